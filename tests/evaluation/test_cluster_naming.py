"""Names of clusters, by counting votes one by one."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lvis_cases import HEIGHT, WIDTH, rectangle
from pycocotools import mask as mask_util

from unseg.config import get_cfg
from unseg.evaluation.cluster_naming import (
    NamingSettings,
    box_ious,
    choose_per_class,
    embedded_voters,
    fold_of_image,
    mask_ious,
    match_with_objects,
    name_by_assignment,
    name_by_majority,
    vote_by_neighbours,
)


@st.composite
def voters(draw):
    size = draw(st.integers(0, 25))
    lists = [draw(st.lists(st.integers(0, top), min_size=size, max_size=size)) for top in (4, 3)]
    return tuple(np.array(x, dtype=np.int64) for x in lists)


@given(voters(), st.sampled_from([0.0, 0.5, 0.6, 0.75, 1.0]), st.integers(1, 4))
def test_majority_by_counting(case, min_purity, min_size):
    clusters, votes = case
    found = name_by_majority(clusters, votes, 6, min_purity=min_purity, min_size=min_size)
    assert len(found.classes) == len(found.purity) == len(found.voters) == 6
    for k in range(6):
        counts = Counter(votes[clusters == k].tolist())
        top, total = max(counts.values(), default=0), sum(counts.values())
        assert found.voters[k] == total
        assert found.purity[k] == pytest.approx(top / total if total else np.nan, nan_ok=True)
        if total >= min_size and top / total >= min_purity:
            assert found.classes[k] == min(c for c in counts if counts[c] == top)
        else:
            assert found.classes[k] == -1


@pytest.mark.parametrize("size", [20, 40, 60, 100, 200])
def test_a_share_of_exactly_the_least_purity_is_enough(size):
    votes = np.zeros(size, dtype=np.int64)
    votes[: size // 20] = 1
    clusters = np.zeros(size, dtype=np.int64)
    assert name_by_majority(clusters, votes, 1, min_purity=0.95, min_size=3).classes == [0]
    votes[-1] = 1
    assert name_by_majority(clusters, votes, 1, min_purity=0.95, min_size=3).classes == [-1]


@given(voters())
def test_assignment_by_trying_all(case):
    clusters, votes = case
    found = name_by_assignment(clusters, votes, 6)
    named = found.classes[found.classes >= 0].tolist()
    assert len(set(named)) == len(named)
    right = sum(int(found.classes[k] == c) for k, c in zip(clusters, votes))
    pairs = Counter(zip(clusters.tolist(), votes.tolist()))
    # All ways to give the four classes different ones of five clusters.
    ways = itertools.permutations(range(5), 4)
    assert right == max(sum(pairs[k, c] for c, k in enumerate(way)) for way in ways)
    for k in range(6):
        votes_for = Counter(votes[clusters == k].tolist())
        if found.classes[k] >= 0:
            assert votes_for[int(found.classes[k])] > 0
            share = votes_for[int(found.classes[k])] / sum(votes_for.values())
            assert found.purity[k] == pytest.approx(share)


def test_assignment_differs_from_majority():
    """Two clusters of one class: the larger has it, the other takes what nobody else wants."""
    clusters, votes = np.array([0, 0, 0, 1, 1, 1]), np.array([2, 2, 2, 2, 2, 0])
    by_majority = name_by_majority(clusters, votes, 3, min_purity=0, min_size=1)
    assert by_majority.classes.tolist() == [2, 2, -1]
    by_assignment = name_by_assignment(clusters, votes, 3)
    assert by_assignment.classes.tolist() == [2, 0, -1]
    assert by_assignment.of(np.array([2, 1, 0, 1])).tolist() == [-1, 0, 2, 0]


def test_voters_of_unknown_clusters():
    with pytest.raises(ValueError, match="clusters: 2 there are"):
        name_by_majority(np.array([2]), np.array([0]), 2, min_purity=0, min_size=1)


def test_folds_are_those_of_ever():
    """Written down once; halves of about equal size, for consecutive numbers too."""
    known = {6460: 0x4D, 6894: 0xA4, 11813: 0xA0, 223747: 0x56, 346638: 0x28}  # of sha256sum
    assert {i: fold_of_image(i) for i in known} == {i: byte % 2 for i, byte in known.items()}
    for step in (1, 2, 10, 1000):
        share = np.mean([fold_of_image(i * step) for i in range(2000)])
        assert 0.46 < share < 0.54


def test_matching_with_masks():
    rng = np.random.default_rng(0)

    def boxes(count):
        return [
            [int(x) for x in (*rng.integers(0, 60, 2), *rng.integers(5, 60, 2))]
            for _ in range(count)
        ]

    found, there = boxes(12), boxes(5)
    masks, objects = ([rectangle(*box) for box in part] for part in (found, there))
    iou = mask_ious(masks, objects)
    dense = [
        np.array([mask_util.decode(rle).astype(bool) for rle in part]) for part in (masks, objects)
    ]
    for i, j in itertools.product(range(12), range(5)):
        union = (dense[0][i] | dense[1][j]).sum()
        assert iou[i, j] == (dense[0][i] & dense[1][j]).sum() / union
    assert np.allclose(box_ious(found, there), iou, atol=1e-12)
    for least in (0.1, 0.3, 0.5):
        expected = [max(range(5), key=lambda j: row[j]) if max(row) >= least else -1 for row in iou]
        assert match_with_objects(iou, least).tolist() == expected
    assert mask_ious([], objects).shape == box_ious([], there).shape == (0, 5)
    assert match_with_objects(mask_ious(masks, []), 0.5).tolist() == [-1] * 12


def test_matching_at_the_threshold_is_exact():
    """IoU 13/20: 0.65 in float64, below it in float32."""
    iou = mask_ious([rectangle(0, 0, 13, 1)], [rectangle(0, 0, 20, 1)])
    assert (HEIGHT, WIDTH) == (120, 160)
    assert match_with_objects(iou, 0.65).tolist() == [0]
    assert match_with_objects(iou, np.nextafter(0.65, 1)).tolist() == [-1]


def test_choice_of_a_class():
    classes = np.random.default_rng(0).integers(0, 4, 200)
    chosen = choose_per_class(classes, 30, 7)
    assert (np.diff(chosen) > 0).all()
    there = Counter(classes.tolist())
    assert Counter(classes[chosen].tolist()) == {c: min(30, there[c]) for c in there}
    assert (choose_per_class(classes, 30, 7) == chosen).all()
    assert len(set(choose_per_class(classes, 30, 8)) ^ set(chosen)) > 10
    assert choose_per_class(classes, 500, 7).tolist() == list(range(200))
    assert choose_per_class(classes[:0], 5, 7).tolist() == []


@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
def test_neighbours_vote(geometry):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(30, 2, generator=generator)
    queries = torch.randn(20, 2, generator=generator)
    classes = np.random.default_rng(1).integers(0, 3, 30)
    found = vote_by_neighbours(queries, points, classes, k=4, geometry=geometry)

    def away(x, y):
        if geometry == "euclidean":
            return float((x - y).norm())
        x, y = (torch.tanh(u.norm()) * u / u.norm() for u in (x.double(), y.double()))
        square = (x - y).square().sum() / (1 - x.square().sum()) / (1 - y.square().sum())
        return float(torch.arccosh(1 + 2 * square))

    for query, vote in zip(queries, found.tolist()):
        near = sorted(range(30), key=lambda j: away(query, points[j]))[:4]
        votes = Counter(int(classes[j]) for j in near)
        tied = [c for c in votes if votes[c] == max(votes.values())]
        assert vote == next(int(classes[j]) for j in near if int(classes[j]) in tied)


def test_no_neighbours_no_vote():
    tangents = torch.zeros(3, 2)
    none = vote_by_neighbours(tangents, tangents[:0], np.zeros(0, int), k=5, geometry="poincare")
    assert none.tolist() == [-1, -1, -1]


def test_embedded_voters_leave_out():
    """Objects of hidden images and of unknown class have no vote; of a class only some have."""
    store = SimpleNamespace(
        tangents=np.arange(10, dtype=np.float32)[:, None],
        classes=np.array([0, 0, 0, 0, 1, 1, -1, 2, 2, 2]),
        image_ids=np.array([1, 1, 2, 2, 2, 3, 2, 3, 3, 3]),
    )
    tangents, classes = embedded_voters(store, {3}, NamingSettings(knn_per_class=3))
    assert Counter(classes.tolist()) == {0: 3, 1: 1}
    assert set(tangents[:, 0].tolist()) < {0.0, 1.0, 2.0, 3.0, 4.0}
    assert store.classes[tangents[:, 0].long()].tolist() == classes.tolist()
    everything, _ = embedded_voters(store, set(), NamingSettings())
    assert everything[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    store.classes = store.classes[:-1]
    with pytest.raises(ValueError, match="10 tangents, 9 classes"):
        embedded_voters(store, set(), NamingSettings())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "vote"),
        ("split", "three_fold"),
        ("match_iou", 0.0),
        ("min_purity", 1.5),
        ("min_size", 0),
        ("knn", 0),
        ("knn_per_class", 0),
    ],
)
def test_settings_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"NAMING.{key.upper()}"):
        NamingSettings(**{key: value})


def test_settings_of_the_config():
    cfg = get_cfg()
    assert NamingSettings.from_cfg(cfg) == NamingSettings()
    node = cfg.MODEL.HIERARCHICAL_EMBEDDING
    node.NAMING.METHOD, node.NAMING.SPLIT, node.CLUSTERING.SEED = "hungarian", "same", 3
    node.NAMING.MATCH_IOU, node.NAMING.MIN_PURITY, node.NAMING.MIN_SIZE = 0.6, 0.5, 4
    node.NAMING.KNN, node.NAMING.KNN_PER_CLASS = 6, 7
    assert NamingSettings.from_cfg(cfg) == NamingSettings("hungarian", "same", 0.6, 0.5, 4, 6, 7, 3)
