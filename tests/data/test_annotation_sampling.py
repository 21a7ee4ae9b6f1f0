"""DATA.SAMPLING "annotation": a category at random, then one of its annotations."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetFromList
from PIL import Image
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.data import build_mapper, build_train_loader
from unseg.data.annotation_stream import AnnotationDataset, uniform_over_categories
from unseg.data.sampling import TrainingBatchSampler

SIZES = {1: (40, 60), 2: (60, 40), 3: (40, 60)}  # by image id


def rectangle(image_id, x, y, w, h, category, crowd=0):
    mask = np.zeros(SIZES[image_id], np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return {"segmentation": mask_util.encode(mask), "category_id": category, "iscrowd": crowd}


# Category 5 has one usable object, category 9 three; category 2 has none that is usable.
ANNOTATIONS = {
    1: [
        rectangle(1, 0, 0, 30, 20, 9),
        rectangle(1, 0, 0, 30, 30, 9, crowd=1),
        rectangle(1, 40, 10, 12, 30, 5),
        rectangle(1, 50, 10, 4, 30, 5),  # narrow
    ],
    2: [rectangle(2, 5, 5, 30, 30, 9), rectangle(2, 5, 5, 9, 9, 2), rectangle(2, 1, 9, 20, 20, 9)],
    3: [],
}
USABLE = {(1, 0): 9, (1, 2): 5, (2, 0): 9, (2, 2): 9}


@pytest.fixture
def name(tmp_path, register):
    records = []
    for image_id, annotations in ANNOTATIONS.items():
        height, width = SIZES[image_id]
        file = tmp_path / f"{image_id}.png"
        Image.fromarray(np.full((height, width, 3), image_id, np.uint8)).save(file)
        records.append(
            {
                "file_name": str(file),
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    classes = [f"class {k}" for k in range(10)]
    return register(records, thing_classes=classes)


def make_cfg(name, **changes):
    cfg = get_cfg()
    cfg.INPUT.MAPPER = "DeepMaskPatchMapper"
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 3
    node = cfg.MODEL.DEEPMASK
    node.INPUT_SIZE, node.CONTEXT, node.GT_SIZE = 16, 0, 16
    node.DATA.SAMPLING = "annotation"
    node.DATA.PATCHES_PER_IMAGE = 2
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def drawn(loader, batches):
    """Image ids and annotation indices of the first batches, without mapping them."""
    stream = loader.make_batches(loader.seed, loader.start_iteration)
    records = loader.dataset.dataset
    return [
        [(records[i]["image_id"], records[i]["annotation_index"]) for i, _ in batch]
        for batch in itertools.islice(iter(stream), batches)
    ]


def test_repeat_factors():
    index = uniform_over_categories([0, 0, 1, 2, 2], [0, 3, 1, 0, 2], [7, 700, 7, 7, 7])
    assert index.images.tolist() == [0, 0, 1, 2, 2]
    assert index.annotations.tolist() == [0, 3, 1, 0, 2]
    # Five draws, two and a half of each category.
    np.testing.assert_allclose(index.repeat_factors, [0.625, 2.5, 0.625, 0.625, 0.625])
    assert len(uniform_over_categories([], [], []).repeat_factors) == 0


def test_epochs_are_as_long_as_there_are_annotations():
    rng = np.random.default_rng(0)
    categories = rng.zipf(1.5, 1000) % 50
    index = uniform_over_categories(np.zeros(1000), np.arange(1000), categories)
    assert index.repeat_factors.sum() == pytest.approx(1000)
    shares = np.bincount(categories, index.repeat_factors)
    present = np.unique(categories)
    np.testing.assert_allclose(shares[present], 1000 / len(present))


def test_what_is_drawn(name):
    """Both categories as often, and within one all of its annotations; nothing else ever."""
    loader = build_train_loader(make_cfg(name))
    counts = Counter(item for batch in drawn(loader, 4000) for item in batch)
    assert set(counts) == set(USABLE)
    total = sum(counts.values())
    assert counts[1, 2] / total == pytest.approx(1 / 2, abs=0.02)
    for item in ((1, 0), (2, 0), (2, 2)):
        assert counts[item] / total == pytest.approx(1 / 6, abs=0.02)


def test_only_the_subset_counts(name):
    subset = ("class 9", "class 2")
    loader = build_train_loader(make_cfg(name, MODEL__DEEPMASK__DATA__CATEGORY_SUBSET=subset))
    counts = Counter(item for batch in drawn(loader, 1500) for item in batch)
    assert set(counts) == {item for item, category in USABLE.items() if category == 9}
    for count in counts.values():
        assert count / 3000 == pytest.approx(1 / 3, abs=0.01)


def test_smaller_objects_count_if_they_are_allowed(name):
    cfg = make_cfg(name, MODEL__DEEPMASK__DATA__MIN_AREA=1, MODEL__DEEPMASK__DATA__MIN_SIDE=1)
    counts = Counter(item for batch in drawn(build_train_loader(cfg), 2000) for item in batch)
    assert set(counts) == {*USABLE, (1, 3), (2, 1)}
    assert counts[2, 1] / 4000 == pytest.approx(1 / 3, abs=0.02)  # the only one of category 2


def test_positives_are_of_the_annotation_drawn(name):
    """Every sample shows its object alone: the extent of the target tells which one."""
    cfg = make_cfg(
        name,
        MODEL__DEEPMASK__DATA__JITTER_SHIFT=0.0,
        MODEL__DEEPMASK__DATA__JITTER_SCALE=0.0,
        MODEL__DEEPMASK__INPUT_SIZE=64,
        MODEL__DEEPMASK__GT_SIZE=64,
    )
    loader = build_train_loader(cfg)
    expected = [item for batch in drawn(loader, 12) for item in batch]
    samples = [sample for batch in itertools.islice(iter(loader), 12) for sample in batch]
    for sample, (image_id, number) in zip(samples, expected, strict=True):
        assert sample["image_id"] == image_id
        assert "annotation_index" not in sample
        assert sample["patch_labels"].tolist() == [1, -1]
        rows, columns = (sample["patch_masks"][0] == 1).nonzero().T
        width, height = (int(v.max() - v.min()) + 1 for v in (columns, rows))
        mask = mask_util.decode(ANNOTATIONS[image_id][number]["segmentation"])
        rows, columns = mask.nonzero()
        ratio = (np.ptp(columns) + 1) / (np.ptp(rows) + 1)
        assert width / height == pytest.approx(ratio, rel=0.12)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_and_workers(name, workers):
    whole = list(itertools.islice(iter(build_train_loader(make_cfg(name))), 6))
    loader = build_train_loader(make_cfg(name, DATALOADER__NUM_WORKERS=workers))
    loader.start_iteration = 3
    resumed = list(itertools.islice(iter(loader), 3))
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a["image_id"] == b["image_id"]
            assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("patch"))


def test_orientation_is_that_of_the_image(name):
    cfg = make_cfg(name, DATALOADER__ASPECT_RATIO_GROUPING=True)
    batches = drawn(build_train_loader(cfg), 200)
    assert all(len({image_id for image_id, _ in batch}) == 1 for batch in batches)
    assert {batch[0][0] for batch in batches} == {1, 2}


def test_annotations_are_not_copied(name):
    """The serialised list holds each image once, whatever the number of its annotations."""
    dataset = build_train_loader(make_cfg(name)).dataset.dataset
    assert isinstance(dataset, AnnotationDataset)
    assert isinstance(dataset.dataset, DatasetFromList)
    assert (len(dataset), len(dataset.dataset)) == (4, 3)
    records = [{"annotations": [1, 2]}, {"annotations": [3]}]
    view = AnnotationDataset(records, uniform_over_categories([0, 0, 1], [0, 1, 0], [0, 0, 0]))
    assert [item["annotation_index"] for item in view] == [0, 1, 0]
    assert view[1]["annotations"] is records[0]["annotations"]
    assert records == [{"annotations": [1, 2]}, {"annotations": [3]}]


def test_images_are_the_default(name):
    cfg = make_cfg(name, MODEL__DEEPMASK__DATA__SAMPLING="image")
    loader = build_train_loader(cfg)
    assert isinstance(loader.make_batches(0, 0), TrainingBatchSampler)
    assert len(loader.dataset) == 3
    assert {s["image_id"] for batch in itertools.islice(iter(loader), 3) for s in batch} == {
        *(1, 2, 3)
    }
    assert build_mapper(cfg, True).annotation_index([]) is None


def test_bad_settings_name_the_key(name, register):
    with pytest.raises(ValueError, match=r"MODEL\.DEEPMASK\.DATA\.SAMPLING .*'objects'"):
        build_train_loader(make_cfg(name, MODEL__DEEPMASK__DATA__SAMPLING="objects"))
    with pytest.raises(ValueError, match=r"SAMPLING annotation: .* no usable one"):
        build_train_loader(make_cfg(name, MODEL__DEEPMASK__DATA__MIN_AREA=10**6))
    cfg = make_cfg(name, DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler")
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN 'RepeatFactorTrainingSampler'"):
        build_train_loader(cfg)
    bad = {"file_name": "x.png", "image_id": 4, "height": 9, "width": 9}
    bad["annotations"] = [{"segmentation": {"size": [9, 9], "counts": b"1"}, "category_id": 0}]
    other = register([bad], name="bad", thing_classes=["class"])
    with pytest.raises(ValueError, match=r"x\.png: annotation 0: .*malformed"):
        build_train_loader(make_cfg(other))
