"""cfg.MODEL.INSTANCE_FCN: mask proposals assembled from instance-sensitive score maps."""

from detectron2.config import CfgNode


def add_instance_fcn_config(cfg: CfgNode) -> None:
    """Add the keys of InstanceFCN to `cfg` in place. Defaults are the paper's, with VGG-16."""
    node = cfg.MODEL.INSTANCE_FCN = CfgNode()
    # Maps of the backbone that the heads (shared) read: one, with an image pyramid, or several.
    node.IN_FEATURES = ("conv5",)
    # k: score maps are k x k. 1 is a plain FCN cut by windows.
    node.K = 5
    # m: cells per side of a window, odd.
    node.M = 21
    # Channels of the first convolution of both branches.
    node.HIDDEN = 512
    # Where the centre of a map's first cell lies, in pixels. -1: what the backbone says
    # (`cell_offsets`), else half a stride. Several maps need -1. A proposal generator cannot ask
    # the backbone.
    node.CELL_OFFSET = -1.0
    # Longest side in pixels of an object that fits a window. 0: m * stride / 1.3125 (128 for m = 21
    # at stride 8). Of several maps it is that of the finest; the others' are in proportion to their
    # strides.
    node.OBJECT_SIZE = 0.0
    # A window is positive if it is at most so far from an object's place, in pixels for an object
    # of 128 (in proportion for others) and in octaves; negative if at least so far from every
    # object's; ignored in between.
    node.POS_SHIFT = 16.0
    node.POS_SCALE_OCT = 0.3
    node.NEG_SHIFT = 32.0
    node.NEG_SCALE_OCT = 1.0
    # Windows sampled per image, and the share of positives among them.
    node.WINDOWS_PER_IMAGE = 256
    node.POS_FRACTION = 0.5
    # Logit of cells outside the map.
    node.PAD_LOGIT = -10.0
    # "mean" over a window's cells inside the image and over positives, or "sum" over the cells.
    node.MASK_LOSS_REDUCTION = "mean"
    node.MASK_LOSS_WEIGHT = 1.0
    node.SCORE_LOSS_WEIGHT = 1.0
    # "image": whole images (fully convolutional training); "crop": patches around objects, one
    # window each, by DeepMaskPatchMapper (the ablation of the paper); MODEL.DEEPMASK.INPUT_SIZE,
    # CONTEXT, OBJECT_SIZE and GT_SIZE must fit the windows.
    node.TRAIN_ON = "image"

    test = node.TEST = CfgNode()
    # Short sides of the image pyramid. Empty: the image as it comes.
    test.SHORT_SIDES = (119, 178, 267, 400, 600, 900)
    # Longest side of the pyramid's images: a panorama's are smaller than SHORT_SIDES says.
    test.MAX_SIZE = 2000
    # Windows kept per scale (and level) before NMS.
    test.PRE_NMS_TOPK = 1000
    # NMS "none", on tight "box"es (paper) or on "mask"s.
    test.NMS_TYPE = "box"
    test.NMS_THRESH = 0.8
    # Proposals per image.
    test.TOPK = 1000
    # Probability from which a pixel is in a mask.
    test.MASK_THRESH = 0.5
