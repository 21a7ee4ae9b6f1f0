"""The ball against formulas in many digits and against geoopt; gradients where they could break."""

import copy
import math
import pickle

import geoopt
import pytest
import torch
from ball_cases import (
    CURVATURES,
    exact_dist,
    exact_tangent_dist,
    random_points,
    random_tangents,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unseg.geometry import PoincareBall, clip_tangent, tangent_dist, tangent_dist0

curvatures = st.sampled_from(CURVATURES)
coordinates = st.lists(st.floats(-1.4, 1.4), min_size=3, max_size=3)  # |u| below 2.5
ZERO, ORDINARY = [0.0, 0.0, 0.0], [0.4, -0.7, 0.2]


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def geoopt_ball(c: float) -> geoopt.PoincareBall:
    # geoopt takes a Python number as float32: 0.3 would be another curvature.
    return geoopt.PoincareBall(f64(c))


def points_up_to_999(c: float, seed: int) -> torch.Tensor:
    """Of all lengths up to 0.999 of the radius."""
    x = random_points(400, 5, c, seed=seed)
    length = torch.linspace(0, 0.999, 400, dtype=torch.float64)[:, None]
    return x / x.norm(dim=1, keepdim=True) * length / math.sqrt(c)


# --- distances ---------------------------------------------------------------------------------


@given(coordinates, coordinates, curvatures)
def test_tangent_dist_of_any_tangents(u, v, c):
    truth = exact_tangent_dist(u, v, c)
    stretch = 1e-15 * math.exp(4 * math.sqrt(c) * max(math.hypot(*u), math.hypot(*v)))
    assert float(tangent_dist(f64(u), f64(v), c)) == pytest.approx(
        truth, rel=1e-13 + stretch, abs=1e-30
    )


@given(
    coordinates.filter(lambda u: math.hypot(*u) > 1e-3),
    coordinates.filter(lambda u: math.hypot(*u) > 1e-3),
    st.sampled_from([1e-2, 1e-6, 1e-10, 1e-13]),
)
def test_tangent_dist_of_near_tangents_keeps_its_digits(u, shift, scale):
    v = [a + scale * b for a, b in zip(u, shift)]
    truth = exact_tangent_dist(u, v, 1.0)  # of u and v as they are stored
    assert float(tangent_dist(f64(u), f64(v))) == pytest.approx(truth, rel=1e-11, abs=0)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize(
    ("direction", "other", "rel"),
    [
        ([1.0, 0, 0], [-1.0, 0, 0], 1e-13),
        ([1.0, 0, 0], [0, 1.0, 0], 1e-13),
        ([0.6, 0.8, 0], [0.6, 0.8, 1e-6], 1e-7),
        ([0.6, 0.8, 0], [0.59, 0.79, 0], 1e-7),
    ],
)
def test_tangent_dist_near_the_rim(c, direction, other, rel):
    # 6.1 / s is where expmap0 stops in float64; beyond 3.1 / s float32 points do.
    u, v = ([6.1 / math.sqrt(c) * a for a in vector] for vector in (direction, other))
    assert float(tangent_dist(f64(u), f64(v), c)) == pytest.approx(
        exact_tangent_dist(u, v, c), rel=rel
    )


@pytest.mark.parametrize("c", CURVATURES)
def test_equal_and_zero_tangents_are_exact(c):
    u = random_tangents(50, 4, 5.0)
    assert not tangent_dist(u, u, c).any()
    assert not tangent_dist(u * 0, u * 0, c).any()
    torch.testing.assert_close(tangent_dist(u, u * 0, c), 2 * u.norm(dim=1), rtol=1e-14, atol=0)
    assert torch.equal(tangent_dist0(u, c), 2 * u.norm(dim=1))
    assert tangent_dist(u.float(), u[0].float(), c).dtype == torch.float64


@given(coordinates, coordinates, curvatures)
def test_dist_of_any_points(a, b, c):
    # |a| is below 2.5: points up to 0.99 of the radius
    x, y = (f64(v) * 0.4 / math.sqrt(c) for v in (a, b))
    truth = exact_dist(x.tolist(), y.tolist(), c)
    assert float(PoincareBall(c).dist(x, y)) == pytest.approx(truth, rel=1e-13, abs=1e-30)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("shift", [0.0, 1e-2, 1e-6, 1e-10, 1e-14])
@pytest.mark.parametrize("norm", [0.0, 0.5, 0.92, 0.99999 - 1e-2])
def test_dist_of_near_points(c, shift, norm):
    x = [norm / math.sqrt(c), 0.0]
    y = [norm / math.sqrt(c) * (1 - shift), shift / math.sqrt(c)]
    distance = float(PoincareBall(c).dist(f64(x), f64(y)))
    assert distance == pytest.approx(exact_dist(x, y, c), rel=1e-12, abs=0)


@pytest.mark.parametrize("c", CURVATURES)
def test_dist_across_the_ball_from_rim_to_rim(c):
    # geoopt's own distance is clamped to 16.8; the true one is 24.4 / s.
    x = [0.99999 / math.sqrt(c), 0.0]
    y = [-0.99999 / math.sqrt(c), 1e-7]
    truth = exact_dist(x, y, c)
    assert truth > 24 / math.sqrt(c)
    assert float(PoincareBall(c).dist(f64(x), f64(y))) == pytest.approx(truth, rel=1e-11)


@pytest.mark.parametrize("c", CURVATURES)
def test_float32_points_lose_nothing_but_the_last_rounding(c):
    x = (0.996 / 0.999 * points_up_to_999(c, 0)).float()
    y = x.roll(1, 0)
    distances = PoincareBall(c).dist(x, y)
    assert distances.dtype == torch.float32
    truth = f64([exact_dist(*pair, c) for pair in zip(x.tolist(), y.tolist())])
    torch.testing.assert_close(distances.double(), truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize("c", CURVATURES)
def test_pairwise_dist_is_dist_of_all_pairs(c):
    ball, x = PoincareBall(c), random_points(30, 4, c)
    y = torch.cat([x[:7], random_points(13, 4, c, 4.0, seed=1), torch.zeros(1, 4).double()])
    pairs = ball.pairwise_dist(x, y)
    assert pairs.shape == (30, 21)
    torch.testing.assert_close(pairs, ball.dist(x[:, None], y), rtol=1e-13, atol=0)
    assert not pairs[range(7), range(7)].any()
    assert ball.pairwise_dist(x[:0], y).shape == (0, 21)
    assert ball.pairwise_dist(x.float(), y.float()).dtype == torch.float32


def test_what_is_not_in_the_ball_is_infinitely_far():
    ball, x = PoincareBall(2.0), f64([[0.1, 0.2]])
    for outside in (f64([[1.0, 0.0]]), f64([[3.0, 4.0]])):
        assert math.isinf(ball.dist(x, outside))
        assert math.isinf(ball.dist0(outside))
        assert math.isinf(ball.pairwise_dist(x, outside))
    # two points outside are not near each other either
    assert math.isinf(ball.dist(f64([3.0, 4.0]), f64([3.0, 4.1])))


# --- geoopt and identities ---------------------------------------------------------------------


@pytest.mark.parametrize("c", CURVATURES)
def test_as_geoopt_up_to_norm_999(c):
    ball, theirs = PoincareBall(c), geoopt_ball(c)
    x, y = points_up_to_999(c, 0), points_up_to_999(c, 1).flip(0)
    near = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(ball.dist(x, y), theirs.dist(x, y), **near)
    torch.testing.assert_close(ball.dist0(x), theirs.dist0(x), **near)
    torch.testing.assert_close(ball.mobius_add(x, y), theirs.mobius_add(x, y), **near)
    torch.testing.assert_close(ball.logmap0(x), theirs.logmap0(x), **near)
    u = 3 * x
    torch.testing.assert_close(ball.expmap0(u), theirs.expmap0(u), **near)
    assert ball.radius == pytest.approx(float(theirs.radius))


@given(coordinates, coordinates, coordinates, curvatures)
def test_identities(u, v, w, c):
    ball = PoincareBall(c)
    # Not so far out that geoopt draws sums of two in, for every c.
    u, v, w = ([t / math.sqrt(c) for t in a] for a in (u, v, w))
    x, y, z = (ball.expmap0(f64(t)) for t in (u, v, w))
    near = {"rtol": 1e-9, "atol": 1e-9}
    assert float(ball.dist0(x)) == pytest.approx(2 * math.hypot(*u), rel=1e-9, abs=1e-14)
    torch.testing.assert_close(ball.logmap0(x), f64(u), **near)
    torch.testing.assert_close(ball.mobius_add(-x, ball.mobius_add(x, y)), y, **near)
    torch.testing.assert_close(ball.mobius_add(x, torch.zeros_like(x)), x, **near)
    assert torch.equal(ball.dist(x, y), ball.dist(y, x))
    assert ball.dist(x, y) <= ball.dist(x, z) + ball.dist(z, y) + 1e-9
    torch.testing.assert_close(ball.dist(x, y), tangent_dist(f64(u), f64(v), c), **near)
    torch.testing.assert_close(ball.dist(x, y), ball.dist0(ball.mobius_add(-x, y)), **near)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expmap0_and_logmap0_near_the_origin(c, dtype):
    # tiny vectors stay what they are; geoopt's logmap0 has no digits of them left
    ball, u = PoincareBall(c), (1e-9 * random_tangents(20, 3, 2.0)).to(dtype)
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ball.expmap0(u), u, rtol=rtol, atol=0)
    torch.testing.assert_close(ball.logmap0(u), u, rtol=rtol, atol=0)
    zero = torch.zeros(2, 3, dtype=dtype)
    assert not ball.expmap0(zero).any()
    assert not ball.logmap0(zero).any()


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.996), (torch.float64, 0.99999)])
def test_far_tangents_and_sums_are_drawn_into_geoopts_radius(c, dtype, share):
    ball = PoincareBall(c)
    far = ball.expmap0((100 * random_tangents(20, 3, 2.0)).to(dtype))
    assert far.dtype == dtype
    norm = torch.full((20,), share * ball.radius, dtype=dtype)
    torch.testing.assert_close(far.norm(dim=1), norm, rtol=1e-6, atol=0)
    assert ball.mobius_add(far, far).norm(dim=1).max() <= share * ball.radius * (1 + 1e-6)
    assert torch.isfinite(ball.logmap0(far)).all()


