"""A data set seen as its annotations, one item each, without a copy of any of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class AnnotationIndex:
    """Which annotations an epoch goes through, and how often each one comes.

    Attributes:
        images: int32 (A,), indices of dataset dicts.
        annotations: int32 (A,), indices into these dicts' ``annotations``.
        repeat_factors: float64 (A,), for :class:`unseg.data.sampling.TrainingBatchSampler`.
    """

    images: np.ndarray
    annotations: np.ndarray
    repeat_factors: np.ndarray


class AnnotationDataset(Sequence):
    """The dict of an annotation's image, with ``annotation_index`` added, for each annotation."""

    def __init__(self, dataset: Sequence[dict[str, Any]], index: AnnotationIndex):
        """
        Args:
            dataset: dataset dicts, for instance serialised ones; not copied.
            index: of their annotations.
        """
        self.dataset = dataset
        self.index = index

    def __len__(self) -> int:
        return len(self.index.images)

    def __getitem__(self, item: int) -> dict[str, Any]:
        record = self.dataset[int(self.index.images[item])]
        return {**record, "annotation_index": int(self.index.annotations[item])}


def uniform_over_categories(
    images: Sequence[int], annotations: Sequence[int], categories: Sequence[int]
) -> AnnotationIndex:
    """An index in which a category is drawn uniformly, then one of its annotations uniformly.

    Uniform in expectation over an epoch, which has as many items as there are annotations:
    with C categories that occur, an annotation of a category of n comes A / (C n) times.

    Args:
        images, annotations: (A,) see :class:`AnnotationIndex`.
        categories: (A,) the annotations' categories, any integers.
    """
    _, kinds, sizes = np.unique(
        np.asarray(categories, np.int64), return_inverse=True, return_counts=True
    )
    factors = len(kinds) / (len(sizes) * sizes[kinds]) if len(kinds) else np.zeros(0)
    return AnnotationIndex(np.asarray(images, np.int32), np.asarray(annotations, np.int32), factors)
