"""Windows, masks in them, views and means, against slow definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from region_cases import covered_slowly

from unseg.modeling.roi_heads.regions import (
    pool_cells,
    resample_masks,
    view_weights,
    windows_around,
)


def test_square_windows():
    boxes = torch.tensor([[10.0, 20, 50, 30], [0, 0, 8, 100], [3, 4, 9, 10], [5, 5, 5, 5]])
    windows = windows_around(boxes, "square")
    expected = torch.tensor([[10.0, 5, 50, 45], [-46, 0, 54, 100], [3, 4, 9, 10], [5, 5, 5, 5]])
    torch.testing.assert_close(windows, expected, atol=1e-3, rtol=0)
    assert torch.equal(windows_around(boxes, "tight"), boxes)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    cells=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.integers(1, 5),
    mode=st.sampled_from(["square", "tight"]),
)
def test_masks_in_windows(seed, cells, size, mode):
    rng = np.random.default_rng(seed)
    mask = rng.random(cells)
    x0, y0 = rng.uniform(-20, 60, 2)
    frame = np.array([x0, y0, x0 + rng.uniform(2, 50), y0 + rng.uniform(2, 50)])
    box = torch.tensor(frame, dtype=torch.float32)[None]
    window = windows_around(box, mode)
    found = resample_masks(torch.tensor(mask)[None], box, window, size)
    expected = covered_slowly(mask, box[0].double().numpy(), window[0].double().numpy(), size)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-4)


def test_a_planted_mask_is_where_it_is():
    """A box 40 wide and 10 high, its left half in the mask. Half a cell off would be seen: then
    nothing here would be whole."""
    box = torch.tensor([[100.0, 50.0, 140.0, 60.0]])
    mask = torch.zeros(1, 28, 28)
    mask[..., :14] = 1
    found = resample_masks(mask, box, windows_around(box, "square"), 8)
    expected = torch.zeros(8, 8)
    expected[3:5, :4] = 1  # rows of 5 pixels: 35 ... 75, the box has 50 ... 60
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    off = resample_masks(mask, box, windows_around(box, "square") + 2.5, 8)
    assert (off[0] - expected).abs().max() > 0.4


def test_tight_windows_are_resized_as_by_bilinear_interpolation():
    masks = torch.rand(3, 28, 28)
    boxes = torch.tensor([[0.0, 0, 30, 60], [5, 5, 100, 9], [1, 2, 3, 4]])
    found = resample_masks(masks, boxes, boxes, 14)
    expected = F.interpolate(masks[None], (14, 14), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_masks_of_whole_images(monkeypatch):
    """Cut out of the image's mask, in chunks or not."""
    masks = torch.rand(5, 40, 60) > 0.5
    frames = torch.tensor([[0.0, 0.0, 120.0, 80.0]]).expand(5, 4)  # half the resolution
    windows = torch.tensor([[20.0, 10.0, 36.0, 26.0]]).expand(5, 4)
    expected = masks[:, 5:13, 10:18].float()
    assert torch.equal(resample_masks(masks, frames, windows, 8), expected)
    monkeypatch.setattr("unseg.modeling.roi_heads.regions._CELLS_AT_ONCE", 5000)
    assert torch.equal(resample_masks(masks, frames, windows, 8), expected)


def test_flat_boxes_and_no_masks():
    boxes = torch.tensor([[10.0, 10, 10, 30], [10, 10, 10, 10]])
    found = resample_masks(torch.ones(2, 28, 28), boxes, windows_around(boxes, "square"), 14)
    assert torch.isfinite(found).all()
    assert found[0].max() < 1e-3
    assert resample_masks(torch.ones(0, 28, 28), boxes[:0], boxes[:0], 14).shape == (0, 14, 14)


def test_view_weights():
    masks = torch.rand(2, 3, 3)
    fg, full, bg = view_weights(masks, ("fg", "full", "bg")).split(2)
    assert torch.equal(fg, masks)
    assert (full == 1).all()
    assert torch.equal(bg, 1 - masks)
    assert torch.equal(view_weights(masks, ("bg",)), bg)


@pytest.mark.parametrize("mode", ["mean", "masked_mean"])
def test_pool_cells(mode):
    cells, weights = torch.rand(3, 4, 5, 5), torch.rand(3, 5, 5)
    weights[2] = 0
    found = pool_cells(cells, weights, mode)
    for n in range(2):
        for c in range(4):
            w = weights[n].double() if mode == "masked_mean" else torch.ones(5, 5).double()
            expected = (cells[n, c].double() * w).sum() / w.sum()
            assert abs(float(found[n, c]) - float(expected)) < 1e-6
    if mode == "masked_mean":
        assert (found[2] == 0).all()
