"""LazyConfigs build the same models, data and schedules as the YAMLs of their name, and train."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from lazy_cases import assert_same_optimizer, modules, plain, settings
from omegaconf import ListConfig
from quick import ROOT, quick_config
from torch import nn

from unseg.config import load_config
from unseg.data import build_mapper
from unseg.discovery import save_exemplar_pool
from unseg.engine.exemplars import attach_exemplars
from unseg.structures import Exemplar, ExemplarPool

# Each .py is the .yaml of its name. Those of other models have tests of their own.
CONFIGS = sorted(
    path for path in (ROOT / "projects").glob("*/configs/*.py") if "freesolo" in path.stem
)
# What QUICK and SHALLOW are for the YAMLs.
QUICK = (
    "dataloader.train.dataset.names=[quick_train]",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.dataset.names.name=quick_val",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "dataloader.test.num_workers=0",
    "model.backbone.bottom_up.stages.depth=18",
    "model.instance_head.channels=16",
    "model.instance_head.num_convs=1",
    "model.instance_head.num_kernels=16",
    "model.instance_head.groups=4",
    "model.mask_head.channels=16",
    "model.mask_head.groups=4",
    "model.inference.score_thr=0.001",
    "model.inference.update_thr=0.0",
    "model.inference.max_per_img=10",
    "train.device=cpu",
)


@pytest.fixture(params=CONFIGS, ids=lambda p: p.stem)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def pool_file(tmp_path_factory):
    """Two exemplars."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    mask = np.ones((40, 40), dtype=bool)
    embedding = np.eye(512, dtype=np.float32)[0]
    exemplars = [
        Exemplar(image, mask, f"category {n}", "x.jpg", (0, 0, 40, 40), "whole", embedding)
        for n, image in enumerate(images)
    ]
    file = tmp_path_factory.mktemp("pool") / "pool.npz"
    save_exemplar_pool(file, ExemplarPool(tuple(exemplars)))
    return file


def load(path, *overrides):
    """The lazy config; where it has an exemplar pool, without it."""
    cfg = LazyConfig.load(str(path))
    if "pool" in cfg.model:
        cfg.model.pool = None
    return LazyConfig.apply_overrides(cfg, list(overrides))


def quick(path, pool_file):
    cfg = load(path, *QUICK)
    if "pool" in cfg.model:
        cfg.model.pool = LazyConfig.load(str(path)).model.pool
        cfg.model.pool.path = str(pool_file)
        # Of untrained features, which are alike.
        cfg.model.exemplars.alpha = cfg.model.exemplars.beta = 0.9
    # The blocks of a ResNet-18 have no such choice.
    del cfg.model.backbone.bottom_up.stages.stride_in_1x1
    return cfg


def test_plain():
    assert plain(ListConfig([1, [2.0]])) == plain((1, (2.0,))) == [1, [2.0]]
    assert plain(nn.Identity()) is ...
    norm = settings(nn.GroupNorm(2, 4, eps=0.5))
    assert (norm["num_groups"], norm["num_channels"], norm["eps"]) == (2, 4, 0.5)


def test_there_are_lazy_configs():
    assert {p.stem for p in CONFIGS} >= {"freesolo_R_50", "exemplar_freesolo_R_50"}
    assert all(p.with_suffix(".yaml").is_file() for p in CONFIGS)


