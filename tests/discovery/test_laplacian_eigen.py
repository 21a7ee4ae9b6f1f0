"""Eigenvectors of graph Laplacians against scipy's generalised problem in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch

from unseg.discovery.spectral.eigen import EigenError, laplacian_eigenpairs, orient

SOLVERS = ("dense", "lanczos", "lobpcg")
# Of sines of angles between subspaces, and of eigenvalues: iterations stop at residuals of 1e-5.
TOLERANCE = 2e-3


def random_graph(nodes, seed, groups=3, contrast=4.0):
    """Symmetric positive weights, larger within groups of nodes of unequal sizes."""
    rng = np.random.default_rng(seed)
    group = np.minimum((rng.random(nodes) ** 1.5 * groups).astype(int), groups - 1)
    weights = rng.random((nodes, nodes)) + 0.1 + contrast * (group[:, None] == group)
    return torch.from_numpy((weights + weights.T) / 2)


def reference(weights):
    """All of (D - W) v = lambda D v in float64."""
    weights = weights.double().numpy()
    degree = np.diag(weights.sum(axis=1))
    return scipy.linalg.eigh(degree - weights, degree)


def clusters(values, gap=1e-3):
    """Slices of the indices whose values differ by less than `gap` from their neighbours'."""
    cuts = [0, *(np.flatnonzero(np.diff(values) > gap) + 1), len(values)]
    return [slice(*pair) for pair in zip(cuts, cuts[1:], strict=False)]


def check_pairs(weights, values, vectors, tolerance=TOLERANCE):
    """Values, subspaces of close values, and v^T D v = 1."""
    count = vectors.shape[1]
    expected, basis = reference(weights)
    root = np.sqrt(weights.double().sum(dim=1).numpy())
    ours = root[:, None] * vectors.double().numpy()  # orthonormal
    np.testing.assert_allclose(values.double().numpy(), expected[:count], atol=tolerance / 20)
    np.testing.assert_allclose(ours.T @ ours, np.eye(count), atol=tolerance)
    for part in clusters(expected):
        inside = slice(part.start, min(part.stop, count))
        if inside.start < inside.stop:
            true = root[:, None] * basis[:, part]
            missing = ours[:, inside] - true @ (true.T @ ours[:, inside])
            assert np.linalg.norm(missing, axis=0).max() < tolerance, inside


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nodes", [40, 255, 257, 400])
def test_pairs_are_scipys(nodes, dtype, solver):
    weights = random_graph(nodes, seed=nodes).to(dtype)
    before = weights.clone()
    values, vectors = laplacian_eigenpairs(weights, 4, solver=solver)
    assert values.shape == (4,)
    assert vectors.shape == (nodes, 4)
    assert values.dtype == vectors.dtype == dtype
    assert torch.equal(weights, before)
    check_pairs(weights, values, vectors)


def test_dense_is_exact():
    weights = random_graph(60, seed=1)
    check_pairs(weights, *laplacian_eigenpairs(weights, 60, solver="dense"), tolerance=1e-9)


