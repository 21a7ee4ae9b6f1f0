"""Agreement of clusters with classes, against formulas written out over items and pairs."""

import itertools
import math
from collections import Counter

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from unseg.evaluation.cluster_metrics import (
    adjusted_mutual_information,
    adjusted_rand_index,
    clustering_accuracy,
    confusion,
    coverage,
    distances,
    hierarchy_accuracy,
    knn_accuracy,
    macro_recall,
    majority_classes,
    nearest,
    normalized_mutual_information,
    purity,
    purity_curve,
)


@st.composite
def labelled(draw):
    size = draw(st.integers(1, 25))
    lists = [draw(st.lists(st.integers(0, top), min_size=size, max_size=size)) for top in (4, 5)]
    return tuple(np.array(x) for x in lists)


def entropy(counts) -> float:
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts)


@given(labelled())
def test_nmi_is_that_of_the_arithmetic_mean(case):
    clusters, classes = (x.tolist() for x in case)
    one, two = entropy(Counter(clusters).values()), entropy(Counter(classes).values())
    both = entropy(Counter(zip(clusters, classes)).values())
    expected = (one + two - both) / ((one + two) / 2) if one + two > 1e-12 else 1.0
    found = normalized_mutual_information(*case)
    assert found == pytest.approx(expected, abs=1e-9)


@given(labelled())
def test_adjusted_rand_index_over_pairs(case):
    clusters, classes = case
    pairs = list(itertools.combinations(range(len(classes)), 2))
    same = [(clusters[i] == clusters[j], classes[i] == classes[j]) for i, j in pairs]
    both, one, two = sum(a and b for a, b in same), sum(a for a, _ in same), sum(b for _, b in same)
    expected = one * two / max(1, len(pairs))
    top = (one + two) / 2
    value = (both - expected) / (top - expected) if top != expected else 1.0
    assert adjusted_rand_index(*case) == pytest.approx(value)


