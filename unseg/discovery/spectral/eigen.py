"""Eigenvectors of graph Laplacians (Shi and Malik, "Normalized Cuts and Image Segmentation", PAMI
2000, section 2.1).

Legend: n nodes, k eigenpairs.
"""

import numpy as np
import torch
from scipy.linalg import eigh, get_blas_funcs
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

SOLVERS = ("auto", "dense", "lanczos", "lobpcg")
# Up to this many nodes the full dense problem is quicker than to iterate.
_DENSE_NODES = 256
# A degree below this is taken for 1, as the published code does: such a node hangs on nothing.
_MIN_DEGREE = 1e-12
# A second eigenvalue below this: the graph has (almost) come apart. Then any combination of the
# parts' indicators is an eigenvector; an edge of this share of the mean weight between all nodes
# makes it one vector again.
_DISCONNECTED = 1e-6
_TOLERANCE = 1e-5
# The residual of what LAPACK gives in float64 for a matrix of norm 3 or less is far below this.
_EXACT = 1e-9
# The trivial eigenvalue goes at least this far below 0.
_MIN_DEPTH = 0.01


class EigenError(RuntimeError):
    """The eigenvectors of a graph could not be computed."""


def laplacian_eigenpairs(
    weights: Tensor, count: int, *, solver: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The smallest solutions of (D - W) v = lambda D v, with D the row sums of W.

    The first is the constant vector of eigenvalue 0 (0 at nodes without any weight). Reproducible:
    iterations start from a fixed vector. The sign of a vector is that of the solver, see
    :func:`orient`.

    Args:
        weights: (n, n) float, symmetric and not negative. Not changed.
        count: number of pairs wanted.
        solver: "dense" (LAPACK, float64), "lanczos" (ARPACK on the CPU), "lobpcg" (torch, where
            the weights are); "auto" is dense for small graphs, else Lanczos on the CPU and LOBPCG
            elsewhere. An iteration that does not converge gives way to the dense solver.

    Returns:
        values (k,) in rising order and vectors (n, k) with v^T D v = 1, in the type of the weights;
        k is `count`, or n if that is less.

    Raises:
        ValueError: the weights are not square, or the solver is unknown.
        EigenError: the weights are not finite.
    """
    if weights.dim() != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(f"weights must have shape (n, n), got {tuple(weights.shape)}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    nodes = len(weights)
    count = min(count, nodes)
    degree = weights.sum(dim=1)
    if not bool(degree.isfinite().all()):
        raise EigenError("the affinities hold NaN or infinite values")
    if count <= 1:
        scale = degree.sum().clamp(min=_MIN_DEGREE).rsqrt()
        return weights.new_zeros(count), scale * weights.new_ones((nodes, count))
    values, vectors = _solve(weights, degree, count, _choose(solver, weights))
    if values[1] < _DISCONNECTED:
        joined = weights.double() + _DISCONNECTED * weights.mean().double()
        values, vectors = _solve(joined, joined.sum(dim=1), count, "dense")
    return values.to(weights.dtype), vectors.to(weights.dtype)


def orient(vectors: Tensor) -> Tensor:
    """Signs such that the positive entries of each column are not the majority.

    A column with all or exactly half of its entries positive stays as it is.

    Args:
        vectors: (n, k).
    """
    positive = (vectors > 0).double().mean(dim=0)
    return torch.where((positive > 0.5) & (positive < 1.0), -vectors, vectors)


def _choose(solver: str, weights: Tensor) -> str:
    if solver != "auto":
        return solver
    if len(weights) <= _DENSE_NODES:
        return "dense"
    return "lanczos" if weights.device.type == "cpu" else "lobpcg"


def _solve(weights: Tensor, degree: Tensor, count: int, solver: str) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the symmetric form S = D^-1/2 W D^-1/2: lambda = 1 - mu, v = D^-1/2 u.

    Of a graph whose nodes all have neighbours the first is known, u = D^1/2 1, and is projected
    out: the largest eigenvalues of the rest are small and dense, and one that is far above them
    costs precision.
    """
    root = torch.where(degree < _MIN_DEGREE, 1.0, degree).rsqrt()
    trivial = degree.clamp(min=0).sqrt()
    trivial = trivial / trivial.norm().clamp(min=torch.finfo(degree.dtype).tiny)
    if solver != "dense" and count + 1 < len(weights):
        symmetric = (weights * root).mul_(root[:, None])
        found = _iterate(symmetric, trivial, count - 1, solver)
        if found is not None:
            mu, u = found
            values = torch.cat((mu.new_zeros(1), 1 - mu))
            u = torch.cat((trivial[:, None], u), dim=1)
            return values, u * root[:, None]
    root, trivial = root.double(), trivial.double()
    symmetric = (weights.double() * root).mul_(root[:, None])
    # mu = 1 becomes -2: the others are in [-1, 1], and -1 occurs (bipartite graphs).
    symmetric.addr_(trivial, trivial, alpha=-3)
    mu, u = _largest(symmetric, count - 1)
    values = torch.cat((mu.new_zeros(1), 1 - mu))
    return values, torch.cat((trivial[:, None], u), dim=1) * root[:, None]


def _largest(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenpairs by LAPACK, in falling order."""
    nodes = len(symmetric)
    if symmetric.device.type == "cpu":  # a few vectors take a third of the time of all
        matrix = symmetric.numpy()
        mu, u = eigh(matrix, subset_by_index=(nodes - count, nodes - 1), check_finite=False)
        # Where many eigenvalues are equal it may find fewer, or a wrong one.
        if len(mu) == count and np.abs(matrix @ u - u * mu).max() < _EXACT:
            return torch.from_numpy(mu[::-1].copy()), torch.from_numpy(u[:, ::-1].copy())
    mu, u = torch.linalg.eigh(symmetric)
    return mu.flip(0)[:count], u.flip(1)[:, :count]


def _iterate(
    symmetric: Tensor, trivial: Tensor, count: int, solver: str
) -> tuple[Tensor, Tensor] | None:
    """The largest eigenpairs orthogonal to `trivial`, None if the iteration does not converge.

    `symmetric` may be changed.
    """
    nodes = len(symmetric)
    start = np.random.default_rng(0).standard_normal((nodes, 3 * count))
    # The trivial eigenvalue moves below all others, which the norm of the rest bounds: at 0 it is
    # found again where fewer than `count` of them are positive. The bound is small because what
    # is far from the wanted values costs precision.
    depth = float((symmetric.norm().square() - 1).clamp(min=_MIN_DEPTH**2).sqrt())
    if solver == "lobpcg":
        if nodes < 9 * count:  # torch's condition
            return None
        block = torch.from_numpy(start).to(symmetric)
        deflated = symmetric.addr_(trivial, trivial, alpha=-1 - depth)
        mu, u = torch.lobpcg(deflated, count, X=block[:, : 2 * count], tol=_TOLERANCE, niter=200)
        residual = (deflated @ u - u * mu).norm(dim=0).max()
        return (mu[:count], u[:, :count]) if residual < 10 * _TOLERANCE else None
    matrix, known = symmetric.numpy(), trivial.numpy()
    (product,) = get_blas_funcs(("symv",), (matrix,))  # reads half of the matrix

    def multiply(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1)
        part = known @ x
        y = product(1.0, matrix.T, x - known * part)
        return y - known * (known @ y + depth * part)

    operator = LinearOperator(matrix.shape, matvec=multiply, dtype=matrix.dtype)
    try:
        first = start[:, 0].astype(matrix.dtype)
        mu, u = eigsh(operator, k=count, which="LA", v0=first, tol=_TOLERANCE, maxiter=1000)
    except ArpackError:
        return None
    order = np.argsort(-mu, kind="stable")
    return torch.from_numpy(mu[order]), torch.from_numpy(np.ascontiguousarray(u[:, order]))
