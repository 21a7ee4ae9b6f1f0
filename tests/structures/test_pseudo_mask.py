"""Pseudo-masks: boxes, areas and round trips against plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unseg.structures import encode_masks, make_pseudo_masks, stack_masks

mask_stacks = hnp.arrays(bool, st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(1, 30)))


@given(mask_stacks)
def test_round_trip_boxes_and_areas(masks):
    pseudo = make_pseudo_masks(torch.from_numpy(masks), torch.arange(len(masks)).float())
    assert torch.equal(stack_masks(pseudo, *masks.shape[1:]), torch.from_numpy(masks))
    for index, (pixels, mask) in enumerate(zip(masks, pseudo, strict=True)):
        assert np.array_equal(mask.decode(), pixels)
        assert mask.area == pixels.sum()
        assert mask.score == index
        if pixels.any():
            ys, xs = np.nonzero(pixels)
            size = [np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert mask.box == [xs.min(), ys.min(), *size]


def test_more_than_255_masks():
    """pycocotools 2.0.11 overflows in some functions of lists under numpy 2."""
    masks = torch.rand(300, 6, 7) > 0.5
    pseudo = make_pseudo_masks(masks, torch.ones(300))
    assert torch.equal(stack_masks(pseudo, 6, 7), masks)
    assert [m.area for m in pseudo] == masks.flatten(1).sum(1).tolist()


def test_embeddings():
    vectors = torch.randn(2, 3)
    pseudo = make_pseudo_masks(torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(2), vectors)
    np.testing.assert_array_equal(np.stack([m.embedding for m in pseudo]), vectors.numpy())


def test_mismatches_are_refused():
    with pytest.raises(ValueError, match="2 masks, 3 scores and 2 embeddings"):
        make_pseudo_masks(torch.ones(2, 4, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        encode_masks(torch.ones(4, 4))
