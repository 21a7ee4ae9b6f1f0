"""Errors, malformed calls, memory, dispatcher rules, torch.compile, the environment's switches."""

import json
import math
import os
import subprocess
import sys
import textwrap
import warnings

import mask_ops_oracle as oracle
import numpy as np
import pytest
import torch

from unseg.layers import (
    PackedMasks,
    backend,
    batched_mask_nms,
    has_native,
    keep_decayed,
    mask_iou,
    mask_nms,
    matrix_nms,
    pack_masks,
)

MASKS = torch.ones(3, 4, 5, dtype=torch.bool)
SCORES = torch.tensor([0.3, 0.2, 0.1])
LABELS = torch.tensor([0, 0, 1])
needs_native = pytest.mark.skipif(not has_native(), reason="the extension is not built")


@pytest.fixture(params=["native", "pytorch"])
def path(request):
    """The errors are alike with and without the extension."""
    with oracle.use_path("pytorch" if request.param == "pytorch" else backend()):
        yield request.param


WRONG_TYPE = [
    (lambda: mask_iou([[1]]), "masks1"),
    (lambda: mask_iou(MASKS.numpy()), "masks1"),
    (lambda: mask_iou(MASKS, [{"size": [4, 5], "counts": [20]}]), "masks2.*pack_masks"),
    (lambda: mask_iou(MASKS.long()), "masks1"),
    (lambda: mask_iou(MASKS.to(torch.complex64)), "masks1"),
    (lambda: mask_iou(MASKS, mode=3), "mode"),
    (lambda: mask_iou(MASKS, labels1=SCORES), "labels1"),
    (lambda: mask_nms(MASKS, [0.3, 0.2, 0.1], 0.5), "scores"),
    (lambda: mask_nms(MASKS, LABELS, 0.5), "scores"),
    (lambda: mask_nms(MASKS, SCORES, "0.5"), "iou_threshold"),
    (lambda: mask_nms(MASKS, SCORES, torch.tensor(0.5)), "iou_threshold"),
    (lambda: mask_nms(MASKS, SCORES, True), "iou_threshold"),
    (lambda: mask_nms(MASKS, SCORES, 0.5, [0, 0, 1]), "labels"),
    (lambda: mask_nms(MASKS, SCORES, 0.5, LABELS.bool()), "labels"),
    (lambda: batched_mask_nms(MASKS, SCORES, None, 0.5), "idxs"),
    (lambda: batched_mask_nms(MASKS, SCORES, SCORES, 0.5), "idxs"),
    (lambda: matrix_nms(MASKS, SCORES, kernel=None), "kernel"),
    (lambda: matrix_nms(MASKS, SCORES, sigma=None), "sigma"),
    (lambda: pack_masks(None), "masks"),
    (lambda: pack_masks("masks"), "masks"),
    (lambda: pack_masks(MASKS.int()), "masks"),
    (lambda: pack_masks(MASKS.float(), "0.5"), "threshold"),
    (lambda: pack_masks([{"size": [4, 5]}]), r"masks\[0\]"),
    (lambda: pack_masks([{"size": [4, 5], "counts": [0.5]}]), r"masks\[0\]"),
    (lambda: PackedMasks(MASKS, MASKS, (4, 5)), "bits"),
    (lambda: keep_decayed(LABELS), "decayed_scores"),
    (lambda: keep_decayed(SCORES, max_num=1.5), "max_num"),
]
WRONG_VALUE = [
    (lambda: mask_iou(MASKS[0]), "masks1"),
    (lambda: mask_iou(MASKS, MASKS[:, :, :4]), "one size"),
    (lambda: mask_iou(MASKS, pack_masks(MASKS[:, :, :4])), "one size"),
    (lambda: mask_iou(pack_masks(MASKS), pack_masks(MASKS[:, :, :4])), "do not mix"),
    (lambda: mask_iou(MASKS.float()), "threshold"),
    (lambda: mask_iou(MASKS, mode="giou"), "mode"),
    (lambda: mask_iou(MASKS, labels1=LABELS[:2]), "labels1"),
    (lambda: mask_iou(MASKS, labels2=LABELS), "labels2"),
    (lambda: mask_iou(MASKS, MASKS, labels1=LABELS), "labels1 and labels2"),
    (lambda: mask_nms(MASKS, SCORES[:2], 0.5), "scores"),
    (lambda: mask_nms(MASKS, SCORES[None], 0.5), "scores"),
    (lambda: mask_nms(MASKS, SCORES, -0.1), "iou_threshold"),
    (lambda: mask_nms(MASKS, SCORES, math.nan), "iou_threshold"),
    (lambda: mask_nms(MASKS, SCORES, 0.5, LABELS[:2]), "labels"),
    (lambda: mask_nms(MASKS, SCORES, 0.5, mode="inter"), "mode"),
    (lambda: batched_mask_nms(MASKS, SCORES, LABELS[:1], 0.5), "idxs"),
    (lambda: matrix_nms(MASKS, SCORES, kernel="Gaussian"), "kernel"),
    (lambda: matrix_nms(MASKS, SCORES, sigma=0), "sigma"),
    (lambda: matrix_nms(MASKS, SCORES, sigma=-2.0), "sigma"),
    (lambda: matrix_nms(MASKS, SCORES, sigma=math.inf), "sigma"),
    (lambda: pack_masks(MASKS, 0.5), "threshold"),
    (lambda: pack_masks(pack_masks(MASKS), 0.5), "threshold"),
    (lambda: pack_masks(MASKS.float()), "threshold"),
    (lambda: pack_masks(MASKS.float(), math.nan), "threshold"),
    (lambda: pack_masks(MASKS.flatten()), "masks"),
    (lambda: pack_masks([{"size": [4], "counts": [4]}]), "size"),
    (lambda: pack_masks([{"size": [-4, -5], "counts": [20]}]), "size"),
    (
        lambda: pack_masks([{"size": [4, 5], "counts": [20]}, {"size": [5, 4], "counts": [20]}]),
        "one",
    ),
    (lambda: PackedMasks.cat([]), "parts"),
    (lambda: PackedMasks.cat([pack_masks(MASKS), pack_masks(MASKS[:, 1:])]), "parts"),
    (lambda: PackedMasks(torch.zeros(3, 1).long(), torch.zeros(3, 8).int(), (4, 5)), "bits"),
    (lambda: PackedMasks(torch.zeros(3, 8).long(), torch.zeros(2, 8).int(), (4, 5)), "meta"),
    (lambda: PackedMasks(torch.zeros(3, 8).long(), torch.zeros(3, 8).int(), (4, 5), "A"), "order"),
    (lambda: keep_decayed(SCORES[None]), "decayed_scores"),
    (lambda: keep_decayed(SCORES, max_num=-1), "max_num"),
]
WRONG_DEVICE = [
    (lambda: mask_iou(MASKS, MASKS.to("meta")), "masks1 is on cpu and masks2 is on meta"),
    (lambda: mask_nms(MASKS, SCORES.to("meta"), 0.5), "masks is on cpu and scores is on meta"),
    (lambda: mask_nms(MASKS, SCORES, 0.5, LABELS.to("meta")), "labels is on meta"),
    (lambda: matrix_nms(MASKS.to("meta"), SCORES), "masks is on meta and scores is on cpu"),
]


