"""boc_affinity against the formula in float64 and scipy's distances, on every path."""

import sys
import warnings

import boc_oracle
import mask_ops_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial.distance import pdist, squareform

from unseg.layers import boc_affinity, native
from unseg.layers.boc_affinity import boc_affinity_reference

needs_native = pytest.mark.skipif(
    not native.has_op("boc_affinity"), reason="the extension is not built, or without this op"
)
# n, C: around 4 rows at a time, 16 of a panel and 64 of a tile, and around 32 channels of a chunk
SIZES = [(0, 5), (0, 0), (1, 1), (2, 0), (3, 1), (5, 31), (15, 32), (17, 33), (63, 60), (64, 64)]
SIZES += [(65, 65), (130, 3), (200, 128)]


@pytest.fixture(params=oracle.PATHS)
def device(request):
    with oracle.use_path(request.param) as device:
        if request.param in oracle.NATIVE_PATHS and not native.has_op("boc_affinity"):
            pytest.skip("the extension is built without this op")
        yield device


def affinity(features: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    return boc_affinity(torch.from_numpy(features).to(device)).cpu().numpy()


def check(features: np.ndarray, device: torch.device) -> None:
    """Type, values, diagonal and symmetry."""
    got = affinity(features, device)
    assert got.shape == (len(features), len(features))
    assert got.dtype == features.dtype
    # cdist sums in an order of its own: at most as if one after the other.
    rtol = boc_oracle.tolerance(features.shape[1], features.dtype)
    if not native.has_op("boc_affinity", device):
        rtol += 2 * features.shape[1] * np.finfo(features.dtype).eps
    np.testing.assert_allclose(got, boc_oracle.exact(features), rtol=rtol, atol=0)
    assert (got.diagonal() == 1).all()
    assert got.tobytes() == got.T.copy().tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_values(device, size, dtype):
    check(boc_oracle.features(*size, dtype), device)


@st.composite
def cases(draw):
    """Features of any signs and scales, with repeated, opposite and zero rows."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shape = draw(st.tuples(st.integers(0, 20), st.integers(0, 40)))
    # Sums of 40 values stay finite; so does every quotient that is not 0 by definition.
    scale = draw(st.sampled_from([1e-37, 1e-20, 1e-3, 1.0, 1e3, 1e20, 1e36]))
    small = st.integers(-3, 3).map(float)
    values = st.floats(-1, 1, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4)
    unit = draw(arrays.arrays(np.float64, shape, elements=draw(st.sampled_from([small, values]))))
    for k in draw(st.lists(st.integers(0, 19), max_size=6)):
        if k + 1 < shape[0]:
            unit[k] = draw(st.sampled_from([0.0, 1.0, -1.0, 2.0])) * unit[k + 1]
    return (unit * scale).astype(dtype)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_shapes_and_values(features):
    for path in ("native", "pytorch"):
        with oracle.use_path(path if path == "pytorch" else native.backend()) as device:
            check(features, device)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
@needs_native
def test_the_kernels_agree_to_the_last_bit(size, dtype, monkeypatch):
    """With the sums one channel after the other, whatever the width of a vector."""
    features = boc_oracle.features(*size, dtype)
    expected = boc_oracle.ordered(features).tobytes()
    for path in oracle.NATIVE_PATHS:
        monkeypatch.setenv("UNSEG_MASK_ISA", path)
        assert affinity(features).tobytes() == expected


def test_against_the_distances_of_scipy(device):
    features = boc_oracle.features(70, 60)
    double = features.astype(np.float64)
    with np.errstate(all="ignore"):
        bray_curtis = squareform(pdist(double, "braycurtis"))
    expected = (1 + squareform(pdist(double, "chebyshev"))) * np.nan_to_num(1 / (1 + bray_curtis))
    np.testing.assert_allclose(affinity(features, device), expected, rtol=2e-6, atol=0)


def test_facts_of_the_specification(device):
    """Section 1.6: equal rows, background rows, opposite rows, scales."""
    row = np.array([0.5, -0.25, 0.125, -2.0], np.float32)
    got = affinity(np.stack([row, row, 0 * row, 0 * row, -row, 4 * row]), device)
    assert got[0, 1] == 1
    assert got[0, 2] == got[3, 0] == (1 + 2.0) / 2  # BC is 1
    assert got[2, 3] == 0  # 0 / 0
    assert (got.diagonal() == 1).all()
    assert got[0, 4] == 0  # BC is infinite
    assert got[0, 5] == np.float32((1 + 6.0) / (1 + 3 / 5))
    # Bray-Curtis does not see a common scale, Chebyshev follows it.
    scaled = affinity(64 * np.stack([row, row + np.float32(0.5)]), device)[0, 1]
    plain = affinity(np.stack([row, row + np.float32(0.5)]), device)[0, 1]
    assert scaled / (1 + 64 * 0.5) == pytest.approx(plain / (1 + 0.5), rel=1e-6)


def test_tiny_and_subnormal_values(device):
    """Differences of subnormal numbers are exact: the quotient is as good as ever."""
    features = np.float32(1e-44) * np.array([[1, 2], [3, -4], [-1, -2], [0, 0]], np.float32)
    assert features[0].all()
    check(features, device)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_has_no_neighbours(device, bad):
    features = boc_oracle.features(70, 40)
    expected = affinity(features, device)
    features[9, 33] = bad
    expected[9] = expected[:, 9] = 0
    expected[9, 9] = 1
    assert np.array_equal(affinity(features, device), expected)


def test_sums_that_overflow_give_zero(device):
    features = np.array([[3e38, 3e38, 3e38], [-3e38, 1, 1], [1, 2, 3]], np.float32)
    got = affinity(features, device)
    assert got[0, 1] == got[1, 0] == got[0, 2] == 0
    assert np.isfinite(got).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    features = torch.from_numpy(boc_oracle.features(40, 50)).to(device, dtype)
    got = boc_affinity(features)
    assert got.dtype == torch.float32
    assert torch.equal(got, boc_affinity(features.float()))


def test_strides_do_not_matter(device):
    features = torch.from_numpy(boc_oracle.features(40, 66)).to(device)
    expected = boc_affinity(features[::2, 1::3].clone(memory_format=torch.contiguous_format))
    assert torch.equal(boc_affinity(features[::2, 1::3]), expected)
    assert torch.equal(boc_affinity(features.t().contiguous().t()), boc_affinity(features))
    same = features[:1].expand(5, -1)
    assert torch.equal(boc_affinity(same), torch.ones(5, 5, device=device))


def test_the_result_carries_no_gradient(device):
    features = torch.ones(3, 4, device=device, requires_grad=True)
    assert not boc_affinity(features * 2).requires_grad
    assert boc_affinity(features).equal(torch.ones(3, 3, device=device))


def test_autocast_changes_nothing(device):
    features = torch.from_numpy(boc_oracle.features(40, 50)).to(device)
    expected = boc_affinity(features)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(boc_affinity(features), expected)


@needs_native
def test_threads_do_not_change_a_bit():
    features = boc_oracle.features(300, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(affinity(features).tobytes())
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_the_plain_version_takes_some_rows_at_a_time(monkeypatch):
    features = torch.from_numpy(boc_oracle.features(50, 20))
    expected = boc_affinity_reference(features)
    module = sys.modules["unseg.layers.boc_affinity"]  # the package's attribute is the function
    monkeypatch.setattr(module, "_CHUNK_PAIRS", 350)  # 7 rows: the last chunk has 1
    assert torch.equal(boc_affinity_reference(features), expected)


def test_an_extension_without_the_op_is_passed_by(monkeypatch):
    monkeypatch.setattr(native, "_OPS", frozenset())
    assert not native.has_op("boc_affinity")
    features = torch.from_numpy(boc_oracle.features(20, 20))
    assert torch.equal(boc_affinity(features), boc_affinity_reference(features))


@pytest.mark.parametrize("path", ["native", "pytorch"])
def test_errors_name_the_argument(path):
    with oracle.use_path("pytorch" if path == "pytorch" else native.backend()):
        for wrong in (np.ones((2, 3), np.float32), [[1.0]], None, torch.ones(2, 3).long()):
            with pytest.raises(TypeError, match="features"):
                boc_affinity(wrong)
        for wrong in (torch.ones(2, 3) * 1j, torch.ones(2, 3, dtype=torch.bool)):
            with pytest.raises(TypeError, match="features"):
                boc_affinity(wrong)
        for shape in ((), (3,), (1, 2, 3)):
            with pytest.raises(ValueError, match=r"features.*\(n, C\)"):
                boc_affinity(torch.ones(shape))


@needs_native
def test_the_bare_op_checks_too():
    op = torch.ops.unseg.boc_affinity
    with pytest.raises(TypeError, match="features"):
        op(torch.ones(2, 3).long())
    with pytest.raises(ValueError, match="features"):
        op(torch.ones(3))


@needs_native
def test_opcheck():
    for features in (torch.randn(9, 5), torch.randn(9, 5).half(), torch.randn(4, 0).double()):
        torch.library.opcheck(torch.ops.unseg.boc_affinity.default, (features,))


def test_meta_tensors_give_shapes():
    assert boc_affinity(torch.ones(3, 4, device="meta")).shape == (3, 3)
    assert boc_affinity(torch.ones(3, 4, device="meta").half()).dtype == torch.float32
    assert boc_affinity(torch.ones(3, 4, device="meta").double()).dtype == torch.float64


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    def normalised(features):
        values = boc_affinity(features * 2)
        return values / values.amax()

    features = torch.from_numpy(boc_oracle.features(20, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for count in (20, 11):
            assert torch.equal(compiled(features[:count]), normalised(features[:count]))
