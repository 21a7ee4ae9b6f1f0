"""deepmask_R_50.yaml as a LazyConfig: the same model, data and schedule, to be changed in Python.

    cfg = LazyConfig.load("projects/DeepMask/configs/deepmask.py")
    model = instantiate(cfg.model)

With Detectron2's own tools/lazyconfig_train_net.py:

    python lazyconfig_train_net.py --config-file projects/DeepMask/configs/deepmask.py \\
        --num-gpus 8 train.init_checkpoint=r50_d2.pth

Unlike projects/DeepMask/train_net.py, that script has loaders and checkpoints of Detectron2: runs
cannot be repeated exactly, and an epoch goes through images, not through annotations
(MODEL.DEEPMASK.DATA.SAMPLING).
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from unseg.data import register_if_file
from unseg.data.mappers import DeepMaskPatchMapper
from unseg.evaluation import ProposalRecallEvaluator
from unseg.modeling import DeepMask
from unseg.modeling.proposals.deepmask_heads import SharedHead

_MAX_ITER = 1200000

# Dataclasses are targets by their names: Detectron2 0.5 does not take them for targets otherwise.

model = L(DeepMask)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
        out_features=["res4"],  # res5 is not kept
    ),
    head=L(SharedHead)(
        in_channels=1024,
        cells=10,
        out_size="${..geometry.out_size}",
        embed_dim=512,
        reduce_dim=128,
        score_hidden=1024,
        dropout=0.5,
    ),
    geometry=L("unseg.modeling.proposals.deepmask_geometry.PatchGeometry")(
        input_size=160, context=32, out_size=56, gt_size=112, align_corners=False, object_size=92
    ),
    in_feature="res4",
    losses=L("unseg.modeling.proposals.deepmask_losses.DeepMaskLosses")(
        score_weight=1 / 32, reduction="sum", train_mode="joint"
    ),
    scales=[-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5],
    inference=L("unseg.modeling.proposals.ProposalSettings")(
        topk=1000, mask_threshold=0.2, nms_type="none", nms_threshold=0.8
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=[L(register_if_file)(name="coco_2014_train")], filter_empty=False
        ),
        mapper=L(DeepMaskPatchMapper)(
            is_train=True,
            settings=L("unseg.data.patches.PatchSettings")(
                rule=L("unseg.structures.CanonicalRule")(
                    object_size="${model.geometry.object_size}",
                    pos_shift=16.0,
                    pos_scale=0.25,
                    neg_shift=32.0,
                    neg_scale=1.0,
                ),
                input_size="${model.geometry.input_size}",
                context="${model.geometry.context}",
                gt_size="${model.geometry.gt_size}",
                patches_per_image=4,
                min_area=100,
                min_side=5,
                scales=[-0.5, 2.5],
            ),
            image_format="RGB",
            with_patches=False,
        ),
        # Batches of 32 patches.
        total_batch_size=8,
        aspect_ratio_grouping=False,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(
            names=L(register_if_file)(name="unseg_coco_2014_val_first5k_cls_agnostic"),
            filter_empty=False,
        ),
        mapper=L(DeepMaskPatchMapper)(
            is_train=False,
            settings="${dataloader.train.mapper.settings}",
            image_format="RGB",
            with_patches=False,
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
        values=[1.0, 0.3, 0.09], milestones=[200000, 480000], num_updates=_MAX_ITER
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
    "checkpointer": {"period": 20000, "max_to_keep": 100},
    "eval_period": _MAX_ITER,
    "log_period": 20,
    "device": "cuda",
}