@pytest.mark.parametrize(
    ("call", "named", "error"),
    [(c, n, TypeError) for c, n in WRONG_TYPE]
    + [(c, n, ValueError) for c, n in WRONG_VALUE]
    + [(c, n, RuntimeError) for c, n in WRONG_DEVICE],
)
def test_errors_name_the_argument(path, call, named, error):
    with pytest.raises(error, match=named):
        call()


# Run in a process of its own: a crash would otherwise end the tests.
MALFORMED = """
import itertools, json, random, torch, warnings
from unseg.layers import *
from unseg.layers import native
warnings.simplefilter("ignore")
random.seed(0)
masks, scores = torch.ones(3, 4, 5, dtype=torch.bool), torch.tensor([.3, .2, .1])
labels = torch.tensor([0, 0, 1])
bad_masks = [None, 1, "a", [1], [{}], masks.numpy(), masks[0], masks[None], masks.long(),
             masks.double(), masks.to(torch.complex64), masks.to_sparse(), torch.tensor(True)]
bad_scores = [None, .5, [.1, .2, .3], labels, scores[:2], scores[None], scores.to("meta"),
              torch.zeros(3, dtype=torch.bool), torch.tensor(.5), scores.to(torch.complex64)]
bad_numbers = [None, "a", [], -1.0, float("nan"), torch.tensor(.5), True, 1j]
bad_labels = [1, [0, 0, 1], labels[:2], labels[None], scores, labels.bool(), labels.to("meta")]
bad_names = [None, 0, "", "IOU", "inter "]
calls = []
for f in (mask_iou, lambda m: mask_nms(m, scores, .5), lambda m: matrix_nms(m, scores),
          lambda m: batched_mask_nms(m, scores, labels, .5)):
    calls += [(f, (m,)) for m in bad_masks]
calls += [(mask_iou, (masks, m)) for m in bad_masks[1:]]
calls += [(mask_nms, (masks, s, .5)) for s in bad_scores]
calls += [(matrix_nms, (masks, s)) for s in bad_scores]
calls += [(batched_mask_nms, (masks, s, labels, .5)) for s in bad_scores]
calls += [(mask_nms, (masks, scores, t)) for t in bad_numbers]
calls += [(lambda s: matrix_nms(masks, scores, sigma=s), (s,)) for s in bad_numbers]
calls += [(lambda t: pack_masks(masks.float(), t), (t,)) for t in bad_numbers if t != -1.0]
calls += [(mask_nms, (masks, scores, .5, l)) for l in bad_labels]
calls += [(matrix_nms, (masks, scores, l)) for l in bad_labels]
calls += [(lambda n: mask_nms(masks, scores, .5, mode=n), (n,)) for n in bad_names]
calls += [(lambda n: mask_iou(masks, mode=n), (n,)) for n in bad_names]
calls += [(lambda n: matrix_nms(masks, scores, kernel=n), (n,)) for n in bad_names]
for length in range(1, 70):  # random characters almost never add up to the size
    text = bytes(random.randrange(40, 127) for _ in range(length))
    calls.append((pack_masks, ([{"size": [211, 97], "counts": text}],)))
if has_native():  # the ops themselves, below all checks in Python
    ops = torch.ops.unseg
    bits, meta = ops.pack_masks(masks, 0.)
    wrong_bits = [bits[:2], bits[:, :3], bits.int(), bits[0], bits.float(), masks.float()]
    wrong_meta = [meta[:2], meta[:, :7], meta.long(), meta[0], meta + 1000, meta - 1000]
    for m in wrong_bits:
        calls += [(ops.mask_nms, (m, meta, None, scores, .5, 0)),
                  (ops.mask_overlap, (m, meta, None, None, None, None, 0)),
                  (ops.matrix_nms, (m, meta, None, scores, 0, 2.))]
    for m in wrong_meta:
        calls += [(ops.mask_nms, (bits, m, None, scores, .5, 0)),
                  (ops.mask_overlap, (bits, m, None, None, None, None, 0)),
                  (ops.matrix_nms, (bits, m, None, scores, 0, 2.))]
    calls += [(ops.mask_nms, (bits, meta, None, scores, .5, m)) for m in (-1, 4, 99)]
    calls += [(ops.mask_overlap, (bits, meta, None, None, None, None, m)) for m in (-1, 5)]
    calls += [(ops.mask_overlap, (bits, meta, None, bits, None, None, 0)),
              (ops.mask_overlap, (bits, meta, labels, bits, meta, None, 0)),
              (ops.mask_overlap, (bits, meta, None, None, meta, None, 0)),
              (ops.mask_nms, (bits, meta, None, scores, -1., 0)),
              (ops.mask_nms, (bits, meta, labels[:2], scores, .5, 0)),
              (ops.mask_nms, (bits, meta, labels.int(), scores, .5, 0)),
              (ops.matrix_nms, (bits, meta, None, scores, 2, 2.)),
              (ops.matrix_nms, (bits, meta, None, scores, 0, 0.)),
              (ops.matrix_nms, (bits, meta, None, labels, 0, 2.)),
              (ops.pack_masks, (masks[0], 0.)), (ops.pack_masks, (masks.int(), 0.))]
    data = torch.tensor([20])
    for offsets in ([], [0, 2], [0, -1], [1, 0], [-1, 1], [0, 2**62]):
        calls.append((ops.pack_rle, (data, torch.tensor(offsets, dtype=torch.int64), 4, 5)))
    for size in ((-4, -5), (2**40, 2**40), (4, 2**31), (-1, 20)):
        calls.append((ops.pack_rle, (data, torch.tensor([0, 1]), *size)))
silent = []
for k, (f, args) in enumerate(calls):
    try:
        f(*args)
    except Exception:
        continue
    silent.append((k, repr(args)[:200]))
print(json.dumps({"calls": len(calls), "silent": silent}))
"""