# --- gradients ---------------------------------------------------------------------------------


def gradient(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).sum(), inputs)


@pytest.mark.parametrize("c", CURVATURES)
def test_gradients_against_differences(c):
    ball, x, y = PoincareBall(c), random_points(4, 3, c, 1.5), random_points(4, 3, c, 1.5, seed=1)
    u, v = random_tangents(4, 3, 3.0), random_tangents(4, 3, 3.0, seed=1)
    for function, inputs in (
        (ball.dist, (x, y)),
        (ball.dist0, (x,)),
        (ball.pairwise_dist, (x, y)),
        (ball.expmap0, (u,)),
        (ball.logmap0, (x,)),
        (ball.mobius_add, (x, y)),
        (ball.midpoint, (x,)),
        (lambda a, b: tangent_dist(a, b, c), (u, v)),
        (lambda a, b: tangent_dist(1e-3 * a, 1e-3 * b, c), (u, v)),  # small angles
        (lambda a: clip_tangent(a, 1.2, c), (u,)),  # some clipped, some not
    ):
        inputs = [i.clone().requires_grad_() for i in inputs]
        assert torch.autograd.gradcheck(function, inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c", CURVATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_formulas_divide_by_zero(c, dtype):
    ball = PoincareBall(c)
    zero, x = torch.zeros(2, 3, dtype=dtype), 0.5 * f64([ORDINARY, ORDINARY]).to(dtype)
    rim = ball.expmap0(100 * x)
    near = x * (1 + 2 * torch.finfo(dtype).eps)
    for function, inputs in (
        (ball.expmap0, (zero,)),
        (ball.logmap0, (zero,)),
        (ball.logmap0, (rim,)),
        (ball.dist0, (zero,)),
        (ball.dist0, (rim,)),
        (ball.dist, (zero, zero)),
        (ball.dist, (x, x)),
        (ball.dist, (x, near)),
        (ball.dist, (rim, rim)),
        (ball.dist, (rim, -rim)),
        (ball.pairwise_dist, (x, x)),
        (ball.pairwise_dist, (zero, rim)),
        (lambda a, b: tangent_dist(a, b, c), (zero, zero)),
        (lambda a, b: tangent_dist(a, b, c), (x, x)),
        (lambda a, b: tangent_dist(a, b, c), (x, near)),
        (lambda a, b: tangent_dist(a, b, c), (zero, x)),
        (lambda a, b: tangent_dist(a, b, c), (20 * x, -20 * x)),
        (lambda a: tangent_dist0(a, c), (zero,)),
        (lambda a: clip_tangent(a, 2.5, c), (zero,)),
    ):
        for value in gradient(function, *inputs):
            assert torch.isfinite(value).all()
    for function in (ball.dist, lambda a, b: tangent_dist(a, b, c)):
        assert not any(value.any() for value in gradient(function, x, x))


@pytest.mark.parametrize("c", CURVATURES)
def test_a_tangent_of_zeros_is_still_drawn(c):
    # A network without bias gives exact zeros for an empty view: they must be able to leave.
    zero, v = torch.zeros(1, 3, dtype=torch.float64), f64([ORDINARY])
    own, _ = gradient(lambda a, b: tangent_dist(a, b, c), zero, v)
    torch.testing.assert_close(own, -2 * v / v.norm())
    (identity,) = gradient(lambda a: clip_tangent(a, 2.5, c), zero)
    assert torch.equal(identity, torch.ones_like(zero))
    for function in (PoincareBall(c).expmap0, PoincareBall(c).logmap0):
        torch.testing.assert_close(gradient(function, zero)[0], torch.ones_like(zero))


# --- clip_tangent ------------------------------------------------------------------------------


@given(coordinates, curvatures, st.floats(1e-3, 4.0))
def test_clip_tangent(u, c, limit):
    u = f64(u)
    clipped, norm = clip_tangent(u, limit, c), float(u.norm()) * math.sqrt(c)
    if norm <= limit * (1 - 1e-12):
        assert torch.equal(clipped, u)
    elif norm > limit:
        assert float(clipped.norm()) * math.sqrt(c) == pytest.approx(limit, rel=1e-12)
        torch.testing.assert_close(clipped / clipped.norm(), u / u.norm(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1.0, 2.5, 2.500001, 1e4, 1e30])
def test_clip_tangent_keeps_gradients_across(length):
    u = torch.tensor([[length, 0.0]])
    assert float(clip_tangent(u, 2.5).norm()) == pytest.approx(min(length, 2.5), rel=1e-6)
    (along,) = gradient(lambda a: clip_tangent(a, 2.5)[:, 0], u)
    (across,) = gradient(lambda a: clip_tangent(a, 2.5)[:, 1], u)
    assert torch.isfinite(along).all()
    assert float(along[0, 0]) == pytest.approx(0.0 if length > 2.5 else 1.0, abs=1e-6)
    assert float(across[0, 1]) == pytest.approx(min(1.0, 2.5 / length), rel=1e-6)
    assert clip_tangent(u, 2.5).dtype == torch.float32


# --- not a module, dtypes, errors --------------------------------------------------------------


def test_the_ball_registers_nothing():
    module = nn.Linear(2, 2)
    module.ball = PoincareBall(0.3)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert len(list(module.modules())) == 1
    for other in (copy.deepcopy(module.ball), pickle.loads(pickle.dumps(module.ball))):
        assert other.c == 0.3
    assert repr(module.ball) == "PoincareBall(c=0.3)"


def test_low_precision_is_raised():
    ball, u = PoincareBall(), random_tangents(5, 4, 3.0).to(torch.bfloat16)
    x = ball.expmap0(u)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, ball.expmap0(u.float()))
    half = x.half()
    assert ball.dist(half, half.roll(1, 0)).dtype == torch.float32
    assert ball.mobius_add(half, half).dtype == torch.float32
    assert clip_tangent(u, 0.1).dtype == torch.float32


def test_autocast_changes_nothing():
    ball, u, v = PoincareBall(), random_tangents(9, 4, 3.0).float(), random_tangents(9, 4, 3.0, 1)

    def everything() -> list[torch.Tensor]:
        x, y = ball.expmap0(u), ball.expmap0(v.float())
        tangents = [tangent_dist(u, v), tangent_dist0(u), clip_tangent(u, 0.7), ball.logmap0(x)]
        distances = [ball.dist(x, y), ball.dist0(x), ball.pairwise_dist(x, y)]
        return [x, ball.mobius_add(x, y), ball.frechet_mean(x), ball.midpoint(x)] + (
            tangents + distances
        )

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = everything()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("c", [0.0, -1.0, math.nan, math.inf])
def test_curvatures_that_are_none(c):
    u = torch.zeros(1, 2)
    for call in (
        lambda: PoincareBall(c),
        lambda: clip_tangent(u, 1.0, c),
        lambda: tangent_dist(u, u, c),
        lambda: tangent_dist0(u, c),
    ):
        with pytest.raises(ValueError, match="c must be a finite number above 0"):
            call()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_limits_that_are_none(max_norm):
    with pytest.raises(ValueError, match="max_norm"):
        clip_tangent(torch.zeros(1, 2), max_norm)
