"""Cluster an embedding store by hyperbolic k-means, or look for the number of clusters.

    python -m unseg.tools.cluster_embeddings STORE --output clusters.npz [--config-file CONFIG]
        [--anchor] [--name-by DATASET] [--num-gpus N] [KEY VALUE ...]
    python -m unseg.tools.cluster_embeddings STORE --elbow [--grid K K K ...] [--plot elbow.png]

STORE is a folder of unseg.tools.embed_dataset. MODEL.HIERARCHICAL_EMBEDDING.CLUSTERING.* say how:
K, CENTROID (lorentz, frechet, or kmeans, scikit-learn's on tangent vectors), SEED, N_INIT,
MAX_ITER, TOL, MINIBATCH; without --config-file they have their default values. The file of clusters
is for MODEL.HIERARCHICAL_EMBEDDING.CLUSTERS; clusters.json beside it is a report. Stores of
annotations have classes, with which the clusters are compared.

--anchor runs scikit-learn's k-means on the tangent vectors as well, and prints it beside; its
hyperbolic distances are to the midpoints of its clusters. --name-by gives clusters the classes of
the annotations that their masks overlap (MODEL.HIERARCHICAL_EMBEDDING.NAMING.*); a model with such
clusters finds objects of these classes. --elbow clusters with each K of a grid and prints the table
and its knee over K and over log K; both depend on the ends of the grid.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from unseg.checkpoint import CheckpointError
from unseg.config import load_config
from unseg.data import open_embeddings, register_if_file
from unseg.engine.cluster_names import name_clusters
from unseg.engine.cluster_store import (
    agreement,
    cluster_rows,
    elbow_of,
    own_rows,
    plot_elbow,
    settings_for,
    table_row,
    write_clusters,
)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("store", metavar="STORE", help="folder of unseg.tools.embed_dataset")
    result.add_argument("--output", metavar="FILE", help="the file to write, .npz or .pth")
    result.add_argument("--config-file", default="", metavar="FILE")
    result.add_argument("--anchor", action="store_true", help="print Euclidean k-means beside it")
    result.add_argument(
        "--name-by", metavar="DATASET", help="a registered name, or x.json@DIR, that votes"
    )
    result.add_argument("--elbow", action="store_true", help="try several K, write no clusters")
    result.add_argument("--grid", type=int, nargs="+", metavar="K", help="for --elbow: the K")
    result.add_argument("--plot", metavar="FILE", help="for --elbow: a picture (.png) of it")
    result.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    result.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return result


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags; ends the process if they do not go together."""
    parser = make_parser()
    # Not parse_args: it takes KEY VALUE only directly behind STORE.
    args = parser.parse_intermixed_args(words)
    if args.elbow == bool(args.output):
        parser.error("either --output FILE or --elbow is needed")
    if args.elbow and (args.anchor or args.name_by):
        parser.error("--anchor and --name-by are for --output")
    if not args.elbow and (args.grid or args.plot):
        parser.error("--grid and --plot are for --elbow")
    if args.output and Path(args.output).suffix not in (".npz", ".pth"):
        parser.error(f"--output {args.output} must end in .npz or .pth")
    if args.num_gpus < 1 or (args.num_gpus > 1 and (args.elbow or args.anchor)):
        parser.error("--num-gpus must be at least 1, and 1 with --elbow and --anchor")
    return args


def _device(cfg: CfgNode) -> torch.device:
    """Several ranks talk by NCCL where there are GPUs, as Detectron2's launch wants it."""
    if comm.get_world_size() > 1 and torch.cuda.is_available():
        return torch.device("cuda", comm.get_local_rank())
    return torch.device(cfg.MODEL.DEVICE)


def cluster_embeddings(args: argparse.Namespace) -> None:
    """One rank's work; the first one prints and writes.

    Raises:
        ValueError, OSError: the store, a setting or the output is wrong.
    """
    setup_logger(distributed_rank=comm.get_rank(), name="unseg")
    cfg = load_config(args.config_file, args.opts)
    store = open_embeddings(args.store)
    if not len(store):
        raise ValueError(f"{args.store}: the store holds no objects")
    settings = settings_for(cfg, store)
    start, stop = own_rows(store)
    tangents = torch.from_numpy(store.column("tangents", start, stop)).to(_device(cfg))
    if args.elbow:
        table = elbow_of(tangents, settings, args.grid)
        sys.stdout.write(f"{table}\n")
        if args.plot:
            plot_elbow(table, Path(args.plot), settings)
        return
    results = [cluster_rows(tangents, settings)]
    labels = [torch.cat(comm.all_gather(results[0].labels)).numpy()]
    if not comm.is_main_process():
        return
    if args.anchor and settings.centroid != "kmeans":
        anchor = replace(settings, centroid="kmeans")
        results.append(cluster_rows(tangents, anchor))
        labels.append(results[1].labels.numpy())
    rows = [
        table_row(result, agreement(own, store.classes))
        for result, own in zip(results, labels, strict=True)
    ]
    table = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".5g")
    space = store.geometry + (f", c = {store.c:g}" if store.geometry == "poincare" else "")
    sys.stdout.write(f"{len(store)} objects, {store.dim} dimensions, {space}\n\n{table}\n")
    clusters = results[0].clusters
    if args.name_by:
        names = name_clusters(store, labels[0], len(clusters), register_if_file(args.name_by), cfg)
        clusters = replace(clusters, classes=torch.from_numpy(names.classes))
    write_clusters(Path(args.output), replace(results[0], clusters=clusters), store)
    sys.stdout.write(f"\nwrote {args.output} and its report\n")


def main() -> None:
    """Entry point."""
    args = parse()
    try:
        if args.num_gpus == 1:
            cluster_embeddings(args)
        else:
            launch(cluster_embeddings, args.num_gpus, dist_url="auto", args=(args,))
    except (AssertionError, KeyError) as error:  # fvcore's, for wrong overrides
        sys.exit(f"error: {error}")
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
