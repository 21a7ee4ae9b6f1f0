"""Affinities between patches, and the quotient graph of foreground and background."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.spatial.distance import cdist
from spectral_cases import published

from unseg.discovery.spectral import affinity, foreground_graph
from unseg.discovery.spectral.graphs import AFFINITIES

# Metrics whose background patches have no affinity to each other but to themselves.
LOSING = ("boc", "boc_product", "braycurtis")


def rows(count, channels=11, seed=0):
    """Signed rows of length 1, with two rows of zeros, two equal and two opposite ones."""
    x = published.normalized(np.random.default_rng(seed).normal(size=(count, channels)))
    if count >= 8:
        x[[1, 5]] = 0
        x[4] = x[2]
        x[6] = -x[2]
    return x


def expected_affinity(x, metric):
    """From scipy's distances of all pairs."""
    if metric in ("dot", "cosine"):
        length = np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.where(length > 0, length, 1) if metric == "cosine" else x
        return np.maximum(x @ x.T, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bray_curtis = cdist(x, x, "braycurtis")
    np.fill_diagonal(bray_curtis, 0)
    bray_curtis = np.where(np.isnan(bray_curtis), np.inf, bray_curtis)
    chebyshev = cdist(x, x, "chebyshev")
    return {
        "boc": (1 + chebyshev) / (1 + bray_curtis),
        "boc_product": 1 / ((1 + chebyshev) * (1 + bray_curtis)),
        "braycurtis": 1 / (1 + bray_curtis),
        "chebyshev": 1 / (1 + chebyshev),
        "l1": 1 / (1 + cdist(x, x, "cityblock")),
        "l2": 1 / (1 + cdist(x, x, "euclidean")),
    }[metric]


@pytest.mark.parametrize("metric", AFFINITIES)
@pytest.mark.parametrize("count", [1, 2, 9, 130])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str
)
def test_affinity(metric, count, dtype, tolerance):
    x = 3 * rows(count)
    given = torch.from_numpy(x).to(dtype)
    before = given.clone()
    found = affinity(given, metric)
    assert found.dtype == dtype
    assert torch.equal(given, before)
    # Matrix products are symmetric up to rounding.
    torch.testing.assert_close(
        found, found.t(), rtol=0, atol=tolerance if metric in ("cosine", "dot") else 0
    )
    assert found.min() >= 0
    expected = expected_affinity(given.double().numpy(), metric)
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)
    # The transcription, whose formulas are written in another way, agrees.
    np.testing.assert_allclose(expected, published.similarity(x, metric), rtol=1e-6, atol=1e-6)


def test_boc_of_known_rows():
    x = torch.tensor([[0.0, 0, 0], [1, -2, 0.5], [2, -4, 1], [-1, 2, -0.5], [0, 0, 0]])
    weights = affinity(x, "boc")
    assert weights.diagonal().tolist() == [1] * 5
    # To zeros: (1 + max|u|) / 2. Opposite rows: 0. Zeros to other zeros: 0.
    assert weights[0].tolist() == [1, 1.5, 2.5, 1.5, 0]
    assert weights[1, 3] == 0
    # Bray-Curtis does not change with the scale, 3.5 / 10.5 here; Chebyshev does.
    torch.testing.assert_close(weights[1, 2], torch.tensor(3 / (1 + 1 / 3)))
    torch.testing.assert_close(affinity(10 * x)[1, 2], torch.tensor(21 / (1 + 1 / 3)))


def test_misuse():
    with pytest.raises(ValueError, match="'euclid'"):
        affinity(torch.rand(3, 4), "euclid")
    for metric in AFFINITIES:
        with pytest.raises(ValueError, match="shape"):
            affinity(torch.rand(3, 4, 5), metric)


# --- the quotient graph


def degrees(weights):
    total = weights.sum(axis=1)
    return np.where(total < 1e-12, 1.0, total)


def full_problem(foreground, background, metric):
    """W of all patches, the background ones of zeros and last, as published; D."""
    x = np.concatenate((foreground, np.zeros((background, foreground.shape[1]))))
    weights = expected_affinity(x, metric)
    weights = weights / weights.max()
    return weights, degrees(weights)


