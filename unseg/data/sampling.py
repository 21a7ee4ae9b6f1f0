"""Training data whose order and randomness depend on the seed and the iteration only.

A killed and resumed run must see what the uninterrupted run would have seen. So the order of images
is a pure function of the seed: resuming replays it without loading anything. Each image drawn has a
number, and the mapper's randomness is seeded from (seed, number), whatever worker maps it and
however many there are.
"""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from unseg.data.image import ImageReadError

logger = logging.getLogger(__name__)

# INPUT.ON_BAD_IMAGE "skip" gives up when more than this share of the images cannot be read.
_MAX_BAD_FRACTION = 0.01


@contextlib.contextmanager
def isolated_rng(*entropy: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators for a block, and restore them after it.

    Args:
        entropy: non-negative integers; equal ones give equal streams.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(*entropy)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_rng(*entropy: int) -> None:
    """Seed Python's, numpy's and torch's global generators (CUDA's too) from integers."""
    torch.manual_seed(_seed_cpu(*entropy))


def _seed_cpu(*entropy: int) -> int:
    """Seed the generators of the CPU alone; returns torch's seed."""
    words = np.random.SeedSequence(entropy).generate_state(3, dtype=np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


class TrainingBatchSampler(Sampler):
    """An endless stream of batches of (index, draw number) for one rank.

    Every epoch is a permutation of the data (with repeat factors: of each image repeated that
    often, fractions rounded at random), dealt to the ranks in turn. With `is_wide`, batches hold
    images of one orientation.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        is_wide: Sequence[bool] | None = None,
        repeat_factors: np.ndarray | None = None,
    ):
        """
        Args:
            num_images: size of the data set.
            batch_size: images per batch of this rank.
            seed: of the order, equal on all ranks.
            start_batch: batches to leave out at the beginning (when resuming).
            rank, world_size: which share of the stream.
            is_wide: (num_images,) orientation; None mixes orientations.
            repeat_factors: (num_images,) float, how often an image comes per epoch; None is 1.
        """
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start_batch = start_batch
        self.rank, self.world_size = rank, world_size
        self.is_wide = is_wide
        self.repeat_factors = repeat_factors

    def _draws(self) -> Iterator[tuple[int, int]]:
        """All (index, draw number) of this rank, in order."""
        draw = epoch = 0
        while True:
            rng = np.random.default_rng((self.seed, epoch))
            indices = np.arange(self.num_images)
            if self.repeat_factors is not None:
                whole = np.floor(self.repeat_factors)
                extra = rng.random(self.num_images) < self.repeat_factors - whole
                indices = np.repeat(indices, (whole + extra).astype(np.int64))
            for index in rng.permutation(indices).tolist():
                if draw % self.world_size == self.rank:
                    yield index, draw
                draw += 1
            epoch += 1

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        open_batches: tuple[list, list] = ([], [])
        for index, draw in self._draws():
            group = 0 if self.is_wide is None else int(self.is_wide[index])
            open_batches[group].append((index, draw))
            if len(open_batches[group]) == self.batch_size:
                yield open_batches[group].copy()
                open_batches[group].clear()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self._batches()
        for _ in range(self.start_batch):
            next(batches)
        return batches


class DrawDataset(Dataset):
    """Maps (index, draw number) under randomness that is seeded from the draw number.

    An unreadable image raises, or, with `skip_bad`, is replaced by another one that the draw number
    determines. The run stops when it is clear that more than 1 % of the images are bad. Every
    worker of every rank judges by what it has seen itself.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        *,
        seed: int = 0,
        skip_bad: bool = False,
    ):
        """
        Args:
            dataset: dataset dicts.
            mapper: maps one of them.
            seed: of the mapper's randomness; :class:`ResumableLoader` sets its own.
            skip_bad: replace unreadable images.
        """
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed
        self.skip_bad = skip_bad
        self._bad: set[int] = set()
        self._tried = np.zeros(len(dataset), dtype=bool)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        index, draw = item
        with isolated_rng(self.seed, draw):
            while True:
                self._tried[index] = True
                try:
                    return self.mapper(self.dataset[index])
                except ImageReadError as error:
                    if not self.skip_bad:
                        raise
                    self._note_bad(index, error)
                # After a failure the stream depends on what failed, but on nothing else.
                index = int(np.random.randint(len(self.dataset)))

    def _note_bad(self, index: int, error: ImageReadError) -> None:
        if index in self._bad:
            return
        self._bad.add(index)
        tried, total = int(self._tried.sum()), len(self.dataset)
        logger.warning("skipped %s (%d of %d tried so far)", error, len(self._bad), tried)
        if len(self._bad) > min(_most_bad(total), _most_bad_by_chance(tried)):
            raise ImageReadError(
                f"{len(self._bad)} of the {tried} images tried so far (of {total}) cannot be read: "
                f"more than {_MAX_BAD_FRACTION:.0%} of the data; the last one: {error}"
            )


def _most_bad(total: int) -> float:
    """Bad images that a data set may have. In small sets it is one, unless there is no other."""
    return min(max(1, int(_MAX_BAD_FRACTION * total)), total - 1)


def _most_bad_by_chance(tried: int) -> float:
    """Bad ones to expect at most among the images tried if no more than 1 % of all are bad.

    Mean and four standard deviations, plus four for the beginning: runs have many workers.
    """
    mean = _MAX_BAD_FRACTION * tried
    return mean + 4 * mean**0.5 + 4


class ResumableLoader:
    """Batches for training, a pure function of ``seed``, from ``start_iteration`` on.

    Both may be set until the first batch is asked for, whenever Detectron2 calls ``iter`` on the
    loader: a resumed run learns them from its checkpoint only after it has built its loader.
    """

    def __init__(
        self,
        dataset: DrawDataset,
        make_batches: Callable[[int, int], TrainingBatchSampler],
        *,
        seed: int,
        num_workers: int,
    ):
        """
        Args:
            dataset: maps (index, draw number).
            make_batches: the batch sampler for a seed and a start iteration.
            seed: of the order and of the mapper's randomness, equal on all ranks.
            num_workers: processes that load data; 0 loads in the training process.
        """
        self.dataset = dataset
        self.make_batches = make_batches
        self.num_workers = num_workers
        self.seed = seed
        self.start_iteration = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self.dataset.seed = self.seed
        yield from DataLoader(
            self.dataset,
            batch_sampler=self.make_batches(self.seed, self.start_iteration),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            # DataLoader draws a number for its workers: not from the training step's generator.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _as_list(batch: list[Any]) -> list[Any]:
    return batch
