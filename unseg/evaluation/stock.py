"""Detectron2's class-aware evaluators under their own names in the EVALUATORS registry."""

import json
import os

import detectron2.evaluation as detectron2_evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator

from unseg.checkpoint.files import atomic_write
from unseg.compat import detectron2_extension
from unseg.evaluation.build import EVALUATORS
from unseg.evaluation.coco_class_agnostic import as_file_name, output_folder
from unseg.evaluation.lvis_api import import_lvis, lvis_ground_truth_of


def _refuse_one_class(cfg: CfgNode, dataset_name: str, evaluator: str) -> None:
    """A one-class model on a dataset of several classes would be scored on the first class."""
    classes = MetadataCatalog.get(dataset_name).get("thing_classes", [])
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1 and len(classes) > 1:
        raise ValueError(
            f"{evaluator} on {dataset_name!r} would take every prediction of a one-class model "
            f"(MODEL.ROI_HEADS.NUM_CLASSES 1) for {classes[0]!r}: use ClassAgnosticCOCOEvaluator"
        )


@EVALUATORS.register()
def COCOEvaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:  # noqa: N802
    """Detectron2's COCOEvaluator, for class-aware models.

    A data set that is not of a COCO file is written as one to the output folder, anew each time.
    """
    _refuse_one_class(cfg, dataset_name, "COCOEvaluator")
    folder = output_folder(cfg, dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    converted = metadata.get("json_file") is None
    if converted:
        # The evaluator would do this itself, but take a file of an earlier run if there is one, and
        # put the data set's name, slashes and all, into the path.
        path = os.path.join(folder, f"{as_file_name(dataset_name)}_coco_format.json")
        convert_to_coco_json(dataset_name, path, allow_cached=False)
        metadata.json_file = path
    try:
        return detectron2_evaluation.COCOEvaluator(
            dataset_name,
            output_dir=folder,
            # Detectron2 0.5 without its C++ extension crashes on the first prediction otherwise.
            use_fast_impl=hasattr(detectron2_extension(), "COCOevalEvaluateImages"),
        )
    finally:
        if converted:  # the file has been read; others must not take it for the data set's own
            del metadata.json_file


@EVALUATORS.register()
def LVISEvaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:  # noqa: N802
    """Detectron2's LVISEvaluator (lvis-api), for class-aware models.

    A synthetic set is written as a file to the output folder, anew each time.

    Raises:
        ValueError: a one-class model, or a data set without LVIS ground truth.
    """
    _refuse_one_class(cfg, dataset_name, "LVISEvaluator")
    import_lvis()  # so that the evaluator's own import gets one that works
    folder = output_folder(cfg, dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    converted = metadata.get("json_file") is None
    if converted:
        content, _ = lvis_ground_truth_of(dataset_name)
        path = os.path.join(folder, f"{as_file_name(dataset_name)}_lvis_format.json")
        with atomic_write(path) as file:
            json.dump(content, file)
        metadata.json_file = path
    try:
        return detectron2_evaluation.LVISEvaluator(dataset_name, output_dir=folder)
    finally:
        if converted:  # the file has been read; others must not take it for the data set's own
            del metadata.json_file
