"""Class-agnostic metrics against pycocotools with useCats=0, for every implementation installed."""

import copy

import numpy as np
import pytest
from coco_cases import CATEGORIES, KEYS, encode, official, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.evaluation import coco_api
from unseg.evaluation.coco_api import (
    equals_pycocotools,
    evaluate_class_agnostic,
    fastest_implementation,
    implementations,
)

NAMES = list(implementations())


def close(got, expected):
    assert list(got) == list(expected)
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=0, atol=1e-9)


def square(x, y, side, size=100):
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def content(masks, crowds=(), size=100, **fields):
    """A one-image COCO file whose annotations have classes 1, 2, ..."""
    annotations = [
        {
            "id": n + 1,
            "image_id": 7,
            "category_id": CATEGORIES[n]["id"],
            "segmentation": encode(mask),
            "iscrowd": int(n in crowds),
        }
        | fields
        for n, mask in enumerate(masks)
    ]
    images = [{"id": 7, "height": size, "width": size}]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def detections(masks, scores=None):
    scores = np.linspace(1, 0.5, len(masks)).tolist() if scores is None else scores
    return [
        {"image_id": 7, "category_id": 1, "segmentation": encode(m), "score": s}
        for m, s in zip(masks, scores)
    ]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_pycocotools_without_categories(name, seed):
    coco_gt, results = random_case(seed)
    before = copy.deepcopy((coco_gt, results))
    if not results:
        return
    for task in ("bbox", "segm"):
        got = evaluate_class_agnostic(coco_gt, results, task, implementation=name)
        close(got, official(coco_gt, results, task))
    assert (coco_gt, results) == before


@pytest.mark.parametrize("name", NAMES)
def test_curves_equal_for_other_caps(name):
    coco_gt, results = random_case(5)
    for task in ("bbox", "segm"):
        ground_truth = coco_api.prepare_ground_truth(coco_gt, task)
        arguments = (
            list(ground_truth.images.values()),
            ground_truth.annotations,
            coco_api.prepare_detections(results, ground_truth, task),
            task,
            [1, 2, 7, 100, 1000],
        )
        expected = implementations()["pycocotools"](*arguments)
        for got, want in zip(implementations()[name](*arguments), expected):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_one_class_predictions_on_80_classes():
    """What a one-class model gives on a class-aware file: class-aware numbers are nonsense."""
    masks = [square(20 * n, 15 * n, 10 + n) for n in range(5)]
    coco_gt = content(masks)
    for n, annotation in enumerate(coco_gt["annotations"]):
        annotation |= {"bbox": [20 * n, 15 * n, 10 + n, 10 + n], "area": (10 + n) ** 2}
    results = detections(masks)
    aware = official(coco_gt, results, "segm", use_cats=1)
    got = evaluate_class_agnostic(coco_gt, results)
    assert aware["AP"] == pytest.approx(20)  # the first of five classes
    assert got["AP"] == got["AP75"] == pytest.approx(100)
    assert got["AR@1"] == pytest.approx(20)
    assert got["AR@100"] == pytest.approx(100)


def test_detections_in_unknown_categories_count():
    coco_gt = content([square(0, 0, 40)])
    results = [r | {"category_id": 12345} for r in detections([square(0, 0, 40)])]
    assert evaluate_class_agnostic(coco_gt, results)["AP"] == pytest.approx(100)


def test_crowds_absorb_detections():
    objects = [square(0, 0, 40), square(50, 50, 45)]
    inside = [square(50 + n, 50, 5) for n in range(20)]
    results = detections([*inside, objects[0]])
    kept = evaluate_class_agnostic(content(objects, crowds=[1]), results)
    assert kept["AP"] == pytest.approx(100)
    as_object = evaluate_class_agnostic(content(objects), results)
    dropped = evaluate_class_agnostic(content(objects[:1]), results)
    assert as_object["AP"] < 10
    assert dropped["AP"] < 10


def test_ap_is_at_100_detections_for_any_caps():
    objects = [square(0, 0, 40)]
    wrong = [square(60, 60, 30)] * 100
    results = detections([*wrong, *objects])
    got = evaluate_class_agnostic(content(objects), results, max_dets=(1, 10, 1000))
    assert [k for k in got if k.startswith("AR@")] == ["AR@1", "AR@10", "AR@100", "AR@1000"]
    assert got["AR@1000"] == pytest.approx(100)
    assert got["AR@100"] == got["AP"] == got["AP50"] == got["ARm"] == 0
    few = evaluate_class_agnostic(content(objects), detections(objects), max_dets=(5,))
    assert few["AP"] == pytest.approx(100)


def test_no_predictions_and_missing_sizes():
    got = evaluate_class_agnostic(content([square(0, 0, 40)]), [])  # medium
    assert got["AP"] == got["APm"] == got["AR@100"] == 0
    assert np.isnan([got["APs"], got["APl"], got["ARs"]]).all()
    got = evaluate_class_agnostic(content([]), detections([square(0, 0, 40)]))
    assert np.isnan(list(got.values())).all()


