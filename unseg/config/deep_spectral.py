"""cfg.MODEL.DEEP_SPECTRAL: spectral segmentation with channel reduction and the BoC affinity.

Read by META_ARCHITECTURE DeepSpectral and by the discoverer Spectral (DISCOVERY.NAME).
"""

from detectron2.config import CfgNode


def add_deep_spectral_config(cfg: CfgNode) -> None:
    """Add the keys to `cfg` in place; defaults are the paper's unless marked as ours."""
    node = cfg.MODEL.DEEP_SPECTRAL = CfgNode()

    # Noise channel reduction: of C channels the C // DIVISOR of lowest entropy are kept.
    node.NCR = CfgNode()
    node.NCR.ENABLED = True
    node.NCR.BINS = 30
    node.NCR.DIVISOR = 3
    # For the foreground graph and for the instance graph: "paper" (by entropy) or "reference_fg"
    # (what the published code does for its foreground graph: L2-normalised patches, and channels
    # with an empty bin of the histogram come last). "paper" for both is ours.
    node.NCR.MODE_FOREGROUND = "paper"
    node.NCR.MODE_INSTANCES = "paper"

    # Deviation-based channel reduction of the instance graph: share of the channels left by NCR
    # that is kept. The paper keeps 60 of ViT-S's 128; the same share of others is ours.
    node.DCR = CfgNode()
    node.DCR.ENABLED = True
    node.DCR.KEEP_RATIO = 60 / 128

    # Foreground: clean-up of the Fiedler vector's mask. Strips of BORDER patches along the borders;
    # inverted where two of them are foreground by more than BORDER_RATIO.
    node.FOREGROUND = CfgNode()
    node.FOREGROUND.BORDER = 5
    node.FOREGROUND.BORDER_RATIO = 0.9
    # Components below this share of the largest are dropped. Their area: "pixels" (ours) or
    # "polygon" (the outline's, as published).
    node.FOREGROUND.MIN_AREA_RATIO = 0.1
    node.FOREGROUND.AREA = "pixels"
    # Width of the median filter, in patches; 1 for none.
    node.FOREGROUND.MEDIAN = 3

    # boc, or for ablation boc_product, braycurtis, chebyshev, cosine, dot, l1, l2.
    node.AFFINITY = "boc"
    # Background patches in the instance graph. "reference": as published, where their null-space
    # may take the places of the instances' eigenvectors. "quotient" (ours): one node for all of
    # them, which leaves exactly the other eigenvectors. "drop" (ours): none.
    node.BACKGROUND = "quotient"
    # Eigenvectors that embed a patch, and width of the median filter over each of them (1: none).
    node.NUM_EIGENVECTORS = 4
    node.EMBEDDING_MEDIAN = 5
    # auto, dense, lanczos or lobpcg; see unseg.discovery.spectral.laplacian_eigenpairs.
    node.SOLVER = "auto"

    # k-means. MODE "oracle": as many clusters as the image has instances in the ground truth, as
    # published (needs INPUT.MAPPER OracleMapper). Ours: "auto" (best silhouette, one cluster if
    # none reaches MIN_SILHOUETTE), "eigengap", "fixed" (NUM). MAX_NUM limits auto and eigengap.
    node.CLUSTERS = CfgNode()
    node.CLUSTERS.MODE = "auto"
    node.CLUSTERS.NUM = 3
    node.CLUSTERS.MAX_NUM = 8
    node.CLUSTERS.MIN_SILHOUETTE = 0.35
    node.CLUSTERS.SEED = 0
    node.CLUSTERS.NUM_INIT = 10
    # Oracle: how the ground truth is reduced to the patch grid before its instances are counted:
    # "corner" (top-left pixel of each patch, as published), "center" or "majority".
    node.CLUSTERS.ORACLE_SAMPLING = "center"

    # Ours (the published code ends on the patch grid). Connected components of a cluster become
    # instances of their own; those below a share MIN_AREA of the grid are dropped; masks are
    # upsampled "bilinear" (the label with the largest interpolated indicator) or "nearest".
    node.SPLIT_COMPONENTS = True
    node.MIN_AREA = 0.01
    node.UPSAMPLE = "bilinear"
    # Length of the embedding stored with each mask (ours): the mean feature of its patches, resized
    # along channels. FreeSOLO's semantic loss can be trained on it.
    node.EMBEDDING_DIM = 128

    # Add the foreground, eigenvectors and kept channels to the model's outputs.
    node.OUTPUT_INTERMEDIATES = False
