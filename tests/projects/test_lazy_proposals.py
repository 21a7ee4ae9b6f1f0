"""The LazyConfigs of DeepMask and InstanceFCN are the YAMLs of their names, and train."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from lazy_cases import assert_same_optimizer, modules, settings
from quick import ROOT

from unseg.config import load_config
from unseg.data import build_mapper

PATHS = {
    ROOT / "projects/DeepMask/configs/deepmask.py": "deepmask_R_50.yaml",
    ROOT / "projects/InstanceFCN/configs/instance_fcn.py": "instance_fcn_VGG_16_voc.yaml",
}
QUICK = {
    "deepmask": (
        "model.backbone.stages.depth=18",
        "model.head.in_channels=256",
        "model.head.reduce_dim=8",
        "model.head.embed_dim=16",
        "model.inference.topk=20",
        "model.scales=[-1.0]",
        "dataloader.train.mapper.settings.patches_per_image=2",
    ),
    "instance_fcn": (
        "model.backbone.depth=11",
        "model.head.hidden=8",
        "model.proposals.topk=20",
        "model.pre_nms_topk=20",
        "model.short_sides=[64]",
    ),
}


@pytest.fixture(params=PATHS, ids=lambda p: p.stem)
def path(request):
    return request.param


def yaml_of(path):
    return path.with_name(PATHS[path])


def test_same_model(path):
    """Modules, parameters and every number that a module keeps."""
    cfg = load_config(str(yaml_of(path)), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        expected, model = build_model(cfg), instantiate(LazyConfig.load(str(path)).model)
    assert str(model) == str(expected)
    ours, theirs = modules(model), modules(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    shapes = {name: (x.shape, x.dtype) for name, x in expected.state_dict().items()}
    assert {name: (x.shape, x.dtype) for name, x in model.state_dict().items()} == shapes


@pytest.mark.parametrize("is_train", [True, False])
def test_same_mapper(path, is_train):
    expected = build_mapper(load_config(str(yaml_of(path))), is_train)
    lazy = LazyConfig.load(str(path)).dataloader["train" if is_train else "test"]
    mapper = instantiate(lazy.mapper)
    assert type(mapper) is type(expected)
    ours, theirs = settings(mapper), settings(expected)
    # Detectron2's loader goes through images; what concerns annotations is not read in testing.
    unused = {"sampling"} | (set() if is_train else {"class_agnostic", "keep_crowds"})
    assert {k: v for k, v in ours.items() if k not in unused} == {
        k: v for k, v in theirs.items() if k not in unused
    }
    if hasattr(mapper, "augmentations"):
        for one, other in zip(mapper.augmentations.augs, expected.augmentations.augs, strict=True):
            assert type(one) is type(other)
            assert settings(one) == settings(other)


def test_same_data_and_schedule(path):
    cfg, lazy = load_config(str(yaml_of(path))), LazyConfig.load(str(path))
    assert [x.name for x in lazy.dataloader.train.dataset.names] == list(cfg.DATASETS.TRAIN)
    assert [lazy.dataloader.test.dataset.names.name] == list(cfg.DATASETS.TEST)
    empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert lazy.dataloader.train.dataset.filter_empty is empty is False
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    grouping = lazy.dataloader.train.get("aspect_ratio_grouping", True)
    assert grouping == cfg.DATALOADER.ASPECT_RATIO_GROUPING
    assert lazy.train.max_iter == lazy.train.eval_period == cfg.SOLVER.MAX_ITER
    assert lazy.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    schedule = lazy.lr_multiplier.scheduler
    assert list(schedule.milestones) == list(cfg.SOLVER.STEPS)
    assert list(schedule["values"]) == pytest.approx(
        [cfg.SOLVER.GAMMA**n for n in range(len(cfg.SOLVER.STEPS) + 1)]
    )


def test_same_optimizer(path):
    assert assert_same_optimizer(path, yaml_of(path), steps=5) == pytest.approx([0.001] * 5)


@pytest.mark.usefixtures("quick_datasets")
def test_trains_and_evaluates(path):
    cfg = LazyConfig.load(str(path))
    cfg.dataloader.train.dataset.names = ["quick_train"]
    cfg.dataloader.test.dataset.names.name = "quick_val"
    if path.stem == "deepmask":  # the blocks of a ResNet-18 have no such choice
        del cfg.model.backbone.stages.stride_in_1x1
    overrides = ["dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"]
    overrides += ["dataloader.test.num_workers=0", *QUICK[path.stem]]
    cfg = LazyConfig.apply_overrides(cfg, overrides)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(
        model.train(), instantiate(cfg.dataloader.train), instantiate(cfg.optimizer)
    )
    trainer.train(0, 2)
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    assert set(results) == {"segm_proposals", "box_proposals_coco"}