def test_annotation_id_zero_can_be_found():
    coco_gt = content([square(0, 0, 40)], id=0, area=1600, bbox=[0, 0, 40, 40])
    results = detections([square(0, 0, 40)])
    assert official(coco_gt, results, "segm")["AP"] == 0  # pycocotools' trap
    assert evaluate_class_agnostic(coco_gt, results)["AP"] == pytest.approx(100)


def test_sizes_are_by_the_files_area():
    mask = square(0, 0, 40)
    for area, size in ((1000.0, "s"), (2000.0, "m"), (10_000.0, "l"), (None, "m")):
        got = evaluate_class_agnostic(content([mask], area=area), detections([mask]))
        found = {s: got[f"AR{s}"] for s in "sml"}
        assert {s for s, v in found.items() if v == v} == {size}
    box = {"segmentation": None, "bbox": [0, 0, 20, 20]}
    got = evaluate_class_agnostic(
        content([mask], **box), [{"image_id": 7, "bbox": [0, 0, 20, 20], "score": 1.0}], "bbox"
    )
    assert got["APs"] == pytest.approx(100)


def test_boxes_come_from_masks_where_there_are_none():
    mask = square(10, 20, 30)
    got = evaluate_class_agnostic(content([mask]), detections([mask]), "bbox")
    assert got["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "image 7.*score nan"),
        ({"score": float("inf")}, "image 7.*score inf"),
        ({"image_id": 8}, "image 8 is not in the ground truth"),
        ({"segmentation": encode(square(0, 0, 10, size=50))}, r"image 7.*\[50, 50\]"),
        ({"segmentation": None}, "image 7 has no mask"),
        ({"bbox": [0, 0, float("nan"), 1]}, "image 7 has the box"),
    ],
)
def test_bad_detections(change, message):
    result = detections([square(0, 0, 40)])[0] | change
    with pytest.raises(ValueError, match=message):
        evaluate_class_agnostic(content([square(0, 0, 40)]), [result])


def test_bad_ground_truth():
    good = content([square(0, 0, 40)])
    with pytest.raises(ValueError, match="not unique"):
        evaluate_class_agnostic(good | {"images": good["images"] * 2}, [])
    with pytest.raises(ValueError, match="all integers or all strings"):
        evaluate_class_agnostic(
            good | {"images": [*good["images"], {"id": "a", "height": 1, "width": 1}]}, []
        )
    with pytest.raises(ValueError, match="annotation 1 of image 7 has no segmentation"):
        evaluate_class_agnostic(content([square(0, 0, 4)], segmentation=None), [], "segm")
    with pytest.raises(ValueError, match="neither a box nor"):
        evaluate_class_agnostic(content([square(0, 0, 4)], segmentation=None), [], "bbox")
    polygons = content([square(0, 0, 4)], segmentation=[[0, 0, 4, 0, 4, 4]])
    with pytest.raises(ValueError, match="height and width"):
        evaluate_class_agnostic(polygons | {"images": [{"id": 7}]}, [])
    with pytest.raises(ValueError, match="task"):
        evaluate_class_agnostic(good, [], "keypoints")


@pytest.mark.parametrize("caps", [(), (0, 10), (1.5,), (True,)])
def test_bad_caps(caps):
    with pytest.raises(ValueError, match="max_dets"):
        evaluate_class_agnostic(content([square(0, 0, 40)]), [], max_dets=caps)


def test_images_of_unknown_size_need_encodings_only():
    coco_gt = content([square(0, 0, 40)]) | {"images": [{"id": 7}]}
    for name in NAMES:
        got = evaluate_class_agnostic(coco_gt, detections([square(0, 0, 40)]), implementation=name)
        assert got["AP"] == pytest.approx(100)


def test_the_fastest_exact_implementation_is_taken():
    fastest_implementation.cache_clear()
    assert fastest_implementation() == NAMES[0]
    assert NAMES[-1] == "pycocotools"


@pytest.mark.parametrize("fault", ["crowds", "ties", "areas", "error"])
def test_an_inexact_implementation_is_dropped(fault, monkeypatch, caplog):
    def faulty(images, ground_truth, found, task, caps):
        if fault == "error":
            raise RuntimeError("broken build")
        if fault == "crowds":
            ground_truth = [a | {"iscrowd": 0} for a in ground_truth]
        if fault == "areas":
            ground_truth = [a | {"area": a["bbox"][2] * a["bbox"][3]} for a in ground_truth]
        if fault == "ties":
            found = found[::-1]
        return exact(images, ground_truth, found, task, caps)

    exact = implementations()["pycocotools"]
    assert equals_pycocotools(exact)
    monkeypatch.setattr(
        coco_api, "implementations", lambda: {"faulty": faulty, "pycocotools": exact}
    )
    fastest_implementation.cache_clear()
    try:
        assert fastest_implementation() == "pycocotools"
    finally:
        fastest_implementation.cache_clear()
    assert "faulty is not used" in caplog.text


def test_keys_are_those_of_coco():
    got = evaluate_class_agnostic(content([square(0, 0, 40)]), [])
    assert list(got) == KEYS
    assert all(type(value) is float for value in got.values())
