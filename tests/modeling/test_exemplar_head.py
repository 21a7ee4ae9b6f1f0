"""The exemplar head: embeddings inside masks, the pool's, when they are made, two processes."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from exemplar_cases import (
    SmallModel,
    contrast_slowly,
    embed_slowly,
    encode_slowly,
    images_and_masks,
    make_pool,
    narrow_config,
    noise_images,
    shake_norms,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unseg.modeling import ExemplarContrast, ExemplarFeatureError, encode_exemplars, with_exemplars
from unseg.modeling.exemplars import MaskedEmbedding, find_exemplar_head
from unseg.structures import ExemplarPool

embed = MaskedEmbedding()


def features_and_masks(seed=0, counts=(2, 0, 3), channels=5, cells=(3, 4), scale=(4, 2)):
    """Random maps, one cell of which is 0, and soft masks, the second of which is empty."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(counts), channels, *cells, generator=generator)
    features[0, :, -1, -1] = 0
    size = [side * s for side, s in zip(cells, scale, strict=True)]
    masks = torch.rand(sum(counts), *size, generator=generator).square()
    masks[1:2] = 0
    return features, masks


def slow_embeddings(features, masks, counts):
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    rows = [embed_slowly(features[b], mask) for b, mask in zip(owners, masks, strict=True)]
    return torch.stack(rows) if rows else features.new_zeros(0, features.shape[1]).double()


@settings(max_examples=40)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_embedding_is_that_of_features_blown_up_to_the_pixels(seed, counts, cells, scale):
    features, masks = features_and_masks(seed, counts, cells=cells, scale=scale)
    found = embed(features, masks, counts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), slow_embeddings(features, masks, counts), rtol=1e-4, atol=1e-5
    )
    # One map per mask says the same.
    repeated = features.repeat_interleave(torch.tensor(counts), dim=0)
    torch.testing.assert_close(embed(repeated, masks), found, rtol=1e-4, atol=1e-5)


def test_embeddings_have_unit_length_and_those_of_empty_masks_are_zero():
    counts = (2, 0, 3)
    features, masks = features_and_masks(counts=counts)
    masks[3] *= 1e-6
    found = embed(features, masks, counts)
    assert torch.equal(found[1], torch.zeros(5))
    expected = torch.tensor([1.0, 0, 1, 1, 1])
    torch.testing.assert_close(found.norm(dim=1), expected)


def test_gradients_reach_features_and_masks():
    counts = (2, 0, 3)
    inputs = [x.requires_grad_() for x in features_and_masks(counts=counts)]
    weights = torch.arange(25.0).view(5, 5).sin()
    weights[1] = 0  # of the empty mask, as its loss is
    found = torch.autograd.grad((embed(*inputs, counts) * weights).sum(), inputs)
    expected = torch.autograd.grad((slow_embeddings(*inputs, counts) * weights).sum(), inputs)
    for x, y in zip(found, expected, strict=True):
        assert y.abs().max() > 0.01
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_no_masks_have_gradients_too():
    features, masks = (x.requires_grad_() for x in features_and_masks(counts=(0, 0)))
    for found in (embed(features, masks, (0, 0)), embed(features[:0], masks)):
        assert found.shape == (0, 5)
        for gradient in torch.autograd.grad(found.sum(), (features, masks)):
            assert not gradient.any()


def test_half_precision_is_computed_in_float32():
    counts = (2, 0, 3)
    features, masks = (x.to(torch.bfloat16) for x in features_and_masks(counts=counts))
    found = embed(features, masks, counts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), slow_embeddings(features, masks, counts), rtol=1e-4, atol=1e-5
    )


def make_head(pool, **options):
    head = ExemplarContrast(**{"alpha": 0.3, "beta": -0.3, "temperature": 0.5} | options)
    head.pool_embeddings = pool
    return head


def test_loss_of_a_head_and_what_it_counts():
    counts = (5, 0, 7)
    features, masks = features_and_masks(seed=1, counts=counts)
    pool = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    total = dict.fromkeys(("objects", "positives", "used", "negatives"), 0)
    head = make_head(pool, weight=1.7)
    for scale in (1, -1):
        embeddings = slow_embeddings(scale * features, masks, counts)
        loss, numbers = contrast_slowly(embeddings, pool, 0.3, -0.3, 0.5)
        found = head(scale * features, masks, counts)
        assert found.item() == pytest.approx(1.7 * loss.item(), rel=1e-4)
        assert numbers["objects"] == 11
        total = {key: total[key] + numbers[key] for key in total}
    assert 0 < total["used"] < total["positives"] < total["objects"], "choose another seed"
    assert head.tally.tolist() == list(total.values())
    summed = make_head(pool, weight=1.0, reduction="sum")(-features, masks, counts)
    assert summed.item() == pytest.approx(loss.item() * numbers["used"], rel=1e-4)


