"""freesolo_R_50.yaml as a LazyConfig: the same model, data and schedule, to be changed in Python.

    cfg = LazyConfig.load("projects/FreeSOLO/configs/freesolo_R_50.py")
    model = instantiate(cfg.model)

With Detectron2's own tools/lazyconfig_train_net.py:

    python lazyconfig_train_net.py --config-file projects/FreeSOLO/configs/freesolo_R_50.py \\
        --num-gpus 8 train.init_checkpoint=densecl_r50_d2.pth

A ResNet-101: model.backbone.bottom_up.stages.depth=101. Unlike projects/FreeSOLO/train_net.py, that
script has loaders and checkpoints of Detectron2: runs cannot be repeated exactly.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from unseg.data import register_if_file
from unseg.data.mappers import ResizeShortestEdge, TwoViewInstanceMapper
from unseg.evaluation import ClassAgnosticCOCOEvaluator
from unseg.modeling import FreeSOLO
from unseg.modeling.solo.heads import InstanceHead, MaskHead

_MAX_ITER = 30000

# Dataclasses are targets by their names: Detectron2 0.5 does not take them for targets otherwise.

# What the heads see of the FPN.
_shapes = L("builtins.dict")(
    p2=L(ShapeSpec)(channels="${model.backbone.out_channels}", stride=4),
    p3=L(ShapeSpec)(channels="${model.backbone.out_channels}", stride=8),
    p4=L(ShapeSpec)(channels="${model.backbone.out_channels}", stride=16),
    p5=L(ShapeSpec)(channels="${model.backbone.out_channels}", stride=32),
    p6=L(ShapeSpec)(channels="${model.backbone.out_channels}", stride=64),
)

model = L(FreeSOLO)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
            out_features=["res2", "res3", "res4", "res5"],
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    instance_head=L(InstanceHead)(
        input_shape=_shapes,
        in_features=["p2", "p3", "p4", "p5", "p6"],
        strides=[8, 8, 16, 32, 32],
        num_grids=[40, 36, 24, 16, 12],
        num_classes=1,
        num_kernels=256,
        embedding_dim=128,
        channels=512,
        num_convs=4,
        norm="GN",
        groups=32,
        prior_prob=0.01,
    ),
    mask_head=L(MaskHead)(
        input_shape=_shapes,
        in_features=["p2", "p3", "p4", "p5"],
        channels=128,
        num_kernels="${..instance_head.num_kernels}",
        norm="GN",
        groups=32,
    ),
    grid=L("unseg.modeling.solo.targets.GridSpec")(
        num_grids="${..instance_head.num_grids}",
        scale_ranges=[[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]],
        sigma=0.2,
    ),
    losses=L("unseg.modeling.solo.criterion.FreeSOLOLossSettings")(
        focal_alpha=0.25,
        focal_gamma=2.0,
        focal_weight=1.0,
        max_projection_weight=1.0,
        avg_projection_weight=0.1,
        pairwise_weight=1.0,
        pairwise_size=3,
        pairwise_dilation=2,
        pairwise_color_thr=0.3,
        pairwise_warmup_iters=1000,
        bottom_pixels_removed=10,
        semantic_weight=4.0,
    ),
    inference=L("unseg.modeling.solo.postprocess.SoloInferenceSettings")(
        score_thr=0.1,
        nms_pre=500,
        mask_thr=0.5,
        nms_kernel="gaussian",
        nms_sigma=2.0,
        update_thr=0.05,
        max_per_img=100,
        compat=False,
    ),
    copy_paste_overlap=0.5,
    append_weak_view=True,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=[
                L(register_if_file)(name="free_masks_train2017.json@coco_2017_train"),
                L(register_if_file)(name="free_masks_unlabeled2017.json@unseg_coco_2017_unlabeled"),
            ]
        ),
        mapper=L(TwoViewInstanceMapper)(
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
            class_agnostic=True,
            embedding_dim="${model.instance_head.embedding_dim}",
            strong_view_settings=L("unseg.data.mappers.StrongViewSettings")(
                color_jitter=[0.4, 0.4, 0.4, 0.1],
                color_jitter_prob=0.8,
                grayscale_prob=0.2,
                blur_prob=0.5,
                blur_sigma=[0.1, 2.0],
                erasing=[
                    [0.7, 0.05, 0.2, 0.3, 3.3],
                    [0.5, 0.02, 0.2, 0.1, 6.0],
                    [0.3, 0.02, 0.2, 0.05, 8.0],
                ],
            ),
            boxes="masks",
        ),
        # Two views of each image: 32 images go through the model.
        total_batch_size=16,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=L(register_if_file)(name="unseg_coco_2017_val_cls_agnostic"), filter_empty=False
        ),
        mapper=L(TwoViewInstanceMapper)(
            is_train=False,
            augmentations=[
                L(ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
            ],
            image_format="${model.input_format}",
        ),
        num_workers=4,
    ),
    "evaluator": L(ClassAgnosticCOCOEvaluator)(
        dataset_name="${dataloader.test.dataset.names.name}",
        output_dir="${train.output_dir}/inference",
    ),
}

# Momentum and weight decay are Detectron2's; norms do not decay.
optimizer = L(torch.optim.SGD)(
    # params.model is set by whoever builds the optimizer.
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.001,
    momentum=0.9,
    weight_decay=0.0001,
)

# Factors of the learning rate: it stays after the warm-up.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0], milestones=[], num_updates=_MAX_ITER),
    warmup_factor=0.01,
    warmup_length=1000 / _MAX_ITER,
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
    "eval_period": _MAX_ITER,
    "log_period": 20,
    "device": "cuda",
}