def solutions(weights):
    return eigh(np.diag(degrees(weights)) - weights, np.diag(degrees(weights)))


@pytest.mark.parametrize("metric", AFFINITIES)
@pytest.mark.parametrize(("count", "background"), [(1, 1), (3, 2), (20, 1), (20, 57), (70, 30)])
def test_quotient_graph_has_all_other_eigenvectors(metric, count, background):
    x = rows(count, seed=count)
    graph = foreground_graph(torch.from_numpy(x), background, metric)
    assert graph.weights.shape == (count + 1, count + 1)
    torch.testing.assert_close(graph.weights, graph.weights.t(), rtol=0, atol=1e-15)
    full, degree = full_problem(x, background, metric)
    np.testing.assert_allclose(graph.weights[:-1, :-1].numpy(), full[:count, :count], atol=1e-12)

    # 1. A vector of the quotient graph, repeated over the background, solves the full problem.
    values, vectors = solutions(graph.weights.numpy())
    lifted = np.concatenate((vectors[:-1], np.repeat(vectors[-1:], background, axis=0)))
    residual = degree[:, None] * lifted - full @ lifted - degree[:, None] * lifted * values
    assert np.abs(residual).max() < 1e-10
    # It keeps its length: v^T D v = 1 in both.
    if metric in LOSING or metric in ("l1", "l2", "chebyshev"):
        np.testing.assert_allclose(np.sum(lifted**2 * degree[:, None], axis=0), 1, atol=1e-10)
    # 2. So do differences of background patches, with the one eigenvalue.
    assert graph.multiplicity == background - 1
    for node in range(count + 1, count + background):
        difference = np.zeros(count + background)
        difference[[count, node]] = 1, -1
        rest = degree * difference - full @ difference - graph.degenerate * degree * difference
        assert np.abs(rest).max() < 1e-10
    # 3. There are no others.
    everything = np.sort(np.append(values, [graph.degenerate] * graph.multiplicity))
    np.testing.assert_allclose(everything, solutions(full)[0], atol=1e-10)


@pytest.mark.parametrize("metric", AFFINITIES)
def test_only_some_affinities_lose_vectors_to_the_background(metric):
    x = rows(30)
    graph = foreground_graph(torch.from_numpy(x), 40, metric)
    if metric in LOSING:
        # 1.7: of a patch of zeros, without the self-affinity, all is to the foreground.
        full, degree = full_problem(x, 40, metric)
        assert graph.degenerate == pytest.approx(1 - full[-1, -1] / degree[-1], abs=1e-12)
        assert graph.degenerate < 0.98
    else:
        assert graph.degenerate == pytest.approx(1, abs=1e-15)


def test_boc_null_space_by_the_formula_of_the_specification():
    x = rows(25)
    graph = foreground_graph(torch.from_numpy(x), 60)
    # Rows of zeros in the foreground have no affinity to those of the background.
    largest = np.abs(x).max(axis=1)
    to_background = np.where(largest > 0, (1 + largest) / 2, 0)
    assert graph.degenerate == pytest.approx(1 - 1 / (1 + to_background.sum()), abs=1e-12)
    peak = expected_affinity(np.concatenate((x, x[:1] * 0)), "boc").max()
    np.testing.assert_allclose(graph.weights[-1, :-1].numpy(), 60 * to_background / peak)
    assert graph.weights[-1, -1].item() == pytest.approx(60 / peak)


@pytest.mark.parametrize("metric", AFFINITIES)
def test_without_background(metric):
    x = rows(12)
    expected = expected_affinity(x, metric)
    expected /= expected.max()
    for graph in (
        foreground_graph(torch.from_numpy(x), 0, metric),
        foreground_graph(torch.from_numpy(x), 9, metric, drop=True),
    ):
        np.testing.assert_allclose(graph.weights.numpy(), expected, atol=1e-12)
        assert graph.multiplicity == 0


@pytest.mark.parametrize("metric", AFFINITIES)
def test_rows_of_zeros_only(metric):
    for background in (0, 1, 5):
        graph = foreground_graph(torch.zeros(4, 3), background, metric)
        assert graph.weights.isfinite().all()
        assert np.isfinite(graph.degenerate)
