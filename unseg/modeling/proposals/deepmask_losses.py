"""DeepMask's two losses, and which of them a step is about.

Source: Pinheiro et al., "Learning to segment object candidates" (NeurIPS 2015), section 3.2: with
y = +1 or -1 the label of a patch and m its mask of +1 and -1, the sum over patches of
``(1 + y) / 2 * mean(log(1 + exp(-m * f_mask))) + lambda * log(1 + exp(-y * f_score))``.

Legend: N positive patches, P patches, g pixels per side of a mask.
"""

import hashlib
import math
from dataclasses import dataclass

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor

LOSS_REDUCTIONS = ("sum", "mean")
TRAIN_MODES = ("joint", "alternate")


@dataclass(frozen=True)
class DeepMaskLosses:
    """How the two losses of a step are weighed.

    Attributes:
        score_weight: lambda, of the score's loss.
        reduction: "sum" over the patches of all processes, or "mean", divided by their number.
        train_mode: "joint", one step on both losses; "alternate", on one of them, by a fair coin.
        coin_seed: chooses among sequences of coins.

    Raises:
        ValueError: a value that is none of these; the message names the config's key.
    """

    score_weight: float = 1.0 / 32
    reduction: str = "sum"
    train_mode: str = "joint"
    coin_seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score_weight) and self.score_weight >= 0):
            raise ValueError(
                f"MODEL.DEEPMASK.SCORE_WEIGHT must not be negative: {self.score_weight}"
            )
        for key, value, values in (
            ("LOSS_REDUCTION", self.reduction, LOSS_REDUCTIONS),
            ("TRAIN_MODE", self.train_mode, TRAIN_MODES),
        ):
            if value not in values:
                raise ValueError(
                    f"MODEL.DEEPMASK.{key} must be one of {', '.join(values)}: {value!r}"
                )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "DeepMaskLosses":
        node = cfg.MODEL.DEEPMASK
        return cls(node.SCORE_WEIGHT, node.LOSS_REDUCTION, node.TRAIN_MODE, max(cfg.SEED, 0))

    def coin(self, iteration: int) -> str:
        """The branch of an iteration, "mask" or "score": the same in all processes and after a
        resume, whatever else has been drawn."""
        digest = hashlib.blake2b(f"{self.coin_seed} {iteration}".encode(), digest_size=1).digest()
        return ("mask", "score")[digest[0] & 1]

    def factor(self, patches: int) -> float:
        """What this process multiplies its sums over patches by, of which it has so many.

        DistributedDataParallel averages gradients over processes. A sum over all patches is the
        average of the processes' sums times their number; the mean over all patches is the average
        of the processes' means, as all have equally many.
        """
        return float(comm.get_world_size()) if self.reduction == "sum" else 1.0 / patches


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over patches of the mean over pixels of ``log(1 + exp(-target * logit))``.

    Args:
        logits: (N, g, g).
        targets: (N, g, g) of +1 and -1.
    """
    if len(logits) == 0:
        return logits.sum()  # zero, but connected to what the logits came from
    return F.softplus(-targets.to(logits.dtype) * logits).mean(dim=(1, 2)).sum()


def score_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over patches of ``log(1 + exp(-label * logit))``, both (P,), labels +1 or -1."""
    return F.softplus(-labels.to(logits.dtype) * logits).sum()
