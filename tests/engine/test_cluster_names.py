"""Clusters named by the masks of annotations."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from toy_proposer import rectangle

from unseg.config import get_cfg
from unseg.data import EmbeddingRows, EmbeddingWriter, open_embeddings
from unseg.engine.cluster_names import matched_classes, name_clusters
from unseg.structures import encode_masks

SIZE = (20, 30)
OBJECTS = {1: [((0, 0, 10, 10), 5), ((12, 2, 28, 18), 7)], 2: [((5, 5, 15, 15), 2)], 4: []}
# Image, box, and the class of the annotation with an IoU of 0.5 or more; image 3 is not known.
FOUND = [
    (1, (0, 0, 10, 10), 5),
    (1, (0, 0, 10, 5), 5),  # exactly half
    (1, (0, 0, 9, 5), -1),
    (1, (13, 2, 28, 18), 7),
    (2, (5, 5, 15, 14), 2),
    (2, (0, 0, 10, 10), -1),
    (3, (5, 5, 15, 15), -1),
    (4, (5, 5, 15, 15), -1),
]


def encoded(box, size=SIZE):
    return encode_masks(rectangle(box, size)[None])[0]


def write_store(path, found=FOUND, size=SIZE, masks=True):
    writer = EmbeddingWriter(path, dim=2, geometry="poincare", c=1.0)
    for part in filter(None, (found[:3], found[3:])):
        count = len(part)
        writer.add(
            EmbeddingRows(
                image_ids=np.array([image for image, _, _ in part], dtype=np.int64),
                scores=np.ones(count, np.float32),
                boxes=np.array([box for _, box, _ in part], dtype=np.float32),
                areas=np.ones(count, np.int64),
                classes=np.full(count, -1),
                tangents=np.ones((count, 2), np.float32),
                masks=[encoded(box, size) for _, box, _ in part] if masks else None,
            )
        )
    writer.finish({})
    return open_embeddings(path)


@pytest.fixture
def dataset(register):
    dicts = [
        {
            "image_id": image_id,
            "file_name": "",
            "height": SIZE[0],
            "width": SIZE[1],
            "annotations": [
                {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": category,
                 "segmentation": encoded(box)}
                for box, category in objects
            ],
        }
        for image_id, objects in OBJECTS.items()
    ]  # fmt: skip
    return register(dicts, "votes")


def test_rows_take_the_class_that_they_overlap(dataset, tmp_path):
    store = write_store(tmp_path / "x")
    assert matched_classes(store, dataset, 0.5).tolist() == [want for _, _, want in FOUND]
    assert matched_classes(store, dataset, 0.05).tolist() == [5, 5, 5, 7, 2, 2, -1, -1]


def config(**naming):
    cfg = get_cfg()
    for key, value in naming.items():
        cfg.MODEL.HIERARCHICAL_EMBEDDING.NAMING[key] = value
    return cfg


def test_names(dataset, tmp_path):
    store = write_store(tmp_path / "x")
    labels = np.array([0, 0, 0, 2, 0, 1, 1, 3])  # votes of cluster 0: 5, 5, 2; of 2: 7; no others

    def names(**naming):
        return name_clusters(store, labels, 4, dataset, config(**naming)).classes.tolist()

    assert names(MIN_PURITY=0.6, MIN_SIZE=1) == [5, -1, 7, -1]
    assert names(MIN_PURITY=0.7, MIN_SIZE=1) == [-1, -1, 7, -1]
    assert names(MIN_PURITY=0.6, MIN_SIZE=2) == [5, -1, -1, -1]
    assert names(METHOD="hungarian") == [5, -1, 7, -1]
    with pytest.raises(ValueError, match=r"NAMING\.METHOD must be majority or hungarian"):
        names(METHOD="knn_val")


def test_what_cannot_be_matched(dataset, tmp_path):
    with pytest.raises(ValueError, match="the objects have no masks"):
        matched_classes(write_store(tmp_path / "a", masks=False), dataset, 0.5)
    with pytest.raises(ValueError, match=r"image 1 is \(20, 31\) in .*, \(20, 30\) in data set"):
        matched_classes(write_store(tmp_path / "b", size=(20, 31)), dataset, 0.5)
    with pytest.raises(ValueError, match="'votes' has none of the images"):
        matched_classes(write_store(tmp_path / "c", FOUND[6:7]), dataset, 0.5)
