"""cfg.MODEL.FREESOLO: the weakly supervised SOLO of FreeSOLO, its losses and its two views."""

from detectron2.config import CfgNode


def add_freesolo_config(cfg: CfgNode) -> None:
    """Add the keys of FreeSOLO to `cfg` in place. Defaults are the preset "paper"."""
    solo = cfg.MODEL.FREESOLO = CfgNode()
    # Channels of the category branch. Every object is of class 0; the released checkpoints have a
    # second channel that is always negative.
    solo.NUM_CLASSES = 1
    # Length of the semantic embedding; targets of another length are resized along the channels.
    solo.EMB_DIM = 128
    # Repeat the known errors of the released code, where they change results: inference boxes
    # (centre -/+ half of the occupied columns and rows), the upsampling ratio of small images,
    # boxes of objects pasted into an image without any. (It also scrambles the embeddings at
    # inference. Its embeddings are not trained, and ours stay in order.)
    solo.COMPAT = False

    # Instance head: FPN levels, the strides they are resized to, grid cells per side, and the range
    # of sqrt(box area) in pixels (inclusive, overlapping) of the objects each one learns.
    solo.INSTANCE_IN_FEATURES = ("p2", "p3", "p4", "p5", "p6")
    solo.FPN_INSTANCE_STRIDES = (8, 8, 16, 32, 32)
    solo.NUM_GRIDS = (40, 36, 24, 16, 12)
    solo.FPN_SCALE_RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    # Cells count as positive within this fraction of the box size around the mask's centre.
    solo.SIGMA = 0.2
    solo.INSTANCE_CHANNELS = 512
    solo.NUM_INSTANCE_CONVS = 4
    # Channels of the mask features and of the dynamic 1x1 kernels.
    solo.NUM_KERNELS = 256
    # Norm of both heads (Detectron2's names) and, for GN, its groups.
    solo.NORM = "GN"
    solo.GN_GROUPS = 32
    # Initial probability of the category branch.
    solo.PRIOR_PROB = 0.01

    # Mask head: features of falling resolution; the first one's stride is that of the masks.
    solo.MASK_IN_FEATURES = ("p2", "p3", "p4", "p5")
    solo.MASK_CHANNELS = 128

    # Inference: category score of a cell, candidates before matrix NMS, mask threshold, lowest
    # decayed score, most objects per image.
    solo.SCORE_THR = 0.1
    solo.NMS_PRE = 500
    solo.MASK_THR = 0.5
    solo.NMS_KERNEL = "gaussian"
    solo.NMS_SIGMA = 2.0
    solo.UPDATE_THR = 0.05
    solo.MAX_PER_IMG = 100

    loss = solo.LOSS = CfgNode()
    loss.FOCAL_ALPHA = 0.25
    loss.FOCAL_GAMMA = 2.0
    loss.FOCAL_WEIGHT = 1.0
    # Max-projection and average-projection (the paper's gamma) dice.
    loss.MAX_PROJECTION_WEIGHT = 1.0
    loss.AVG_PROJECTION_WEIGHT = 0.1
    # Pairwise colour affinity: neighbourhood and dilation in mask pixels, the colour similarity
    # from which a pair counts, iterations until the full weight.
    loss.PAIRWISE_WEIGHT = 1.0
    loss.PAIRWISE_SIZE = 3
    loss.PAIRWISE_DILATION = 2
    loss.PAIRWISE_COLOR_THR = 0.3
    loss.PAIRWISE_WARMUP_ITERS = 1000
    # Rows at the bottom of the image file that pairs leave out: many photographs end in a border.
    loss.BOTTOM_PIXELS_REMOVED = 10
    # Cosine loss of the semantic embedding (the paper's mu). 0 leaves it out.
    loss.SEMANTIC_WEIGHT = 4.0

    data = solo.DATA = CfgNode()
    # Train on a strongly augmented view ...
    data.STRONG_VIEW = True
    # ... into which objects of another image of the batch are pasted ...
    data.COPY_PASTE = True
    # ... unless they cover at least this much of an object that is there ...
    data.COPY_PASTE_MAX_OVERLAP = 0.5
    # ... and on the weak view as well (twice SOLVER.IMS_PER_BATCH images go through the model).
    data.APPEND_WEAK_VIEW = True
    # Boxes of the training masks: "masks" (tight), or "xyxy_as_xywh": what the released code
    # trains its first round on, too wide and too high boxes.
    data.BOXES = "masks"
    # Strong view: brightness, contrast, saturation, hue and their probability; ...
    data.COLOR_JITTER = (0.4, 0.4, 0.4, 0.1)
    data.COLOR_JITTER_PROB = 0.8
    data.GRAYSCALE_PROB = 0.2
    data.BLUR_PROB = 0.5
    data.BLUR_SIGMA = (0.1, 2.0)
    # ... rectangles of noise: probability, least and largest area, least and largest aspect ratio.
    data.ERASING = (
        (0.7, 0.05, 0.2, 0.3, 3.3),
        (0.5, 0.02, 0.2, 0.1, 6.0),
        (0.3, 0.02, 0.2, 0.05, 8.0),
    )
