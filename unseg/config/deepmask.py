"""cfg.MODEL.DEEPMASK and cfg.MODEL.SHARPMASK: mask proposals from patches."""

from detectron2.config import CfgNode


def add_deepmask_config(cfg: CfgNode) -> None:
    """Add the keys of DeepMask and SharpMask to `cfg` in place.

    Defaults are the released variant; the paper's is in deepmask_VGG_A.yaml.
    """
    node = cfg.MODEL.DEEPMASK = CfgNode()
    # Map of the backbone that the head reads; its stride divides INPUT_SIZE.
    node.IN_FEATURE = "res4"
    # Side in pixels of the patch whose mask is predicted, and of the ring around it (both sides
    # together) that the trunk sees besides. Even multiples of the stride; CONTEXT may be 0.
    node.INPUT_SIZE = 160
    node.CONTEXT = 32
    # Longest side of an object that fits a patch. 0: INPUT_SIZE * 128 / 224, rounded up.
    node.OBJECT_SIZE = 0
    # Side of the predicted mask, and of the one that the loss compares after bilinear upsampling.
    node.OUT_SIZE = 56
    node.GT_SIZE = 112
    # Corner-aligned upsampling and pasting, as in the released models.
    node.ALIGN_CORNERS = False
    # "shared": 1x1 convolution to REDUCE_DIM channels, one vector for mask and score (released).
    # "paper": a mask and a score branch of their own on the trunk. "full": as "paper", but each
    # output pixel is linear in the whole trunk map (DeepMaskFull).
    node.HEAD = "shared"
    node.EMBED_DIM = 512
    node.REDUCE_DIM = 128
    node.SCORE_HIDDEN = 1024
    node.DROPOUT = 0.5
    # What convolutions larger than 1x1 see beyond the border: "zeros", "symmetric" (released in
    # Lua) or "port" (released in PyTorch: reflect, and symmetric for the first one).
    node.PAD_MODE = "zeros"
    # Weight of the score's loss (lambda), and whether a batch's losses are summed, as in the paper,
    # or divided by its number of patches; "mean" needs a higher learning rate.
    node.SCORE_WEIGHT = 1.0 / 32
    node.LOSS_REDUCTION = "sum"
    # "joint": one step on both losses. "alternate": a fair coin chooses mask or score.
    node.TRAIN_MODE = "joint"

    data = node.DATA = CfgNode()
    # Patches cut out of one image, an even number: half of them positive.
    data.PATCHES_PER_IMAGE = 4
    # What an epoch goes through: "image", or "annotation" (a category at random, then one of its
    # objects, as released).
    data.SAMPLING = "image"
    # Names of the categories to learn from; empty: all. DeepMask20 takes PASCAL's.
    data.CATEGORY_SUBSET = ()
    # Smaller objects are no positives: pixels, and pixels of the shorter side of the box.
    data.MIN_AREA = 100
    data.MIN_SIDE = 5
    # A positive's shift in pixels of the patch (both ways) and scale in octaves.
    data.JITTER_SHIFT = 16.0
    data.JITTER_SCALE = 0.25
    # A negative is so far from every object's place, in shift or in scale.
    data.NEG_SHIFT = 32.0
    data.NEG_SCALE = 1.0

    test = node.TEST = CfgNode()
    # Scales of the image pyramid, as powers of 2. Negative patches are drawn from their range.
    test.SCALES = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5)
    # Proposals per image.
    test.TOPK = 1000
    # Probability from which a pixel is in a mask.
    test.MASK_THRESH = 0.2
    # NMS "none" (as released), on tight "box"es or on "mask"s.
    test.NMS_TYPE = "none"
    test.NMS_THRESH = 0.8
    # Take scores from a second trunk and head, `scorer.*` in the weights (DeepMask20*; see
    # unseg.tools.merge_scorer).
    test.SCORER = False

    sharp = cfg.MODEL.SHARPMASK = CfgNode()
    # Channels of the first refinement's mask encoding (halved at each step) and of the first
    # convolution on the trunk's maps.
    sharp.KM = 32
    sharp.KS = 64
    # Maps of the backbone from coarse to fine; the first is MODEL.DEEPMASK.IN_FEATURE, each next
    # one has half the stride. "stem" is a ResNet's first convolution after its ReLU.
    sharp.IN_FEATURES = ("res4", "res3", "res2", "stem")
    # Upsampling between steps: "nearest" (released) or "bilinear" (paper).
    sharp.UPSAMPLE = "nearest"
    # Padding of the refinement's convolutions, as MODEL.DEEPMASK.PAD_MODE. Zeros leave single
    # pixels in the windows' corners, which spoil the tight boxes.
    sharp.PAD_MODE = "symmetric"
