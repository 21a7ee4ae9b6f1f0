"""long_tail_R_50_FPN.yaml as a LazyConfig: Detectron2's own Mask R-CNN with other ROI heads.

    cfg = LazyConfig.load("projects/LongTail/configs/long_tail.py")
    model = instantiate(cfg.model)

With Detectron2's own tools/lazyconfig_train_net.py:

    python lazyconfig_train_net.py --config-file projects/LongTail/configs/long_tail.py \\
        --num-gpus 1 train.init_checkpoint=proposals.pth

Unlike projects/LongTail/train_net.py, that script has loaders and checkpoints of Detectron2: runs
cannot be repeated exactly.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.model_zoo import get_config
from detectron2.modeling.poolers import ROIPooler
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from unseg.data.mappers import InstanceMapper, ResizeShortestEdge
from unseg.evaluation import ClusterLVISEvaluator
from unseg.modeling.meta_arch.long_tail import LongTailDiscoveryRCNN
from unseg.modeling.roi_heads.embedding_head import HierarchicalEmbeddingHead
from unseg.modeling.roi_heads.hierarchical_embedding import HierarchicalEmbeddingROIHeads
from unseg.modeling.roi_heads.region_encoders import FeatureEncoder

_MAX_ITER = 20000

_SPACE = {"geometry": "poincare", "c": 1.0, "max_tangent_norm": 2.5}

# From here on this is what makes Detectron2's Mask R-CNN one that embeds its masks.
model = get_config("common/models/mask_rcnn_fpn.py").model
model._target_ = LongTailDiscoveryRCNN
model.freeze_detector = True
model.proposal_generator.pre_nms_topk = [2000, 30]
model.proposal_generator.post_nms_topk = [1000, 20]
model.proposal_generator.nms_thresh = 0.6
# One mask for all classes.
model.roi_heads.mask_head.num_classes = 1
model.roi_heads.class_specific_masks = False
model.roi_heads._target_ = HierarchicalEmbeddingROIHeads
model.roi_heads.embedding_head = L(HierarchicalEmbeddingHead)(
    encoder=L(FeatureEncoder)(
        in_features=["p2", "p3", "p4", "p5"],
        pooler=L(ROIPooler)(
            output_size=14,
            scales=[1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        in_channels=256,
        num_conv=2,
        conv_dim=256,
        pool="mean",
        box_mode="square",
    ),
    num_fc=1,
    fc_dim=256,
    embed_dim=64,
    init_std=0.01,
    **_SPACE,
)
# Dataclasses are targets by their names: Detectron2 0.5 does not take them for targets otherwise.
model.roi_heads.embedding_loss = L("unseg.modeling.losses.hierarchical.HierarchicalEmbeddingLoss")(
    weight_mask=1.0,
    weight_object=1.0,
    weight_hier=1.0,
    margin=0.2,
    reduction="mean",
    **_SPACE,
)
model.roi_heads.max_proposals = 20

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train", filter_empty=False),
        mapper=L(InstanceMapper)(
            is_train=True,
            augmentations=[
                L(ResizeShortestEdge)(
                    short_edge_length=[640, 672, 704, 736, 768, 800],
                    max_size=1333,
                    sample_style="choice",
                ),
                L(T.RandomFlip)(horizontal=True),
            ],
            image_format="${model.input_format}",
        ),
        total_batch_size=4,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="lvis_v0.5_val", filter_empty=False),
        mapper=L(InstanceMapper)(
            is_train=False,
            augmentations=[
                L(ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
            ],
            image_format="${model.input_format}",
        ),
        num_workers=4,
    ),
    "evaluator": L(ClusterLVISEvaluator)(
        dataset_name="${dataloader.test.dataset.names}",
        cluster=L("unseg.evaluation.clustering.ClusterSettings")(k=1462),
        naming=L("unseg.evaluation.cluster_naming.NamingSettings")(),
    ),
}

optimizer = L(torch.optim.AdamW)(
    # params.model is set by whoever builds the optimizer.
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0, weight_decay_bias=0.0),
    lr=0.0001,
    weight_decay=0.00001,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=1.0,
    warmup_length=0.0,
)

train = {
    "output_dir": "./output",
    "init_checkpoint": "",
    "max_iter": _MAX_ITER,
    "amp": {"enabled": False},
    "ddp": {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": False,
    },
    "checkpointer": {"period": 5000, "max_to_keep": 100},
    "eval_period": 0,
    "log_period": 20,
    "device": "cuda",
}
