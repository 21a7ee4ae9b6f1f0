"""Every YAML of configs/ and projects/ loads, builds and runs: two steps of training, one test."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from unseg.config import load_config
from unseg.data import register_datasets_in_config
from unseg.engine import PseudoMaskJob, Trainer, images_of_dataset
from unseg.modeling import MaskDiscovery

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "projects").glob("*/configs/*.yaml"))
BASES = sorted((ROOT / "configs").glob("*.yaml"))

# Small images, small batches and narrow heads, so that a run takes seconds whatever the config.
QUICK = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "DATASETS.TRAIN": ("quick_train",),
    "DATASETS.TEST": ("quick_val",),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
}


@pytest.fixture(scope="module", autouse=True)
def quick_datasets():
    """Four training scenes and two for testing."""
    for name, count in (("train", 4), ("val", 2)):
        DatasetCatalog.register(
            f"quick_{name}", lambda n=name, c=count: DatasetCatalog.get(f"unseg_synthetic_{n}")[:c]
        )
        metadata = MetadataCatalog.get(f"unseg_synthetic_{name}")
        MetadataCatalog.get(f"quick_{name}").set(
            thing_classes=metadata.thing_classes,
            evaluator_type="coco_class_agnostic",
            image_root=metadata.image_root,
        )
    yield
    for name in ("quick_train", "quick_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def quick_config(path, output):
    overrides = QUICK | {"OUTPUT_DIR": str(output)}
    cfg = load_config(str(path))
    if "SyncBN" in (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM):  # needs a GPU
        overrides |= {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN"}
    return load_config(str(path), [x for item in overrides.items() for x in item])


def test_there_are_configs():
    assert len(CONFIGS) >= 6
    assert len(BASES) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parents[1].name}/{p.name}")
def test_config_runs(path, tmp_path):
    cfg = quick_config(path, tmp_path)
    register_datasets_in_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "MaskDiscovery":
        run_discovery(cfg, tmp_path)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.train()
    assert trainer.iter == 2
    assert (tmp_path / "model_final.pth").is_file()
    assert set(trainer._last_eval_results) >= {"bbox", "segm"}


def run_discovery(cfg, folder):
    model = build_model(cfg)
    assert isinstance(model, MaskDiscovery)
    job = PseudoMaskJob(cfg, images_of_dataset("quick_val"), folder / "x.json")
    job.start(resume=False)
    job.run(model)
    assert job.collect_if_complete().images == 2
    assert set(Trainer.test(cfg, model.eval())) >= {"bbox", "segm"}


@pytest.mark.parametrize("path", BASES + CONFIGS, ids=lambda p: p.name)
def test_config_is_read_without_other_repositories(path):
    """Bases lie in this repository; class-agnostic models have one class."""
    text = path.read_text()
    for line in text.splitlines():
        if line.startswith("_BASE_:"):
            base = (path.parent / line.split(":", 1)[1].strip().strip('"')).resolve()
            assert base.is_relative_to(ROOT)
    cfg = load_config(str(path))
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
