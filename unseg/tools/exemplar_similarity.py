"""How similar a model's objects are to the exemplars of a pool: choose ALPHA and BETA by it.

    python -m unseg.tools.exemplar_similarity --config-file CONFIG [--batches N] [--random-weights]
        [KEY VALUE ...]

Runs the model of MODEL.WEIGHTS over training batches of DATASETS.TRAIN without learning, and prints
quantiles of the cosines that the loss would see: of each object with its most similar exemplar (its
positive, if above MODEL.EXEMPLAR.ALPHA), of all pairs of objects and exemplars (negatives, if below
MODEL.EXEMPLAR.BETA), and of each exemplar with its most similar other one.
"""

import argparse
import sys

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import Tensor

from unseg.checkpoint import CheckpointError
from unseg.config import load_config
from unseg.data import build_train_loader, register_datasets_in_config
from unseg.data.sampling import seed_rng
from unseg.discovery import ExemplarError
from unseg.engine.exemplars import attach_exemplars
from unseg.engine.find_masks import load_weights
from unseg.modeling.exemplars import ExemplarContrast
from unseg.modeling.losses import (
    choose_exemplars,
    compare_with_exemplars,
    largest_exemplar_loss,
)

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config-file", required=True, metavar="FILE")
    result.add_argument("--batches", type=int, default=50, help="training batches to look at")
    result.add_argument(
        "--random-weights", action="store_true", help="load no weights (to try a model out)"
    )
    result.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return result


@torch.no_grad()
def collect_embeddings(
    cfg: CfgNode, batches: int, *, random_weights: bool = False
) -> tuple[ExemplarContrast, Tensor]:
    """The exemplar head of a model, with its pool encoded, and the embeddings (N, C) of the objects
    in the first training batches.

    Raises:
        ExemplarError: the model has no exemplar head with a weight, or no pool.
        CheckpointError: see :func:`unseg.engine.find_masks.load_weights`.
    """
    register_datasets_in_config(cfg)
    model = build_model(cfg)
    if not random_weights:
        load_weights(model, cfg.MODEL.WEIGHTS)
    head = attach_exemplars(model, cfg)
    if head is None:
        raise ExemplarError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no exemplar head, or "
            "MODEL.EXEMPLAR.WEIGHT is 0"
        )
    found: list[Tensor] = []
    head.embed.register_forward_hook(lambda _, args, output: found.append(output))
    loader = build_train_loader(cfg)
    model.train()
    with EventStorage():
        for number, batch in zip(range(batches), loader):
            seed_rng(loader.seed, number)  # copy-paste and sampled proposals
            model(batch)
    objects = torch.cat(found)
    return head, objects[objects.any(dim=1)]


def make_table(head: ExemplarContrast, objects: Tensor) -> str:
    """Quantiles of cosines, and what the head's thresholds make of them.

    Raises:
        ExemplarError: there are no objects.
    """
    if len(objects) == 0:
        raise ExemplarError("the batches hold no object that a cell learns: more --batches?")
    pool = head.pool_embeddings
    similarities = compare_with_exemplars(objects, pool)
    among = compare_with_exemplars(pool, pool).fill_diagonal_(-2).max(dim=1).values
    columns = {
        "object, its most similar exemplar": similarities.max(dim=1).values,
        "object, any exemplar": similarities.flatten(),
        "exemplar, its most similar other": among if len(pool) > 1 else torch.full((1,), torch.nan),
    }
    # Not torch.quantile, which takes no more than 16 million numbers.
    rows = []
    for q in QUANTILES:
        values = [x.sort().values[round(q * (len(x) - 1))].item() for x in columns.values()]
        rows.append([f"{100 * q:g} %", *values])
    table = tabulate(rows, ["quantile", *columns], tablefmt="pipe", floatfmt=".3f")
    positive, _, negatives = choose_exemplars(similarities, head.alpha, head.beta)
    used = positive & negatives.any(dim=1)
    bound = largest_exemplar_loss(head.alpha, head.beta, head.temperature)
    return (
        f"{len(objects)} objects, {len(pool)} exemplars of length {pool.shape[1]}\n\n{table}\n\n"
        f"MODEL.EXEMPLAR.ALPHA {head.alpha}: {_percent(positive)} of the objects have a positive\n"
        f"MODEL.EXEMPLAR.BETA {head.beta}: {_percent(negatives)} of all pairs are negative, "
        f"{_percent(negatives.any(dim=1))} of the objects have one\n"
        f"the loss is about the {_percent(used)} of the objects that have both, and no object's is "
        f"above {bound:.3g} (MODEL.EXEMPLAR.TEMPERATURE {head.temperature}, before the weight)"
    )


def _percent(values: Tensor) -> str:
    return f"{100 * values.float().mean().item():.1f} %"


def main() -> None:
    """Entry point."""
    args = parser().parse_args()
    setup_logger(name="unseg")
    if args.batches < 1:
        sys.exit(f"error: --batches must be at least 1, got {args.batches}")
    try:
        cfg = load_config(args.config_file, args.opts)
    except (AssertionError, KeyError, OSError) as error:  # fvcore's, for wrong overrides and files
        sys.exit(f"error: {error}")
    try:
        head, objects = collect_embeddings(cfg, args.batches, random_weights=args.random_weights)
        table = make_table(head, objects)
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{table}\n")


if __name__ == "__main__":
    main()