def test_settings_of_the_config():
    head = ExemplarContrast(
        narrow_config(
            MODEL__EXEMPLAR__IN_FEATURE="p3",
            MODEL__EXEMPLAR__WEIGHT=0.5,
            MODEL__EXEMPLAR__ALPHA=0.6,
            MODEL__EXEMPLAR__BETA=0.2,
            MODEL__EXEMPLAR__TEMPERATURE=0.4,
            MODEL__EXEMPLAR__REDUCTION="sum",
        )
    )
    found = (head.in_feature, head.weight, head.alpha, head.beta, head.temperature, head.reduction)
    assert found == ("p3", 0.5, 0.6, 0.2, 0.4, "sum")
    assert not head.state_dict()
    with pytest.raises(ValueError, match="alpha 0.1, beta 0.2"):
        ExemplarContrast(alpha=0.1, beta=0.2)


def test_a_head_without_a_fitting_pool_says_so():
    features, masks = features_and_masks(counts=(1, 1))
    with pytest.raises(ExemplarFeatureError, match="MODEL.EXEMPLAR.POOL names a file"):
        ExemplarContrast()(features, masks, [1, 1])
    with pytest.raises(ExemplarFeatureError, match="res5 has 5 channels, .* embeddings 7.*another"):
        make_head(torch.ones(2, 7))(features, masks, [1, 1])


