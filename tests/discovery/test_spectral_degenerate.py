"""Spectral segmentation of features without structure: fewer instances or none, and no error."""

import numpy as np
import pytest
import torch
from spectral_cases import ORACLE, check, reference_settings, with_features

from unseg.discovery.spectral import SpectralSettings, segment
from unseg.discovery.spectral.settings import ClusterSettings, ForegroundSettings, NCRSettings


def degenerate_inputs():
    rng = torch.Generator().manual_seed(0)

    def noise(*size):
        return torch.randn(size, generator=rng)

    bars = torch.zeros(6, 12, 12)
    bars[0, :, :4] = bars[1, :, 4:8] = bars[2, :, 8:] = 1  # orthogonal: three graphs
    hot = torch.eye(36).view(36, 6, 6)
    one_channel = torch.zeros(9, 8, 8)
    one_channel[7] = noise(8, 8)
    spot = torch.ones(5, 10, 10) + 1e-3 * noise(5, 10, 10)
    spot[:, 4, 4] = -3
    sparse = torch.zeros(8, 9, 9)
    sparse[:, 3:6, 3:6] = noise(8, 3, 3)
    return {
        "constant": torch.full((6, 10, 12), 0.3),
        "all zero": torch.zeros(6, 10, 12),
        "almost constant": torch.ones(6, 10, 12) + 1e-7 * noise(6, 10, 12),
        "one channel": noise(1, 9, 9),
        "two channels": noise(2, 9, 9),
        "one channel of nine": one_channel,
        "one patch": noise(8, 1, 1),
        "two patches": noise(8, 1, 2),
        "2 x 2": noise(8, 2, 2),
        "3 x 2": noise(8, 3, 2),
        "no patch": noise(8, 0, 4),
        "no channel": torch.zeros(0, 4, 4),
        "row": noise(8, 1, 60),
        "column": noise(8, 60, 1),
        "two rows": noise(8, 2, 40),
        "noise": noise(24, 12, 12),
        "positive noise": noise(24, 12, 12).abs(),
        "disconnected": bars,
        "one hot": hot,
        "one hot, large": torch.eye(400).view(400, 20, 20),
        "one patch differs": spot,
        "zero background": sparse,
        "checkerboard": (torch.arange(12)[:, None] + torch.arange(12)) % 2 * torch.ones(4, 1, 1),
        "opposite halves": torch.cat((torch.ones(4, 6, 12), -torch.ones(4, 6, 12)), dim=1),
        "huge": 1e37 * noise(12, 12, 12),
        "tiny": 1e-37 * noise(12, 12, 12),
        "subnormal": 1e-42 * noise(12, 12, 12),
        "single precision's range": 3e38 * (2 * torch.rand(12, 12, 12, generator=rng) - 1),
    }


INPUTS = degenerate_inputs()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    "settings",
    [
        SpectralSettings(),
        reference_settings(solver="auto"),
        SpectralSettings(background="drop", affinity="dot", solver="lanczos", min_area=0),
        SpectralSettings(affinity="braycurtis", solver="lobpcg"),
        SpectralSettings(
            ncr=NCRSettings(enabled=False),
            foreground=ForegroundSettings(median=1, min_area_ratio=0),
            clusters=ClusterSettings(mode="eigengap"),
            embedding_median=1,
            min_area=0,
        ),
    ],
    ids=["default", "reference", "drop", "braycurtis", "eigengap"],
)
def test_degenerate_input_is_no_error(name, settings):
    features = INPUTS[name]
    before = features.clone()
    found = check(segment(features, settings, 5), tuple(features.shape[1:]))
    assert torch.equal(features, before)
    assert bool(found.embeddings.isfinite().all())
    if name in ("constant", "all zero", "one patch", "no patch", "no channel"):
        assert found.reason == "all patches look alike"
    if name == "one patch differs" and settings.foreground.median == 3:
        assert found.reason == "no foreground"


def test_all_foreground_is_no_foreground():
    # Along four borders one thing, which the border rule turns into background; thin inside.
    instances = np.zeros((12, 12), dtype=np.int64)
    instances[:, 6] = 1
    found = segment(torch.from_numpy(with_features(instances, 96)), SpectralSettings())
    assert found.reason == "no foreground"


def test_fewer_patches_than_clusters():
    instances = np.zeros((15, 15), dtype=np.int64)
    instances[6:9, 6:9] = 1
    features = torch.from_numpy(with_features(instances, 96))
    settings = SpectralSettings(clusters=ORACLE, min_area=0)
    found = check(segment(features, settings, 500), (15, 15))
    assert 1 <= found.labels.max() <= int(found.foreground.sum()) <= 9
    assert torch.equal(found.labels > 0, found.foreground)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value):
    features = torch.rand(6, 8, 8)
    features[3, 2, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        segment(features, SpectralSettings())


def test_wrong_shape():
    for wrong in (torch.rand(6, 8), torch.rand(1, 6, 8, 8)):
        with pytest.raises(ValueError, match=r"\(C, h, w\)"):
            segment(wrong, SpectralSettings())
