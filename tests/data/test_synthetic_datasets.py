"""The synthetic sets as Detectron2 datasets: dicts, URIs, loaders, names."""

import json
import os
import uuid
from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from lvis import LVIS

from unseg.data.datasets.synthetic import (
    PRESETS,
    SceneSettings,
    lvis_ground_truth,
    records,
    register_synthetic,
    register_synthetic_datasets,
    render_clip,
    render_scene,
    scene_set,
)
from unseg.data.datasets.synthetic.catalogue import PART_NAMES
from unseg.data.datasets.synthetic.presets import HELDOUT_CATEGORIES

register_synthetic_datasets()

ROLES = ("train", "val", "val{}_fresh")
KINDS = ("", "_single", "_touching", "_lvis", "_video", "_heldout")
NAMES = [
    "unseg_synthetic_" + (role.format(kind) if "{" in role else role + kind)
    for role in ROLES
    for kind in KINDS
]


@pytest.fixture
def registered():
    """Register a small set under a fresh name; gone afterwards."""
    names = []

    def register(*args, **kwargs) -> str:
        name = f"test_synthetic_{uuid.uuid4().hex[:8]}"
        register_synthetic(name, *args, **kwargs)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def decoded(annotation: dict) -> np.ndarray:
    return mask_util.decode(annotation["segmentation"]).astype(bool)


