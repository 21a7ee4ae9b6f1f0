"""Hyperbolic geometry: the Poincaré ball on top of geoopt, means, nearest centroids, k-means."""

from unseg.geometry.assignment import nearest_centroids
from unseg.geometry.means import frechet_centroids, lorentz_centroids
from unseg.geometry.poincare import PoincareBall, clip_tangent, tangent_dist, tangent_dist0

__all__ = [
    "PoincareBall",
    "clip_tangent",
    "frechet_centroids",
    "lorentz_centroids",
    "nearest_centroids",
    "tangent_dist",
    "tangent_dist0",
]