@pytest.mark.parametrize("nodes", [255, 256, 257, 300])
def test_auto_on_both_sides_of_the_dense_size(nodes):
    weights = random_graph(nodes, seed=3).float()
    check_pairs(weights, *laplacian_eigenpairs(weights, 5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_first_pair_is_the_constant(solver):
    weights = random_graph(300, seed=5)
    values, vectors = laplacian_eigenpairs(weights, 3, solver=solver)
    assert abs(values[0]) < 1e-9
    constant = weights.sum().rsqrt().expand(300)
    torch.testing.assert_close(vectors[:, 0].abs(), constant, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_count_up_to_and_above_the_number_of_nodes(nodes, count, solver):
    weights = random_graph(nodes, seed=7)
    values, vectors = laplacian_eigenpairs(weights, count, solver=solver)
    assert vectors.shape == (nodes, min(nodes, count))
    check_pairs(weights, values, vectors)


def test_nothing_is_wanted_or_there():
    values, vectors = laplacian_eigenpairs(torch.ones(4, 4), 0)
    assert (values.shape, vectors.shape) == ((0,), (4, 0))
    values, vectors = laplacian_eigenpairs(torch.ones(0, 0), 3)
    assert (values.shape, vectors.shape) == ((0,), (0, 0))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_above_one_do_not_hide_behind_the_constant(dtype, solver):
    # Without loops all eigenvalues but the first are n / (n - 1).
    weights = (torch.ones(300, 300) - torch.eye(300)).to(dtype)
    check_pairs(weights, *laplacian_eigenpairs(weights, 4, solver=solver))


@pytest.mark.parametrize("half", [1, 3])
def test_bipartite_graph(half):
    weights = torch.zeros(2 * half, 2 * half)
    weights[:half, half:] = weights[half:, :half] = 1
    values, vectors = laplacian_eigenpairs(weights, 2 * half)
    check_pairs(weights, values, vectors)
    assert values[-1] == pytest.approx(2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_weights(solver):
    weights = torch.ones(300, 300)
    check_pairs(weights, *laplacian_eigenpairs(weights, 3, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nodes", [60, 320])
def test_a_graph_in_two_parts_is_cut_between_them(nodes, solver):
    part = torch.arange(nodes) < nodes // 3
    weights = random_graph(nodes, seed=2, groups=1).float() * (part[:, None] == part)
    values, vectors = laplacian_eigenpairs(weights, 2, solver=solver)
    assert 0 <= values[1] < 1e-4
    second = vectors[:, 1].double()
    assert part.equal(second > second.mean()) or part.equal(second < second.mean())
    # Constant on each part, so that the cut does not hang on rounding.
    assert second[part].std() < 1e-4 * second.std()
    assert second[~part].std() < 1e-4 * second.std()
    again = laplacian_eigenpairs(weights.clone(), 2, solver=solver)
    assert torch.equal(again[1], vectors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_isolated_nodes(solver):
    nodes, alone = 300, [0, 7, 299]
    weights = random_graph(nodes, seed=4).float()
    weights[alone] = 0
    weights[:, alone] = 0
    others = [n for n in range(nodes) if n not in alone]
    values, vectors = laplacian_eigenpairs(weights, 3, solver=solver)
    rest = weights[others][:, others]
    check_pairs(rest, values, vectors[others])
    assert vectors[alone].abs().max() < TOLERANCE * vectors.abs().max()


def test_no_weights_at_all():
    values, vectors = laplacian_eigenpairs(torch.zeros(5, 5), 3)
    assert values.isfinite().all()
    assert vectors.isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_bits_twice(solver):
    weights = random_graph(320, seed=6).float()
    first = laplacian_eigenpairs(weights, 4, solver=solver)
    torch.rand(3)  # not of the state of any generator
    np.random.default_rng().random(3)
    second = laplacian_eigenpairs(weights.clone(), 4, solver=solver)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
@pytest.mark.parametrize("nodes", [5, 300])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(nodes, value, solver):
    weights = torch.ones(nodes, nodes)
    weights[2, 3] = weights[3, 2] = value
    with pytest.raises(EigenError, match="NaN or infinite"):
        laplacian_eigenpairs(weights, 2, solver=solver)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"shape \(n, n\), got \(3, 4\)"):
        laplacian_eigenpairs(torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match=r"solver must be one of .* got 'arpack'"):
        laplacian_eigenpairs(torch.ones(3, 3), 2, solver="arpack")


def test_orient_makes_the_positive_entries_the_minority():
    columns = torch.tensor(
        [
            # kept: minority, half, all, none; turned: majority
            [-1.0, 2, 3, -1, 1],
            [-1.0, 2, 3, -1, 2],
            [-1.0, -2, 3, -2, 3],
            [4.0, -2, 3, -1, -4],
        ]
    )
    turned = orient(columns)
    assert torch.equal(turned[:, :4], columns[:, :4])
    assert torch.equal(turned[:, 4], -columns[:, 4])
    # Zeros are not positive: two of four are half.
    zeros = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    assert torch.equal(orient(zeros), zeros)
