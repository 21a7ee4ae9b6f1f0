"""instance_fcn_VGG_16_voc.yaml as a LazyConfig: the same model, data and schedule, to be changed in
Python.

    cfg = LazyConfig.load("projects/InstanceFCN/configs/instance_fcn.py")
    model = instantiate(cfg.model)

With Detectron2's own tools/lazyconfig_train_net.py:

    python lazyconfig_train_net.py --config-file projects/InstanceFCN/configs/instance_fcn.py \\
        --num-gpus 8 train.init_checkpoint=vgg16_d2.pth

Unlike projects/InstanceFCN/train_net.py, that script has loaders and checkpoints of Detectron2:
runs cannot be repeated exactly.
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
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from unseg.data import register_if_file
from unseg.data.mappers import InstanceMapper, ResizeShortestEdge
from unseg.evaluation import ProposalRecallEvaluator
from unseg.modeling import VGG, InstanceFCN
from unseg.modeling.proposals.instance_fcn_head import InstanceFCNHead
from unseg.modeling.proposals.instance_fcn_windows import make_levels

_MAX_ITER = 40000

# Dataclasses are targets by their names: Detectron2 0.5 does not take them for targets otherwise.

model = L(InstanceFCN)(
    backbone=L(VGG)(depth=16, out_features=["conv5"], pool4_stride=1, conv5_dilation=2),
    head=L(InstanceFCNHead)(
        in_features=["conv5"],
        in_channels=512,
        levels=L(make_levels)(
            shapes=L("builtins.dict")(conv5=L(ShapeSpec)(channels=512, stride=8)),
            in_features="${..in_features}",
            m="${..m}",
            # The pool of stride 1 joins cells i and i + 1.
            cell_offset=8.0,
        ),
        k=5,
        m=21,
        hidden=512,
        pad_logit=-10.0,
        training=L("unseg.modeling.proposals.instance_fcn_losses.WindowTraining")(
            pos_shift=16.0,
            pos_scale=0.3,
            neg_shift=32.0,
            neg_scale=1.0,
            windows_per_image=256,
            pos_fraction=0.5,
            mask_reduction="mean",
            mask_weight=1.0,
            score_weight=1.0,
        ),
    ),
    proposals=L("unseg.modeling.proposals.ProposalSettings")(
        topk=1000, mask_threshold=0.5, nms_type="box", nms_threshold=0.8
    ),
    short_sides=[119, 178, 267, 400, 600, 900],
    max_size=2000,
    pre_nms_topk=1000,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=[L(register_if_file)(name="unseg_voc_2012_train_instances")], filter_empty=False
        ),
        mapper=L(InstanceMapper)(
            is_train=True,
            augmentations=[
                L(ResizeShortestEdge)(
                    short_edge_length="${model.short_sides}", max_size=2000, sample_style="choice"
                ),
                L(T.RandomFlip)(horizontal=True),
            ],
            image_format="${model.input_format}",
            class_agnostic=True,
            keep_crowds=True,
        ),
        total_batch_size=8,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=L(register_if_file)(name="unseg_voc_2012_val_instances"), filter_empty=False
        ),
        mapper=L(InstanceMapper)(
            is_train=False,
            # 0: the image stays as it is.
            augmentations=[
                L(ResizeShortestEdge)(short_edge_length=0, max_size=1333, sample_style="choice")
            ],
            image_format="${model.input_format}",
        ),
        num_workers=4,
    ),
    "evaluator": L(ProposalRecallEvaluator)(dataset_name="${dataloader.test.dataset.names.name}"),
}

optimizer = L(torch.optim.SGD)(
    # params.model is set by whoever builds the optimizer.
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.001,
    momentum=0.9,
    weight_decay=0.0005,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1], milestones=[32000], num_updates=_MAX_ITER
    ),
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
    "eval_period": _MAX_ITER,
    "log_period": 20,
    "device": "cuda",
}
