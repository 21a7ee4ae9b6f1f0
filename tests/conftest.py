"""Fixtures that several tests share."""

import json
import logging
import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from hypothesis import settings

# Times say nothing on a busy machine.
settings.register_profile("unseg", deadline=None)
settings.load_profile("unseg")

SUBSET_IMAGES = 150  # of the shared subset's val2017; COCO's own has 5000


@pytest.fixture(scope="session")
def shared_datasets() -> Path:
    """The tree of small real data sets, or skip: $DETECTRON2_DATASETS, else ../shared/datasets.

    Tests name its numbers of images and objects, so a tree with the whole of COCO will not do.
    """
    root = os.getenv("DETECTRON2_DATASETS") or Path(__file__).parents[2] / "shared/datasets"
    root = Path(root).expanduser()
    file = root / "coco/annotations/instances_val2017.json"
    if not file.is_file():
        pytest.skip(f"no data sets in {root}: set DETECTRON2_DATASETS")
    images = len(json.loads(file.read_text())["images"])
    if images != SUBSET_IMAGES:
        pytest.skip(f"{file} has {images} images: the tests are about a subset of {SUBSET_IMAGES}")
    return root


@pytest.fixture
def register():
    """Registers dataset dicts, or a function that returns them, under a name for one test."""
    names = []

    def add(dicts, name="toy", **metadata):
        DatasetCatalog.register(name, dicts if callable(dicts) else lambda: dicts)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def restored_loggers():
    """The commands take these over for good; other tests read them. They are set up anew."""
    setup_logger.cache_clear()  # else whoever came first decides where the lines go
    logging_of = [logging.getLogger(name) for name in ("detectron2", "fvcore", "unseg")]
    kept = [(x, x.level, x.propagate, x.handlers.copy()) for x in logging_of]
    for logger in logging_of:
        logger.handlers.clear()
    yield
    for logger, level, propagate, handlers in kept:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers
    setup_logger.cache_clear()
