"""mask_iou, mask_nms, batched_mask_nms and matrix_nms against the slow oracle, on every path."""

import math

import mask_ops_oracle as oracle
import numpy as np
import pytest
import torch

from unseg.layers import (
    batched_mask_nms,
    keep_decayed,
    mask_iou,
    mask_nms,
    matrix_nms,
    pack_masks,
)


@pytest.fixture(params=oracle.PATHS)
def device(request):
    with oracle.use_path(request.param) as device:
        yield device


def filled(height: int, width: int, begin: int, end: int) -> np.ndarray:
    """One mask with the pixels [begin, end) of the flattened image."""
    mask = np.zeros(height * width, bool)
    mask[begin:end] = True
    return mask.reshape(height, width)


def special_masks() -> np.ndarray:
    """Duplicates, empty, full and single-pixel masks, and runs that end on word borders."""
    runs = [(0, 64), (0, 64), (0, 0), (0, 0), (0, 30 * 43), (30 * 43 - 1, 30 * 43), (0, 1)]
    runs += [(63, 64), (64, 65), (63, 65), (64, 128), (60, 512), (511, 513), (512, 1024), (0, 128)]
    runs += [(200, 800), (201, 801), (200, 800), (700, 1290), (1024, 1290)]
    return np.stack([filled(30, 43, a, b) for a, b in runs])


def check_all(masks: np.ndarray, scores: np.ndarray, labels: np.ndarray, device: torch.device):
    """All ops, modes and kernels, with and without labels, dense and packed."""
    dense = torch.from_numpy(masks).to(device)
    values = torch.from_numpy(scores).to(device)
    same = labels[:, None] == labels[None, :]
    for classes in (None, labels):
        tensor = None if classes is None else torch.from_numpy(classes).to(device)
        for given in (dense, pack_masks(dense)):
            for mode in oracle.MODES:
                expected = oracle.overlaps(masks, masks, mode)
                if classes is not None:
                    expected = expected * same
                got = mask_iou(given, mode=mode, labels1=tensor)
                assert np.array_equal(got.cpu().numpy(), expected.astype(np.float32)), mode
                for threshold in (0.0, 0.3, 0.5):
                    kept = mask_nms(given, values, threshold, tensor, mode=mode)
                    wanted = oracle.greedy(masks, scores, threshold, classes, mode)
                    assert kept.tolist() == wanted
            for kernel, sigma in (("gaussian", 2.0), ("gaussian", 0.5), ("linear", 2.0)):
                decayed = matrix_nms(given, values, tensor, kernel=kernel, sigma=sigma)
                wanted = oracle.matrix(masks, scores, classes, kernel, sigma)
                np.testing.assert_allclose(
                    decayed.cpu().numpy(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True
                )


def test_special_masks(device):
    masks = special_masks()
    rng = np.random.default_rng(0)
    scores = np.round(rng.random(len(masks)), 1).astype(np.float32)  # with ties
    check_all(masks, scores, rng.integers(0, 3, len(masks)), device)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 130])
def test_around_the_block_size(device, count):
    masks = oracle.blobs(count, 13, 21, seed=count)
    rng = np.random.default_rng(count)
    check_all(masks, rng.random(count, dtype=np.float32), rng.integers(-2, 3, count), device)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (8, 8), (5, 103), (7, 128), (0, 5)])
def test_image_shapes(device, size):
    masks = np.random.default_rng(1).random((9, *size)) < 0.5
    scores = np.linspace(0, 1, 9)
    check_all(masks, scores, np.arange(9) % 2, device)


def test_images_of_many_words(device):
    """Long rows, whose words are counted in several stretches."""
    masks = oracle.blobs(70, 96, 160, seed=3, objects=2)
    masks[:3] |= np.random.default_rng(0).random((3, 96, 160)) < 0.5  # spans of the whole image
    scores = np.random.default_rng(5).random(70)
    check_all(masks, scores, np.zeros(70, np.int64), device)


def test_full_masks_count_every_word(device):
    """All pairs meet everywhere: the counts are those of dense products."""
    masks = np.random.default_rng(2).random((90, 40, 61)) < 0.7
    got = mask_iou(torch.from_numpy(masks).to(device), mode="inter")
    assert got.dtype == torch.int32
    assert np.array_equal(got.cpu().numpy(), oracle.intersections(masks, masks))


def test_two_different_sets(device):
    masks = oracle.blobs(100, 17, 30, seed=8)
    first, second = masks[:70], masks[30:]
    labels = np.arange(100) % 3
    a, b = torch.from_numpy(first).to(device), torch.from_numpy(second).to(device)
    for mode in oracle.MODES:
        expected = oracle.overlaps(first, second, mode).astype(np.float32)
        for left, right in ((a, b), (pack_masks(a), b), (a, pack_masks(b))):
            assert np.array_equal(mask_iou(left, right, mode=mode).cpu().numpy(), expected)
    labels1 = torch.from_numpy(labels[:70]).to(device)
    labels2 = torch.from_numpy(labels[30:]).to(device)
    got = mask_iou(a, b, labels1=labels1, labels2=labels2).cpu().numpy()
    same = labels[:70, None] == labels[None, 30:]
    assert np.array_equal(got, (oracle.overlaps(first, second, "iou") * same).astype(np.float32))
    assert mask_iou(a[:0], b).shape == (0, 70)
    assert mask_iou(a, b[:0], mode="inter").shape == (70, 0)


