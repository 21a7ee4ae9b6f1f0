"""Noise channel reduction (NCR) and deviation-based channel reduction (DCR)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectral_cases import published

from unseg.discovery.spectral import (
    channel_entropy,
    deviation_channel_reduction,
    entropy_channel_reduction,
)


def entropy_of(values, bins):
    """In bits, from numpy's histogram."""
    counts, _ = np.histogram(values, bins=bins, range=(values.min(), values.max()))
    share = counts[counts > 0] / counts.sum()
    return -(share * np.log2(share)).sum()


def structured(height=14, width=17, channels=48, seed=0):
    features, _ = published.structured_map(height, width, 2, channels, seed)
    return features.reshape(channels, -1).T.astype(np.float64)


def test_entropy_of_known_histograms():
    uniform = torch.arange(30.0).repeat(4)
    constant = torch.full((120,), -3.0)
    two = torch.tensor([0.0, 1.0]).repeat(60)
    rare = torch.tensor([0.0] * 90 + [5.0] * 30)
    entropy = channel_entropy(torch.stack((uniform, constant, two, rare), dim=1))
    expected = [np.log2(30), 0, 1, -0.25 * np.log2(0.25) - 0.75 * np.log2(0.75)]
    torch.testing.assert_close(entropy, torch.tensor(expected, dtype=torch.float64))
    assert entropy.dtype == torch.float64


@given(
    seed=st.integers(0, 2**32 - 1), patches=st.integers(1, 200), bins=st.sampled_from([1, 2, 7, 30])
)
def test_entropy_is_that_of_a_histogram(seed, patches, bins):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(patches, 12)) ** 3 * np.exp(rng.normal(0, 5, 12))
    expected = [entropy_of(channel, bins) for channel in features.T]
    found = channel_entropy(torch.from_numpy(features), bins)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_values_between_bins_and_the_maximum():
    # Bins are closed on the left, the last one also on the right.
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    share = np.array([1, 1, 1, 2]) / 5
    found = channel_entropy(values[:, None], bins=4)
    assert found.item() == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-12)


@pytest.mark.parametrize("mode", ["paper", "reference_fg"])
@pytest.mark.parametrize("size", [(1, 9), (14, 17), (30, 30)])
@pytest.mark.parametrize("seed", [0, 1])
def test_ncr_keeps_the_published_channels(mode, size, seed):
    features = structured(*size, seed=seed)
    for keep in (1, 16, 30, 48):
        reduced, kept = entropy_channel_reduction(torch.from_numpy(features), keep, mode=mode)
        if mode == "paper":
            expected = published.low_entropy_channels(features, keep)
        else:
            rows = published.normalized(features)
            expected = published.full_histogram_channels(rows, keep)
        assert kept.tolist() == expected.tolist()
        assert torch.equal(reduced, torch.from_numpy(features)[:, kept])


def test_the_two_forms_of_ncr_differ():
    features = torch.from_numpy(structured(30, 30, seed=2))
    kept = [
        set(entropy_channel_reduction(features, 16, mode=m)[1].tolist())
        for m in ("paper", "reference_fg")
    ]
    assert kept[0] != kept[1]


def test_a_channel_with_an_empty_bin_comes_last_in_the_published_form():
    rng = np.random.default_rng(0)
    # Of 5 channels, 1 and 3 have full histograms. All rows get the same length.
    uniform = np.stack([rng.permutation(np.arange(3000) / 2999) for _ in range(2)])
    peaked = np.where(rng.random(3000) < 0.8, uniform[1] * 0.1, uniform[1])
    two = (np.arange(3000) % 2).astype(float)
    channels = np.stack((two, uniform[0], two[::-1], peaked, np.zeros(3000)))
    length = np.sqrt(np.square(channels).sum(axis=0).max() + 1 - np.square(channels).sum(axis=0))
    features = torch.from_numpy(np.concatenate((channels, length[None])).T)
    _, kept = entropy_channel_reduction(features, 6, mode="reference_fg")
    full = [c for c in kept.tolist() if c in (1, 3)]
    assert full == [3, 1]
    assert kept.tolist()[-3:] == [0, 2, 4]
    _, kept = entropy_channel_reduction(features, 2)
    assert kept.tolist() == [4, 0]


def test_only_the_published_form_normalises_patches():
    features = torch.from_numpy(structured())
    scale = torch.linspace(0.1, 10, len(features), dtype=torch.float64)[:, None]
    for mode, same in (("paper", False), ("reference_fg", True)):
        before, after = (
            entropy_channel_reduction(x, 16, mode=mode)[1] for x in (features, features * scale)
        )
        assert torch.equal(before, after) == same


def test_equal_entropies_keep_the_order_of_channels():
    features = torch.from_numpy(structured(seed=3))[:, :8]
    # Copies, and mirrored channels, whose histograms hold the same counts in another order.
    _, kept = entropy_channel_reduction(torch.cat((features, -features, features), dim=1), 24)
    _, order = entropy_channel_reduction(features, 8)
    for channel, group in zip(order.tolist(), kept.view(-1, 3).tolist(), strict=True):
        assert group == [channel, channel + 8, channel + 16]
    # Where every histogram has an empty bin, all are equal for the published form.
    rough = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 9)))
    _, kept = entropy_channel_reduction(rough, 5, mode="reference_fg")
    assert kept.tolist() == [0, 1, 2, 3, 4]


def test_ncr_of_huge_values():
    features = torch.from_numpy(structured()).float()
    _, expected = entropy_channel_reduction(features, 16)
    _, kept = entropy_channel_reduction(features * 2.0**120, 16)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("seed", range(3))
def test_dcr_keeps_the_channels_of_highest_deviation(seed):
    features = structured(seed=seed)
    deviation = [np.sqrt(np.mean((c - c.mean()) ** 2)) for c in features.T]
    expected = sorted(range(48), key=lambda c: -deviation[c])
    for keep in (1, 20, 48):
        reduced, kept = deviation_channel_reduction(torch.from_numpy(features), keep)
        assert kept.tolist() == expected[:keep]
        assert kept.tolist() == published.deviating_channels(features, keep).tolist()
        assert torch.equal(reduced, torch.from_numpy(features)[:, kept])


def test_equal_deviations_keep_the_order_of_channels():
    features = torch.from_numpy(structured())[:, :3]
    _, kept = deviation_channel_reduction(torch.cat((features, -features, features), dim=1), 9)
    assert [sorted(group) for group in kept.view(-1, 3).tolist()] == kept.view(-1, 3).tolist()
    assert deviation_channel_reduction(torch.zeros(5, 4), 3)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("reduce", [entropy_channel_reduction, deviation_channel_reduction])
def test_misuse(reduce):
    features = torch.rand(10, 6)
    for keep in (0, 7):
        with pytest.raises(ValueError, match=f"1 to 6 channels, got {keep}"):
            reduce(features, keep)
    for wrong in (torch.rand(6), torch.rand(0, 6), torch.rand(2, 3, 4)):
        with pytest.raises(ValueError, match="shape"):
            reduce(wrong, 1)
    with pytest.raises(ValueError, match="'other'"):
        entropy_channel_reduction(features, 2, mode="other")
