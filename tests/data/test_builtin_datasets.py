"""Our registrations, on tiny trees of each layout and on the shared subsets."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from unseg.data.datasets import register_builtin_datasets
from unseg.data.datasets.builtin import builtin_datasets
from unseg.evaluation.coco_records import dataset_ground_truth

HEIGHT, WIDTH = 40, 60
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


@pytest.fixture
def root(tmp_path):
    """An empty root to which our data sets are moved for one test."""
    register_builtin_datasets(tmp_path)
    yield tmp_path
    register_builtin_datasets()


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_content(**image_fields) -> dict:
    """Two images out of order; in the first an object of class 90, then a crowd of class 3."""
    image = {"height": HEIGHT, "width": WIDTH}
    base = {"image_id": 8, "bbox": [10, 10, 20, 20], "area": 400.5}
    crowd = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            image | {"id": 8, "file_name": "b.jpg"} | image_fields,
            image | {"id": 4, "file_name": "a.jpg"} | image_fields,
        ],
        "annotations": [
            base | {"id": 0, "category_id": 90, "iscrowd": 0, "segmentation": SQUARE},
            base | {"id": 7, "category_id": 3, "iscrowd": 1, "segmentation": crowd},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}],
    }


COCO_FORM = [
    (name, d.metadata["annotation_file"], d.metadata["image_root"])
    for d in builtin_datasets("")
    if "annotation_file" in d.metadata
    for name in [d.name]
    if not any(word in name for word in ("lvis_", "video", "dense", "unlabeled", "frames"))
]


@pytest.mark.parametrize(("name", "file", "images"), COCO_FORM, ids=lambda value: str(value))
def test_files_in_coco_form(root, name, file, images):
    write_json(root / file, coco_content())
    first, second = DatasetCatalog.get(name)
    assert first["file_name"] == str(root / images / "a.jpg")
    assert (first["image_id"], first["annotations"]) == (4, [])
    crowd, thing = second["annotations"]  # by category
    assert (crowd["iscrowd"], thing["iscrowd"]) == (1, 0)
    assert {a["category_id"] for a in second["annotations"]} == {0}
    assert thing["area"] == 400.5
    assert thing["segmentation"] == SQUARE
    assert mask_util.area(crowd["segmentation"]) == 50
    thing["bbox"] = BoxMode.convert(thing["bbox"], thing["bbox_mode"], BoxMode.XYXY_ABS)
    thing["bbox_mode"] = BoxMode.XYXY_ABS
    instances = annotations_to_instances([thing], (HEIGHT, WIDTH), mask_format="bitmask")
    assert instances.gt_masks.tensor.sum() == 400
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["object"]
    assert metadata.evaluator_type == "coco_class_agnostic"
    # Detectron2's COCOEvaluator would take a json_file's categories for ours.
    assert metadata.get("json_file") is None


def test_the_first_images_of_a_file(root):
    """COCO val2014's first 5000 by image id, whatever their order in the file."""
    image = {"height": HEIGHT, "width": WIDTH}
    ids = np.random.default_rng(0).permutation(np.arange(1, 5301) * 3).tolist()
    content = coco_content()
    content["images"] = [image | {"id": n, "file_name": f"{n}.jpg"} for n in ids]
    inside, outside = (content["annotations"][0] | {"image_id": 3 * n} for n in (5000, 5001))
    content["annotations"] = [outside | {"id": 1}, inside | {"id": 2}]
    write_json(root / "coco/annotations/instances_val2014.json", content)
    name = "unseg_coco_2014_val_first5k_cls_agnostic"
    records = DatasetCatalog.get(name)
    assert [r["image_id"] for r in records] == [3 * n for n in range(1, 5001)]
    assert records[0]["file_name"] == str(root / "coco/val2014/3.jpg")
    assert [len(r["annotations"]) for r in records] == [0] * 4999 + [1]
    # The rest is not ground truth either.
    truth, _ = dataset_ground_truth(name)
    assert len(truth["images"]) == 5000
    assert len(truth["annotations"]) == 1


