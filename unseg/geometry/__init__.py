"""Hyperbolic geometry: the Poincaré ball on top of geoopt, means, nearest centroids, k-means."""

from unseg.geometry.assignment import nearest_centroids
from unseg.geometry.elbow import ElbowTable, elbow, elbow_grid
from unseg.geometry.kmeans import euclidean_kmeans, hyperbolic_kmeans
from unseg.geometry.lloyd import KMeansResult
from unseg.geometry.means import frechet_centroids, lorentz_centroids
from unseg.geometry.poincare import PoincareBall, clip_tangent, tangent_dist, tangent_dist0

__all__ = [
    "ElbowTable",
    "KMeansResult",
    "PoincareBall",
    "clip_tangent",
    "elbow",
    "elbow_grid",
    "euclidean_kmeans",
    "frechet_centroids",
    "hyperbolic_kmeans",
    "lorentz_centroids",
    "nearest_centroids",
    "tangent_dist",
    "tangent_dist0",
]
