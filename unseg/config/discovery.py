"""cfg.DISCOVERY: how masks are found without labels, and what becomes a pseudo-mask.

cfg.MODEL.FILTER_BANK: dense features without weights.
"""

from detectron2.config import CfgNode


def add_discovery_config(cfg: CfgNode) -> None:
    """Add the keys of the discoverers and of the filter-bank backbone to `cfg` in place."""
    cfg.DISCOVERY = CfgNode()
    # Name in the DISCOVERERS registry (unseg.discovery), used by META_ARCHITECTURE MaskDiscovery.
    cfg.DISCOVERY.NAME = "FreeMask"
    # The backbone output that the discoverer reads, e.g. "res5" or "filter_bank".
    cfg.DISCOVERY.IN_FEATURE = "res5"
    # Images with more patches (cells of that output) than this are made smaller, 0 for no limit:
    # discoverers that compare all patches need memory and time for the square of their number.
    cfg.DISCOVERY.MAX_PATCHES = 0
    # unseg.tools.pseudo_masks: images per batch, the lowest score and the most masks per image
    # that are written. They apply to whatever model produced the masks.
    cfg.DISCOVERY.BATCH_SIZE = 8
    cfg.DISCOVERY.SCORE_THRESHOLD = 0.0
    cfg.DISCOVERY.MAX_MASKS_PER_IMAGE = 100
    # Only masks are written whose box is narrower than this fraction of the image; 0 is no limit.
    cfg.DISCOVERY.MAX_WIDTH = 0.0

    # Free Mask (FreeSOLO, section 3.1). Defaults are the paper's.
    free_mask = cfg.DISCOVERY.FREE_MASK = CfgNode()
    # Queries are the features resized by these factors.
    free_mask.SCALES = (1.0, 0.5, 0.25)
    # A pixel belongs to a mask where the min-max normalised similarity reaches this.
    free_mask.MASK_THRESHOLD = 0.5
    # Matrix NMS at feature resolution ("gaussian" or "linear"), then the best MAX_MASKS.
    free_mask.NMS_KERNEL = "gaussian"
    free_mask.NMS_SIGMA = 2.0
    free_mask.MAX_MASKS = 20
    # Masks are kept whose decayed maskness reaches this ...
    free_mask.SCORE_THRESHOLD = 0.7
    # ... whose centre lies below this fraction of the image height (sky and ceiling filter) ...
    free_mask.MIN_CENTER_Y = 0.2
    # ... whose box is narrower than this fraction of the image width ...
    free_mask.MAX_WIDTH = 0.95
    # ... and whose area lies within these fractions of the image.
    free_mask.MIN_AREA = 0.0
    free_mask.MAX_AREA = 1.0
    # Length of the embedding stored with each mask: its query, resized along channels.
    free_mask.EMBEDDING_DIM = 128

    # TokenCut (Wang et al., CVPR 2022): one object per image, as the mask of its patches. Defaults
    # are the paper's.
    token_cut = cfg.DISCOVERY.TOKENCUT = CfgNode()
    # Two patches are joined by a weight of 1 where the cosine of their features exceeds this, ...
    token_cut.THRESHOLD = 0.2
    # ... by this one elsewhere.
    token_cut.FLOOR = 1e-5
    # The object is one connected part of the foreground, of patches that touch at their sides (4)
    # or also at their corners (8).
    token_cut.CONNECTIVITY = 4
    # From patches to pixels: "nearest" keeps the patches' squares, "bilinear" rounds them off.
    token_cut.UPSAMPLE = "nearest"
    # Of the eigenproblem: "dense", "lanczos", "lobpcg", or "auto" by the number of patches.
    token_cut.SOLVER = "auto"

    # MaskCut (CutLER, Wang et al., CVPR 2023), without the CRF that refines the paper's masks:
    # several objects per image, one TokenCut after the other. Defaults are the paper's.
    mask_cut = cfg.DISCOVERY.MASKCUT = CfgNode()
    # As for TokenCut. The paper's threshold for COCO and ImageNet.
    mask_cut.THRESHOLD = 0.15
    mask_cut.FLOOR = 1e-5
    mask_cut.CONNECTIVITY = 4
    mask_cut.UPSAMPLE = "nearest"
    mask_cut.SOLVER = "auto"
    # Number of cuts, and so the most masks of an image.
    mask_cut.MAX_MASKS = 3
    # A foreground with more corners of the image than this is taken for the background; 4 is off.
    mask_cut.MAX_CORNERS = 2
    # Not the paper's: whether patches found before are kept out of later foregrounds.
    mask_cut.EXCLUDE_FOUND = False
    # Masks are dropped whose IoU with an earlier one exceeds this, ...
    mask_cut.MAX_IOU = 0.5
    # ... and whose area is not above this fraction of the image.
    mask_cut.MIN_AREA = 0.01

    bank = cfg.MODEL.FILTER_BANK = CfgNode()
    # Pixels per feature cell: 8 or 4.
    bank.STRIDE = 8
    # Wavelengths (pixels) and number of orientations of the Gabor energies.
    bank.WAVELENGTHS = (4.0, 8.0)
    bank.ORIENTATIONS = 4
    # Weights of the whitened groups: colour (at blur 0 and at 2 cells), texture, position.
    # Position 1.5 suits photographs, 0.7 the synthetic 160-pixel scenes.
    bank.COLOR_WEIGHT = 1.0
    bank.TEXTURE_WEIGHT = 0.3
    bank.POSITION_WEIGHT = 1.5
    # Whitening adds this fraction of the largest eigenvalue to all of them.
    bank.DAMPING = 0.05
    # Random Fourier lift: output channels and the bandwidth of the Gaussian kernel it stands for.
    bank.CHANNELS = 256
    bank.BANDWIDTH = 1.4