@pytest.mark.parametrize(
    ("sizes", "threshold"),
    [((10, 1, 1), 0.1), ((2, 1, 1), 0.5), ((10, 7, 7), 0.7), ((20, 13, 13), 0.65)],
)
def test_iou_equal_to_the_threshold_is_kept(device, sizes, threshold):
    """1/10 is not above 0.1, 7/10 not above 0.7, ...: decided in float64, strictly."""
    first, second, common = sizes
    masks = np.stack([filled(5, 5, 0, first), filled(5, 5, first - common, first)])
    assert masks[1].sum() == second
    dense = torch.from_numpy(masks).to(device)
    scores = torch.tensor([0.9, 0.8], device=device)
    assert mask_nms(dense, scores, threshold).tolist() == [0, 1]
    assert mask_nms(dense, scores, math.nextafter(threshold, 0)).tolist() == [0]


def test_order_of_scores(device):
    """Ties in input order, -0 equal to 0, infinities at the ends, NaN after all."""
    masks = torch.zeros(7, 3, 3, dtype=torch.bool, device=device)
    scores = torch.tensor([-0.0, math.nan, 0.0, math.inf, -math.inf, math.nan, 0.5], device=device)
    assert mask_nms(masks, scores, 0.5).tolist() == [3, 6, 0, 2, 4, 1, 5]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert mask_nms(masks, scores.to(dtype), 0.5).tolist() == [3, 6, 0, 2, 4, 1, 5]


def test_nan_score_changes_no_other_score(device):
    masks = torch.from_numpy(oracle.blobs(20, 9, 9, seed=4)).to(device)
    scores = torch.linspace(1, 0.1, 20, device=device)
    clean = matrix_nms(masks, scores)
    spoilt = scores.clone()
    spoilt[7] = math.nan
    others = [i for i in range(20) if i != 7]
    decayed = matrix_nms(masks, spoilt)
    assert decayed[7].isnan()
    assert torch.equal(decayed[others], matrix_nms(masks[others], scores[others]))
    assert not clean.isnan().any()


def test_return_mask(device):
    masks = torch.from_numpy(oracle.blobs(50, 12, 12, seed=6)).to(device)
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0)).to(device)
    kept = mask_nms(masks, scores, 0.4)
    keep = mask_nms(masks, scores, 0.4, return_mask=True)
    assert keep.dtype == torch.bool
    assert kept.dtype == torch.int64
    assert sorted(kept.tolist()) == keep.nonzero().flatten().tolist()
    assert 1 < len(kept) < 50


def test_empty_masks_are_never_dropped_and_thresholds_from_one_keep_all(device):
    masks = torch.zeros(5, 4, 4, dtype=torch.bool, device=device)
    scores = torch.ones(5, device=device)
    assert mask_nms(masks, scores, 0.0).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(matrix_nms(masks, scores), scores)
    assert mask_nms(~masks, scores, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert mask_nms(~masks, scores, 0.999).tolist() == [0]


def test_duplicates_decay_by_the_definition(device):
    """Three equal masks: exp(-2) for each but the first; 0 with the linear kernel, never NaN."""
    masks = torch.ones(3, 4, 4, dtype=torch.bool, device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    expected = torch.tensor([0.9, 0.8 * math.exp(-2), 0.7 * math.exp(-2)])
    torch.testing.assert_close(matrix_nms(masks, scores).cpu(), expected)
    linear = matrix_nms(masks, scores, kernel="linear").cpu()
    torch.testing.assert_close(linear, torch.tensor([0.9, 0.0, 0.0]))


def test_batched_nms_is_nms_per_category(device):
    masks = oracle.blobs(60, 15, 15, seed=9)
    rng = np.random.default_rng(9)
    scores, categories = rng.random(60), rng.integers(0, 4, 60)
    kept = batched_mask_nms(
        torch.from_numpy(masks).to(device),
        torch.from_numpy(scores).to(device),
        torch.from_numpy(categories.astype(np.int32)).to(device),
        0.3,
    )
    assert kept.tolist() == oracle.greedy(masks, scores, 0.3, categories)


def test_labels_beyond_32_bits(device):
    masks = torch.ones(4, 3, 3, dtype=torch.bool, device=device)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6], device=device)
    labels = torch.tensor([1, 1 + 2**40, 1 + 2**40, -(2**62)], device=device)
    assert mask_nms(masks, scores, 0.5, labels).tolist() == [0, 1, 3]


def test_keep_decayed():
    scores = torch.tensor([0.05, 0.9, math.nan, 0.049, 0.9, 0.3])
    assert keep_decayed(scores).tolist() == [1, 4, 5, 0]
    assert keep_decayed(scores, update_threshold=0.3, max_num=2).tolist() == [1, 4]
    assert keep_decayed(scores[:0]).tolist() == []


def test_results_carry_no_gradient(device):
    masks = torch.from_numpy(oracle.blobs(10, 9, 9, seed=1)).to(device)
    scores = torch.rand(10, device=device, requires_grad=True)
    assert not matrix_nms(masks, scores).requires_grad
    assert not mask_nms(masks, scores, 0.5).requires_grad


@pytest.mark.parametrize("path", oracle.PATHS)
def test_thread_count_does_not_matter(path):
    """Large enough that every parallel loop is split."""
    masks = oracle.blobs(900, 24, 40, seed=11, objects=60)
    rng = np.random.default_rng(11)
    small = rng.random((5000, 4, 16)) < 0.05  # many survivors: the parallel branch of greedy NMS
    before = torch.get_num_threads()
    results = []
    with oracle.use_path(path) as device:
        dense, tiny = torch.from_numpy(masks).to(device), torch.from_numpy(small).to(device)
        scores = torch.from_numpy(rng.random(900)).to(device)
        tiny_scores = torch.from_numpy(rng.random(5000)).to(device)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(
                    [
                        mask_iou(dense),
                        mask_nms(dense, scores, 0.4),
                        matrix_nms(dense, scores),
                        pack_masks(dense).bits,
                        mask_nms(tiny, tiny_scores, 0.9),
                    ]
                )
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