def run_python(code: str, **environment: str) -> str:
    """The last line that the code writes, run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("without", ["0", "1"])
def test_malformed_calls_end_in_exceptions(without):
    answer = json.loads(run_python(MALFORMED, UNSEG_NO_EXT=without))
    assert answer["calls"] >= 200
    assert answer["silent"] == []


def test_the_extension_can_be_left_out_and_the_instruction_set_chosen():
    code = "from unseg.layers import *; print(has_native(), backend(), has_native('cuda'))"
    assert run_python(code, UNSEG_NO_EXT="1") == "False pytorch False"
    if has_native():
        assert run_python(code, UNSEG_MASK_ISA="portable").startswith("True portable")


@needs_native
def test_an_unknown_instruction_set_raises(monkeypatch):
    monkeypatch.setenv("UNSEG_MASK_ISA", "neon")
    with pytest.raises(ValueError, match="UNSEG_MASK_ISA"):
        mask_nms(MASKS, SCORES, 0.5)


MEMORY = """
import json, os, resource, torch
from unseg.layers import *
count = int(os.environ["COUNT"])
generator = torch.Generator().manual_seed(0)
y, x = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
centre = torch.rand(count, 2, generator=generator) * torch.tensor([12.0, 16.0])
masks = ((y - centre[:, :1, None])**2 + (x - centre[:, 1:, None])**2) < 6
scores = torch.rand(count, generator=generator)
labels = torch.randint(0, 3, (count,), generator=generator)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
mask_nms(masks[:600], scores[:600], .5), matrix_nms(masks[:600], scores[:600])
start = peak()
kept = mask_nms(masks, scores, 0.6, labels)
greedy = peak() - start
decayed = matrix_nms(masks, scores, labels)
print(json.dumps({"greedy": greedy, "matrix": peak() - start, "kept": len(kept)}))
"""


@pytest.mark.parametrize(("without", "count", "limit"), [("0", 20_000, 60), ("1", 9_000, 200)])
def test_memory_is_bounded_for_many_masks(without, count, limit):
    """MiB above what a first call takes; N x N float32 would be 1526 and 309."""
    grown = json.loads(run_python(MEMORY, UNSEG_NO_EXT=without, COUNT=str(count)))
    assert grown["greedy"] < limit
    assert grown["matrix"] < limit
    assert 100 < grown["kept"] < count


def sample_arguments() -> dict[str, list[tuple]]:
    """Arguments of each op, dense and packed, with and without labels."""
    masks = torch.from_numpy(oracle.blobs(9, 10, 13, seed=0))
    bits, meta = torch.ops.unseg.pack_masks(masks, 0.0)
    scores, labels = torch.rand(9), torch.arange(9) % 2
    runs = torch.tensor([2, 3, 1, 0, 6], dtype=torch.int64)
    return {
        "pack_masks": [(masks, 0.0), (torch.rand(4, 5, 6), 0.5), (masks[:0], 0.0)],
        "pack_rle": [(runs, torch.tensor([0, 3, 5]), 2, 3)],
        "mask_overlap": [
            (bits, meta, labels, None, None, None, 0),
            (masks, None, None, masks[:4], None, None, 4),
            (bits, meta, None, bits[:2], meta[:2], None, 2),
        ],
        "mask_nms": [(bits, meta, labels, scores, 0.3, 0), (masks, None, None, scores, 0.3, 1)],
        "matrix_nms": [(bits, meta, labels, scores, 0, 2.0), (masks, None, None, scores, 1, 2.0)],
    }


@needs_native
@pytest.mark.parametrize(
    "name", ["pack_masks", "pack_rle", "mask_overlap", "mask_nms", "matrix_nms"]
)
def test_opcheck(name):
    for arguments in sample_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.unseg, name).default, arguments)


@needs_native
def test_meta_tensors_give_shapes():
    masks, scores = MASKS.to("meta"), SCORES.to("meta")
    assert mask_iou(masks).shape == (3, 3)
    assert mask_iou(masks, masks[:2], mode="inter").dtype == torch.int32
    assert mask_nms(masks, scores, 0.5, return_mask=True).dtype == torch.bool
    assert matrix_nms(masks, scores).shape == (3,)


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    def pipeline(masks, scores):
        decayed = matrix_nms(masks, scores)
        keep = mask_nms(masks, decayed, 0.5, return_mask=True)
        return decayed * keep, mask_iou(masks, mode="ioa").amax(1)

    masks = torch.from_numpy(oracle.blobs(20, 10, 13, seed=0))
    scores = torch.rand(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for count in (20, 11):
            expected = pipeline(masks[:count], scores[:count])
            got = compiled(masks[:count], scores[:count])
            assert all(torch.equal(a, b) for a, b in zip(expected, got))


def test_autocast_changes_nothing(path):
    masks = torch.from_numpy(np.ones((40, 50, 60), bool))  # 3000 pixels: not exact in bfloat16
    masks[:, 0, :7] = False
    expected = mask_iou(masks, mode="inter")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask_iou(masks, mode="inter"), expected)
    assert (expected == 2993).all()
