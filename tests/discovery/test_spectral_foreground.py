"""The Fiedler vector of a patch grid, and the clean-up of its mask."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from spectral_cases import published

from unseg.discovery.spectral import clean_mask, fiedler_vector

FOUR = ndimage.generate_binary_structure(2, 1)
EIGHT = ndimage.generate_binary_structure(2, 2)


@st.composite
def masks(draw):
    """Random and smooth masks of all sizes and densities, strips too."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = ndimage.gaussian_filter(
        rng.normal(size=(height, width)), draw(st.sampled_from([0, 1, 2]))
    )
    return values > np.quantile(values, draw(st.floats(0, 1)))


def expected_mask(mask, *, border, border_ratio, min_area_ratio, median):
    """The clean-up with areas in pixels, by scipy."""
    strips = mask[:border], mask[-border:], mask[:, :border], mask[:, -border:]
    if sum(np.mean(s) > border_ratio for s in strips) >= 2:
        mask = ~mask
    mask = ndimage.binary_fill_holes(mask, structure=FOUR)
    labels, count = ndimage.label(mask, structure=EIGHT)
    areas = [np.sum(labels == n) for n in range(1, count + 1)]
    kept = [n for n, area in enumerate(areas, 1) if area >= min_area_ratio * max(areas)]
    mask = np.isin(labels, kept)
    return ndimage.median_filter(mask.astype(np.uint8), median, mode="nearest").astype(bool)


@given(
    mask=masks(),
    border=st.integers(1, 6),
    border_ratio=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    min_area_ratio=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    median=st.sampled_from([1, 3, 5]),
)
def test_clean_up_by_pixels(mask, **settings):
    before = mask.copy()
    found = clean_mask(mask, **settings)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected_mask(mask, **settings))
    np.testing.assert_array_equal(mask, before)


@given(mask=masks())
def test_clean_up_by_polygons_is_the_published_one(mask):
    np.testing.assert_array_equal(clean_mask(mask, area="polygon"), published.cleaned(mask))


def test_areas_of_thin_parts():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:6, 2:6] = True  # 16 patches, and 9 inside the outline through their centres
    mask[10, 2:18] = True  # 16 patches, none inside
    assert clean_mask(mask, median=1)[10, 2:18].all()
    polygons = clean_mask(mask, area="polygon", median=1)
    assert polygons[2:6, 2:6].all()
    assert not polygons[10].any()
    # If no part has an area, all stay, as published.
    mask[2:6, 2:6] = False
    np.testing.assert_array_equal(clean_mask(mask, area="polygon", median=1), mask)


def test_holes_are_filled():
    mask = np.zeros((12, 12), dtype=bool)
    mask[3:9, 3:9] = True
    mask[5:7, 5:7] = False
    for area in ("pixels", "polygon"):
        assert clean_mask(mask, area=area, median=1).sum() == 36


def test_a_mask_along_two_borders_is_inverted():
    mask = np.ones((30, 30), dtype=bool)
    mask[10:20, 10:20] = False
    np.testing.assert_array_equal(clean_mask(mask, median=1), ~mask)
    # One border is not enough, nor is 90 % itself.
    mask = np.zeros((30, 30), dtype=bool)
    mask[:5] = True
    np.testing.assert_array_equal(clean_mask(mask, median=1), mask)
    mask[-5:] = True
    assert clean_mask(mask, median=1)[5:-5].all()
    mask[:5, :3] = mask[-5:, :3] = False
    np.testing.assert_array_equal(clean_mask(mask, median=1), mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 2), (4, 5), (5, 30)])
@pytest.mark.parametrize("area", ["pixels", "polygon"])
def test_empty_and_full_masks_have_no_foreground(size, area):
    assert not clean_mask(np.zeros(size, dtype=bool), area=area).any()
    assert not clean_mask(np.ones(size, dtype=bool), area=area).any()


def test_misuse():
    mask = np.zeros((4, 4), dtype=bool)
    with pytest.raises(ValueError, match="'contour'"):
        clean_mask(mask, area="contour")
    with pytest.raises(ValueError, match="median must be 1, 3 or 5, got 2"):
        clean_mask(mask, median=2)
    for wrong in (mask[0], mask.astype(np.uint8)):
        with pytest.raises(ValueError, match="bool"):
            clean_mask(wrong)


# --- the Fiedler vector


@pytest.mark.parametrize("solver", ["auto", "dense", "lanczos", "lobpcg"])
@pytest.mark.parametrize("size", [(10, 12), (20, 26)])
@pytest.mark.parametrize("seed", [0, 1])
def test_fiedler_vector_is_the_published_one(solver, size, seed):
    features, _ = published.structured_map(*size, 2, 60, seed)
    rows = features.reshape(60, -1).T.astype(np.float64)
    channels = published.low_entropy_channels(rows, 20)
    expected = published.foreground_vector(rows, channels, exact=True)
    given = torch.from_numpy(published.normalized(rows)[:, channels])
    for dtype, tolerance in ((torch.float64, 1e-3), (torch.float32, 2e-3)):
        found = fiedler_vector(given.to(dtype), solver=solver)
        assert found.dtype == dtype
        error = np.abs(found.double().numpy() * np.abs(expected).max() / found.abs().max().item())
        assert np.abs(error - np.abs(expected)).max() < tolerance * np.abs(expected).max()
        # The sign too, of all but values close to 0.
        sure = np.abs(expected) > 0.01 * np.abs(expected).max()
        np.testing.assert_array_equal(found.numpy()[sure] > 0, expected[sure] > 0)
        assert (found > 0).double().mean() <= 0.5
    before = given.clone()
    fiedler_vector(given)
    assert torch.equal(given, before)


def test_fiedler_vector_of_two_groups():
    # Two of 5 patches look alike, and are a minority: they are positive. The graph falls apart.
    rows = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0], [0, 1]])
    vector = fiedler_vector(rows)
    assert (vector > 0).tolist() == [False, False, True, False, True]
    assert vector[2] == pytest.approx(vector[4].item(), rel=1e-4)