def test_same_model(path):
    """Modules, parameters and every number that a module keeps."""
    cfg = load_config(str(path.with_suffix(".yaml")), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        expected, model = build_model(cfg), instantiate(load(path).model)
    assert str(model) == str(expected)
    ours, theirs = modules(model), modules(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert ours[""][1]["losses"][1]["semantic_weight"] == 4.0
    shapes = {name: (x.shape, x.dtype) for name, x in expected.state_dict().items()}
    assert {name: (x.shape, x.dtype) for name, x in model.state_dict().items()} == shapes
    buffers = {name for name, _ in expected.named_buffers()}
    assert {name for name, _ in model.named_buffers()} == buffers


def example(size=(96, 128)):
    """An image with two objects."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros((2, *size), dtype=torch.bool)
    masks[0, 10:60, 20:70] = masks[1, 30:90, 80:120] = True
    instances = Instances(size, gt_masks=BitMasks(masks))
    instances.gt_boxes = Boxes([[20, 10, 70, 60], [80, 30, 120, 90]])
    instances.gt_embeddings = torch.randn((2, 128), generator=generator)
    return {"image": image, "strong_image": 255 - image, "instances": instances}


@pytest.mark.usefixtures("quick_datasets")
def test_same_outputs(path, tmp_path, pool_file):
    cfg = quick_config(path.with_suffix(".yaml"), tmp_path).clone()
    cfg.defrost()
    cfg.MODEL.EXEMPLAR.merge_from_list(["POOL", str(pool_file), "ALPHA", 0.9, "BETA", 0.9])
    expected = build_model(cfg)
    attach_exemplars(expected, cfg)
    model = instantiate(quick(path, pool_file).model)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model.pixel_mean, expected.pixel_mean)
    assert torch.equal(model.pixel_std, expected.pixel_std)
    losses = []
    for m in (expected, model):
        m.train()
        torch.manual_seed(3)
        losses.append(m([example(), example()]))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    assert all(losses[0][name] > 0 for name in losses[0] if name != "loss_exemplar")
    (first,), (second,) = expected.eval()([example()]), model.eval()([example()])
    assert len(first["instances"]) > 0
    for name, value in first["instances"].get_fields().items():
        other = second["instances"].get(name)
        assert torch.equal(getattr(other, "tensor", other), getattr(value, "tensor", value)), name


@pytest.mark.parametrize("is_train", [True, False])
def test_same_mapper(path, is_train):
    expected = build_mapper(load_config(str(path.with_suffix(".yaml"))), is_train)
    mapper = instantiate(load(path).dataloader["train" if is_train else "test"].mapper)
    ours, theirs = settings(mapper), settings(expected)
    if not is_train:  # annotations are not read
        unused = ("class_agnostic", "strong_view_settings", "embedding_dim", "boxes")
        ours, theirs = ({k: v for k, v in x.items() if k not in unused} for x in (ours, theirs))
    assert ours == theirs
    pairs = zip(mapper.augmentations.augs, expected.augmentations.augs, strict=True)
    for ours, theirs in pairs:
        assert type(ours) is type(theirs)
        assert settings(ours) == settings(theirs)


def test_same_data_and_schedule(path):
    cfg, lazy = load_config(str(path.with_suffix(".yaml"))), load(path)
    names = [x.name for x in lazy.dataloader.train.dataset.names]
    assert names == list(cfg.DATASETS.TRAIN)
    assert [lazy.dataloader.test.dataset.names.name] == list(cfg.DATASETS.TEST)
    assert lazy.dataloader.evaluator.dataset_name == cfg.DATASETS.TEST[0]
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.dataloader.train.num_workers == cfg.DATALOADER.NUM_WORKERS
    assert lazy.train.max_iter == lazy.train.eval_period == cfg.SOLVER.MAX_ITER
    assert lazy.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert lazy.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED


def test_same_pool_and_schedule_of_it():
    path = next(p for p in CONFIGS if p.stem == "exemplar_freesolo_R_50")
    exemplar = load_config(str(path.with_suffix(".yaml"))).MODEL.EXEMPLAR
    model = LazyConfig.load(str(path)).model
    assert (model.pool.path, model.pool.per_category) == (exemplar.POOL, exemplar.PER_CATEGORY)
    assert model.update_period == exemplar.UPDATE_PERIOD
    assert model.pool_batch_size == exemplar.BUILD.BATCH_SIZE


def test_same_optimizer(path):
    rates = assert_same_optimizer(path)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(1e-3)


@pytest.mark.usefixtures("quick_datasets")
def test_trains_and_evaluates(path, tmp_path, pool_file):
    cfg = quick(path, pool_file)
    cfg.train.output_dir = str(tmp_path)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(
        model.train(), instantiate(cfg.dataloader.train), instantiate(cfg.optimizer)
    )
    trainer.train(0, 2)
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])
    assert model._iter == 2
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    assert set(results) == {"bbox", "segm"}
    assert Path(tmp_path, "inference/coco_instances_results.json").is_file()
