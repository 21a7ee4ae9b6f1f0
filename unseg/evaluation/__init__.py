"""Evaluators, chosen by ``cfg.TEST.EVALUATORS`` or by the kind of the dataset."""

from unseg.evaluation.build import DEFAULT_EVALUATORS, EVALUATORS, build_evaluator
from unseg.evaluation.coco_api import evaluate_class_agnostic
from unseg.evaluation.coco_class_agnostic import ClassAgnosticCOCOEvaluator
from unseg.evaluation.stock import COCOEvaluator, LVISEvaluator

__all__ = [
    "DEFAULT_EVALUATORS",
    "EVALUATORS",
    "COCOEvaluator",
    "ClassAgnosticCOCOEvaluator",
    "LVISEvaluator",
    "build_evaluator",
    "evaluate_class_agnostic",
]
