"""Evaluators by name from the config, or by the kind of the dataset."""

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from fvcore.common.registry import Registry

EVALUATORS = Registry("EVALUATORS")
EVALUATORS.__doc__ = """Names for ``cfg.TEST.EVALUATORS``. Each makes a DatasetEvaluator when it is
called with ``(cfg, dataset_name)``: a function, or a class with Detectron2's ``@configurable`` and
``from_config(cls, cfg, dataset_name)``."""

# For an empty cfg.TEST.EVALUATORS: evaluators by the dataset's `evaluator_type`. The models of this
# package predict objects, not classes, so data sets of instances are evaluated class-agnostically
# whatever classes they have: on an 80-class data set Detectron2's COCOEvaluator would take every
# prediction of a one-class model for a person, and say nothing. Users of class-aware models name
# "COCOEvaluator" or "LVISEvaluator" in cfg.TEST.EVALUATORS.
DEFAULT_EVALUATORS: dict[str, tuple[str, ...]] = {
    "coco": ("ClassAgnosticCOCOEvaluator",),
    "coco_class_agnostic": ("ClassAgnosticCOCOEvaluator",),
    "lvis": ("ClassAgnosticCOCOEvaluator",),
    "pascal_voc": ("ClassAgnosticCOCOEvaluator",),
}

# Their results share the keys "bbox" and "segm", which DatasetEvaluators refuses, but only after
# the inference.
_SAME_RESULTS = {"ClassAgnosticCOCOEvaluator", "COCOEvaluator", "LVISEvaluator"}


def evaluator_names(cfg: CfgNode, dataset_name: str) -> tuple[str, ...]:
    """Names of the evaluators for a dataset: ``cfg.TEST.EVALUATORS``, else the default ones.

    Raises:
        ValueError: the dataset's metadata have no ``evaluator_type`` with a default.
    """
    if cfg.TEST.EVALUATORS:
        return tuple(cfg.TEST.EVALUATORS)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in DEFAULT_EVALUATORS:
        raise ValueError(
            f"no default evaluator for {dataset_name!r} (evaluator_type {kind!r}); name some in "
            f"TEST.EVALUATORS: {_known()}"
        )
    return DEFAULT_EVALUATORS[kind]


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator, or Detectron2's DatasetEvaluators of several, for a registered dataset.

    Args:
        cfg: with ``TEST.EVALUATORS``; what else is read is up to the evaluators.
        dataset_name: a name in Detectron2's DatasetCatalog.

    Raises:
        KeyError: an unknown evaluator; the message lists the known ones.
        ValueError: no evaluator for this kind of dataset, or two that return the same keys.
    """
    names = evaluator_names(cfg, dataset_name)
    for name in names:
        if name not in EVALUATORS:
            raise KeyError(f"TEST.EVALUATORS: {name!r} is not registered; there are: {_known()}")
    clash = [name for name in names if name in _SAME_RESULTS]
    if len(clash) > 1:
        raise ValueError(f"TEST.EVALUATORS: {clash} return the same keys, choose one of them")
    evaluators = [EVALUATORS.get(name)(cfg, dataset_name) for name in names]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _known() -> str:
    return ", ".join(sorted(name for name, _ in EVALUATORS))