def test_lvis_images_are_named_by_url(root):
    url = "http://images.cocodataset.org/train2017/000000155379.jpg"
    content = coco_content(coco_url=url, neg_category_ids=[1], not_exhaustive_category_ids=[2])
    for image in content["images"]:
        del image["file_name"]
    for version in ("v1", "v0.5"):
        write_json(root / f"lvis/lvis_{version}_val.json", content)
        record = DatasetCatalog.get(f"unseg_lvis_{version}_val_cls_agnostic")[0]
        assert record["file_name"] == str(root / "coco/train2017/000000155379.jpg")


def test_files_of_lvis_need_the_url(root):
    write_json(root / "lvis/lvis_v1_val.json", coco_content())
    with pytest.raises(ValueError, match="image 8 has no coco_url"):
        DatasetCatalog.get("unseg_lvis_v1_val_cls_agnostic")


def test_lvis_of_cutler_may_lie_elsewhere(root):
    write_json(root / "lvis/lvis1.0_cocofied_val_cls_agnostic.json", coco_content())
    record = DatasetCatalog.get("unseg_cutler_lvis")[0]
    assert record["file_name"] == str(root / "coco/a.jpg")


def test_unlabeled_images(root):
    content = coco_content()
    del content["annotations"], content["categories"]
    write_json(root / "coco/annotations/image_info_unlabeled2017.json", content)
    records = DatasetCatalog.get("unseg_coco_2017_unlabeled")
    assert [r["annotations"] for r in records] == [[], []]
    assert records[0]["file_name"] == str(root / "coco/unlabeled2017/a.jpg")
    assert MetadataCatalog.get("unseg_coco_2017_unlabeled").get("evaluator_type") is None


def test_video_files_become_frames(root, caplog):
    encoding = {"size": [HEIGHT, WIDTH], "counts": [0, 80, HEIGHT * WIDTH - 80]}
    videos = [
        {"id": v, "height": HEIGHT, "width": WIDTH, "file_names": [f"{v}/0.png", f"{v}/1.png"]}
        for v in (5, 2)
    ]
    tracks = [
        {
            "id": 1,
            "video_id": 5,
            "category_id": 1,
            "iscrowd": 0,
            "segmentations": [None, encoding],
            "bboxes": [None, [0, 0, 2, 40]],
            "areas": [None, 80],
        },
        {"id": 2, "video_id": 5, "category_id": 1, "segmentations": [SQUARE, None]},
    ]
    path = root / "UVO/VideoDenseSet/UVO_video_val_dense.json"
    write_json(path, {"videos": videos, "annotations": tracks, "categories": []})
    records = DatasetCatalog.get("unseg_uvo_val_dense_cls_agnostic")
    names = [os.path.relpath(r["file_name"], root / "UVO") for r in records]
    assert names == [f"uvo_videos_dense_frames/{n}.png" for n in ("2/0", "2/1", "5/0", "5/1")]
    assert [r["image_id"] for r in records] == [1, 2, 3, 4]
    assert [len(r["annotations"]) for r in records] == [0, 0, 1, 1]
    polygon, encoded = (r["annotations"][0] for r in records[2:])
    assert polygon["bbox"] == [10, 10, 20, 20]
    assert "area" not in polygon
    assert (encoded["bbox"], encoded["area"]) == ([0, 0, 2, 40], 80)
    assert mask_util.area(encoded["segmentation"]) == 80
    assert "left out" not in caplog.text
    tracks[1]["segmentations"][0] = [[1, 2]]
    write_json(path, {"videos": videos, "annotations": tracks, "categories": []})
    records = DatasetCatalog.get("unseg_uvo_val_dense_cls_agnostic")
    assert [len(r["annotations"]) for r in records] == [0, 0, 0, 1]
    assert "1 without a valid polygon" in caplog.text
    tracks[0]["segmentations"].append(None)
    write_json(path, {"videos": videos, "annotations": tracks, "categories": []})
    with pytest.raises(ValueError, match="annotation 1 has 3 frames, its video has 2"):
        DatasetCatalog.get("unseg_uvo_val_dense_cls_agnostic")
    write_json(path, coco_content())
    with pytest.raises(ValueError, match="YouTube-VIS"):
        DatasetCatalog.get("unseg_uvo_val_dense_cls_agnostic")


