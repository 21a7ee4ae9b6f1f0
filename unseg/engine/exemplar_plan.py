"""Which images exemplars are cut out of, in units of work that no number of processes changes."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from unseg.data.build import skips_bad_images
from unseg.discovery import ExemplarError, choose_random

SOURCES = ("folder", "random", "kmeans")


@dataclass(frozen=True)
class Candidates:
    """Images of one category: exemplars come from the first `count` that can be read.

    Attributes:
        category: its name.
        file_names: relative to the root of all images; beyond `count` they are spares.
        count: exemplars wanted.
    """

    category: str
    file_names: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class ExemplarPlan:
    """All exemplars that are wanted.

    Attributes:
        root: folder or URI prefix of the file names.
        units: fixed batches, in the order of the pool; a category may go on in the next unit.
        unreadable: images that were left out before.
    """

    root: str
    units: tuple[tuple[Candidates, ...], ...]
    unreadable: int = 0

    def fingerprint(self) -> str:
        """sha256 of what is wanted, wherever the images lie."""
        return hashlib.sha256(repr(self.units).encode()).hexdigest()

    def wanted(self) -> dict[str, int]:
        """Exemplars by category, in the order of the pool."""
        counts: dict[str, int] = {}
        for candidates in (candidates for unit in self.units for candidates in unit):
            counts[candidates.category] = counts.get(candidates.category, 0) + candidates.count
        return counts


def check_build_settings(cfg: CfgNode) -> None:
    """
    Raises:
        ExemplarError: SOURCE is unknown, or a number out of its range.
        ValueError: so is how bad images are treated.
    """
    build = cfg.MODEL.EXEMPLAR.BUILD
    if build.SOURCE not in SOURCES:
        raise ExemplarError(
            f"MODEL.EXEMPLAR.BUILD.SOURCE {build.SOURCE!r} is unknown; there are: "
            f"{', '.join(SOURCES)}"
        )
    for key in ("PER_CATEGORY", "NUM_CATEGORIES", "BATCH_SIZE"):
        if build[key] < 1:
            raise ExemplarError(f"MODEL.EXEMPLAR.BUILD.{key} must be 1 or more, got {build[key]}")
    if not 0 <= build.SEED < 2**32:  # scikit-learn's limits
        raise ExemplarError(f"MODEL.EXEMPLAR.BUILD.SEED must be in 0..2**32 - 1, got {build.SEED}")
    skips_bad_images(cfg)


def plan_folder(
    root: str, categories: Mapping[str, Sequence[str]], per_category: int, batch_size: int
) -> ExemplarPlan:
    """The first images of each class; as many whole classes a unit as fit into a batch.

    Args:
        root: the folder of class folders.
        categories: the images of each class, in the order in which they are taken.
        per_category: exemplars of each.
        batch_size: images per unit; those of one class stay together all the same.
    """
    wanted = [Candidates(name, tuple(files), per_category) for name, files in categories.items()]
    return ExemplarPlan(root, _batches(wanted, max(1, batch_size // per_category)))


def plan_random(
    root: str,
    file_names: Sequence[str],
    count: int,
    *,
    batch_size: int,
    seed: int,
    unreadable: int = 0,
) -> ExemplarPlan:
    """Images at random, as the one category "random"; a larger count adds to them.

    Args:
        root: of the file names.
        file_names: all there are.
        count: exemplars in all; fewer if there are fewer images.
        batch_size: images per unit. Each has spares of its own, which no other unit takes.
        seed: of the choice.
        unreadable: images that were left out of `file_names`.
    """
    count = min(count, len(file_names))
    chosen = choose_random(len(file_names), count, seed)
    more = choose_random(len(file_names), min(2 * count, len(file_names)), seed)
    spare = sorted(set(more) - set(chosen))
    parts = _batches(chosen, batch_size)
    units = [
        (Candidates("random", _pick(file_names, [*part, *spare[i :: len(parts)]]), len(part)),)
        for i, part in enumerate(parts)
    ]
    return ExemplarPlan(root, tuple(units), unreadable)


def plan_medoids(
    root: str,
    file_names: Sequence[str],
    medoids: Iterable[tuple[int, int]],
    per_category: int,
    *,
    batch_size: int,
    unreadable: int = 0,
) -> ExemplarPlan:
    """The medoids of clusters, as categories "cluster 000", "cluster 001", ...

    Args:
        root: of the file names.
        file_names: all there are.
        medoids: (cluster, index of a file), those of a cluster one after the other.
        per_category: exemplars wanted of each cluster; it may have fewer images.
        batch_size: images per unit; those of one cluster stay together all the same.
        unreadable: images that were left out before.
    """
    clusters: dict[int, list[int]] = {}
    for cluster, index in medoids:
        clusters.setdefault(cluster, []).append(index)
    wanted = [
        Candidates(f"cluster {cluster:03d}", _pick(file_names, indices), per_category)
        for cluster, indices in clusters.items()
    ]
    return ExemplarPlan(root, _batches(wanted, max(1, batch_size // per_category)), unreadable)


def _batches(items: Sequence, size: int) -> tuple[tuple, ...]:
    return tuple(tuple(items[i : i + size]) for i in range(0, len(items), size))


def _pick(items: Sequence[str], indices: Iterable[int]) -> tuple[str, ...]:
    return tuple(items[index] for index in indices)
