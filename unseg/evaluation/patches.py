"""How well a network masks and scores patches: DeepMask's measure during training.

It says nothing about finding objects in images: see ProposalRecallEvaluator.

Legend: P patches of an image, g side of their masks.
"""

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate
from torch import Tensor

from unseg.evaluation.build import EVALUATORS

logger = logging.getLogger(__name__)

_INPUTS = ("patch_masks", "patch_labels")
_OUTPUTS = ("patch_logits", "patch_scores")


def patch_ious(logits: Tensor, targets: Tensor) -> np.ndarray:
    """IoU of each predicted mask, the pixels of logit 0 or more, with its target.

    Args:
        logits: float (P, g, g).
        targets: (P, g, g), 1 in the mask, anything else outside.

    Returns:
        float64 (P,); 1 where both are empty.
    """
    predicted, mask = logits >= 0, targets == 1
    inter = (predicted & mask).sum((1, 2)).double()
    union = (predicted | mask).sum((1, 2)).double()
    return (inter / union).masked_fill(union == 0, 1).cpu().numpy()


@EVALUATORS.register()
class PatchMaskEvaluator(DatasetEvaluator):
    """IoU of masks on positive patches, and how often a patch's score has the right sign.

    Keeps a number or two per patch. The mapper has to give patches in testing: DeepMaskPatchMapper
    does if this evaluator is among ``TEST.EVALUATORS``.
    """

    @configurable
    def __init__(self, dataset_name: str, *, distributed: bool = True) -> None:
        """
        Args:
            dataset_name: named in the log.
            distributed: collect the numbers of all ranks on the main process, which alone returns
                some; otherwise each process evaluates its own.
        """
        self._name = dataset_name
        self._distributed = distributed
        self.reset()

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_name: str) -> dict[str, Any]:
        """Arguments; nothing of them is configurable, so that numbers are comparable."""
        return {"dataset_name": dataset_name}

    def reset(self) -> None:
        """Forget all patches."""
        # IoUs (positives,) and right scores (P,), by image id: an image seen twice counts once.
        self._images: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Measure the patches of some images.

        Args:
            inputs: with ``image_id``, ``patch_masks`` (P, g, g) and ``patch_labels`` (P,), 1 for
                positives.
            outputs: with ``patch_logits`` (P, g, g) and ``patch_scores`` (P,), logits. A score of 0
                or more says that there is an object.

        Raises:
            ValueError: one of these is missing, shapes do not fit, or logits are NaN/inf; the
                message names the image.
        """
        for record, output in zip(inputs, outputs, strict=True):
            try:
                self._images[record["image_id"]] = _measure(record, output)
            except ValueError as error:
                raise ValueError(f"image {record['image_id']!r}: {error}") from error

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{"patches": numbers}``, all times 100; {} on other ranks than the main one.

        Of the positive patches' masks: "IoU" (mean), "IoU-median", "IoU>50" and "IoU>70" (shares of
        patches); of the scores of all patches: "score-accuracy". NaN where there is no patch.
        """
        images = self._images
        if self._distributed and comm.get_world_size() > 1:
            comm.synchronize()
            gathered = comm.gather(images, dst=0)
            if not comm.is_main_process():
                return {}
            images = {k: v for part in gathered for k, v in part.items()}
        ious = np.concatenate([np.zeros(0), *(ious for ious, _ in images.values())])
        right = np.concatenate([np.zeros(0, bool), *(right for _, right in images.values())])
        numbers = {
            "IoU": _mean(ious),
            "IoU-median": 100 * float(np.median(ious)) if len(ious) else float("nan"),
            "IoU>50": _mean(ious > 0.5),
            "IoU>70": _mean(ious > 0.7),
            "score-accuracy": _mean(right),
        }
        logger.info(
            "Patches of %s: %d images, %d patches, %d of them positive\n%s",
            self._name,
            len(images),
            len(right),
            len(ious),
            tabulate([list(numbers.values())], list(numbers), tablefmt="pipe", floatfmt=".2f"),
        )
        return {"patches": numbers}


def _mean(values: np.ndarray) -> float:
    return 100 * float(values.mean()) if len(values) else float("nan")


def _measure(record: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """IoUs of the positive patches, and which scores of all patches are right."""
    for keys, found, owner in ((_INPUTS, record, "input"), (_OUTPUTS, output, "output")):
        missing = [key for key in keys if key not in found]
        if missing:
            raise ValueError(f"the {owner} has no {', '.join(missing)}, but {sorted(found)}")
    logits, scores = (output[key].detach() for key in _OUTPUTS)
    masks, labels = (record[key].to(logits.device) for key in _INPUTS)
    if logits.shape != masks.shape or not scores.shape == labels.shape == masks.shape[:1]:
        raise ValueError(
            f"patch_logits {tuple(logits.shape)} must be as patch_masks {tuple(masks.shape)}, and "
            f"patch_scores {tuple(scores.shape)} as patch_labels {tuple(labels.shape)}"
        )
    if not (logits.isfinite().all() and scores.isfinite().all()):
        raise ValueError("patch_logits or patch_scores are NaN/inf")
    positive = labels == 1
    right = (scores >= 0) == positive.to(scores.device)
    return patch_ious(logits[positive], masks[positive]), right.cpu().numpy()
