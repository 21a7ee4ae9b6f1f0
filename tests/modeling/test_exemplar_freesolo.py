"""Exemplar-FreeSOLO: its loss from the pixels, nearest cells, and that it is FreeSOLO otherwise."""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import freesolo_oracle as oracle
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from exemplar_cases import (
    EXEMPLAR,
    FREESOLO,
    contrast_slowly,
    embed_slowly,
    make_pool,
    narrow_config,
    shake_norms,
)
from freesolo_cases import batch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_freesolo_model import (
    CASES,
    GRIDS,
    LOSSES,
    RANGES,
    FixedInstanceHead,
    FixedMaskHead,
    flat_outputs,
    two_view_batch,
)
from torch import nn

from unseg.modeling import (
    ExemplarContrast,
    ExemplarFeatureError,
    ExemplarFreeSOLO,
    with_exemplars,
)
from unseg.modeling.solo.criterion import FreeSOLOLossSettings
from unseg.modeling.solo.postprocess import SoloInferenceSettings
from unseg.modeling.solo.targets import GridSpec, Pairs, nearest_pairs
from unseg.structures import ExemplarPool

# Which pair is the nearest.


def nearest_by_loop(pairs, centers, size, grids):
    """Per object the pairs of the least distance, as (squared distance, pair), exactly."""
    offsets = [sum(g * g for g in grids[:level]) for level in range(len(grids))]
    found = [[] for _ in centers]
    for p, (level, cell, target) in enumerate(pairs):
        side = grids[level]
        row, column = divmod(cell - offsets[level], side)
        y = (row + Fraction(1, 2)) * Fraction(size[0], side)
        x = (column + Fraction(1, 2)) * Fraction(size[1], side)
        own_x, own_y = (Fraction(float(c)) + Fraction(1, 2) for c in centers[target])
        found[target].append(((x - own_x) ** 2 + (y - own_y) ** 2, p))
    return found


def as_pairs(pairs):
    level, cell, target = torch.tensor(pairs).long().view(-1, 3).unbind(dim=1)
    return Pairs(torch.zeros_like(level), level, cell, target, [len(level)])


@st.composite
def pair_cases(draw):
    grids = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 12]), min_size=1, max_size=3))
    size = (32 * draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4)))
    number = draw(st.integers(1, 4))
    eighths = st.integers(0, 8 * 127)
    centers = [(draw(eighths) / 8, draw(eighths) / 8) for _ in range(number)]
    pairs = []
    for target in range(number):
        for level, side in enumerate(grids):
            offset = sum(g * g for g in grids[:level])
            cells = draw(st.sets(st.integers(0, side * side - 1), max_size=4))
            pairs += [(level, offset + cell, target) for cell in sorted(cells)]
    return grids, size, centers, pairs


@settings(max_examples=150)
@given(pair_cases())
def test_nearest_pairs(case):
    grids, size, centers, pairs = case
    spec = GridSpec(grids, [(1, 2)] * len(grids))
    found = nearest_pairs(as_pairs(pairs), torch.tensor(centers), size, spec).tolist()
    # Without thirds and fifths all numbers are exact, and so are ties.
    exact = all(math.log2(g).is_integer() for g in grids)
    for pair, candidates in zip(found, nearest_by_loop(pairs, centers, size, grids), strict=True):
        if not candidates or exact:
            assert pair == min(candidates, default=(0, -1))[1]
        else:
            distances = {p: float(d) for d, p in candidates}
            assert distances[pair] == pytest.approx(min(distances.values()), rel=1e-9, abs=1e-9)


def test_nearest_pair_of_an_object_between_cells_is_the_first():
    """Cells of 16 pixels and of 32: pixel index 15.5 is the border of the first two."""
    pairs = [(1, 17, 1), (0, 1, 0), (0, 0, 0), (0, 6, 1), (0, 5, 1)]
    centers = torch.tensor([[15.5, 7.5], [31.5, 23.5], [3.0, 3.0]])
    found = nearest_pairs(as_pairs(pairs), centers, (64, 64), GridSpec((4, 2), [(1, 2)] * 2))
    assert found.tolist() == [1, 3, -1]


# The loss of a model whose predictions and features are parameters.

CELLS = 4  # per side: of 16 pixels


class FixedBackbone(nn.Module):
    size_divisibility = 0

    def __init__(self, images):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(images, 5, CELLS, CELLS))
        self.dtype = torch.float32

    def forward(self, x):
        return {"image": x, "cells": self.cells.to(self.dtype)}


POOL = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))


def make_fixed(images=4, **head):
    torch.manual_seed(3)
    contrast = ExemplarContrast(
        **{"in_feature": "cells", "alpha": 0.2, "beta": 0.1, "temperature": 0.5} | head
    )
    contrast.pool_embeddings = POOL
    model = ExemplarFreeSOLO(
        backbone=FixedBackbone(images),
        instance_head=FixedInstanceHead(images, 4, 6),
        mask_head=FixedMaskHead(images, 4, (16, 16)),
        grid=GridSpec(GRIDS, RANGES, 0.2),
        losses=FreeSOLOLossSettings(),
        inference=SoloInferenceSettings(),
        copy_paste_overlap=None,
        append_weak_view=True,
        pixel_mean=[10.0, 20.0, 30.0],
        pixel_std=[1.0, 2.0, 4.0],
        exemplars=contrast,
    )
    return model.train()


