"""Join two DeepMasks: the masks of one, the scores of the other (DeepMask20*).

    python -m unseg.tools.merge_scorer MASKS.pth SCORES.pth OUTPUT.pth

Both are checkpoints of the same config but for its data. OUTPUT is for MODEL.WEIGHTS of that config
with MODEL.DEEPMASK.TEST.SCORER True, and for inference only. It holds all weights of MASKS, under
their names, and trunk and head of SCORES as ``scorer.*``.
"""

import argparse
import logging
import os
from typing import Any

import torch
from detectron2.utils.logger import setup_logger
from torch import Tensor

from unseg.checkpoint import CheckpointError, load_weights_file, save_converted

logger = logging.getLogger("unseg.tools.merge_scorer")

_PARTS = ("backbone.", "head.")


def _weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The model inside a checkpoint of a DeepMask without a scorer."""
    content: Any = load_weights_file(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    weights = {k: torch.as_tensor(v) for k, v in content.items() if hasattr(v, "shape")}
    if any(name.startswith("scorer.") for name in weights):
        raise CheckpointError(f"{path} has been merged before: it holds scorer.* already")
    for part in ("backbone.", "head.score."):
        if not any(name.startswith(part) for name in weights):
            raise CheckpointError(
                f"{path} is no DeepMask: none of its {len(weights)} weights begins with {part!r}, "
                f"e.g. {sorted(weights)[:3]}"
            )
    return weights


def _layers(weights: dict[str, Tensor]) -> set[str]:
    """Names in trunk and head, without the mask layer: the head of a SharpMask has none."""
    return {n for n in weights if n.startswith(_PARTS) and not n.startswith("head.mask.")}


def merge_scorer(masks: str | os.PathLike, scores: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint with the weights of `masks`, and trunk and head of `scores` as ``scorer.*``.

    Args:
        masks, scores: files of :func:`unseg.checkpoint.load_weights_file`.

    Returns:
        ``{"model": {name: tensor}, "__author__": ..., "matching_heuristics": False}``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file is damaged or no DeepMask, has a scorer already, or the two are of
            different configs: a weight that both have differs in shape, or one of trunk or head is
            missing in one of them.
    """
    first, second = _weights(masks), _weights(scores)
    second = {name: value for name, value in second.items() if name.startswith(_PARTS)}
    for name, value in second.items():
        if name in first and first[name].shape != value.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(first[name].shape)} in {masks} and "
                f"{tuple(value.shape)} in {scores}: they are of different configs"
            )
    if other := sorted(_layers(first) ^ _layers(second)):
        raise CheckpointError(
            f"{masks} and {scores} are of different configs: only one of them has "
            f"{', '.join(other[:3])}" + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        )
    return {
        "model": first | {f"scorer.{name}": value for name, value in second.items()},
        "__author__": "unseg (merge_scorer)",
        "matching_heuristics": False,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("masks", help="checkpoint of the model whose masks are taken")
    parser.add_argument("scores", help="checkpoint of the model whose scores are taken")
    parser.add_argument("output", help="the file to write (.pth)")
    args = parser.parse_args()
    setup_logger(name="unseg")
    merged = merge_scorer(args.masks, args.scores)
    save_converted(merged, args.output)
    logger.info("wrote %d weights to %s", len(merged["model"]), args.output)


if __name__ == "__main__":
    main()
