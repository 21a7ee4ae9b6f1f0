"""Fixtures of the tests of training."""

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from quick_rcnn import CONFIG, QUICK, ROOT, write_scenes

from unseg.data.image import read_image
from unseg.engine import SelfTrainingOptions

SELF_TRAINING = QUICK | {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,  # which can be narrower than 18: checkpoints of 3 MB, not of 100
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "DISCOVERY.BATCH_SIZE": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SELF_TRAINING.SCORE_THRESHOLD": 0.01,
    "SELF_TRAINING.MAX_MASKS_PER_IMAGE": 5,
    "VIS_PERIOD": 0,
}


@pytest.fixture
def photographs(tmp_path):
    """Three scenes as files, and the config of a discoverer for them."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(read_image(f"unseg-synthetic://train/{i:06d}.bmp", "RGB")).save(
            folder / f"{i}.png"
        )
    content = {
        "_BASE_": str(ROOT / "projects/FreeSOLO/configs/free_masks_tiny.yaml"),
        "INPUT": {"MIN_SIZE_TEST": 64},
        "DISCOVERY": {"BATCH_SIZE": 2, "FREE_MASK": {"SCORE_THRESHOLD": 0.3, "MAX_AREA": 1.0}},
    }
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def options(tmp_path):
    """Makes the options of a self-training in `tmp_path`, tested on one scene; its data sets are
    forgotten."""
    known = set(DatasetCatalog.list())
    test = write_scenes(tmp_path, "val", 1)

    def make(output, changes=None, **sources):
        settings = SELF_TRAINING | {"DATASETS.TEST": (test,)} | (changes or {})
        opts = tuple(str(word) for item in settings.items() for word in item)
        return SelfTrainingOptions(str(CONFIG), str(tmp_path / output), opts, **sources)

    yield make
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
