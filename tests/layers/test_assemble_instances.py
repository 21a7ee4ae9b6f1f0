"""assemble_instances against a loop over cells, F.unfold, torchvision's ps_roi_align and plants."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import ps_roi_align

from unseg.layers import assemble_instances

PAD = -10.0
# k, m: divisible and not, one cell, as many bins as cells, even k
SIZES = [(1, 1), (1, 15), (3, 15), (3, 7), (5, 21), (7, 21), (7, 15), (5, 5), (2, 7), (4, 9)]


def bin_of(u, k, m):
    """The bin that the centre of cell u lies in, bin i being [i, i + 1) * m / k."""
    centre = u + Fraction(1, 2)
    return next(i for i in range(k) if i * Fraction(m, k) <= centre < (i + 1) * Fraction(m, k))


def slowly(maps, locations, k, m, pad=PAD):
    """One cell after the other."""
    out = torch.full((len(locations), m, m), pad, dtype=maps.dtype)
    for n, (b, y, x) in enumerate(locations.tolist()):
        for u in range(m):
            for v in range(m):
                row, col = y - m // 2 + u, x - m // 2 + v
                if 0 <= row < maps.shape[2] and 0 <= col < maps.shape[3]:
                    out[n, u, v] = maps[b, bin_of(u, k, m) * k + bin_of(v, k, m), row, col]
    return out


def random_case(k, m, *, images=2, height=9, width=13, count=12, seed=0, dtype=torch.float32):
    """Maps and locations, some of whose centres lie outside the map."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, k * k, height, width, generator=generator, dtype=torch.float64)
    sides = (images, height + 4, width + 4)
    columns = [torch.randint(side, (count,), generator=generator) for side in sides]
    return maps.to(dtype), torch.stack(columns, dim=1) - torch.tensor([0, 2, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "m"), SIZES)
def test_values(k, m, dtype):
    maps, locations = random_case(k, m, dtype=dtype)
    got = assemble_instances(maps, locations, k, m)
    assert got.dtype == dtype
    assert torch.equal(got, slowly(maps, locations, k, m))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_shapes(data):
    m = 2 * data.draw(st.integers(0, 6)) + 1
    k = data.draw(st.integers(1, m))
    images, height, width, count = (data.draw(st.integers(1, top)) for top in (3, 9, 9, 5))
    maps, _ = random_case(k, m, images=images, height=height, width=width)
    centre = st.tuples(
        st.integers(0, images - 1), st.integers(-20, height + 20), st.integers(-20, width + 20)
    )
    locations = torch.tensor(data.draw(st.lists(centre, min_size=count, max_size=count)))
    pad = data.draw(st.sampled_from([PAD, 0.0, -math.inf]))
    got = assemble_instances(maps, locations, k, m, pad)
    assert torch.equal(got, slowly(maps, locations, k, m, pad))


