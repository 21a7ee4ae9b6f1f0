"""cfg.MODEL.HIERARCHICAL_EMBEDDING: the embedding head of long-tail discovery (Weng et al., CVPR
2021), its training and the clustering of what it embeds.

What neither the paper's public texts nor the authors' released training code gives is marked
[ours].
"""

from detectron2.config import CfgNode


def add_hierarchical_embedding_config(cfg: CfgNode) -> None:
    """Add the keys of the hierarchical-embedding ROI heads to `cfg` in place."""
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING = CfgNode()
    # Name in the ROI_EMBEDDING_HEAD registry.
    node.NAME = "HierarchicalEmbeddingHead"

    # What is embedded. "roi": the detector's features in a box [ours]; "crop": the image's pixels
    # in a box, by a network of its own, as in the paper.
    node.FEATURE_SOURCE = "roi"
    # "square": the box's centre and longer side, with context; "tight": the box [ours].
    node.BOX_MODE = "square"
    # The masks of the three views: "pred", those of the mask head; "box", the whole box (then
    # WEIGHT_MASK must be 0), for detectors without masks [ours].
    node.MASK_SOURCE = "pred"
    # "roi": features to pool (empty: MODEL.ROI_HEADS.IN_FEATURES) and how.
    node.IN_FEATURES = []
    node.POOLER_RESOLUTION = 14
    node.POOLER_SAMPLING_RATIO = 0
    node.POOLER_TYPE = "ROIAlignV2"
    # No gradient from the embedding losses into the detector [ours].
    node.DETACH_FEATURES = True
    # "crop": side of the crops in pixels; depth and weights (a file for this backbone, "" random)
    # of the residual network; whether it stays as it is; whether PIXEL_MEAN and PIXEL_STD are
    # applied after masking (the authors' code divides by 255 alone).
    node.CROP_SIZE = 224
    node.CROP_DEPTH = 18
    node.CROP_WEIGHTS = ""
    node.CROP_FREEZE = True
    node.CROP_NORMALIZE = False

    # The network behind: 3x3 convolutions ("roi" only), the mean over the cells ("mean": over all
    # of them, as the paper's masked pixels are zeros too; "masked_mean": of the view's), linear
    # layers, and a last one to the tangent space at the origin.
    node.NUM_CONV = 2
    node.CONV_DIM = 256
    node.POOL = "mean"
    node.NUM_FC = 1
    node.FC_DIM = 256
    node.EMBED_DIM = 64
    node.INIT_STD = 0.01
    # "poincare" or "euclidean" (the ablation). The ball has the curvature -CURVATURE; tangents are
    # cut to MAX_TANGENT_NORM / sqrt(CURVATURE) [ours], half the greatest distance from the origin.
    node.GEOMETRY = "poincare"
    node.CURVATURE = 1.0
    node.MAX_TANGENT_NORM = 2.5
    # Multiply the gradient that enters the ball by the inverse of the metric, as the authors do.
    node.RIEMANNIAN_GRAD_SCALE = False

    # The losses: L_mask, L_object and L_hierarchical. Weight 0: the term is not computed.
    node.WEIGHT_MASK = 1.0
    node.WEIGHT_OBJECT = 1.0
    node.WEIGHT_HIER = 1.0
    node.MARGIN = 0.2
    # Over the terms of a batch: "mean" [ours] or "sum", as the authors.
    node.REDUCTION = "mean"
    # Proposals of an image that are trained on, by falling score.
    node.MAX_PROPOSALS = 20
    # L_mask: masks drawn from each image.
    node.MASKS_PER_IMAGE = 10
    # L_object: positives overlap by more than OBJECT_IOU; NEG_PER_PAIR negatives from the batch;
    # those of the same image overlap by at most NEG_MAX_IOU and neither mask holds more than half
    # of the other [ours].
    node.OBJECT_IOU = 0.4
    node.NEG_PER_PAIR = 1
    node.NEG_MAX_IOU = 0.1
    # L_hierarchical: a part lies in its whole by at least this share (the authors: 1, which
    # predicted masks never reach) and the whole is larger by this factor [ours].
    node.HIER_CONTAINMENT = 0.95
    node.HIER_MIN_AREA_RATIO = 1.1
    # "norm": the whole nearer to the origin than the part; "triplet": also nearer to its part than
    # to another object [ours].
    node.HIER_FORM = "norm"
    # Masks are compared on a grid of this stride; smaller ones (in cells) are left out [ours].
    node.RELATION_STRIDE = 4
    node.MIN_MASK_AREA = 16

    # LongTailDiscoveryRCNN: train the embedding head alone.
    node.FREEZE_DETECTOR = True
    # Take the proposals as detections, without the box head: class 0, the score their objectness.
    node.SKIP_BOX_HEAD = False

    # A file of unseg.tools.cluster_embeddings: inference adds `pred_clusters` and
    # `cluster_distances`, and if it names classes, `pred_classes` are these and detections without
    # one are dropped.
    node.CLUSTERS = ""

    # Clustering of a data set's embeddings.
    clustering = node.CLUSTERING = CfgNode()
    # The paper's number for LVIS, found by an elbow; see unseg.tools.cluster_embeddings --elbow.
    clustering.K = 1462
    # "lorentz" (midpoints, exact Lloyd) or "frechet"; which the paper has is unknown. "kmeans":
    # scikit-learn's on tangent vectors, the Euclidean anchor.
    clustering.CENTROID = "lorentz"
    clustering.SEED = 0
    clustering.N_INIT = 1
    clustering.MAX_ITER = 100
    clustering.TOL = 1e-5
    # Rows of a minibatch; 0: all points at once.
    clustering.MINIBATCH = 0

    # Names of clusters, for ClusterLVISEvaluator.
    naming = node.NAMING = CfgNode()
    # "majority", "hungarian" (both from masks matched with ground truth) or "knn_val" (the authors'
    # early protocol: nearest embedded ground truth).
    naming.METHOD = "majority"
    # "two_fold": named on one half of the images, scored on the other, and the reverse; "same": on
    # the evaluated images themselves, optimistic.
    naming.SPLIT = "two_fold"
    # A detection is matched with the annotation of the greatest mask IoU, if it is at least this.
    naming.MATCH_IOU = 0.5
    # A cluster is named if this share of its voters agree and there are so many (the authors' early
    # protocol).
    naming.MIN_PURITY = 0.95
    naming.MIN_SIZE = 3
    # "knn_val": neighbours, embedded annotations of a class at most, and their store (written by
    # unseg.tools.embed_dataset --ground-truth).
    naming.KNN = 5
    naming.KNN_PER_CLASS = 100
    naming.GROUND_TRUTH = ""
