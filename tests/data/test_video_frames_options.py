"""Frames of files of the YouTube-VIS form: what to take of them, and whose they are."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as mask_util

from unseg.data import register_video_frames
from unseg.data.datasets import register_builtin_datasets
from unseg.data.datasets.video_frames import load_class_agnostic_frames
from unseg.data.instance_map import instance_index_map

SIZE = [4, 6]
DOT = {"size": SIZE, "counts": [5, 2, 17]}


def track(number, video, *seen, **fields):
    """An object that is to be seen in some frames of a video of seven."""
    masks = [DOT if frame in seen else None for frame in range(7)]
    return {"id": number, "video_id": video, "category_id": 1, "segmentations": masks} | fields


@pytest.fixture
def file(tmp_path):
    """Two videos of seven frames; numbers of objects 2 2 1 0 0 0 1 and 0 1 1 0 0 0 0 (a crowd)."""
    videos = [
        {
            "id": number,
            "height": SIZE[0],
            "width": SIZE[1],
            "file_names": [f"{name}/{frame:05d}.v.jpg" for frame in range(7)],
        }
        for number, name in ((9, "late"), (3, "early"))
    ]
    tracks = [
        track(40, 3, 0, 1, 2, 6),
        track(41, 3, 0, 1),
        track(50, 9, 1, 2),
        track(51, 9, 1, 2, iscrowd=1),
    ]
    path = tmp_path / "videos.json"
    path.write_text(json.dumps({"videos": videos, "annotations": tracks, "categories": []}))
    return path


def places(records):
    return [(record["video_id"], record["frame"]) for record in records]


def test_everything(file):
    records = load_class_agnostic_frames(file, "root")
    assert places(records) == [(video, frame) for video in (3, 9) for frame in range(7)]
    assert [record["image_id"] for record in records] == list(range(1, 15))
    assert records[1]["file_name"] == "root/early/00001.v.jpg"
    ids = [[a["instance_id"] for a in record["annotations"]] for record in records]
    assert ids[:3] + ids[6:10] == [[40, 41], [40, 41], [40], [40], [], [50, 51], [50, 51]]
    assert (instance_index_map(records[2]["annotations"], *SIZE) == 1).sum() == 2


def test_every_nth_frame_keeps_its_number(file):
    records = load_class_agnostic_frames(file, "root", every_n=3)
    assert places(records) == [(3, 0), (3, 3), (3, 6), (9, 0), (9, 3), (9, 6)]
    assert [record["image_id"] for record in records] == [1, 4, 7, 8, 11, 14]


def test_frames_of_so_many_objects(file):
    some = load_class_agnostic_frames(file, "root", min_instances=1)
    assert places(some) == [(3, 0), (3, 1), (3, 2), (3, 6), (9, 1), (9, 2)]
    assert [record["image_id"] for record in some] == [1, 2, 3, 7, 9, 10]
    several = load_class_agnostic_frames(file, "root", min_instances=2)
    assert places(several) == [(3, 0), (3, 1)]  # crowds do not count
    both = load_class_agnostic_frames(file, "root", min_instances=1, every_n=2)
    assert places(both) == [(3, 0), (3, 2), (3, 6), (9, 2)]


def test_a_list_of_frames(file, tmp_path):
    names = tmp_path / "frames.txt"
    names.write_text("late/00001.v\n\nearly/00006.v.jpg \nearly/00002.v\nearly/00002.v.jpg")
    records = load_class_agnostic_frames(file, "root", frame_list=names)
    assert places(records) == [(3, 2), (3, 6), (9, 1)]
    assert [record["image_id"] for record in records] == [3, 7, 9]
    names.write_text("late/00001.v\nlate/7\nearly_00002.v.jpg\n")
    with pytest.raises(ValueError, match=r"2 of the 3 frames in .*frames.txt .*early_00002.v"):
        load_class_agnostic_frames(file, "root", frame_list=names)
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        load_class_agnostic_frames(file, "root", frame_list=tmp_path / "none.txt")


@pytest.mark.parametrize("options", [{"every_n": 0}, {"min_instances": -1}])
def test_options_out_of_range(file, options):
    with pytest.raises(ValueError, match="every_n must be 1 or more and min_instances 0 or more"):
        load_class_agnostic_frames(file, "root", **options)


def test_files_without_annotations(file):
    """The official valid and test files; some have the key with null."""
    content = json.loads(file.read_text())
    for annotations in (None, []):
        file.write_text(json.dumps(content | {"annotations": annotations}))
        records = load_class_agnostic_frames(file, "root")
        assert [record["annotations"] for record in records] == [[]] * 14
    del content["annotations"]
    file.write_text(json.dumps(content))
    assert len(load_class_agnostic_frames(file, "root")) == 14


def test_registration(file, tmp_path):
    name = "toy_video_frames"
    missing = tmp_path / "later.json"
    register_video_frames(name, missing, "root", min_instances=2, every_n=2)
    try:
        with pytest.raises(FileNotFoundError, match=r"later\.json"):
            DatasetCatalog.get(name)
        file.rename(missing)
        assert places(DatasetCatalog.get(name)) == [(3, 0)]
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["object"]
        assert metadata.evaluator_type == "coco_class_agnostic"
        assert (metadata.image_root, metadata.annotation_file) == ("root", str(missing))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("name", "json_file", "images"),
    [
        (f"unseg_ytvis_{year}_{split}", f"ytvis_{year}/{split}.json", f"{split}/JPEGImages")
        for year in (2019, 2021)
        for split in ("train", "valid", "test")
    ]
    + [
        (f"unseg_ovis_{split}", f"ovis/annotations_{split}.json", f"Images/{split}")
        for split in ("train", "valid", "test")
    ],
)
def test_trees(file, tmp_path, name, json_file, images):
    register_builtin_datasets(tmp_path)
    try:
        target = tmp_path / json_file
        target.parent.mkdir()
        file.rename(target)
        records = DatasetCatalog.get(f"{name}_frames_cls_agnostic")
        assert records[0]["file_name"] == str(target.parent / images / "early/00000.v.jpg")
    finally:
        register_builtin_datasets()


@pytest.mark.parametrize(("split", "clips", "empty"), [("train", 6, 1), ("valid", 3, 0)])
def test_shared_sample(shared_datasets, split, clips, empty):
    """One object a clip; in one frame it is out of view."""
    register_builtin_datasets(shared_datasets)
    try:
        records = DatasetCatalog.get(f"unseg_ytvis_2019_{split}_frames_cls_agnostic")
    finally:
        register_builtin_datasets()
    assert len(records) == 5 * clips
    assert places(records) == [(v, f) for v in range(1, clips + 1) for f in range(5)]
    assert sum(not record["annotations"] for record in records) == empty
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
        for annotation in record["annotations"]:
            assert annotation["instance_id"] == record["video_id"]
            assert mask_util.area(annotation["segmentation"]) == annotation["area"]
            index_map = instance_index_map([annotation], record["height"], record["width"])
            assert (index_map == 1).sum() == annotation["area"]
