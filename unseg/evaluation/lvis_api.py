"""The PyPI package lvis 0.5.3 as it is, made to run under any numpy, and LVIS content for it.

Its evaluation uses ``np.float``, which numpy 1.24 dropped; its import sets up the root logger; its
constructors read files only; and it fails on empty results. None of that needs another package or
a change to numpy.
"""

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from unseg.data.datasets.synthetic import lvis_ground_truth
from unseg.data.datasets.synthetic.register import scene_set

Content = dict[str, Any]

# As Detectron2's LVISEvaluator reports them. r, c and f are categories by their training images.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")

FREQUENCIES = ("r", "c", "f")

# What lvis/__init__.py hands to logging.basicConfig.
_LINE = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_DATE = "%m/%d %H:%M:%S"


class _NumpyWithFloat:
    """numpy with the alias that it had: Python's float."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def import_lvis() -> ModuleType:
    """The package lvis, ready to evaluate.

    Its evaluation module gets a stand-in for numpy; numpy itself stays as it is. The handler that
    the package's import gives to the root logger, by which every line of a log appears twice, is
    kept out, or removed if the package has been imported before (Detectron2's loader does that).
    """
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)  # basicConfig does nothing if the root logger has a handler
    try:
        lvis = importlib.import_module("lvis")
    finally:
        root.removeHandler(nothing)
    for handler in root.handlers.copy():
        formatter = handler.formatter
        if formatter is not None and (formatter._fmt, formatter.datefmt) == (_LINE, _DATE):
            root.removeHandler(handler)
    evaluation = importlib.import_module("lvis.eval")
    if not hasattr(evaluation.np, "float"):
        evaluation.np = _NumpyWithFloat()
    return lvis


def lvis_ground_truth_of(dataset_name: str) -> tuple[Content, str]:
    """The content of an LVIS file (v0.5 or v1) for a registered data set, and where it is from.

    Returns:
        a content that the caller may change, and ``metadata.json_file`` or, for synthetic sets of
        the style "lvis" or "parts", the name.

    Raises:
        KeyError: no data set of that name is registered.
        ValueError: the data set is of no file, the file is not LVIS's (COCO's say nothing of
            frequencies and of what is known to be absent), or it has no annotations, like the files
            of the test splits.
    """
    if dataset_name not in DatasetCatalog.list():
        raise KeyError(f"dataset {dataset_name!r} is not registered")
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        try:
            return lvis_ground_truth(scene_set(dataset_name)), dataset_name
        except ValueError as error:
            raise ValueError(
                f"{dataset_name!r} has no LVIS ground truth: its metadata name no json_file, and "
                f"{error}"
            ) from error
    with PathManager.open(json_file) as file:
        content = json.load(file)
    _check_content(content, json_file)
    return content, str(json_file)


def _check_content(content: Any, name: str) -> None:
    needed = {
        "images": ("id", "neg_category_ids", "not_exhaustive_category_ids"),
        "annotations": ("image_id", "category_id", "bbox", "area", "segmentation"),
        "categories": ("id", "frequency"),
    }
    for table, keys in needed.items():
        if not isinstance(content, dict) or not content.get(table):
            raise ValueError(f"{name} has no {table}: it cannot be evaluated on")
        for entry in content[table]:
            missing = [key for key in keys if key not in entry]
            if missing:
                raise ValueError(f"{name} is not an LVIS file: {table} without {missing}")
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        unknown = {a[key] for a in content["annotations"]} - {x["id"] for x in content[table]}
        if unknown:
            raise ValueError(f"{name}: annotations of the {key} {unknown.pop()!r}, not in {table}")


def category_ids_of_classes(dataset_name: str, content: Content) -> dict[int, int]:
    """Category ids by 0-based class, as Detectron2's loader and LVISEvaluator number them.

    That is by ``thing_dataset_id_to_contiguous_id`` where the metadata have it (COCO's categories
    in LVIS's format), else the id less 1.
    """
    ids = sorted(category["id"] for category in content["categories"])
    numbered = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
    if numbered is None:
        return {number - 1: number for number in ids}
    missing = [number for number in ids if number not in numbered]
    if missing:
        raise ValueError(
            f"{dataset_name!r}: the metadata's thing_dataset_id_to_contiguous_id lacks the "
            f"category {missing[0]}"
        )
    return {numbered[number]: number for number in ids}


def part_of_images(content: Content, image_ids: set[int]) -> Content:
    """The content about some of the images, with all categories."""
    return content | {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [a for a in content["annotations"] if a["image_id"] in image_ids],
    }


def evaluate_lvis(
    content: Content, results: Sequence[Mapping[str, Any]], task: str
) -> dict[str, float]:
    """LVIS's average precision.

    The numbers are those of Detectron2's LVISEvaluator: at most 300 detections an image; sizes are
    by mask area for "segm" (lvis alone would go by the boxes of the results).

    Args:
        content: of an LVIS file; not changed. Annotation ids are not used.
        results: in COCO's result format: image_id and category_id of the file's, score, and bbox
            (XYWH), segmentation (compressed run lengths) or both; not changed. None may do.
        task: "bbox" or "segm".

    Returns:
        METRICS, times 100; NaN where there is no ground truth to measure by. Without a result what
        there is to find counts as missed: 0.

    Raises:
        ValueError: another task, a result without what the task needs, or of an unknown image or
            category.
    """
    key = {"bbox": "bbox", "segm": "segmentation"}.get(task)
    if key is None:
        raise ValueError(f"task must be 'bbox' or 'segm', got {task!r}")
    _check_results(content, results, key)
    if not content["annotations"]:
        return dict.fromkeys(METRICS, float("nan"))
    lvis = import_lvis()
    # Copies, as lvis writes into its entries. Ids from 1: matches are marked by them, 0 is none.
    annotations = [a | {"id": n} for n, a in enumerate(content["annotations"], 1)]
    truth = _in_memory(lvis.LVIS, content | {"annotations": annotations})
    frame = content | {"annotations": []}
    kept = ("image_id", "category_id", "score", key)
    entries = [{name: result[name] for name in kept} for result in results]
    if entries:
        found = lvis.LVISResults(_in_memory(lvis.LVIS, frame), entries)
    else:  # the constructor looks at the first entry
        found = _in_memory(lvis.LVISResults, frame)
    evaluation = lvis.LVISEval(truth, found, task)
    # Those without ground truth are left out of every mean; to go through them takes minutes.
    evaluation.params.cat_ids = sorted({a["category_id"] for a in annotations})
    evaluation.run()
    numbers = evaluation.get_results()
    return {m: 100 * float(numbers[m]) if numbers[m] > -1 else float("nan") for m in METRICS}


def _check_results(content: Content, results: Sequence[Mapping[str, Any]], key: str) -> None:
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for result in results:
        if result.get(key) is None:
            raise ValueError(f"a result of image {result['image_id']!r} has no {key}")
        if result["image_id"] not in images:
            raise ValueError(f"image {result['image_id']!r} is not in the ground truth")
        if result["category_id"] not in categories:
            raise ValueError(
                f"category {result['category_id']!r} of a result is not in the ground truth"
            )


def _in_memory(kind: type, content: Content) -> Any:
    """An lvis.LVIS, or an object of a kind of it, whose constructor would want a file."""
    made = kind.__new__(kind)
    made.logger = logging.getLogger(kind.__module__)
    made.dataset = content
    made._create_index()
    return made
