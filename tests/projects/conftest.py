"""Data sets on which every config runs."""

from dataclasses import replace
from functools import partial

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from unseg.data.datasets.synthetic import PRESETS, register_synthetic, scene_set
from unseg.data.datasets.synthetic.records import load_records


def _load(source, count, with_masks):
    """The first scenes of a set, without rendering all of them."""
    dicts = load_records(replace(scene_set(source), count=count))
    for annotation in (a for d in dicts for a in d["annotations"] if not with_masks):
        del annotation["segmentation"]
    return dicts


@pytest.fixture(scope="session")
def quick_datasets():
    """Synthetic scenes: quick_train (4), quick_val (2), and quick_boxes (the same 2, no masks).

    quick_lvis: the first 2 of a set with parts, of which LVIS's evaluators know the annotations."""
    sets = {
        "quick_train": ("unseg_synthetic_train", 4, True),
        "quick_val": ("unseg_synthetic_val", 2, True),
        "quick_boxes": ("unseg_synthetic_val", 2, False),
    }
    for name, arguments in sets.items():
        DatasetCatalog.register(name, partial(_load, *arguments))
        metadata = MetadataCatalog.get(arguments[0])
        MetadataCatalog.get(name).set(
            thing_classes=metadata.thing_classes,
            evaluator_type="coco_class_agnostic",
            image_root=metadata.image_root,
        )
    register_synthetic("quick_lvis", PRESETS["lvis"], seed=1, count=2, style="parts")
    yield
    for name in (*sets, "quick_lvis"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