def slow_loss(model, objects):
    """From masks, kernels and features of images padded to 64 x 64, in float64."""
    _, kernels, _, features = flat_outputs(model)
    embeddings, levels = [], set()
    for b, own in enumerate(objects):
        for box, mask in zip(own.gt_boxes.tensor.tolist(), own.gt_masks.tensor, strict=True):
            center = oracle.center_of_mass(mask.numpy())
            cells, margin = oracle.cells_of_object(
                box, center, (64, 64), GRIDS, RANGES, Fraction(1, 5)
            )
            assert margin > 1e-4, "choose another seed"
            if not cells:
                continue

            def distance(cell, center=center):
                level, row, column = cell
                side = 64 / GRIDS[level]
                return math.dist(
                    ((column + 0.5) * side, (row + 0.5) * side), [float(c) + 0.5 for c in center]
                )

            best = min(cells, key=distance)
            assert len([c for c in cells if distance(c) < distance(best) + 1e-4]) == 1
            levels.add(best[0])
            kernel = kernels[b, oracle.cell_index(*best, GRIDS)]
            soft = torch.sigmoid((kernel[:, None, None] * features[b]).sum(dim=0))
            embeddings.append(embed_slowly(model.backbone.cells[b], soft))
    assert len(levels) > 1
    head = model.exemplars
    return contrast_slowly(embeddings, POOL, head.alpha, head.beta, head.temperature)


@pytest.mark.parametrize("seed", [16, 19])
def test_loss_of_a_batch_from_its_pixels(seed):
    """Strong and weak views, images of different sizes."""
    model = make_fixed(weight=1.7)
    batch = two_view_batch(seed=seed, counts=(3, 2))
    found = model(copy.deepcopy(batch))
    assert found.keys() == LOSSES | {"loss_exemplar"}
    expected, numbers = slow_loss(model, [x["instances"] for x in batch] * 2)
    assert numbers["used"] >= 4
    assert found["loss_exemplar"].dtype == torch.float32
    assert found["loss_exemplar"].item() == pytest.approx(1.7 * expected.item(), rel=1e-5)
    assert model.exemplars.tally.tolist() == list(numbers.values())
    parameters = dict(model.named_parameters())
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(found["loss_exemplar"], parameters.values(), **options)
    slow = torch.autograd.grad(1.7 * expected, parameters.values(), **options)
    for name, x, y in zip(parameters, gradients, slow, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)
    for name in ("backbone.cells", "mask_head.features"):
        gradient = slow[list(parameters).index(name)]
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 1e-6).sum() >= 3, "most of the four views"


def test_weight_and_pool_do_not_change_the_other_losses():
    batch = two_view_batch()
    expected = make_fixed(weight=0.0)(copy.deepcopy(batch))
    assert expected.keys() == LOSSES
    found = make_fixed(weight=2.0)(copy.deepcopy(batch))
    assert all(torch.equal(found[name], expected[name]) for name in LOSSES)
    single = make_fixed(weight=1.0)(batch)["loss_exemplar"]
    assert found["loss_exemplar"].item() == pytest.approx(2 * single.item(), rel=1e-6)


def test_objects_that_no_cell_learns_are_not_embedded():
    """Empty masks and boxes out of all levels, among others; and nothing else."""
    model = make_fixed()
    batch = two_view_batch(counts=(3, 2))
    with_odd = copy.deepcopy(batch)
    objects = with_odd[0]["instances"]
    objects.gt_masks.tensor[0] = False
    objects.gt_boxes.tensor[1] = torch.tensor([5.0, 5.0, 5.5, 5.5])
    for x in batch[0], with_odd[0]:
        x["instances"].remove("gt_embeddings")
        x["instances"] = x["instances"][2:] if x is batch[0] else x["instances"]
    expected = model(batch)["loss_exemplar"].item()
    objects_seen = model.exemplars.tally[0].item()
    model.exemplars.tally.zero_()
    found = model(with_odd)["loss_exemplar"]
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert model.exemplars.tally[0].item() == objects_seen == 6
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_is_computed_in_float32_under_autocast():
    model = make_fixed()
    batch = two_view_batch()
    with torch.no_grad():
        model.backbone.cells.copy_(model.backbone.cells.bfloat16())
    expected = model(copy.deepcopy(batch))["loss_exemplar"]
    model.backbone.dtype = torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch)["loss_exemplar"]
    assert torch.equal(found, expected)
    assert expected > 0


@pytest.mark.parametrize("view", [0, 3])
def test_nan_in_features_is_not_hidden(view):
    model = make_fixed()
    with torch.no_grad():
        model.backbone.cells[view, 2, 1, 1] = math.nan
    losses = model(two_view_batch())
    assert losses["loss_exemplar"].isnan()
    assert losses["loss_category"].isfinite()


