"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_datasets() -> Path:
    """The tree of small real data sets, or skip: $DETECTRON2_DATASETS, else ../shared/datasets."""
    root = os.getenv("DETECTRON2_DATASETS") or Path(__file__).parents[2] / "shared/datasets"
    root = Path(root).expanduser()
    if not (root / "coco/annotations/instances_val2017.json").is_file():
        pytest.skip(f"no data sets in {root}: set DETECTRON2_DATASETS")
    return root
