"""Evaluators, chosen by ``cfg.TEST.EVALUATORS`` or by the kind of the dataset."""

from unseg.evaluation.build import DEFAULT_EVALUATORS, EVALUATORS, build_evaluator
from unseg.evaluation.cluster_lvis import ClusterLVISEvaluator
from unseg.evaluation.cluster_naming import ClusterNames, NamingSettings
from unseg.evaluation.clustering import ClusterSettings
from unseg.evaluation.coco_api import evaluate_class_agnostic
from unseg.evaluation.coco_class_agnostic import ClassAgnosticCOCOEvaluator
from unseg.evaluation.matching import (
    confusion_of_labels,
    foreground_f_score,
    frame_miou,
    hungarian,
    pairwise_iou_of_labels,
)
from unseg.evaluation.patches import PatchMaskEvaluator
from unseg.evaluation.proposal_recall import ProposalRecallEvaluator
from unseg.evaluation.stock import COCOEvaluator, LVISEvaluator
from unseg.evaluation.video_miou import VideoMIoUEvaluator

__all__ = [
    "DEFAULT_EVALUATORS",
    "EVALUATORS",
    "COCOEvaluator",
    "ClassAgnosticCOCOEvaluator",
    "ClusterLVISEvaluator",
    "ClusterNames",
    "ClusterSettings",
    "LVISEvaluator",
    "NamingSettings",
    "PatchMaskEvaluator",
    "ProposalRecallEvaluator",
    "VideoMIoUEvaluator",
    "build_evaluator",
    "confusion_of_labels",
    "evaluate_class_agnostic",
    "foreground_f_score",
    "frame_miou",
    "hungarian",
    "pairwise_iou_of_labels",
]