def write_voc(folder: Path, names: dict[str, list[tuple[int, list[int]]]], split: str) -> None:
    """An XML file per image from (difficult, box), and the list of a split."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    for name, objects in names.items():
        text = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        for difficult, box in objects:
            sides = "".join(
                f"<{side}>{value}</{side}>"
                for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box)
            )
            # Parts have boxes of their own, which must not be taken for the object's.
            part = "<part><bndbox><xmin>1</xmin></bndbox></part>"
            text += (
                f"<object><name>cat</name>{part}<difficult>{difficult}</difficult>"
                f"<bndbox>{sides}</bndbox></object>"
            )
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
    (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")


def test_voc_boxes(root):
    folder = root / "VOC2007"
    write_voc(folder, {"000005": [(0, [1, 1, WIDTH, HEIGHT]), (1, [11, 21, 30, 40])]}, "trainval")
    write_voc(folder, {"000001": [], "000002": [(0, [5, 6, 7.5, 9])]}, "test")
    (record,) = DatasetCatalog.get("unseg_voc_2007_trainval_cls_agnostic")
    assert record["file_name"] == str(folder / "JPEGImages/000005.jpg")
    assert (record["image_id"], record["height"], record["width"]) == ("000005", HEIGHT, WIDTH)
    assert [a["bbox"] for a in record["annotations"]] == [[0, 0, WIDTH, HEIGHT], [10, 20, 30, 40]]
    assert [a["area"] for a in record["annotations"]] == [WIDTH * HEIGHT, 400]
    (record,) = DatasetCatalog.get("unseg_voc_2007_trainval_cls_agnostic_no_difficult")
    assert [a["bbox"] for a in record["annotations"]] == [[0, 0, WIDTH, HEIGHT]]
    both = DatasetCatalog.get("unseg_voc_2007_trainval_test_cls_agnostic")
    assert [r["image_id"] for r in both] == ["000005", "000001", "000002"]
    assert both[2]["annotations"][0]["bbox"] == [4, 5, 7.5, 9]


def test_voc_instances(root):
    folder = root / "VOC2012"
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[5:20, 10:30] = 255
    ids[6:19, 11:29] = 2
    ids[30:33, 40:50] = 5
    for part in ("SegmentationObject", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    image = Image.fromarray(ids, mode="P")
    image.putpalette([n // 3 for n in range(768)])
    image.save(folder / "SegmentationObject/2007_000032.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("2007_000032\n")
    (record,) = DatasetCatalog.get("unseg_voc_2012_val_instances")
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    masks = [mask_util.decode(a["segmentation"]) for a in record["annotations"]]
    np.testing.assert_array_equal(masks, [ids == 2, ids == 5])
    assert [a["bbox"] for a in record["annotations"]] == [[11, 6, 29, 19], [40, 30, 50, 33]]
    assert [a["area"] for a in record["annotations"]] == [13 * 18, 30]


@pytest.mark.parametrize("name", [dataset.name for dataset in builtin_datasets("")])
def test_a_missing_file_is_named(root, name):
    with pytest.raises(FileNotFoundError, match=r"datasets/README.md") as error:
        DatasetCatalog.get(name)
    assert str(root) in str(error.value)


def test_a_broken_file_is_named(root):
    path = root / "coco/annotations/instances_val2017.json"
    write_json(path, {"neither": []})
    with pytest.raises(ValueError, match="instances_val2017.json is not a COCO-like file"):
        DatasetCatalog.get("unseg_coco_2017_val_cls_agnostic")
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match="instances_val2017.json is not JSON"):
        DatasetCatalog.get("unseg_coco_2017_val_cls_agnostic")
    content = coco_content()
    del content["annotations"][1]["bbox"]
    write_json(path, content)
    with pytest.raises(ValueError, match="annotation 7 has no bbox"):
        DatasetCatalog.get("unseg_coco_2017_val_cls_agnostic")


def test_invalid_annotations_are_counted(root, caplog):
    """The objects left out are those that Detectron2's own loader leaves out of the same file."""
    content = coco_content()
    square, crowd = content["annotations"]
    short = [[1, 2, 3, 4]]
    for number, mask in enumerate((short, [[1, 2]], short + SQUARE, [SQUARE[0] + [3]], [], None)):
        content["annotations"].append(square | {"id": 10 + number, "segmentation": mask})
    content["annotations"].append(crowd | {"id": 20, "image_id": 99})
    path = root / "coco/annotations/instances_val2017.json"
    write_json(path, content)
    first, second = DatasetCatalog.get("unseg_coco_2017_val_cls_agnostic")
    assert first["annotations"] == []
    masks = [a.get("segmentation") for a in second["annotations"]]
    assert masks[1:] == [SQUARE, SQUARE, None, None]  # the crowd is the first
    assert "3 without a valid polygon, 1 of unlisted images" in caplog.text
    content["annotations"].pop()  # Detectron2 refuses unlisted images
    write_json(path, content)
    theirs = load_coco_json(str(path), str(root))[-1]["annotations"]
    theirs.sort(key=lambda a: a["category_id"])
    assert [a.get("segmentation") for a in theirs] == masks