@pytest.mark.parametrize(("k", "m"), [(1, 5), (3, 7), (5, 21)])
def test_equals_unfold_of_all_maps(k, m):
    maps, _ = random_case(k, m)
    b, _, h, w = maps.shape
    windows = F.unfold(F.pad(maps, [m // 2] * 4, value=PAD), m).view(b, k * k, m, m, h, w)
    bins = [bin_of(u, k, m) for u in range(m)]
    cells = [[windows[:, bins[u] * k + bins[v], u, v] for v in range(m)] for u in range(m)]
    wanted = torch.stack([torch.stack(row, -1) for row in cells], -2)  # (b, h, w, m, m)
    everywhere = torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(w))
    got = assemble_instances(maps, everywhere, k, m)
    assert torch.equal(got.view(b, h, w, m, m), wanted)


@pytest.mark.parametrize(("k", "m"), [(3, 7), (5, 21)])
def test_equals_ps_roi_align_of_expanded_maps(k, m):
    maps, locations = random_case(k, m)
    r = m // 2 + 2  # centres lie up to two cells outside
    bins = torch.tensor([bin_of(u, k, m) for u in range(m)])
    expanded = F.pad(maps, [r] * 4, value=PAD)[:, (bins[:, None] * k + bins).flatten()]
    corner = locations[:, [2, 1]] + r - m // 2
    boxes = torch.cat((locations[:, :1], corner, corner + m), dim=1).float()
    wanted = ps_roi_align(expanded, boxes, output_size=m, spatial_scale=1.0, sampling_ratio=1)
    assert torch.equal(assemble_instances(maps, locations, k, m), wanted[:, 0])


@pytest.mark.parametrize(("k", "m"), [(1, 3), (3, 5)])
def test_gradients(k, m):
    maps, locations = random_case(k, m, images=2, height=3, width=4, count=4, dtype=torch.float64)
    maps.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: assemble_instances(s, locations, k, m), maps)
    assert torch.autograd.gradgradcheck(lambda s: assemble_instances(s, locations, k, m), maps)


def test_gradients_are_counts():
    """Each cell's gradient is the number of windows that read it; cells outside take none."""
    k, m = 3, 7
    maps, locations = random_case(k, m, count=40)
    maps.requires_grad_()
    assemble_instances(maps, locations, k, m).sum().backward()
    counts = torch.zeros_like(maps)
    for b, y, x in locations.tolist():
        for u in range(m):
            for v in range(m):
                row, col = y - m // 2 + u, x - m // 2 + v
                if 0 <= row < 9 and 0 <= col < 13:
                    counts[b, bin_of(u, k, m) * k + bin_of(v, k, m), row, col] += 1
    assert counts.max() > 1
    assert torch.equal(maps.grad, counts)


def test_a_nan_outside_a_window_stays_out():
    maps, _ = random_case(3, 3)
    maps[:, :, 0] = math.nan
    maps.requires_grad_()
    out = assemble_instances(maps, torch.tensor([[0, -1, 4]]), 3, 3)
    assert torch.equal(out[0, :2], torch.full((2, 3), PAD))
    assert out[0, 2].isnan().all()
    out[0, :2].sum().backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision_add_up_exactly(dtype):
    """4001 windows read one cell: 1 added to 2048 or 256 is lost in these dtypes."""
    maps = torch.zeros(1, 1, 3, 3, dtype=dtype, requires_grad=True)
    locations = torch.tensor([[0, 1, 1]]).expand(4001, 3)
    assemble_instances(maps, locations, 1, 1).sum(dtype=torch.float32).backward()
    assert maps.grad.dtype == dtype
    assert maps.grad[0, 0, 1, 1] == torch.tensor(4001.0).to(dtype)


def test_autocast():
    conv = torch.nn.Conv2d(4, 9, 3, padding=1)
    features = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    locations = torch.tensor([[0, 2, 3], [0, 7, 0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = conv(features)
        out = assemble_instances(maps, locations, 3, 5)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, slowly(maps.detach(), locations, 3, 5))
        loss = F.binary_cross_entropy_with_logits(out, torch.ones_like(out))
    loss.backward()
    assert conv.weight.grad.dtype == torch.float32
    assert conv.weight.grad.isfinite().all()
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", ["channels_last", "slice", "expanded"])
def test_memory_layouts(layout):
    maps, locations = random_case(3, 7)
    if layout == "channels_last":
        maps = maps.to(memory_format=torch.channels_last)
    elif layout == "slice":
        maps = torch.cat((maps, maps + 1), dim=1)[:, 4:13, 1:-1, ::2]
    else:
        maps = maps[:1].expand(2, -1, -1, -1)
    assert torch.equal(assemble_instances(maps, locations, 3, 7), slowly(maps, locations, 3, 7))


@pytest.mark.parametrize(("k", "m"), [(1, 15), (3, 15), (5, 21), (7, 21), (5, 7)])
def test_flipped_maps_give_flipped_masks(k, m):
    maps, locations = random_case(k, m)
    channels = torch.arange(k * k).view(k, k).flip(1).flatten()
    mirrored = locations.clone()
    mirrored[:, 2] = maps.shape[3] - 1 - locations[:, 2]
    got = assemble_instances(maps.flip(3)[:, channels], mirrored, k, m)
    assert torch.equal(got, assemble_instances(maps, locations, k, m).flip(2))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_touching_objects_separate(k):
    """Maps as a trained net would give them for two touching squares (specs/proposals.md, 7)."""
    m, r = 15, 7
    masks = torch.zeros(2, 21, 30, dtype=torch.bool)
    masks[0, 6:15, 3:12] = True
    masks[1, 6:15, 12:21] = True
    locations = torch.tensor([[0, 10, 7], [0, 10, 16]])
    maps = torch.full((1, k * k, 21, 30), -5.0)
    for mask, (_, y, x) in zip(masks, locations.tolist()):
        for row, col in mask.nonzero().tolist():
            a_row, a_col = bin_of(row - y + r, k, m), bin_of(col - x + r, k, m)
            maps[0, a_row * k + a_col, row, col] = 5.0
    wanted = F.pad(masks, [r] * 4)
    got = assemble_instances(maps, locations, k, m) > 0
    for n, (_, y, x) in enumerate(locations.tolist()):
        wrong = int((got[n] ^ wanted[n, y : y + m, x : x + m]).sum())
        assert wrong == (27 if k == 1 else 0)
        # One cell beside the centre, the window holds another mask.
        beside = assemble_instances(maps, locations + torch.tensor([0, 0, 1]), k, m)[n] > 0
        assert (beside ^ wanted[n, y : y + m, x : x + m]).any()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_nothing_larger_than_the_result_is_made():
    """10 windows of 100 * 100 * 25 * 21 * 21 elements that F.unfold would make."""
    maps, locations = random_case(5, 21, images=1, height=100, width=100, count=10)
    locations[:, 0] = 0
    with _Largest() as largest:
        out = assemble_instances(maps, locations, 5, 21)
    # The flat view of the maps is no copy, but counts here.
    assert largest.elements <= max(out.numel(), maps.numel())


def test_compiles_without_a_break():
    """Dynamo's graph only: what a backend makes of it is torch's affair, and takes long."""
    torch._dynamo.reset()
    compiled = torch.compile(assemble_instances, backend="eager", fullgraph=True, dynamic=True)
    for count, height in ((12, 9), (30, 20)):
        maps, locations = random_case(3, 7, count=count, height=height)
        maps.requires_grad_()
        out = compiled(maps, locations, 3, 7)
        assert torch.equal(out, slowly(maps.detach(), locations, 3, 7))
        (got,) = torch.autograd.grad(out.square().sum(), maps)
        plain = assemble_instances(maps, locations, 3, 7)
        assert torch.equal(got, torch.autograd.grad(plain.square().sum(), maps)[0])


def test_deterministic_mode():
    """Allowed there, and the same bits each time, with as many threads as there are."""
    maps, locations = random_case(3, 7, count=3000)
    maps.requires_grad_()
    upstream = torch.randn(3000, 7, 7, generator=torch.Generator().manual_seed(1))

    def gradient():
        out = assemble_instances(maps, locations, 3, 7)
        return torch.autograd.grad(out, maps, upstream)[0]

    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    plain = gradient()
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(4)
        assert torch.equal(gradient(), gradient())
        assert torch.equal(gradient(), plain)
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("images", [0, 2])
def test_no_windows(images):
    maps = torch.zeros(images, 9, 4, 5, requires_grad=True)
    out = assemble_instances(maps, torch.zeros(0, 3, dtype=torch.int64), 3, 7)
    assert out.shape == (0, 7, 7)
    out.sum().backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


MAPS, PLACES = torch.zeros(2, 9, 4, 5), torch.tensor([[1, 0, 0]])
BAD = [
    (TypeError, "score_maps must be a tensor, not list", ([0.0], PLACES, 3, 7)),
    (TypeError, "locations must be a tensor, not list", (MAPS, [[0, 0, 0]], 3, 7)),
    (TypeError, "score_maps must be floating", (MAPS.int(), PLACES, 3, 7)),
    (TypeError, "locations must be int64", (MAPS, PLACES.int(), 3, 7)),
    (TypeError, "k must be an int", (MAPS, PLACES, 3.0, 7)),
    (TypeError, "m must be an int", (MAPS, PLACES, 3, True)),
    (ValueError, "m must be odd and positive.*: 8", (MAPS, PLACES, 3, 8)),
    (ValueError, "m must be odd and positive.*: -7", (MAPS, PLACES, 3, -7)),
    (ValueError, "k must be in 1..m, which is 7: 0", (MAPS, PLACES, 0, 7)),
    (ValueError, "k must be in 1..m, which is 1: 3", (MAPS, PLACES, 3, 1)),
    (ValueError, r"\(B, 25, h, w\) for k = 5: \(2, 9, 4, 5\)", (MAPS, PLACES, 5, 7)),
    (ValueError, r"score_maps.*\(9, 4, 5\)", (MAPS[0], PLACES, 3, 7)),
    (ValueError, r"must have cells: \(2, 9, 0, 5\)", (MAPS[:, :, :0], PLACES, 3, 7)),
    (ValueError, r"locations must have shape \(N, 3\).*\(1, 2\)", (MAPS, PLACES[:, :2], 3, 7)),
    (ValueError, r"locations must have shape \(N, 3\).*\(3,\)", (MAPS, PLACES[0], 3, 7)),
    (ValueError, "images 1..2, score_maps has 2", (MAPS, PLACES + torch.tensor([[0], [1]]), 3, 7)),
    (ValueError, "images -1..-1", (MAPS, PLACES - 2, 3, 7)),
    (ValueError, "device of score_maps, cpu, not meta", (MAPS, PLACES.to("meta"), 3, 7)),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        assemble_instances(*arguments)