def test_adjusted_mutual_information():
    """1 for equal partitions, 0 on average for random ones (which plain NMI is not)."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, 60)
    assert adjusted_mutual_information((classes + 2) % 5, classes) == pytest.approx(1)
    draws = [rng.integers(0, 20, 60) for _ in range(60)]
    assert abs(np.mean([adjusted_mutual_information(d, classes) for d in draws])) < 0.02
    assert np.mean([normalized_mutual_information(d, classes) for d in draws]) > 0.2


@given(labelled())
def test_purity_and_accuracy_by_counting(case):
    clusters, classes = case
    of = {k: classes[clusters == k].tolist() for k in set(clusters.tolist())}
    right = sum(max(Counter(members).values()) for members in of.values())
    assert purity(clusters, classes) == pytest.approx(right / len(classes))

    def hits(assignment):
        return sum(of.get(k, []).count(c) for k, c in assignment)

    # All ways to give five clusters different ones of six classes.
    best = max(hits(enumerate(chosen)) for chosen in itertools.permutations(range(6), 5))
    assert clustering_accuracy(clusters, classes) == pytest.approx(best / len(classes))


def test_accuracy_of_more_clusters_than_classes():
    """A class that falls into two halves is half right; what is unmatched is wrong."""
    clusters, classes = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 0, 1])
    assert clustering_accuracy(clusters, classes) == pytest.approx(3 / 5)
    assert clustering_accuracy(classes, clusters) == pytest.approx(3 / 5)
    assert purity(clusters, classes) == 1


@given(labelled())
def test_majority_and_recall_by_counting(case):
    clusters, classes = case
    groups = ["f", "c", "r", "f", "c", "r"]
    names = {}
    for k in set(clusters.tolist()):
        counts = Counter(classes[clusters == k].tolist())
        names[k] = min(c for c in counts if counts[c] == max(counts.values()))
    predicted = majority_classes(clusters, classes)
    assert predicted.tolist() == [names[k] for k in clusters.tolist()]
    recalls = {}
    for c in set(classes.tolist()):
        recalls[c] = np.mean([p == c for p in predicted[classes == c]])
    found = macro_recall(predicted, classes, groups)
    assert list(found) == ["all", "f", "c", "r"]
    assert found["all"] == pytest.approx(np.mean(list(recalls.values())))
    covered = coverage(np.array([*names.values(), -1]), classes, groups)
    for group in "fcr":
        there = [c for c in recalls if groups[c] == group]
        expected = np.mean([recalls[c] for c in there]) if there else math.nan
        assert found[group] == pytest.approx(expected, nan_ok=True)
        expected = np.mean([c in names.values() for c in there]) if there else math.nan
        assert covered[group] == pytest.approx(expected, nan_ok=True)


def test_names_of_absent_classes_cover_nothing():
    found = coverage(np.array([0, 3, 3, -1]), np.array([0, 1]), ["a", "a", "b", "b"])
    assert found == pytest.approx({"all": 0.5, "a": 0.5, "b": math.nan}, nan_ok=True)


def test_unnamed_items_are_not_recalled():
    found = macro_recall(np.array([-1, -1, 0, 1]), np.array([0, 1, 0, 1]), ["r", "f"])
    assert found == {"all": 0.5, "r": 0.5, "f": 0.5}


def test_confusion():
    counts = confusion(np.array([2, 0, 2]), np.array([1, 0, 1]))
    assert counts.tolist() == [[1, 0], [0, 0], [0, 2]]


@pytest.mark.parametrize("measure", [purity, clustering_accuracy, normalized_mutual_information])
def test_bad_labels(measure):
    none = np.zeros(0, dtype=np.int64)
    assert math.isnan(measure(none, none))
    with pytest.raises(ValueError, match="clusters"):
        measure(np.array([-1, 0]), np.array([0, 0]))
    with pytest.raises(ValueError, match="classes"):
        measure(np.array([0, 0]), np.array([0.5, 0]))
    with pytest.raises(ValueError, match=r"2.*1|inconsistent"):
        measure(np.array([0, 0]), np.array([0]))


def test_recall_needs_a_group_for_each_class():
    with pytest.raises(ValueError, match="groups: of 3 classes 2"):
        macro_recall(np.array([0]), np.array([2]), ["r", "f"])


def test_hierarchy_accuracy():
    """Wholes must be nearer: equally near ones are wrong."""
    tangents = torch.tensor([[0.0, 0.1], [0.2, 0.0], [0.0, -0.2], [0.3, 0.4]])
    pairs = torch.tensor([[0, 1], [1, 2], [3, 0], [1, 3]])
    assert hierarchy_accuracy(tangents, pairs) == 0.5
    assert math.isnan(hierarchy_accuracy(tangents, pairs[:0]))


def by_geoopt(first, second, c):
    ball = geoopt.PoincareBall(c)
    x, y = (ball.expmap0(t.double()) for t in (first, second))
    return torch.stack([ball.dist(a[None], y) for a in x])


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_distances(c):
    generator = torch.Generator().manual_seed(0)
    first = 0.6 * torch.randn(7, 3, generator=generator)  # geoopt's own is off near the rim
    second = 0.6 * torch.randn(5, 3, generator=generator)
    found = distances(first, second, geometry="poincare", c=c)
    assert torch.allclose(found, by_geoopt(first, second, c), atol=1e-7)
    euclidean = distances(first, second, geometry="euclidean", c=c)
    slow = (first.double()[:, None] - second.double()[None]).pow(2).sum(2).sqrt()
    assert torch.allclose(euclidean, slow, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 10**6])
def test_nearest_in_the_ball(rows, monkeypatch):
    """In chunks of any size; the ball's neighbours are not the tangent space's."""
    generator = torch.Generator().manual_seed(1)
    tangents = 1.5 * torch.randn(40, 2, generator=generator)
    monkeypatch.setattr("unseg.evaluation.cluster_metrics._AT_ONCE", rows * len(tangents))
    away = by_geoopt(tangents, tangents, 1.0)
    expected = []
    for i in range(40):
        others = [j for j in range(40) if j != i]
        expected.append(sorted(others, key=lambda j: away[i, j])[:3])
    found = nearest(tangents, tangents, 3, geometry="poincare", leave_one_out=True)
    assert found.tolist() == expected
    flat = nearest(tangents, tangents, 3, geometry="euclidean", leave_one_out=True)
    assert flat.tolist() != expected
    itself = nearest(tangents, tangents, 1, geometry="poincare")
    assert itself[:, 0].tolist() == list(range(40))


def test_few_and_equal_neighbours():
    tangents = torch.tensor([[0.0], [0.5], [0.5], [0.5]])
    near = nearest(tangents[1:2], tangents, 9, geometry="euclidean")
    assert near.tolist() == [[1, 2, 3, 0]]
    assert nearest(tangents, tangents[:0], 3, geometry="poincare").shape == (4, 0)
    assert nearest(tangents[:0], tangents, 3, geometry="poincare").shape == (0, 3)
    one = nearest(tangents[:1], tangents[:1], 1, geometry="poincare", leave_one_out=True)
    assert one.shape == (1, 0)


def test_knn_accuracy_leaves_one_out():
    tangents = torch.tensor([[0.0, 0.0], [0.0, 0.1], [1.0, 0.0], [1.0, 0.1], [2.0, 0.0]])
    classes = np.array([0, 0, 1, 2, 2])
    for geometry in ("poincare", "euclidean"):
        # 0 and 1 find each other, 2 and 3 too but differ, 4 is nearest to 2.
        assert knn_accuracy(tangents, classes, geometry=geometry) == pytest.approx(2 / 5)
    assert math.isnan(knn_accuracy(tangents[:1], classes[:1], geometry="poincare"))


def test_purity_curve():
    """Singletons are pure: with K as high as there are items, all are right, unless a cluster needs
    members."""
    classes = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    clusters = {2: np.array([0, 0, 0, 1, 1, 1, 1, 1]), 8: np.arange(8)}
    few, few3, many, many3 = purity_curve(clusters.get, classes, [2, 8], min_purity=0.6)
    assert [(p.k, p.min_size) for p in (few, few3, many, many3)] == [(2, 1), (2, 3), (8, 1), (8, 3)]
    assert (few.clusters, few.named, few.kept, few.right) == (2, 2, 1, 6 / 8)
    assert (many.named, many.kept, many.right, many.purity) == (8, 1, 1, 1)
    assert (many3.clusters, many3.named, many3.kept, many3.right) == (8, 0, 0, 0)
    assert few.accuracy == 6 / 8
    assert few.nmi == pytest.approx(normalized_mutual_info_score(classes, clusters[2]))
    strict = purity_curve(clusters.get, classes, [2], min_sizes=[3], min_purity=0.61)
    assert (strict[0].named, strict[0].kept) == (1, 3 / 8)
