"""Points in the ball, and slow obvious forms of what k-means does, in geoopt's terms."""

import geoopt
import numpy as np
import torch


def ball_points(count, dim, *, c=1.0, seed=0, spread=0.6):
    """(count, dim) float64: expmap0 of normal tangent vectors."""
    generator = torch.Generator().manual_seed(seed)
    tangents = spread * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return expmap0(tangents, c)


def expmap0(tangents, c=1.0):
    norms = tangents.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return torch.tanh(c**0.5 * norms) * tangents / (c**0.5 * norms)


def all_distances(x, y, c=1.0):
    """(N, K) float64."""
    x, y = x.double().numpy()[:, None], y.double().numpy()[None]
    square = ((x - y) ** 2).sum(-1)
    product = (1 - c * (x**2).sum(-1)) * (1 - c * (y**2).sum(-1))
    return torch.from_numpy(2 / c**0.5 * np.arcsinh(np.sqrt(c * square / product)))


def costs(distances, centroid, c=1.0):
    if centroid == "lorentz":
        return torch.cosh(c**0.5 * distances) - 1
    return distances**2


def midpoint(x, c=1.0):
    return geoopt.PoincareBall(c=torch.tensor(c, dtype=torch.float64)).weighted_midpoint(
        x.double(), reducedim=[0]
    )


def mean_log(x, m, c=1.0):
    """Of log_m(x); zero where m is the Fréchet mean."""
    return geoopt.PoincareBall(c=torch.tensor(c, dtype=torch.float64)).logmap(m, x.double()).mean(0)


def plain_lloyd(x, centroids, iterations, c=1.0):
    """Midpoint k-means without empty clusters: centroids, labels at them."""
    for _ in range(iterations):
        labels = all_distances(x, centroids, c).argmin(1)
        centroids = torch.stack([midpoint(x[labels == k], c) for k in range(len(centroids))])
    return centroids, all_distances(x, centroids, c).argmin(1)
