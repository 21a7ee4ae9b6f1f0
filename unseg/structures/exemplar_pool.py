"""Exemplars: objects cut out of images, which other objects are compared with.

Legend: K exemplars, D embedding length, H W an object image's size.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Exemplar:
    """One object on a neutral background.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, the object.
        category: its folder's name, or that of its cluster.
        file_name: the image it is from, relative to the folder or data set of all of them.
        box: (x0, y0, x1, y1) in pixels of that image, the crop that ``image`` shows.
        mask_from: "refined" by a model, "coarse" (GrabCut's), or "whole" (neither found anything).
        embedding: (D,) float32 of unit length, or None.
    """

    image: np.ndarray
    mask: np.ndarray
    category: str
    file_name: str
    box: tuple[int, int, int, int]
    mask_from: str
    embedding: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ExemplarPool:
    """K exemplars, those of a category one after the other.

    Attributes:
        exemplars: K of them.
        info: how they were made, JSON-able.
    """

    exemplars: tuple[Exemplar, ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.exemplars)

    @property
    def embeddings(self) -> np.ndarray:
        """(K, D) float32.

        Raises:
            ValueError: the pool is empty, or an exemplar has no embedding.
        """
        rows = [exemplar.embedding for exemplar in self.exemplars]
        if not rows or any(row is None for row in rows):
            raise ValueError("the exemplar pool holds no embeddings")
        return np.stack(rows)

    def first_of_each(self, count: int) -> "ExemplarPool":
        """The first `count` exemplars of each category; all of them if `count` is 0."""
        if count < 0:
            raise ValueError(f"exemplars per category must be 0 (all) or more, got {count}")
        seen: Counter[str] = Counter()
        kept = []
        for exemplar in self.exemplars:
            seen[exemplar.category] += 1
            if not count or seen[exemplar.category] <= count:
                kept.append(exemplar)
        return replace(self, exemplars=tuple(kept))
