"""The exemplar contrastive loss against its formula in float64, by loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unseg.modeling.losses import (
    choose_exemplars,
    compare_with_exemplars,
    exemplar_contrastive_loss,
    largest_exemplar_loss,
)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def losses_by_loops(instances, pool, alpha, beta, temperature):
    """-log(pos / (pos + mean of neg)) of the objects that have both."""
    result = []
    for instance in instances:
        if not any(instance):
            continue
        cosines = [cosine(instance, exemplar) for exemplar in pool]
        negatives = [math.exp(c / temperature) for c in cosines if c < beta]
        if max(cosines) > alpha and negatives:
            pos = math.exp(max(cosines) / temperature)
            neg = sum(negatives) / len(negatives)
            result.append(-math.log(pos / (pos + neg)))
    return result


def vectors(seed, n, k, d=5, spread=0.6):
    """Objects near some of the exemplars, of any length."""
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(k, d))
    instances = pool[rng.integers(0, k, n)] + spread * rng.normal(size=(n, d))
    lengths = rng.uniform(0.1, 9, (n, 1))
    return instances * lengths, pool


SETTINGS = {"alpha": 0.7, "beta": 0.3, "temperature": 0.1}


@settings(max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 7),
    st.floats(-0.2, 0.95),
    st.floats(0.0, 1.2),
    st.floats(0.02, 3.0),
)
def test_values(seed, n, k, alpha, gap, temperature):
    instances, pool = vectors(seed, n, k)
    beta = max(-1.0, alpha - gap)
    expected = losses_by_loops(instances, pool, alpha, beta, temperature)
    arguments = torch.from_numpy(instances), torch.from_numpy(pool)
    options = {"alpha": alpha, "beta": beta, "temperature": temperature}
    total = exemplar_contrastive_loss(*arguments, **options, reduction="sum")
    mean = exemplar_contrastive_loss(*arguments, **options)
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(sum(expected), rel=1e-9, abs=1e-12)
    assert float(mean) == pytest.approx(sum(expected) / max(len(expected), 1), rel=1e-9, abs=1e-12)
    single = exemplar_contrastive_loss(*(x.float() for x in arguments), **options)
    near = [abs(cosine(a, b) - t) < 1e-5 for a in instances for b in pool for t in (alpha, beta)]
    if not any(near):
        assert single.dtype == torch.float32
        assert float(single) == pytest.approx(float(mean), rel=1e-4, abs=1e-4)


def test_cases_of_the_random_inputs_are_of_all_kinds():
    """Objects that count, that lack a positive, that lack a negative."""
    kinds = set()
    for seed in range(30):
        instances, pool = vectors(seed, 9, 1 + seed % 7)
        for instance in instances:
            cosines = [cosine(instance, exemplar) for exemplar in pool]
            kinds.add((max(cosines) > 0.7, min(cosines) < 0.3))
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_a_number_worked_out_by_hand():
    """One positive of cosine 1, negatives of cosines 0 and -1, one exemplar between (0.6)."""
    pool = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.6, 0.8]])
    value = exemplar_contrastive_loss(
        torch.tensor([[5.0, 0.0]]), pool, alpha=0.7, beta=0.3, temperature=0.5
    )
    neg = (math.exp(0) + math.exp(-2)) / 2
    assert float(value) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + neg)), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_gradients(reduction, temperature):
    instances, pool = (torch.from_numpy(x).requires_grad_() for x in vectors(3, 6, 5))
    assert len(losses_by_loops(instances.tolist(), pool.tolist(), 0.7, 0.3, temperature)) > 2

    def loss(a, b):
        return exemplar_contrastive_loss(
            a, b, alpha=0.7, beta=0.3, temperature=temperature, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, (instances, pool))


def test_small_temperatures_do_not_overflow():
    """exp(1 / 0.002) is no float32. The positive is the most similar: no loss is above log 2."""
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    instance = torch.tensor([[1.0, 0.999]], requires_grad=True)
    high, low = (cosine(instance.tolist()[0], row) for row in pool.tolist())
    middle = (high + low) / 2
    value = exemplar_contrastive_loss(instance, pool, alpha=middle, beta=middle, temperature=0.002)
    expected = math.log(1 + math.exp((low - high) / 0.002))
    assert 0.5 < expected < math.log(2)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert bool(instance.grad.isfinite().all())
    assert bool(instance.grad.all())


def test_half_precision_is_computed_in_float32():
    instances, pool = (torch.from_numpy(x).to(torch.bfloat16) for x in vectors(5, 12, 5))
    value = exemplar_contrastive_loss(instances, pool, **SETTINGS)
    assert value.dtype == torch.float32
    exact = exemplar_contrastive_loss(instances.double(), pool.double(), **SETTINGS)
    assert float(value) == pytest.approx(float(exact), rel=1e-5)


def test_rows_of_zeros_do_not_count_and_get_no_gradient():
    instances, pool = (torch.from_numpy(x).float() for x in vectors(5, 12, 5))
    alone = exemplar_contrastive_loss(instances, pool, **SETTINGS)
    assert float(alone) > 0
    padded = torch.cat([torch.zeros(2, 5), instances]).requires_grad_()
    value = exemplar_contrastive_loss(padded, pool, **SETTINGS)
    assert float(value) == pytest.approx(float(alone), rel=1e-6)
    value.backward()
    assert torch.equal(padded.grad[:2], torch.zeros(2, 5))
    assert bool(padded.grad.isfinite().all())
    assert bool(padded.grad[2:].any())
    # Even where any cosine would do for a positive.
    zeros = torch.zeros(3, 5, requires_grad=True)
    value = exemplar_contrastive_loss(zeros, pool, alpha=-0.5, beta=-0.5, temperature=0.1)
    value.backward()
    assert float(value) == 0.0
    assert torch.equal(zeros.grad, torch.zeros(3, 5))


@pytest.mark.parametrize("count", [0, 4])
def test_without_objects_that_count_the_loss_is_a_zero_with_gradients(count):
    instances = torch.ones(count, 3, requires_grad=True)
    pool = torch.tensor([[1.0, -1.0, 0.0]])
    value = exemplar_contrastive_loss(instances, pool, **SETTINGS)
    assert float(value) == 0.0
    value.backward()
    assert torch.equal(instances.grad, torch.zeros(count, 3))


def test_nan_is_not_hidden():
    instances, pool = (torch.from_numpy(x).float() for x in vectors(5, 4, 5))
    instances[1, 2] = math.nan
    assert math.isnan(float(exemplar_contrastive_loss(instances, pool, **SETTINGS)))


def test_choice():
    similarities = torch.tensor(
        [
            [0.9, 0.95, 0.2, 0.5],
            [0.7, 0.1, 0.3, 0.29],  # not above alpha; 0.3 is not below beta
            [math.nan] * 4,
            [0.71, 0.71, 0.3, 0.9],
        ]
    )
    has_positive, positive, negatives = choose_exemplars(similarities, 0.7, 0.3)
    assert has_positive.tolist() == [True, False, False, True]
    assert positive[[0, 3]].tolist() == [1, 3]
    expected = [[0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert negatives.int().tolist() == expected


def test_cosines():
    instances, pool = vectors(2, 4, 3)
    found = compare_with_exemplars(torch.from_numpy(instances), torch.from_numpy(pool))
    expected = [[cosine(a, b) for b in pool] for a in instances]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    nothing = compare_with_exemplars(torch.zeros(1, 5), torch.from_numpy(pool).float())
    assert bool(nothing.isnan().all())


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({}, ((2, 5), (0, 5)), "pool is empty"),
        ({}, ((2, 5), (3, 4)), "length 5, pool_embeddings 4"),
        ({}, ((5,), (3, 5)), r"\(5,\) and \(3, 5\)"),
        ({"alpha": 0.2}, ((2, 5), (3, 5)), "alpha 0.2, beta 0.3"),
        ({"alpha": 1.5}, ((2, 5), (3, 5)), "alpha 1.5"),
        ({"beta": -1.5}, ((2, 5), (3, 5)), "beta -1.5"),
        ({"beta": math.nan}, ((2, 5), (3, 5)), "beta nan"),
        ({"temperature": 0.0}, ((2, 5), (3, 5)), "temperature"),
        ({"temperature": math.nan}, ((2, 5), (3, 5)), "temperature"),
        ({"reduction": "none"}, ((2, 5), (3, 5)), "'none'"),
    ],
)
def test_bad_input(changes, shapes, message):
    with pytest.raises(ValueError, match=message):
        exemplar_contrastive_loss(*(torch.ones(s) for s in shapes), **SETTINGS | changes)


def test_compiles():
    instances, pool = (torch.from_numpy(x).float() for x in vectors(5, 6, 5))
    exported = torch.export.export(_Loss(), (instances, pool))
    expected = exemplar_contrastive_loss(instances, pool, **SETTINGS)
    torch.testing.assert_close(exported.module()(instances, pool), expected)


class _Loss(torch.nn.Module):
    """What a compiler traces: it must not depend on values."""

    def forward(self, instances, pool):
        return exemplar_contrastive_loss(instances, pool, **SETTINGS)


@given(st.integers(0, 10_000), st.floats(-0.2, 0.95), st.floats(0.0, 0.6), st.floats(0.05, 2.0))
def test_no_loss_is_above_the_bound(seed, alpha, gap, temperature):
    instances, pool = vectors(seed, 8, 5)
    bound = largest_exemplar_loss(alpha, alpha - gap, temperature)
    assert bound == pytest.approx(math.log(1 + math.exp(-gap / temperature)))
    for value in losses_by_loops(instances, pool, alpha, alpha - gap, temperature):
        assert value <= bound + 1e-12
