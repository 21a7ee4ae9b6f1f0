"""The CUDA kernels of the mask ops and of boc_affinity, run on the host: no GPU needed.

cuda_on_host.h executes them thread by thread, in several orders; mask_kernels_on_host.cpp launches
them as the ops do. What this leaves open is what only a GPU has: its memory model and its sort.
"""

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import boc_oracle
import mask_ops_oracle as oracle
import numpy as np
import pytest

HERE = Path(__file__).parent
MODES = [*oracle.MODES, "inter"]  # by number
SCHEDULES = {"forward": 0, "backward": 1, "shuffled": 2}
# N, H, W: around the 64 masks of a tile, the 64 bits of a word, the 32 words of a stage
CASES = [(1, 1, 1), (63, 7, 9), (64, 64, 1), (65, 33, 70), (130, 12, 17), (66, 160, 160)]
KERNELS = [("gaussian", 2.0), ("gaussian", 50.0), ("linear", 1.0)]


class Kernels:
    """The compiled kernels: arrays as pointers, None as null, errors raised."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(self, name: str, *arguments: np.ndarray | float | None) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*map(self._convert, arguments))
        if error is not None:
            raise RuntimeError(error.decode())

    @staticmethod
    def _convert(value):
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            return ctypes.c_void_p(value.ctypes.data)
        return ctypes.c_double(value) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ and the ucontext of Linux")
    target = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    command = ["g++", *flags, str(HERE / "mask_kernels_on_host.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(params=SCHEDULES)
def kernels(library, request):
    library.set_schedule(SCHEDULES[request.param])
    return Kernels(library)


def make_masks(count: int, height: int, width: int) -> np.ndarray:
    """Overlapping blobs; with enough of them also empty, full, equal and one-pixel masks."""
    masks = oracle.blobs(count, height, width, seed=count, objects=5)
    if count > 16:
        masks[[3, 9]] = False
        masks[4] = True
        masks[5] = masks[8] = masks[-1] = masks[1]
        masks[6] = masks[7] = False
        masks[6, 0, 0] = masks[7, -1, -1] = True
    return masks


def make_scores(count: int) -> np.ndarray:
    """With ties, both zeros and NaN."""
    scores = np.round(np.random.default_rng(count).random(count), 1)
    if count > 16:
        scores[[10, 11, 12, 13]] = [0.0, -0.0, np.nan, -np.nan]
    return scores


def make_labels(count: int) -> np.ndarray:
    return np.random.default_rng(count).choice([0, -7, 2**40, 2**40 + 2**32], count)


@oracle.remembered
def packed(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits uint64 (N, words) and meta int32 (N, 8), by numpy."""
    count, height, width = masks.shape
    words = -(-height * width // 512) * 8
    eights = np.zeros((count, 8 * words), np.uint8)
    tight = np.packbits(masks.reshape(count, -1), axis=1, bitorder="little")
    eights[:, : tight.shape[1]] = tight
    bits = eights.view("<u8")
    meta = np.zeros((count, 8), np.int32)
    for mask, row, m in zip(masks, bits, meta):
        if mask.any():
            y, x = mask.nonzero()
            word = row.nonzero()[0]
            m[:7] = len(y), x.min(), y.min(), x.max() + 1, y.max() + 1, word[0], word[-1] + 1
    return bits, meta


def garbage(shape, dtype) -> np.ndarray:
    """Memory for results that have to be written in full."""
    return np.full(shape, 113, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_packing(kernels, case, dtype):
    masks = make_masks(*case)[:12]  # each has a block of its own
    rng = np.random.default_rng(0)
    if dtype == np.uint8:
        pixels = masks * rng.integers(1, 256, masks.shape).astype(dtype)
    else:  # not above the threshold: the threshold itself, and NaN
        below = rng.choice([0.3, -np.inf, np.nan, 0.1], masks.shape)
        pixels = np.where(masks, np.nextafter(dtype(0.3), dtype(1)), below).astype(dtype)
    bits, meta = packed(masks)
    out_bits, out_meta = garbage(bits.shape, bits.dtype), garbage(meta.shape, meta.dtype)
    kernels("pack", pixels, pixels.itemsize, 0.3, *masks.shape, out_bits, out_meta)
    assert np.array_equal(out_bits, bits)
    assert np.array_equal(out_meta, meta)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_overlaps(kernels, case, labelled):
    masks1, masks2 = make_masks(*case), make_masks(case[0] // 2 + 1, *case[1:])
    for second in (masks1, masks2):
        labels1 = make_labels(len(masks1)) if labelled else None
        labels2 = make_labels(len(second)) if labelled else None
        same = labels1[:, None] == labels2 if labelled else np.array(True)
        bits1, meta1 = packed(masks1)
        bits2, meta2 = packed(second)
        shape = len(masks1), len(second)
        for number, mode in enumerate(MODES):
            ratios, counts = garbage(shape, np.float32), garbage(shape, np.int32)
            first = bits1, meta1, labels1, len(masks1)
            kernels(
                "overlap", *first, bits2, meta2, labels2, shape[1], bits1.shape[1], number, ratios,
                counts,
            )  # fmt: skip
            if mode == "inter":
                assert np.array_equal(counts, oracle.intersections(masks1, second) * same)
            else:
                expected = oracle.overlaps(masks1, second, mode) * same
                assert np.array_equal(ratios, expected.astype(np.float32))


def run_nms(kernels, masks, scores, threshold, labels=None, mode="iou"):
    """Kept indices by falling score, after checking the other results against them."""
    bits, meta = packed(masks)
    order, count = np.array(oracle.falling(scores)), len(masks)
    keep, ranked, total = np.zeros(count, bool), np.full(count, -1), np.zeros(1, np.int64)
    kernels(
        "nms", bits, meta, labels, order, count, bits.shape[1], MODES.index(mode),
        float(threshold), keep, ranked, total,
    )  # fmt: skip
    kept = ranked[: total[0]].tolist()
    assert keep.nonzero()[0].tolist() == sorted(kept)
    assert (ranked[total[0] :] == -1).all()
    return kept


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_mask_nms(kernels, case, labelled):
    masks, scores = make_masks(*case), make_scores(case[0])
    labels = make_labels(case[0]) if labelled else None
    for mode in oracle.MODES:
        for threshold in (0.0, 0.5, 0.8):
            expected = oracle.greedy(masks, scores, threshold, labels, mode)
            assert run_nms(kernels, masks, scores, threshold, labels, mode) == expected


@pytest.mark.parametrize(("common", "union"), [(1, 10), (1, 3), (1, 2), (7, 10), (1, 1)])
def test_overlap_equal_to_the_threshold_stays(kernels, common, union):
    masks = np.zeros((2, 3, 30), bool)
    masks[0, 1, :union] = masks[1, 1, :common] = True
    scores, threshold = np.array([0.9, 0.8]), common / union
    assert run_nms(kernels, masks, scores, threshold) == [0, 1]
    assert run_nms(kernels, masks, scores, math.nextafter(threshold, 0)) == [0]


def test_a_long_chain_of_suppression(kernels):
    """Each mask overlaps its neighbours: every other one is kept, across all tiles."""
    masks = np.zeros((200, 1, 201), bool)
    for n in range(200):
        masks[n, 0, n : n + 2] = True
    assert run_nms(kernels, masks, -np.arange(200.0), 0.3) == list(range(0, 200, 2))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matrix_nms(kernels, case, labelled):
    masks, scores = make_masks(*case), make_scores(case[0])
    labels = make_labels(case[0]) if labelled else None
    bits, meta = packed(masks)
    order = np.array(oracle.falling(scores))
    for number, sigma in KERNELS:
        decayed = garbage(case[0], np.float32)
        kernels(
            "matrix", bits, meta, labels, order, case[0], bits.shape[1], scores,
            int(number == "linear"), sigma, decayed,
        )  # fmt: skip
        expected = oracle.matrix(masks, scores, labels, number, sigma)
        np.testing.assert_allclose(decayed, expected, rtol=0, atol=1e-6)


# n, C: around the 64 rows of a tile and the 32 channels of a chunk
@pytest.mark.parametrize("size", [(1, 1), (3, 0), (63, 31), (64, 32), (65, 33), (130, 70)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_boc_affinity(kernels, size, dtype):
    features = boc_oracle.features(*size, dtype)
    affinity = garbage((size[0], size[0]), dtype)
    kernels("boc_float" if dtype == np.float32 else "boc_double", features, *size, affinity)
    rtol = boc_oracle.tolerance(size[1], dtype)
    np.testing.assert_allclose(affinity, boc_oracle.exact(features), rtol=rtol, atol=0)
    assert affinity.tobytes() == boc_oracle.ordered(features).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_boc_affinity_of_a_row_that_is_not_finite(kernels, bad):
    features = boc_oracle.features(66, 40)
    expected = boc_oracle.ordered(features)
    features[9, 33] = bad
    expected[9] = expected[:, 9] = 0
    expected[9, 9] = 1
    affinity = garbage((66, 66), np.float32)
    kernels("boc_float", features, 66, 40, affinity)
    assert np.array_equal(affinity, expected)


def test_the_host_finds_what_is_wrong(kernels):
    with pytest.raises(RuntimeError, match="do not meet"):
        kernels("diverge")
    for value in (1, 2):
        out = np.zeros(64, np.int32)
        kernels("race", value, out)
        assert (out != value).any()