def test_names_are_our_own():
    names = [dataset.name for dataset in builtin_datasets("")]
    assert len(set(names)) == len(names)
    assert all(name.startswith("unseg_") for name in names)


def test_root_is_read_at_import_and_registration_repeats():
    """As in Detectron2: from DETECTRON2_DATASETS when the package is imported, ~ expanded."""
    code = (
        "import unseg.data.datasets as d; d.register_builtin_datasets();"
        "from detectron2.data import MetadataCatalog as m;"
        "import sys; sys.stdout.write(m.get('unseg_coco_2017_val_cls_agnostic').annotation_file)"
    )
    environment = os.environ | {"DETECTRON2_DATASETS": "~/somewhere"}
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == str(Path.home() / "somewhere/coco/annotations/instances_val2017.json")


@pytest.mark.parametrize(("images", "taken"), [(150, True), (5000, False), (None, False)])
def test_a_tree_that_is_not_the_shared_subset_is_skipped(tmp_path, monkeypatch, images, taken):
    # By its path: which of several files is the module "conftest" depends on pytest's arguments.
    path = Path(__file__).parents[1] / "conftest.py"
    find = runpy.run_path(str(path))["shared_datasets"].__wrapped__
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    if images is not None:
        file = tmp_path / "coco/annotations/instances_val2017.json"
        write_json(file, {"images": [{"id": n} for n in range(images)]})
    if taken:
        assert find() == tmp_path
        return
    reason = "no data sets" if images is None else "has 5000 images"
    with pytest.raises(pytest.skip.Exception, match=reason):
        find()


@pytest.fixture
def shared(shared_datasets):
    register_builtin_datasets(shared_datasets)
    yield shared_datasets
    register_builtin_datasets()


@pytest.mark.parametrize(
    ("name", "images", "objects", "crowds"),
    [
        ("unseg_coco_2017_val_cls_agnostic", 150, 1366, 16),
        ("unseg_coco_2017_train_cls_agnostic", 200, 1785, 17),
        ("unseg_lvis_v0.5_val_cls_agnostic", 9, 55, 0),
        ("unseg_voc_2012_train_cls_agnostic", 3, 12, 0),
        ("unseg_voc_2012_train_instances", 3, 12, 0),
    ],
)
def test_shared_subsets(shared, name, images, objects, crowds):
    records = DatasetCatalog.get(name)
    annotations = [a for r in records for a in r["annotations"]]
    assert len(records) == images
    assert sum(a["iscrowd"] for a in annotations) == crowds
    assert len(annotations) == objects + crowds
    for r in records:
        with Image.open(r["file_name"]) as image:
            assert image.size == (r["width"], r["height"])


def test_shared_voc_boxes_are_those_of_the_masks(shared):
    """The XML files of the shared VOC sample were derived from its masks."""
    boxes = DatasetCatalog.get("unseg_voc_2012_train_cls_agnostic")
    masks = DatasetCatalog.get("unseg_voc_2012_train_instances")
    for a, b in zip(boxes, masks, strict=True):
        assert a["image_id"] == b["image_id"]
        assert [o["bbox"] for o in a["annotations"]] == [o["bbox"] for o in b["annotations"]]
