"""Segments of a patch grid against the published steps; clusters, scores, embeddings."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from spectral_cases import (
    ORACLE,
    check,
    mean_iou,
    published,
    reference_settings,
    same_partition,
    structured,
    with_features,
)

from unseg.discovery.spectral import SpectralSettings, segment
from unseg.discovery.spectral.segmentation import _by_score
from unseg.discovery.spectral.settings import ClusterSettings

# Height, width, objects and seed of structured maps. In the reference configuration all of their
# eigenvectors, three and two are lost to the background.
MAPS = [(14, 14, 2, 0), (20, 30, 3, 1), (24, 25, 4, 1), (14, 14, 2, 1), (20, 30, 3, 0)]


# --- against the published steps


@pytest.mark.parametrize("case", [*MAPS, (30, 53, 3, 0)], ids=str)
def test_reference_configuration_gives_the_published_labels(case):
    features, tensor, instances = structured(*case)
    count = case[2]
    expected = published.segment_published(
        features.astype(np.float64), count, exact=True, null_space="zeroed"
    )
    found = check(segment(tensor, reference_settings(), count), instances.shape)
    assert sorted(found.channels.tolist()) == sorted(expected.instance_channels.tolist())
    np.testing.assert_array_equal(found.foreground.numpy(), expected.foreground)
    assert same_partition(found.labels.numpy(), expected.labels)


@pytest.mark.parametrize("case", MAPS[3:], ids=str)
def test_without_a_median_nothing_leaks_from_the_null_space(case):
    features, tensor, instances = structured(*case)
    expected = published.segment_published(
        features.astype(np.float64), case[2], exact=True, median=1
    )
    found = segment(tensor, reference_settings(embedding_median=1), case[2])
    assert same_partition(found.labels.numpy(), expected.labels)


@pytest.mark.parametrize("case", [(30, 30, 3, 0), (20, 30, 3, 0)], ids=str)
def test_reference_configuration_is_the_published_one_up_to_what_leaks(case):
    # The median filter spreads the background's arbitrary values into the objects' outlines.
    features, tensor, instances = structured(*case)
    expected = published.segment_published(features.astype(np.float64), case[2], exact=True)
    found = segment(tensor, reference_settings(), case[2])
    scores = [mean_iou(x, instances) for x in (expected.labels, found.labels.numpy())]
    assert scores[1] == pytest.approx(scores[0], abs=0.03)


@pytest.mark.parametrize(
    ("case", "metric"),
    [(case, "boc") for case in MAPS] + [(MAPS[1], m) for m in ("braycurtis", "l2", "cosine")],
    ids=str,
)
def test_quotient_configuration_gives_the_labels_of_the_other_vectors(case, metric):
    features, tensor, instances = structured(*case)
    expected = published.segment_published(
        features.astype(np.float64), case[2], exact=True, metric=metric, null_space="left out"
    )
    found = segment(tensor, reference_settings("quotient", affinity=metric), case[2])
    np.testing.assert_allclose(found.eigenvalues.numpy(), expected.eigenvalues, atol=2e-6)
    embedding = np.moveaxis(expected.embedding, -1, 0)
    if metric == "cosine":  # background without any weight is 0 but for rounding: either sign
        embedding = (
            embedding * np.sign((embedding * found.embedding.numpy()).sum((1, 2)))[:, None, None]
        )
    np.testing.assert_allclose(found.embedding.numpy(), embedding, atol=1e-3 * embedding.max())
    assert same_partition(found.labels.numpy(), expected.labels)


@pytest.mark.parametrize("case", MAPS[2:], ids=str)
def test_iteration_gives_what_the_dense_solver_gives(case):
    _, tensor, _ = structured(*case)
    dense, auto = (
        segment(tensor, reference_settings("quotient", solver=s), case[2])
        for s in ("dense", "lanczos")
    )
    assert same_partition(dense.labels.numpy(), auto.labels.numpy())


@pytest.mark.parametrize("seed", [2, 4])
def test_quotient_finds_what_the_null_space_hides(seed):
    # 900 patches, about a fifth of them in three objects: the sizes of 1.7.
    _, tensor, instances = structured(30, 30, 3, seed)
    # Objects lie apart: their components would hide that clusters are lost.
    settings = SpectralSettings(clusters=ORACLE, split_components=False)
    scores, lost = {}, {}
    for background in ("quotient", "reference"):
        found = segment(tensor, replace(settings, background=background), 3)
        scores[background] = mean_iou(found.labels.numpy(), instances)
        lost[background] = int((found.embedding == 0).flatten(1).all(dim=1).sum())
    assert scores["quotient"] >= 0.7 > scores["reference"]
    assert lost["quotient"] == 0 < lost["reference"]


def test_drawn_objects():
    # A procedurally drawn image of three objects, with clean features.
    instances = np.zeros((24, 32), dtype=np.int64)
    instances[6:13, 5:12] = 1
    instances[8:18, 12:16] = 2
    y, x = np.mgrid[:24, :32]
    instances[(y - 12) ** 2 + (x - 23) ** 2 <= 20] = 3
    features = torch.from_numpy(with_features(instances, 96))
    for clusters in (ORACLE, ClusterSettings(), ClusterSettings(mode="fixed")):
        found = check(segment(features, SpectralSettings(clusters=clusters), 3), (24, 32))
        assert mean_iou(found.labels.numpy(), instances) >= 0.7
        assert len(found.scores) == 3


# --- numbers of clusters, scores, embeddings


@pytest.mark.parametrize(("mode", "found"), [("oracle", 2), ("fixed", 4), ("eigengap", None)])
def test_number_of_clusters(mode, found):
    _, tensor, _ = structured(20, 30, 3, 0)
    clusters = ClusterSettings(mode=mode, num=4)
    settings = SpectralSettings(clusters=clusters, split_components=False, min_area=0)
    labels = segment(tensor, settings, 2).labels
    assert labels.max() == found or (found is None and 1 <= labels.max() <= 8)


def test_oracle_needs_a_number():
    _, tensor, _ = structured(14, 14, 2, 0)
    with pytest.raises(ValueError, match="oracle needs the number"):
        segment(tensor, SpectralSettings(clusters=ORACLE))
    for none in (0, -1):
        assert "no instance" in segment(tensor, SpectralSettings(clusters=ORACLE), none).reason


@pytest.mark.parametrize("case", MAPS, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_scores_are_relative_fiedler_values(case, split):
    _, tensor, instances = structured(*case)
    settings = SpectralSettings(split_components=split)
    found = check(segment(tensor, settings), instances.shape)
    fiedler = np.maximum(found.fiedler.double().numpy(), 0) * found.foreground.numpy()
    for label, score in enumerate(found.scores.tolist(), 1):
        expected = fiedler[found.labels.numpy() == label].mean() / fiedler.max()
        assert score == pytest.approx(max(expected, 1e-6), rel=1e-5)


def test_embeddings_are_mean_features():
    features, tensor, _ = structured(20, 30, 3, 0)
    found = segment(tensor, SpectralSettings())
    length = np.linalg.norm(features.astype(np.float64), axis=0)
    for label, embedding in enumerate(found.embeddings, 1):
        expected = (features / length)[:, found.labels.numpy() == label].mean(axis=1)
        np.testing.assert_allclose(embedding.numpy(), expected, atol=1e-6)


def test_components_and_small_segments():
    # Two squares that look alike, and a smaller one that does not.
    instances = np.zeros((20, 40), dtype=np.int64)
    instances[5:13, 5:11] = instances[5:13, 27:33] = 1
    instances[6:11, 17:22] = 2
    features = torch.from_numpy(with_features(instances, 96))
    clusters = ClusterSettings(mode="fixed", num=2)
    whole = segment(features, SpectralSettings(clusters=clusters, split_components=False))
    assert whole.labels.max() == 2
    found = check(segment(features, SpectralSettings(clusters=clusters)), (20, 40))
    assert found.labels.max() == 3
    parts = [ndimage.label(found.labels.numpy() == k, np.ones((3, 3)))[1] for k in (1, 2, 3)]
    assert parts == [1, 1, 1]
    # 48, 48 and 25 of 800 patches, less what the median takes at corners.
    large = segment(features, SpectralSettings(clusters=clusters, min_area=0.04))
    assert large.labels.max() == 2
    nothing = check(segment(features, SpectralSettings(clusters=clusters, min_area=0.2)), (20, 40))
    assert "too small" in nothing.reason


@pytest.mark.parametrize("clusters", [ClusterSettings(), ORACLE])
@pytest.mark.parametrize("case", [(14, 14, 2, 0), (30, 30, 3, 0)], ids=str)
def test_same_bits_twice(clusters, case):
    _, tensor, _ = structured(*case)
    torch.manual_seed(1)
    first = segment(tensor, SpectralSettings(clusters=clusters), 3)
    torch.manual_seed(2)
    np.random.seed(5)
    second = segment(tensor.clone(), SpectralSettings(clusters=clusters), 3)
    for entry in fields(first):
        a, b = getattr(first, entry.name), getattr(second, entry.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_other_types_and_layouts():
    _, tensor, _ = structured(20, 30, 3, 0)
    expected = segment(tensor, SpectralSettings())
    strided = tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for given in (tensor.double(), strided, tensor.clone().requires_grad_()):
        found = segment(given, SpectralSettings())
        assert torch.equal(found.labels, expected.labels)
        assert not found.scores.requires_grad
    assert segment(tensor.half(), SpectralSettings()).labels.max() > 0


@pytest.mark.parametrize("exponent", [-60, 7, 60])
def test_scale_does_not_matter(exponent):
    _, tensor, _ = structured(20, 30, 3, 0)
    expected = segment(tensor, SpectralSettings())
    found = segment(tensor * 2.0**exponent, SpectralSettings())
    assert torch.equal(found.labels, expected.labels)


def test_scores_where_the_border_inverts_the_mask():
    """Then the foreground is the vector's negative side."""
    labels = np.zeros((12, 12), dtype=np.int64)
    labels[4:8, 4:8] = 1
    fiedler = torch.where(torch.from_numpy(labels) > 0, -2.0, 1.0)
    fiedler[5, 5] = -4.0
    rank, scores = _by_score(labels, torch.from_numpy(labels > 0), fiedler)
    assert scores.tolist() == pytest.approx([(15 * 2 + 4) / 16 / 4])
    assert torch.equal(rank, torch.from_numpy(labels))
