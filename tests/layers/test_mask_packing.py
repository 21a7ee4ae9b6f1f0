"""PackedMasks and pack_masks: formats, dtypes, thresholds, run lengths."""

import math

import mask_ops_oracle as oracle
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from unseg.layers import PackedMasks, mask_iou, mask_nms, pack_masks

SIZES = [(1, 1), (3, 5), (8, 8), (7, 64), (64, 7), (9, 57), (30, 43), (1, 600), (600, 1), (33, 130)]


@pytest.fixture(params=oracle.PATHS)
def device(request):
    with oracle.use_path(request.param) as device:
        yield device


def check_packed(packed: PackedMasks, masks: np.ndarray) -> None:
    """Bits and descriptions against the definition; masks bool (N, H, W)."""
    count, height, width = masks.shape
    assert packed.shape == masks.shape
    words = -(-height * width // 64)
    assert packed.bits.shape == (count, -(-words // 8) * 8)
    flat = masks.transpose(0, 2, 1) if packed.order == "F" else masks
    padded = np.zeros((count, packed.bits.shape[1] * 64), bool)
    padded[:, : height * width] = flat.reshape(count, -1)
    expected = np.packbits(padded, axis=1, bitorder="little").view("<i8")
    assert np.array_equal(packed.bits.cpu().numpy(), expected.reshape(count, -1))
    assert np.array_equal(packed.area.cpu().numpy(), masks.sum((1, 2)))
    for n, mask in enumerate(masks):
        y, x = np.nonzero(mask)
        word = np.nonzero(expected[n])[0]
        box, span = [0, 0, 0, 0], [0, 0]
        if len(y):
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            span = [word[0], word[-1] + 1]
        assert packed.box[n].tolist() == box
        assert packed.span[n].tolist() == span
    assert (packed.meta[:, 7] == 0).all()
    assert np.array_equal(packed.to_dense().cpu().numpy(), masks)


def some_masks(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    masks = [np.zeros((height, width), bool), np.ones((height, width), bool)]
    masks += [rng.random((height, width)) < p for p in (0.5, 0.02, 0.98)]
    masks += list(oracle.blobs(6, height, width, seed=width))
    corner = np.zeros((height, width), bool)
    corner[-1, -1] = True
    return np.stack([*masks, corner])


@pytest.mark.parametrize("size", SIZES)
def test_bits_areas_boxes_and_spans(device, size):
    masks = some_masks(*size)
    check_packed(pack_masks(torch.from_numpy(masks).to(device)), masks)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_any_non_zero_byte_is_set(device, dtype):
    values = torch.randint(0, 256, (5, 9, 31), generator=torch.Generator().manual_seed(0))
    values[values < 128] = 0
    values[0, 0, :4] = torch.tensor([1, 2, 128, 255])
    masks = values.to(torch.uint8).view(dtype)
    check_packed(pack_masks(masks.to(device)), (masks != 0).numpy())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("threshold", [0.5, 0.1, -0.25, 0.0, -math.inf, math.inf])
def test_soft_masks(device, dtype, threshold):
    """Strictly above the threshold, compared in float32 (float64 in float64); NaN is unset."""
    masks = torch.randn(6, 11, 29, generator=torch.Generator().manual_seed(1)).to(dtype)
    masks[:, 0, :4] = torch.tensor([threshold, math.nan, math.inf, -math.inf], dtype=dtype)
    masks[:, 1, :3] = torch.tensor([6e-8, -6e-8, 0.0], dtype=dtype)  # below float16's normal range
    wide = np.float64 if dtype == torch.float64 else np.float32
    expected = masks.to(torch.float64).numpy().astype(wide) > wide(threshold)
    check_packed(pack_masks(masks.to(device), threshold), expected)


def test_a_value_equal_to_the_threshold_is_unset(device):
    """0.1 in float32 is above 0.1 in float64; the comparison is in float32."""
    masks = torch.full((1, 2, 2), 0.1, device=device)
    assert pack_masks(masks, 0.1).area.item() == 0
    assert pack_masks(masks.double(), 0.1).area.item() == 4
    assert pack_masks(masks, 0.0999).area.item() == 4


def test_any_strides(device):
    base = torch.from_numpy(np.random.default_rng(3).random((12, 20, 33)) < 0.4).to(device)
    views = {
        "transposed": base.transpose(1, 2),
        "masks last": base.permute(2, 1, 0),
        "every other mask": base[::2],
        "cropped": base[:, 3:17, 5:30],
        "flipped": base.flip(0)[:, ::2, ::3],
        "one mask repeated": base[:1].expand(5, 20, 33),
        "one row repeated": base[:, :1].expand(12, 20, 33),
    }
    for name, view in views.items():
        masks = view.cpu().numpy()
        check_packed(pack_masks(view), masks)
        expected = oracle.overlaps(masks, masks, "iou").astype(np.float32)
        assert np.array_equal(mask_iou(view).cpu().numpy(), expected), name


def test_no_masks_and_no_pixels(device):
    assert pack_masks(torch.zeros(0, 5, 6, dtype=torch.bool, device=device)).shape == (0, 5, 6)
    empty = pack_masks(torch.zeros(3, 0, 6, dtype=torch.bool, device=device))
    assert empty.shape == (3, 0, 6)
    assert empty.area.tolist() == [0, 0, 0]
    assert empty.to_dense().shape == (3, 0, 6)


def test_selecting_joining_and_moving(device):
    masks = some_masks(9, 57)
    packed = pack_masks(torch.from_numpy(masks).to(device))
    check_packed(packed[2:7], masks[2:7])
    check_packed(packed[3], masks[3:4])
    check_packed(packed[-1], masks[-1:])
    check_packed(packed[torch.tensor([4, 0, 4], device=device)], masks[[4, 0, 4]])
    check_packed(packed[packed.area > 100], masks[masks.sum((1, 2)) > 100])
    check_packed(packed[::3], masks[::3])
    check_packed(PackedMasks.cat([packed[:4], packed[4:]]), masks)
    check_packed(packed.to("cpu"), masks)
    assert len(packed) == len(masks)
    assert packed.device.type == device.type
    assert pack_masks(packed) is packed
    with pytest.raises(IndexError, match="out of range"):
        packed[len(masks)]
    kept = mask_nms(packed[::3], torch.arange(4.0, device=device), 0.5)
    assert kept.tolist() == oracle.greedy(masks[::3], np.arange(4.0), 0.5)


def encode(masks: np.ndarray) -> list[dict]:
    return coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))


def runs_of(mask: np.ndarray) -> dict:
    """Uncompressed run lengths of one mask."""
    flat = mask.T.ravel()
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *borders, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


@pytest.mark.parametrize("size", SIZES)
def test_run_lengths(device, size):
    masks = some_masks(*size)
    compressed = encode(masks)
    text = [{**rle, "counts": rle["counts"].decode()} for rle in compressed]
    plain = [runs_of(mask) for mask in masks]
    for rles in (compressed, text, plain, [compressed[0], *text[1:3], *plain[3:]]):
        packed = pack_masks(rles)
        assert packed.order == "F"
        check_packed(packed, masks)


def test_ops_on_run_lengths(device):
    masks = oracle.blobs(40, 25, 31, seed=2)
    packed = pack_masks(encode(masks)).to(device)
    expected = oracle.overlaps(masks, masks, "iou")
    assert np.array_equal(mask_iou(packed).cpu().numpy(), expected.astype(np.float32))
    scores = np.random.default_rng(0).random(40)
    kept = mask_nms(packed, torch.from_numpy(scores).to(device), 0.3)
    assert kept.tolist() == oracle.greedy(masks, scores, 0.3)
    dense = torch.from_numpy(masks).to(device)
    with pytest.raises(ValueError, match="do not mix"):
        mask_iou(packed, dense)
    with pytest.raises(ValueError, match="do not mix"):
        mask_iou(packed, pack_masks(dense))
    assert len(pack_masks([])) == 0


@pytest.mark.parametrize(
    "counts",
    [b"", "", [], [5], [12, -1, 1], [13], [6, 7], b"/", b"\x7f", "`", b"0" * 3, b"PPP", b"o" * 20],
)
def test_malformed_run_lengths(device, counts):
    with pytest.raises(ValueError, match="RLE 1"):
        pack_masks([{"size": [3, 4], "counts": [12]}, {"size": [3, 4], "counts": counts}])
    with pytest.raises(ValueError, match="RLE 0"):
        pack_masks([{"size": [3, 4], "counts": counts}])
