"""cfg.MODEL.EXEMPLAR: the exemplar pool and the contrastive head of Exemplar-FreeSOLO.

The paper gives WEIGHT, and tries 1 to 9 exemplars per category. Every other number is our choice.
"""

from detectron2.config import CfgNode


def add_exemplar_config(cfg: CfgNode) -> None:
    """Add the keys of the exemplar pool and its contrastive loss to `cfg` in place."""
    exemplar = cfg.MODEL.EXEMPLAR = CfgNode()
    # The pool, a file of unseg.tools.build_exemplars, and how many of each category's exemplars to
    # train with (the first ones; 0: all).
    exemplar.POOL = ""
    exemplar.PER_CATEGORY = 0
    # Weight of the loss (the paper's lambda; its best). With 0 nothing is computed.
    exemplar.WEIGHT = 1.3
    # The backbone's output that objects are embedded in. [ours, as all that follows]
    exemplar.IN_FEATURE = "res5"
    # An object's positive is its most similar exemplar if their cosine is above ALPHA, its
    # negatives are all exemplars below BETA. unseg.tools.exemplar_similarity helps to choose.
    exemplar.ALPHA = 0.7
    exemplar.BETA = 0.3
    exemplar.TEMPERATURE = 0.1
    # "mean" or "sum" over the objects that have a positive and a negative.
    exemplar.REDUCTION = "mean"
    # Training steps after which the pool is encoded anew. 0: the file's embeddings, for ever.
    exemplar.UPDATE_PERIOD = 500

    # How unseg.tools.build_exemplars makes a pool.
    build = exemplar.BUILD = CfgNode()
    # "folder": class/*.jpg (the label of an image, not where the object is); "random": any images;
    # "kmeans": those nearest to the centres of a clustering of image features, without labels.
    build.SOURCE = "folder"
    # Exemplars of each category (folder) or cluster (kmeans), and how many there are of the latter;
    # "random" takes as many as both together.
    build.PER_CATEGORY = 1
    build.NUM_CATEGORIES = 80
    build.SEED = 0
    # GrabCut: iterations, and the border (fraction of the sides) that is background for sure.
    build.GRABCUT_ITERATIONS = 5
    build.GRABCUT_MARGIN = 0.1
    # The whole image is taken where GrabCut finds nothing, or more than this fraction of what lies
    # within that border.
    build.MAX_FOREGROUND = 0.95
    # Border added to the foreground's box, as a fraction of its sides.
    build.CROP_PAD = 0.1
    # The model's mask with the highest score times IoU with GrabCut's replaces it, if their IoU is
    # at least this. Look at the contact sheet: a model that finds parts needs more than 0.
    build.MIN_IOU = 0.0
    # Sides of the object image, in pixels; the shorter one unless the longer one limits it.
    build.SHORT_SIDE = 256
    build.MAX_SIDE = 512
    # Encoded at a time.
    build.BATCH_SIZE = 8
