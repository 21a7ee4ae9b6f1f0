"""The nearest centroid of every point of the Poincaré ball, by one matrix product.

Legend: N points, n of a chunk, D dimensions, K centroids, s square root of c.
"""

import torch
from torch import Tensor

from unseg.geometry.basics import check_curvature, check_points, dist_of_length, rim_gap

# Scores of a chunk: they should stay in the processor's cache.
CHUNK_BYTES = 1 << 24
# Columns of scores whose minimum is taken at once: without their indices torch is several times
# faster, and then only the best group is searched for its place.
_GROUP = 32


@torch.no_grad()
def nearest_centroids(
    x: Tensor, centroids: Tensor, c: float = 1.0, *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Which centroid is nearest to each point, and how far it is.

    The distance rises with b_k |x - y_k|^2, b_k = 1 / (1 - c|y_k|^2), which is a matrix product
    [x, |x|^2, 1] [-2 b y; b; b|y|^2] (spec long_tail.md 4.1). The product rounds by no more than
    (D + 3) eps b_k (|x| + |y_k|)^2: where that leaves more than one centroid possible, the choice
    is made anew, from float64 products for float32 points, then from differences. So float32
    points are as well assigned as float64 ones, and the result does not depend on chunks.

    Args:
        x: (N, D) float32 or float64, inside the ball. float32 products need torch's default
            precision "highest"; under TF32 or bfloat16 products float64 ones are taken.
        centroids: (K, D) float32 or float64, inside the ball, K at least 1.
        chunk_bytes: memory for the scores of a chunk of rows.

    Returns:
        labels (N,) int64, among equally near centroids the lowest; distances (N,) float64, from
        differences.

    Raises:
        TypeError: another dtype.
        ValueError: shapes do not fit, a point is NaN or not inside the ball, or K is 0.
    """
    check_curvature(c)
    check_points("centroids", centroids, c)
    if len(centroids) == 0:
        raise ValueError("centroids has no rows")
    square = check_points("x", x, c, dim=centroids.shape[1])
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    dtype = x.dtype if _full_float32_products() else torch.float64
    centers = centroids.double()
    labels = _labels(x, square, centers, c, dtype, chunk_bytes)
    length = torch.empty_like(square)
    for rows in _row_chunks(len(x), 8 * x.shape[1], chunk_bytes):
        away = x[rows].double() - centers.index_select(0, labels[rows])
        length[rows] = torch.linalg.vector_norm(away, dim=1)
    return labels, dist_of_length(length, 1 - c * square, rim_gap(centers, c)[labels], c)


def _labels(
    x: Tensor, square: Tensor, centers: Tensor, c: float, dtype: torch.dtype, chunk_bytes: int
) -> Tensor:
    """(N,) int64, from products in `dtype` where these decide. square: |x|^2, float64 (N,)."""
    product = _Product(centers, c, dtype)
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows in _row_chunks(len(x), len(centers) * dtype.itemsize, chunk_bytes):
        chunk = x[rows]
        chosen, doubtful = product.nearest(chunk, square[rows])
        open_rows = doubtful.nonzero()[:, 0]
        if len(open_rows):
            if dtype == torch.float64:
                again = _labels_from_differences(chunk[open_rows], centers, c, chunk_bytes)
            else:
                points, squares = chunk[open_rows], square[rows][open_rows]
                again = _labels(points, squares, centers, c, torch.float64, chunk_bytes)
            chosen[open_rows] = again
        labels[rows] = chosen
    return labels


class _Product:
    """Lower bounds of the scores b_k |x - y_k|^2 of centroids (K, D) float64, as one product.

    The scores' possible error, tolerance * b (|x| + |y|)^2, is taken off inside the product.
    """

    def __init__(self, centers: Tensor, c: float, dtype: torch.dtype):
        self.tolerance = (centers.shape[1] + 3) * torch.finfo(dtype).eps
        self.dtype = dtype
        square = centers.square().sum(1)
        self.norm = square.sqrt()
        self.b = 1 / rim_gap(centers, c)
        kept = 1 - self.tolerance
        columns = [kept * square, torch.full_like(square, kept), -2 * self.tolerance * self.norm]
        factors = torch.cat([-2 * centers, torch.stack(columns, dim=1)], dim=1)
        # Whole groups; what is added has infinite scores.
        whole = factors.new_zeros(-len(centers) % _GROUP, factors.shape[1])
        whole[:, -3] = torch.inf
        self.factors = torch.cat([self.b[:, None] * factors, whole]).to(dtype).t().contiguous()

    def nearest(self, x: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """For points (n, D) and |x|^2, float64 (n,): labels (n,) int64, and (n,) bool where another
        could be nearer."""
        norm = square.sqrt()
        columns = torch.stack([torch.ones_like(square), square, norm], dim=1).to(self.dtype)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.cat([x.to(self.dtype), columns], dim=1) @ self.factors
        groups = scores.unflatten(1, (-1, _GROUP))
        least = groups.amin(dim=2)
        lowest, group = least.min(dim=1)
        best = groups[torch.arange(len(x), device=x.device), group]
        place = best.argmin(dim=1)
        labels = group * _GROUP + place
        error = self.tolerance * self.b[labels] * (norm + self.norm[labels]).square()
        best.scatter_(1, place[:, None], torch.inf)
        least.scatter_(1, group[:, None], best.amin(dim=1, keepdim=True))
        return labels, least.amin(dim=1).double() <= lowest.double() + 2 * error


def _labels_from_differences(x: Tensor, centers: Tensor, c: float, chunk_bytes: int) -> Tensor:
    """(n,) int64; the lowest of equally near ones."""
    root = rim_gap(centers, c).rsqrt()
    number = torch.arange(len(centers), device=x.device)
    labels = []
    for rows in _row_chunks(len(x), 8 * len(centers), chunk_bytes):
        scores = root * torch.cdist(
            x[rows].double(), centers, compute_mode="donot_use_mm_for_euclid_dist"
        )
        least = scores == scores.amin(dim=1, keepdim=True)
        labels.append(torch.where(least, number, len(centers)).amin(dim=1))
    return torch.cat(labels)


def _row_chunks(n: int, row_bytes: int, chunk_bytes: int) -> list[slice]:
    rows = max(1, chunk_bytes // row_bytes)
    return [slice(start, start + rows) for start in range(0, n, rows)]


def _full_float32_products() -> bool:
    """Whether torch was left to multiply float32 matrices in float32 (no TF32, no bfloat16)."""
    try:
        return (
            torch.get_float32_matmul_precision() == "highest"
            and not torch.backends.cuda.matmul.allow_tf32
        )
    except RuntimeError:  # torch's older and newer settings were mixed
        return False