# The real model, narrow.


def narrow(path=EXEMPLAR, seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(narrow_config(path, **changes))


@pytest.fixture(scope="module")
def model():
    """Of one exemplar that all features resemble a little (none is negative), and its opposite."""
    model = narrow(MODEL__EXEMPLAR__ALPHA=0.0, MODEL__EXEMPLAR__BETA=0.0)
    channels = model.backbone.output_shape()["res4"].channels
    first, second = make_pool(2, dim=channels).exemplars
    ones = np.full(channels, channels**-0.5, dtype=np.float32)
    exemplars = replace(first, embedding=ones), replace(second, embedding=-ones)
    return with_exemplars(model, ExemplarPool(exemplars), update_period=0)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_learns_from_every_batch(model, name):
    sizes, objects = CASES[name]
    if name == "smaller than the grid":
        objects = [torch.ones(1, *size).bool() for size in sizes]
    model.train()
    model.zero_grad()
    losses = model(batch_of(sizes, objects))
    assert losses.keys() == LOSSES | {"loss_exemplar"}
    assert all(v.isfinite() and v.shape == () for v in losses.values())
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert (losses["loss_exemplar"] > 0) == (losses["loss_max_projection"] > 0)


def test_objects_on_no_level_have_no_loss(model):
    """A batch of nothing else."""
    model.train()
    model.zero_grad()
    batch = batch_of([(64, 64), (48, 48)], [2, 1])
    for x in batch:
        x["instances"].gt_boxes.tensor[:] = torch.tensor([1.0, 1.0, 1.5, 1.5])
    losses = model(batch)
    assert losses["loss_exemplar"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # The exemplar loss itself reaches what it reads.
    model.zero_grad()
    model(batch)["loss_exemplar"].backward()
    assert model.backbone.bottom_up.stem.conv1.weight.grad is not None


def test_bfloat16_autocast(model):
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch_of([(32, 64)] * 2, [2, 2]))
    assert losses["loss_exemplar"].dtype == torch.float32
    assert losses["loss_exemplar"] > 0
    model.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_of_the_loss_reaches_masks_and_features(model):
    model.train()
    model.zero_grad()
    model(batch_of([(64, 64)] * 2, [2, 2]))["loss_exemplar"].backward()
    touched = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"backbone.bottom_up.res4.0.conv1.weight", "ins_head.kernel_pred.weight"} <= touched
    assert "mask_head.conv_pred.0.weight" in touched
    assert not any("cate_pred" in k or "emb_pred" in k for k in touched)


def test_names_of_weights_are_those_of_freesolo():
    ours, theirs = narrow().state_dict(), narrow(FREESOLO).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours), "and so is how they begin"


def test_inference_is_that_of_freesolo_and_needs_no_pool():
    changes = {"MODEL__FREESOLO__SCORE_THR": 0.0, "MODEL__FREESOLO__UPDATE_THR": 0.0}
    ours, theirs = shake_norms(narrow(seed=1, **changes)), narrow(FREESOLO, seed=2, **changes)
    theirs.load_state_dict(ours.state_dict())
    batch = [{"image": x["image"]} for x in batch_of([(64, 96), (40, 33)], [0, 0])]
    for x, y in zip(ours.eval()(batch), theirs.eval()(batch), strict=True):
        assert len(x["instances"]) == len(y["instances"]) > 0
        for name, value in y["instances"].get_fields().items():
            other = x["instances"].get(name)
            assert torch.equal(getattr(other, "tensor", other), getattr(value, "tensor", value))


def test_without_pool_or_feature_it_says_so():
    batch = batch_of([(32, 32)], [1])
    with pytest.raises(ExemplarFeatureError, match="training needs an exemplar pool"):
        narrow().train()(batch)
    model = narrow(MODEL__EXEMPLAR__IN_FEATURE="res5").train()
    with pytest.raises(ExemplarFeatureError, match=r"'res5' .*\(p2, p3, p4, res2, res3, res4\)"):
        model(batch)


def test_a_pool_may_be_given_at_once():
    options = ExemplarFreeSOLO.from_config(narrow_config())
    model = ExemplarFreeSOLO(**options, pool=make_pool(3), update_period=7, pool_batch_size=2)
    encoder = model.exemplars.encoder
    assert (len(encoder.pool), encoder.period, encoder.batch_size) == (3, 7, 2)
    assert model.train()(batch_of([(32, 32)], [1]))["loss_exemplar"].isfinite()


def test_a_pool_that_is_not_used_is_not_looked_at():
    options = ExemplarFreeSOLO.from_config(narrow_config(MODEL__EXEMPLAR__WEIGHT=0.0))
    model = ExemplarFreeSOLO(**options, pool=make_pool(3))
    assert model.exemplars.encoder is None
    assert "loss_exemplar" not in model.train()(batch_of([(32, 32)], [1]))