# Encoding the pool.


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 99])
def test_embeddings_of_a_pool_are_those_of_each_exemplar_alone(input_format, batch_size):
    """Whatever the sizes of those it is encoded with, and their number."""
    model = SmallModel().train()
    model.input_format = input_format
    images, masks = images_and_masks(make_pool(7))
    found = encode_exemplars(model, images, masks, in_feature="cells", batch_size=batch_size)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    model.eval()
    expected = [
        encode_slowly(model, image, mask, "cells")
        for image, mask in zip(images, masks, strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_channel_order_and_padding_matter_to_these_cases():
    model = SmallModel().eval()
    image, mask = (x[0] for x in images_and_masks(make_pool(1)))
    expected = encode_slowly(model, image, mask, "cells")
    for other in (
        encode_slowly(model, image[:, :, ::-1], mask, "cells"),
        encode_slowly(model, image, mask, "cells", divisibility=128),
    ):
        assert (other - expected).abs().max() > 1e-3


def states(model):
    return {k: v.clone() for k, v in (*model.state_dict().items(), *model.named_buffers())}


@pytest.mark.parametrize("in_feature", ["cells", "res9"])
def test_encoding_leaves_the_model_and_generators_alone(in_feature):
    model = SmallModel().train()
    model.backbone.frozen.eval()
    modes = [m.training for m in model.modules()]
    assert modes.count(False) == 1
    before = states(model)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        encode_exemplars(
            model, *images_and_masks(make_pool(3)), in_feature=in_feature, batch_size=2
        )
    except ExemplarFeatureError as error:
        assert in_feature == "res9"
        assert "'res9' is none of the backbone's outputs (cells, image)" in str(error)
    else:
        assert in_feature == "cells"
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in states(model).items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]
    assert random.getstate() == generators[2]
    assert torch.is_grad_enabled()


def test_encoding_is_done_in_full_precision():
    model = SmallModel()
    case = images_and_masks(make_pool(3))
    expected = encode_exemplars(model, *case, in_feature="cells", batch_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encode_exemplars(model, *case, in_feature="cells", batch_size=3)
    assert torch.equal(found, expected)


# When it is encoded.


SEEDS = itertools.count(1)


def step(model):
    """A training step; afterwards no embedding of the backbone is what it was."""
    model(noise_images())
    shake_norms(model, seed=next(SEEDS))


def encode_now(model, pool):
    return encode_exemplars(model, *images_and_masks(pool), in_feature="cells", batch_size=8)


@pytest.mark.parametrize("period", [1, 3])
def test_the_pool_is_encoded_before_steps_0_p_2p_and_no_other(period):
    pool = make_pool(4)
    model = with_exemplars(SmallModel().train(), pool, update_period=period, batch_size=3)
    last = None
    for number in range(7):
        now = encode_now(model, pool)
        model.eval()
        model(noise_images())
        model.train()
        if last is not None:
            assert torch.equal(model.exemplars.pool_embeddings, last), "evaluation is no step"
        step(model)
        if number % period == 0:
            torch.testing.assert_close(model.exemplars.pool_embeddings, now)
            last = model.exemplars.pool_embeddings.clone()
        assert torch.equal(model.exemplars.pool_embeddings, last)
        assert (encode_now(model, pool) - last).abs().max() > 1e-3, "weights have changed"


def test_period_0_keeps_the_embeddings_of_the_file():
    pool = make_pool(4, dim=6)
    model = with_exemplars(SmallModel().train(), pool, update_period=0)
    for _ in range(3):
        step(model)
        assert model.exemplars.pool_embeddings.tolist() == pool.embeddings.tolist()
    with pytest.raises(ValueError, match="the exemplar pool holds no embeddings"):
        with_exemplars(SmallModel(), make_pool(4), update_period=0)
    other = with_exemplars(SmallModel().train(), make_pool(4, dim=9), update_period=0)
    with pytest.raises(ExemplarFeatureError, match="6 channels, the exemplars' embeddings 9"):
        other(noise_images())


def test_pools_that_cannot_be_given():
    with pytest.raises(ExemplarFeatureError, match="the exemplar pool is empty"):
        with_exemplars(SmallModel(), make_pool(0))
    with pytest.raises(ValueError, match="UPDATE_PERIOD must be 0 or more, got -1"):
        with_exemplars(SmallModel(), make_pool(2), update_period=-1)
    for model in (nn.Linear(2, 2), SmallModel(weight=0.0)):
        assert find_exemplar_head(model) is None
        with pytest.raises(ExemplarFeatureError, match=f"{type(model).__name__} has no Exemplar"):
            with_exemplars(model, make_pool(2))


def test_a_second_pool_replaces_the_first():
    model = with_exemplars(SmallModel().train(), make_pool(4), update_period=1)
    step(model)
    pool = make_pool(3, seed=1)
    with_exemplars(model, pool, update_period=2)
    for number in range(3):
        now = encode_now(model, pool)
        step(model)
        assert len(model.exemplars.pool_embeddings) == 3
        assert torch.allclose(model.exemplars.pool_embeddings, now) == (number != 1)


def test_state_of_the_encoder_goes_on_where_it_was():
    pool = make_pool(4)
    first = with_exemplars(SmallModel().train(), pool, update_period=3)
    for _ in range(2):
        step(first)
    state = first.exemplars.encoder.state_dict()
    second = with_exemplars(SmallModel(seed=5).train(), make_pool(4), update_period=3)
    second.exemplars.encoder.load_state_dict(state)
    expected = first.exemplars.pool_embeddings
    step(second)  # 2
    assert torch.equal(second.exemplars.pool_embeddings, expected)
    now = encode_now(second, pool)
    step(second)  # 3
    torch.testing.assert_close(second.exemplars.pool_embeddings, now)
    for other in (make_pool(4, seed=1), make_pool(5)):
        third = with_exemplars(SmallModel(), other)
        with pytest.raises(ValueError, match="begun with another exemplar pool"):
            third.exemplars.encoder.load_state_dict(state)


def test_the_files_embeddings_are_part_of_a_run_that_uses_them():
    pool, again, other = (make_pool(4, dim=8) for _ in range(3))
    flipped = [replace(x, embedding=-x.embedding) for x in other.exemplars]
    first, second, third = (
        with_exemplars(SmallModel(), x, update_period=0).exemplars.encoder
        for x in (pool, again, ExemplarPool(tuple(flipped)))
    )
    state = first.state_dict()
    second.load_state_dict(state)
    with pytest.raises(ValueError, match="begun with another exemplar pool"):
        third.load_state_dict(state)


# Two processes.


def encode_on_rank(rank, folder):
    """Each rank has running statistics of its own, as plain batch norms have in training."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model = SmallModel().train()
    model.backbone.norm.running_mean += rank
    results = {"own": []}
    for count in (5, 1):  # three batches, and fewer than ranks
        case = images_and_masks(make_pool(count))
        options = {"in_feature": "cells", "batch_size": 2}
        results[f"encoded {count}"] = encode_exemplars(model, *case, **options)
    with_exemplars(model, make_pool(5), update_period=2, batch_size=2)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    results["steps"] = []
    for number in range(3):
        ddp(noise_images(seed=10 * rank + number))["loss_exemplar"].backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        results["steps"].append(model.exemplars.pool_embeddings.clone())
    results["mean"] = model.backbone.norm.running_mean
    torch.save(results, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_processes_have_the_same_embeddings(tmp_path):
    mp.start_processes(encode_on_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert (first["mean"] - second["mean"]).abs().max() > 0.1
    for name in ("encoded 5", "encoded 1"):
        assert torch.equal(first[name], second[name])
    for x, y in zip(first["steps"], second["steps"], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(first["steps"][0], first["steps"][1])
    assert (first["steps"][1] - first["steps"][2]).abs().max() > 1e-4
    # Batches of two by turns, each by one rank's statistics.
    case = images_and_masks(make_pool(5))
    model = SmallModel()
    alone = []
    for _ in range(2):
        alone.append(encode_exemplars(model, *case, in_feature="cells", batch_size=2))
        model.backbone.norm.running_mean += 1
    expected = torch.cat([alone[0][:2], alone[1][2:4], alone[0][4:]])
    torch.testing.assert_close(first["encoded 5"], expected)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