def check_region(region: dict, mask: np.ndarray) -> None:
    """Segmentation, box and area describe exactly this mask."""
    assert (decoded(region) == mask).all()
    y, x = np.nonzero(mask)
    assert region["bbox_mode"] == BoxMode.XYWH_ABS
    assert region["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
    assert region["area"] == mask.sum()


# ------------------------------------------------------------------------------- registration


def test_names_are_registered_and_nothing_is_rendered(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("rendered at registration")

    monkeypatch.setattr(records, "render_scene", refuse)
    monkeypatch.setattr(records, "render_clip", refuse)
    register_synthetic_datasets()
    register_synthetic_datasets()
    for name in NAMES:
        assert name in DatasetCatalog.list()
    for role in ROLES:
        name = role.format("_video") if "{" in role else f"{role}_video"
        assert f"unseg_synthetic_{name}_frames" in DatasetCatalog.list()


def test_every_set_has_its_own_seed_and_images():
    sets = [scene_set(name) for name in NAMES]
    assert len({scenes.seed for scenes in sets}) == len(sets)
    assert len({scenes.split for scenes in sets}) == len(sets)
    assert scene_set("unseg_synthetic_train").count == 1500
    assert scene_set("unseg_synthetic_val").count == 200
    assert scene_set("unseg_synthetic_val").settings == PRESETS["default"]


def test_parts_as_annotations():
    name = "unseg_synthetic_val_lvis_parts"
    metadata, lvis = MetadataCatalog.get(name), DatasetCatalog.get("unseg_synthetic_val_lvis")
    assert metadata.thing_classes[:24] == MetadataCatalog.get("unseg_synthetic_val").thing_classes
    assert metadata.thing_classes[24:] == list(PART_NAMES)
    assert len(metadata.thing_frequencies) == len(metadata.thing_families) == 36
    assert Counter(metadata.thing_frequencies) == {"f": 12, "c": 12, "r": 12}
    counts = Counter()
    for record, other in zip(DatasetCatalog.get(name), lvis, strict=True):
        annotations = record["annotations"]
        assert record["file_name"] == other["file_name"]
        assert "neg_category_ids" not in record
        counts.update(a["category_id"] for a in annotations)
        wholes = [a for a in annotations if a["parent"] is None]
        assert [a["segmentation"] for a in wholes] == [
            a["segmentation"] for a in other["annotations"]
        ]
        assert len(annotations) == len(wholes) + sum(len(a["parts"]) for a in other["annotations"])
        for part in (a for a in annotations if a["parent"] is not None):
            whole = annotations[part["parent"]]
            assert whole["parent"] is None
            assert part["category_id"] >= 24
            both = mask_util.merge([part["segmentation"], whole["segmentation"]], intersect=True)
            assert mask_util.area(both) == part["area"]  # inside of it
    groups = dict.fromkeys("fcr", 0)
    for category, count in counts.items():
        groups[metadata.thing_frequencies[category]] += count
    assert groups["f"] > 2 * groups["c"] > 4 * groups["r"] > 0


def test_parts_as_lvis_ground_truth():
    content = lvis_ground_truth(scene_set("unseg_synthetic_val_lvis_parts"))
    metadata = MetadataCatalog.get("unseg_synthetic_val_lvis_parts")
    assert [c["name"] for c in content["categories"]] == metadata.thing_classes
    assert [c["frequency"] for c in content["categories"]] == metadata.thing_frequencies
    assert [c["id"] for c in content["categories"]] == list(range(1, 37))
    assert [a["id"] for a in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )
    there = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    absent = {(i["id"], c) for i in content["images"] for c in i["neg_category_ids"]}
    assert not there & absent
    assert len(there) + len(absent) == 36 * len(content["images"])


def test_metadata():
    plain = MetadataCatalog.get("unseg_synthetic_val")
    assert plain.evaluator_type == "coco_class_agnostic"
    assert plain.image_root == "unseg-synthetic://val"
    assert len(set(plain.thing_classes)) == 24
    lvis = MetadataCatalog.get("unseg_synthetic_train_lvis")
    assert "".join(lvis.thing_frequencies) == "f" * 8 + "c" * 8 + "r" * 8
    assert len(lvis.part_classes) == 12
    heldout = MetadataCatalog.get("unseg_synthetic_val_heldout")
    assert heldout.shown_categories == list(HELDOUT_CATEGORIES)
    assert heldout.thing_classes == plain.thing_classes


def test_own_sets_and_their_mistakes(registered):
    name = registered(SceneSettings(size=(96, 128)), seed=3, count=2)
    register_synthetic(name, SceneSettings(size=(96, 128)), seed=3, count=2)  # no harm
    assert [d["height"] for d in DatasetCatalog.get(name)] == [96, 96]
    with pytest.raises(ValueError, match=name):
        register_synthetic(name, "default", seed=4, count=2)
    with pytest.raises(ValueError, match="unseg-synthetic://train/ holds .*unseg_synthetic_train"):
        register_synthetic("train", "single", seed=4, count=2)  # other scenes behind its URIs
    assert "train" not in DatasetCatalog.list()
    assert len(PathManager.ls("unseg-synthetic://train")) == 1500
    DatasetCatalog.remove(name)  # its own folder may be taken again
    register_synthetic(name, SceneSettings(size=(96, 128)), seed=4, count=3)
    assert len(PathManager.ls(f"unseg-synthetic://{name}")) == 3
    with pytest.raises(ValueError, match="coco_2017_val"):
        register_synthetic("coco_2017_val")
    with pytest.raises(ValueError, match=r"nonsense.*default.*lvis"):
        register_synthetic("x", "nonsense")
    with pytest.raises(ValueError, match="a/b"):
        register_synthetic("a/b")
    with pytest.raises(ValueError, match="count"):
        register_synthetic("x", count=0)
    with pytest.raises(ValueError, match="video"):
        register_synthetic("x", style="video")
    with pytest.raises(ValueError, match="lvis"):
        register_synthetic("x", "video", style="lvis")
    with pytest.raises(ValueError, match="no synthetic dataset"):
        scene_set("x")


# -------------------------------------------------------------------------------------- dicts


def test_instance_dicts_say_what_the_scenes_show(registered):
    dicts = DatasetCatalog.get(registered("touching", seed=8, count=12))
    assert len({d["file_name"] for d in dicts}) == len({d["image_id"] for d in dicts}) == 12
    json.dumps(dicts)
    for index, record in enumerate(dicts):
        scene = render_scene(PRESETS["touching"], 8, index)
        assert (record["height"], record["width"]) == (160, 160)
        assert (read_image(record["file_name"], "RGB") == scene.image).all()
        assert [a["category_id"] for a in record["annotations"]] == scene.categories.tolist()
        for annotation, mask in zip(record["annotations"], scene.masks, strict=True):
            check_region(annotation, mask)
            assert annotation["iscrowd"] == 0
            padded = np.pad(mask, 1)
            grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
            others = scene.masks.any(axis=0) & ~mask
            assert annotation["touching"] == (grown & others).any()
    assert any(a["touching"] for d in dicts for a in d["annotations"])


def test_every_call_returns_fresh_copies():
    first = DatasetCatalog.get("unseg_synthetic_val")
    assert len(first) == 200
    expected = json.dumps(first)
    first[0]["annotations"][0]["bbox"][0] = -1
    del first[1]["annotations"]
    assert json.dumps(DatasetCatalog.get("unseg_synthetic_val")) == expected


def test_lvis_dicts_hold_parts_and_negatives(registered, tmp_path):
    name = registered("lvis", seed=8, count=10)
    assert MetadataCatalog.get(name).evaluator_type == "lvis"
    parts = 0
    dicts = DatasetCatalog.get(name)
    for index, record in enumerate(dicts):
        scene = render_scene(PRESETS["lvis"], 8, index)
        present = {c + 1 for c in scene.categories.tolist()}
        assert set(record["neg_category_ids"]) == set(range(1, 25)) - present
        assert record["not_exhaustive_category_ids"] == []
        row = 0
        for number, annotation in enumerate(record["annotations"]):
            check_region(annotation, scene.masks[number])
            for part in annotation["parts"]:
                check_region(part, scene.part_masks[row])
                assert part["category_id"] == scene.part_categories[row]
                assert not (decoded(part) & ~decoded(annotation)).any()
                row += 1
        assert row == len(scene.part_masks)
        parts += row
    assert parts > 10
    ids = [a["id"] for d in dicts for a in d["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(lvis_ground_truth(scene_set(name))))
    truth = LVIS(str(path))
    assert len(truth.get_ann_ids()) == len(ids)
    assert len(truth.load_cats(None)) == 24
    some = dicts[3]["annotations"][0]
    assert (truth.ann_to_mask(truth.load_anns([some["id"]])[0]) == decoded(some)).all()
    with pytest.raises(ValueError, match="lvis"):
        lvis_ground_truth(scene_set("unseg_synthetic_val"))


def test_video_dicts_follow_objects_through_clips(registered):
    settings = SceneSettings(frames=5, speed=6.0)
    name = registered(settings, seed=8, count=4)
    dicts = DatasetCatalog.get(name)
    json.dumps(dicts)
    missing, seen = 0, []
    for index, video in enumerate(dicts):
        clip = render_clip(settings, 8, index)
        assert video["video_id"] == index
        assert video["length"] == len(video["file_names"]) == len(video["annotations"]) == 5
        seen.append({a["id"] for frame in video["annotations"] for a in frame})
        for file_name, frame, scene in zip(video["file_names"], video["annotations"], clip):
            assert (read_image(file_name, "RGB") == scene.image).all()
            visible = {int(row): mask for row, mask in enumerate(scene.masks) if mask.any()}
            missing += len(scene.masks) - len(visible)
            assert [a["id"] % 1000 - 1 for a in frame] == list(visible)
            for annotation, (row, mask) in zip(frame, visible.items()):
                check_region(annotation, mask)
                assert annotation["category_id"] == scene.categories[row]
    assert missing > 0
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_frame_dicts_are_the_frames_of_the_clips(registered):
    settings = SceneSettings(frames=4)
    videos = DatasetCatalog.get(registered(settings, seed=8, count=3))
    frames = DatasetCatalog.get(registered(settings, seed=8, count=3, style="frames"))
    assert [d["video_id"] for d in frames] == [0] * 4 + [1] * 4 + [2] * 4
    assert [d["frame"] for d in frames] == [0, 1, 2, 3] * 3
    assert len({d["image_id"] for d in frames}) == 12
    for record in frames:
        expected = videos[record["video_id"]]["annotations"][record["frame"]]
        got = [{**a, "id": a["instance_id"]} for a in record["annotations"]]
        for annotation in got:
            del annotation["instance_id"]
        assert got == expected


# --------------------------------------------------------------------------------- path handler


def test_images_are_files_to_the_path_manager():
    uri = "unseg-synthetic://val/000003.bmp"
    scene = render_scene(PRESETS["default"], scene_set("unseg_synthetic_val").seed, 3)
    assert PathManager.exists(uri)
    assert PathManager.isfile(uri)
    assert not PathManager.isdir(uri)
    with PathManager.open(uri, "rb") as file:
        assert file.read(2) == b"BM"
    assert (read_image(uri, "RGB") == scene.image).all()
    assert (read_image(uri, "BGR") == scene.image[:, :, ::-1]).all()
    local = PathManager.get_local_path(uri)
    assert (read_image(local, "RGB") == scene.image).all()
    changed = os.stat(local).st_mtime_ns
    assert PathManager.get_local_path(uri) == local
    assert os.stat(local).st_mtime_ns == changed


def test_listing():
    assert PathManager.isdir("unseg-synthetic://val")
    files = PathManager.ls("unseg-synthetic://val")
    assert files == PathManager.ls("unseg-synthetic://val/")
    assert (len(files), files[0], files[-1]) == (200, "000000.bmp", "000199.bmp")
    assert {"train", "val", "val_lvis", "val_fresh"} <= set(PathManager.ls("unseg-synthetic://"))
    clips = PathManager.ls("unseg-synthetic://val_video")
    assert clips[0] == "000000"
    assert PathManager.isdir("unseg-synthetic://val_video/000003")
    assert PathManager.ls("unseg-synthetic://val_video/000003")[-1] == "00011.bmp"
    assert PathManager.isfile("unseg-synthetic://val_video/000003/00011.bmp")


@pytest.mark.parametrize(
    "path",
    [
        "val/000200.bmp",
        "val/3.bmp",
        "val/000003.png",
        "val/000003/00000.bmp",
        "nowhere/000003.bmp",
        "val_video/000003.bmp",
        "val_video/000003/00012.bmp",
        "val_video/000020/00000.bmp",
        "../val/000003.bmp",
    ],
)
def test_names_of_no_scene(path):
    uri = "unseg-synthetic://" + path
    assert not PathManager.exists(uri)
    assert not PathManager.isfile(uri)
    for use in (lambda: PathManager.open(uri, "rb"), lambda: PathManager.get_local_path(uri)):
        with pytest.raises(FileNotFoundError) as error:
            use()
        assert uri in str(error.value)
        assert "unseg-synthetic://val/ 000000.bmp..000199.bmp" in str(error.value)
    with pytest.raises(NotADirectoryError, match="valid names"):
        PathManager.ls(uri)


@pytest.mark.parametrize("mode", ["r", "w", "wb"])
def test_scenes_are_opened_for_reading_bytes(mode):
    with pytest.raises(ValueError, match="rb"):
        PathManager.open("unseg-synthetic://val/000003.bmp", mode)


# -------------------------------------------------------------------------------------- loaders


def mapper(is_train: bool) -> DatasetMapper:
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (160,)
    cfg.INPUT.MIN_SIZE_TEST = 160
    cfg.INPUT.RANDOM_FLIP = "none"
    return DatasetMapper(cfg, is_train=is_train)


def test_stock_mapper_gives_the_exact_masks(registered):
    name = registered("default", seed=8, count=4)
    for index, record in enumerate(get_detection_dataset_dicts(name)):
        scene = render_scene(PRESETS["default"], 8, index)
        mapped = mapper(is_train=True)(record)
        instances = mapped["instances"]
        assert torch.equal(instances.gt_masks.tensor, torch.from_numpy(scene.masks))
        assert instances.gt_classes.tolist() == scene.categories.tolist()
        bgr = torch.from_numpy(scene.image[:, :, ::-1].copy()).permute(2, 0, 1)
        assert torch.equal(mapped["image"], bgr)


def test_test_loader_with_workers(registered):
    name = registered("default", seed=8, count=6)
    dicts = get_detection_dataset_dicts(name, filter_empty=False)
    loader = build_detection_test_loader(dicts, mapper=mapper(is_train=False), num_workers=2)
    seen = [entry for batch in loader for entry in batch]
    assert [entry["image_id"] for entry in seen] == list(range(6))
    for entry in seen:
        scene = render_scene(PRESETS["default"], 8, entry["image_id"])
        assert (entry["image"].numpy()[::-1].transpose(1, 2, 0) == scene.image).all()


def test_train_loader_with_workers(registered):
    name = registered("lvis", seed=8, count=6)
    loader = build_detection_train_loader(
        get_detection_dataset_dicts(name),
        mapper=mapper(is_train=True),
        total_batch_size=2,
        num_workers=2,
    )
    batch = next(iter(loader))
    assert len(batch) == 2
    for entry in batch:
        scene = render_scene(PRESETS["lvis"], 8, entry["image_id"])
        assert torch.equal(entry["instances"].gt_masks.tensor, torch.from_numpy(scene.masks))
