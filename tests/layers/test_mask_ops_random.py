"""Random masks, drawn by hypothesis: every op and path against the oracle."""

import mask_ops_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unseg.layers import mask_iou, mask_nms, matrix_nms, pack_masks

DTYPES = [torch.bool, torch.uint8, torch.int8]
KINDS = ["noise", "blobs", "equal", "empty", "full", "sparse"]


@st.composite
def problems(draw):
    """Masks bool (N, H, W), scores (N,) with ties and NaN, labels (N,) or None, and a dtype."""
    count, height, width = (
        draw(st.integers(0, 70)),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 70)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(KINDS))
    if kind == "blobs":
        masks = oracle.blobs(count, height, width, seed=int(rng.integers(1 << 30)), objects=4)
    elif kind == "equal":
        masks = np.repeat(rng.random((1, height, width)) < 0.3, count, axis=0)
    else:
        share = {"noise": 0.5, "empty": 0.0, "full": 1.0, "sparse": 0.02}[kind]
        masks = rng.random((count, height, width)) < share
    for _ in range(min(count, draw(st.integers(0, 3)))):  # some duplicates
        masks[rng.integers(count)] = masks[rng.integers(count)]
    scores = np.round(rng.random(count), draw(st.sampled_from([0, 1, 6])))
    if draw(st.booleans()):
        scores[rng.random(count) < 0.1] = np.nan
    labels = rng.integers(0, 3, count) if draw(st.booleans()) else None
    return masks, scores, labels, draw(st.sampled_from(DTYPES)), draw(st.booleans())


@pytest.mark.parametrize("path", oracle.PATHS)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    problem=problems(),
    threshold=st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.7, 0.999, 1.0, 2.0]),
    mode=st.sampled_from(oracle.MODES),
    kernel=st.sampled_from(
        [("gaussian", 2.0), ("gaussian", 0.1), ("gaussian", 15.0), ("linear", 1.0)]
    ),
)
def test_all_ops(path, problem, threshold, mode, kernel):
    masks, scores, labels, dtype, strided = problem
    with oracle.use_path(path) as device:
        dense = torch.from_numpy(masks).to(device).to(dtype)
        if strided:  # the same values, not contiguous
            dense = dense.transpose(1, 2).contiguous().transpose(1, 2)
        values = torch.from_numpy(scores).to(device)
        classes = None if labels is None else torch.from_numpy(labels).to(device)
        packed = pack_masks(dense)
        for given_masks in (dense, packed):
            kept = mask_nms(given_masks, values, threshold, classes, mode=mode)
            assert kept.tolist() == oracle.greedy(masks, scores, threshold, labels, mode)
            decayed = matrix_nms(given_masks, values, classes, kernel=kernel[0], sigma=kernel[1])
            expected = oracle.matrix(masks, scores, labels, *kernel)
            np.testing.assert_allclose(
                decayed.cpu().numpy(), expected, rtol=1e-5, atol=1e-6, equal_nan=True
            )
        same = 1 if labels is None else labels[:, None] == labels[None, :]
        ratio = (oracle.overlaps(masks, masks, mode) * same).astype(np.float32)
        assert np.array_equal(mask_iou(dense, mode=mode, labels1=classes).cpu().numpy(), ratio)
        shuffled = torch.randperm(len(masks), generator=torch.Generator().manual_seed(0))
        mixed = mask_iou(packed[shuffled.to(device)], dense, mode=mode).cpu().numpy()
        plain = oracle.overlaps(masks, masks, mode).astype(np.float32)
        assert np.array_equal(mixed, plain[shuffled.numpy()])
