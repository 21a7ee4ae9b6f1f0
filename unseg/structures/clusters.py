"""Clusters of embedded objects, as files and models share them.

Legend: K clusters, D dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GEOMETRIES = ("poincare", "euclidean")


@dataclass(frozen=True, eq=False)
class Clusters:
    """Where clusters are, and what they are called.

    Attributes:
        centroids: float64 (K, D), K and D at least 1, finite: tangent vectors at the origin, of
            which the ball's centroids are the expmap0 ("poincare"), or points ("euclidean").
        geometry: one of GEOMETRIES.
        c: the ball's curvature is -c; c > 0. Not looked at for "euclidean".
        classes: int64 (K,), 0-based class of each cluster, -1 for one without a name; None: no
            cluster was named.

    Raises:
        TypeError: centroids are not float64, or classes not int64.
        ValueError: a shape, geometry or curvature that is not as above, NaN/inf, classes below -1.
    """

    centroids: Tensor
    geometry: str = "poincare"
    c: float = 1.0
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.centroids.dtype != torch.float64:
            raise TypeError(f"centroids must be float64, got {self.centroids.dtype}")
        if self.centroids.dim() != 2 or not self.centroids.numel():
            raise ValueError(f"centroids: (K, D) is needed, got {tuple(self.centroids.shape)}")
        if not torch.isfinite(self.centroids).all():
            raise ValueError("centroids are NaN/inf")
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry: one of {GEOMETRIES} is needed, got {self.geometry!r}")
        if not self.c > 0:
            raise ValueError(f"c must be above 0, got {self.c}")
        if self.classes is None:
            return
        if self.classes.dtype != torch.int64:
            raise TypeError(f"classes must be int64, got {self.classes.dtype}")
        if self.classes.shape != self.centroids.shape[:1] or (self.classes < -1).any():
            raise ValueError(
                f"classes: {len(self.centroids)} numbers of -1 or more are needed, "
                f"got {tuple(self.classes.shape)}"
            )

    def __len__(self) -> int:
        return len(self.centroids)
