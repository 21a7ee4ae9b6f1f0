"""The losses of hierarchical embeddings against their formulas in float64, by loops."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage, JSONWriter
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from relation_cases import SmallBatch, random_batch, rich_batch

from unseg.config.hierarchical_embedding import add_hierarchical_embedding_config
from unseg.modeling.losses import HierarchicalEmbeddingLoss

KEYS = ("mask", "object", "hier")
ALL_DRAWN = {"masks_per_image": 1000, "neg_per_pair": 1000}  # nothing is left to chance


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the formulas -----------------------------------------------------------------------


def to_ball(u, c):
    length = math.sqrt(c * float(u @ u))
    return u * (math.tanh(length) / length) if length else u


def hyperbolic(u, v, c):
    """2 / s artanh(s |-x + y|), by Moebius addition (Ganea et al., 2018)."""
    x, y = -to_ball(u, c), to_ball(v, c)
    xy, xx, yy = x @ y, x @ x, y @ y
    total = (1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y
    total = total / (1 + 2 * c * xy + c * c * xx * yy)
    return 2 / math.sqrt(c) * math.atanh(min(math.sqrt(c * float(total @ total)), 1 - 1e-16))


def distance(u, v, geometry, c):
    if geometry == "poincare":
        return hyperbolic(u, v, c)
    return math.dist(u, v)


def hinges_by_loops(batch, tangents, loss):
    """All hinges of each term, if everything that may be drawn is drawn."""

    def d(u, v):
        return distance(u, v, loss.geometry, loss.c)

    fg, origin = tangents["fg"], np.zeros(tangents["fg"].shape[1])
    hinges = {"mask": [], "object": [], "norm": [], "triplet": []}
    for i, valid in enumerate(batch.valid):
        if valid and "full" in tangents:
            full = tangents["full"][i]
            hinges["mask"].append(d(full, fg[i]) - d(full, tangents["bg"][i]))
    wholes = batch.hierarchy_pairs(loss.hier_containment, loss.hier_min_area_ratio)
    for name, pairs in (("object", batch.object_pairs(loss.object_iou)), ("triplet", wholes)):
        for i, j in pairs:
            for n in batch.negatives(i, j, loss.neg_max_iou):
                hinges[name].append(d(fg[i], fg[j]) - d(fg[i], fg[n]))
    hinges["norm"] = [d(origin, fg[i]) - d(origin, fg[j]) for i, j in wholes]
    return {name: [max(x + loss.margin, 0.0) for x in found] for name, found in hinges.items()}


def losses_by_loops(batch, tangents, loss):
    def reduced(hinges):
        return math.fsum(hinges) / (max(len(hinges), 1) if loss.reduction == "mean" else 1)

    terms = {k: reduced(v) for k, v in hinges_by_loops(batch, tangents, loss).items()}
    hier = terms["norm"] + (terms["triplet"] if loss.hier_form == "triplet" else 0)
    weighted = {
        "mask": loss.weight_mask * terms["mask"],
        "object": loss.weight_object * terms["object"],
        "hier": loss.weight_hier * hier,
    }
    weights = {
        "mask": loss.weight_mask,
        "object": loss.weight_object,
        "hier": loss.weight_hier,
    }
    return {f"loss_embedding_{k}": weighted[k] for k in KEYS if weights[k] > 0}


def random_tangents(seed, n, d, views=("fg", "full", "bg"), scale=0.6):
    rng = np.random.default_rng(seed)
    return {view: rng.normal(size=(n, d)) * rng.choice([scale, 0.05], (n, 1)) for view in views}


def as_tensors(tangents, dtype=torch.float64):
    return {k: torch.from_numpy(v).to(dtype).requires_grad_() for k, v in tangents.items()}


# --- values -----------------------------------------------------------------------------


@given(
    st.integers(0, 100_000),
    st.sampled_from(["poincare", "euclidean"]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from(["norm", "triplet"]),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([2, 5]),
)
def test_values(seed, geometry, reduction, form, c, dimensions):
    rng = np.random.default_rng(seed)
    loss = HierarchicalEmbeddingLoss(
        geometry=geometry,
        c=c,
        reduction=reduction,
        hier_form=form,
        margin=float(rng.uniform(0, 0.5)),
        weight_mask=float(rng.choice([0, 1, 0.3])),
        weight_object=float(rng.choice([0, 1, 2])),
        weight_hier=float(rng.choice([0, 1, 5])),
        **ALL_DRAWN,
    )
    batch = random_batch(seed, most_images=3, most_masks=6)
    tangents = random_tangents(seed, len(batch), dimensions, loss.views)
    expected = losses_by_loops(batch, tangents, loss) if loss.views else {}
    found = loss(as_tensors(tangents), batch.parts, generator())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert value.item() == pytest.approx(expected[name], rel=1e-6, abs=1e-7)


def test_drawn_losses_are_means_of_what_may_be_drawn():
    """With few negatives and masks a batch, the mean over many steps is that of all of them."""
    loss = HierarchicalEmbeddingLoss(masks_per_image=2, neg_per_pair=1, hier_form="triplet")
    batch = next(
        b
        for b in map(random_batch, range(100))
        if len(b.parts) == 1 and len(b.object_pairs(0.4)) == 2 and b.hierarchy_pairs(0.95, 1.1)
    )
    batch = joined_batch(batch, random_batch(7))
    tangents = random_tangents(2, len(batch), 4)
    tensors = {k: torch.from_numpy(v) for k, v in tangents.items()}
    own = generator()
    sums = {}
    for _ in range(200):
        for name, value in loss(tensors, batch.parts, own).items():
            sums.setdefault(name, []).append(float(value))
    expected = expected_losses(batch, tangents, loss)
    for name, values in sums.items():
        error = np.std(values) / math.sqrt(len(values))
        assert np.mean(values) == pytest.approx(expected[name], abs=max(5 * error, 1e-6))
    assert np.std(sums["loss_embedding_object"]) > 0


def joined_batch(*batches):
    """One batch of the images of several."""
    joined = SmallBatch([])
    for batch in batches:
        joined.image += [len(joined.parts) + k for k in batch.image]
        joined.parts += batch.parts
        joined.sets += batch.sets
        joined.valid += batch.valid
    return joined


def expected_losses(batch, tangents, loss):
    """Expectations of the means, each image and each pair drawn as often as any other."""

    def d(u, v):
        return distance(u, v, loss.geometry, loss.c)

    def hinge(x):
        return max(x + loss.margin, 0.0)

    full, fg, bg = (tangents[view] for view in ("full", "fg", "bg"))
    masks, drawn = 0.0, 0
    for k in range(len(batch.parts)):
        valid = [i for i in range(len(batch)) if batch.valid[i] and batch.image[i] == k]
        values = [hinge(d(full[i], fg[i]) - d(full[i], bg[i])) for i in valid]
        count = min(loss.masks_per_image, len(valid))
        masks, drawn = masks + count * np.mean(values or [0]), drawn + count

    def mean_of_pairs(pairs):
        means = []
        for i, j in pairs:
            negatives = batch.negatives(i, j, loss.neg_max_iou)
            if negatives:
                values = [hinge(d(fg[i], fg[j]) - d(fg[i], fg[n])) for n in negatives]
                means.append(np.mean(values))
        return np.mean(means)

    wholes = batch.hierarchy_pairs(loss.hier_containment, loss.hier_min_area_ratio)
    origin = np.zeros(fg.shape[1])
    norms = np.mean([hinge(d(origin, fg[i]) - d(origin, fg[j])) for i, j in wholes])
    return {
        "loss_embedding_mask": masks / drawn,
        "loss_embedding_object": mean_of_pairs(batch.object_pairs(loss.object_iou)),
        "loss_embedding_hier": norms + mean_of_pairs(wholes),
    }


def test_same_generator_same_losses():
    loss = HierarchicalEmbeddingLoss(masks_per_image=1)
    batch = joined_batch(random_batch(1), rich_batch())
    tangents = as_tensors(random_tangents(0, len(batch), 4))
    first = loss(tangents, batch.parts, generator(3))
    assert loss(tangents, batch.parts, generator(3)) == first
    assert loss(tangents, batch.parts, generator(4)) != first


# --- gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
@pytest.mark.parametrize("c", [0.5, 1.0])
def test_gradients_against_differences(geometry, c):
    loss = HierarchicalEmbeddingLoss(
        geometry=geometry, c=c, hier_form="triplet", reduction="sum", **ALL_DRAWN
    )
    batch = rich_batch()
    views = loss.views
    inputs = as_tensors(random_tangents(3, len(batch), 3, views))

    def total(*tensors):
        tangents = dict(zip(views, tensors, strict=True))
        return sum(unrounded(loss, tangents, batch).values())

    assert torch.autograd.gradcheck(total, tuple(inputs[view] for view in views))
    # And the float32 losses that are given out have these gradients.
    names = [inputs[view] for view in views]
    losses = loss(inputs, batch.parts, generator())
    given_out = torch.autograd.grad(sum(losses.values()), names)
    for a, b in zip(given_out, torch.autograd.grad(total(*names), names), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def unrounded(loss, tangents, batch):
    """The losses before they are rounded to float32, which differences would see."""
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(torch.Tensor, "float", torch.Tensor.double)
        return loss(tangents, batch.parts, generator())


@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-6, 2.5 / math.sqrt(3)])
def test_gradients_of_equal_tangents_are_finite(geometry, dtype, value):
    """All embeddings at one point: at the origin, where training begins, near it, at the rim."""
    loss = HierarchicalEmbeddingLoss(geometry=geometry, hier_form="triplet")
    batch = rich_batch()
    tangents = {
        view: torch.full((len(batch), 3), value, dtype=dtype, requires_grad=True)
        for view in loss.views
    }
    losses = loss(tangents, batch.parts, generator())
    for name, found in losses.items():  # all hinges are the margin
        terms = 2 if name == "loss_embedding_hier" else 1
        assert found.item() == pytest.approx(terms * loss.margin, rel=1e-6)
    sum(losses.values()).backward()
    for tensor in tangents.values():
        assert tensor.grad.isfinite().all()


def test_autocast_changes_nothing():
    loss = HierarchicalEmbeddingLoss(hier_form="triplet")
    batch = rich_batch()
    tangents = as_tensors(random_tangents(0, len(batch), 4), torch.float32)
    plain = loss(tangents, batch.parts, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(tangents, batch.parts, generator()) == plain


def test_a_step_down_the_gradient_orders_the_hierarchy():
    """A whole and its part from the same point: the whole goes in, the part goes out."""
    whole, part = np.ones((12, 12), dtype=bool), np.zeros((12, 12), dtype=bool)
    part[2:6, 2:6] = True
    batch = SmallBatch([[part, whole]])
    tangents = torch.full((2, 4), 0.3, requires_grad=True)
    loss = HierarchicalEmbeddingLoss(weight_mask=0, weight_object=0)
    for _ in range(20):
        (value,) = loss({"fg": tangents}, batch.parts, generator()).values()
        (slope,) = torch.autograd.grad(value, tangents)
        tangents = (tangents - 0.02 * slope).detach().requires_grad_()
    norms = tangents.detach().norm(dim=1)
    assert norms[1] < 0.6 < norms[0]
    assert loss({"fg": tangents}, batch.parts, generator()).popitem()[1] == 0


NOTHING = {
    "no proposals": SmallBatch([[], []]),
    "one mask": SmallBatch([[np.ones((12, 12), dtype=bool)]]),
    "one mask an image": SmallBatch([[np.ones((12, 12), dtype=bool)]] * 3),
    "small masks": SmallBatch([[np.ones((12, 12), dtype=bool)] * 3] * 2, min_area=1000),
    "empty masks": SmallBatch([[np.zeros((12, 12), dtype=bool)] * 3] * 2),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("geometry", ["poincare", "euclidean"])
@pytest.mark.parametrize("form", ["norm", "triplet"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_triplets(case, geometry, form, reduction):
    """All keys are there and the gradients are zeros, not None."""
    batch = NOTHING[case]
    loss = HierarchicalEmbeddingLoss(geometry=geometry, hier_form=form, reduction=reduction)
    network = torch.nn.Linear(6, 4)
    inputs = {view: torch.randn(len(batch), 6) for view in loss.views}
    tangents = {view: network(x) for view, x in inputs.items()}
    losses = loss(tangents, batch.parts, generator())
    assert sorted(losses) == sorted(f"loss_embedding_{name}" for name in KEYS)
    if not any(batch.valid):
        assert losses["loss_embedding_mask"] == 0
    assert losses["loss_embedding_object"] == losses["loss_embedding_hier"] == 0
    (losses["loss_embedding_object"] + losses["loss_embedding_hier"]).backward(retain_graph=True)
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    losses["loss_embedding_mask"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_terms_that_are_off_need_no_views():
    batch = rich_batch()
    fg = as_tensors(random_tangents(0, len(batch), 4, ["fg"]))
    everything = HierarchicalEmbeddingLoss()
    assert set(everything.views) == {"fg", "full", "bg"}
    assert HierarchicalEmbeddingLoss(weight_object=0, weight_hier=0).views == everything.views
    for weights, key in (
        ({"weight_hier": 0}, "loss_embedding_object"),
        ({"weight_object": 0}, "loss_embedding_hier"),
    ):
        loss = HierarchicalEmbeddingLoss(weight_mask=0, **weights)
        assert loss.views == ("fg",)
        assert list(loss(fg, batch.parts, generator())) == [key]
    none = HierarchicalEmbeddingLoss(weight_mask=0, weight_object=0, weight_hier=0)
    assert none.views == ()
    assert none({}, batch.parts, generator()) == {}


# --- logged numbers ---------------------------------------------------------------------


def logged(loss, tangents, batch, step):
    with EventStorage(step) as storage:
        loss(tangents, batch.parts, generator())
    return {name: value for name, (value, _) in storage.latest().items()}


@settings(max_examples=30)
@given(st.integers(0, 100_000), st.sampled_from(["poincare", "euclidean"]))
def test_logged_numbers(seed, geometry):
    batch = random_batch(seed, most_images=3, most_masks=6)
    assume(len(batch))
    loss = HierarchicalEmbeddingLoss(
        geometry=geometry, c=2.0, max_tangent_norm=1.2, hier_form="triplet", **ALL_DRAWN
    )
    tangents = random_tangents(seed, len(batch), 4)
    norms = np.linalg.norm(tangents["fg"], axis=1, keepdims=True)
    limit = 1.2 / math.sqrt(2)
    tangents["fg"] = tangents["fg"] * np.minimum(1, limit / norms)
    found = logged(loss, as_tensors(tangents, torch.float32), batch, 39)
    hinges = hinges_by_loops(batch, tangents, loss)
    hinges["hier"] = hinges.pop("norm") + hinges.pop("triplet")
    factor = 2 if geometry == "poincare" else 1
    expected = {
        "embedding/mean_d0": factor * np.minimum(norms, limit).mean(),
        "embedding/share_clipped": (norms >= limit).mean(),
    }
    for name, values in hinges.items():
        expected[f"embedding/count_{name}"] = len(values)
        active = [x > 0 for x in values]
        expected[f"embedding/active_{name}"] = sum(active) / max(len(active), 1)
    assert found == pytest.approx(expected, rel=1e-5)
    assert logged(loss, as_tensors(tangents), batch, 38) == {}


def test_logged_in_the_line_of_the_losses(tmp_path):
    """Detectron2's writers write after every 20th step, what was put in it."""
    batch = rich_batch()
    loss = HierarchicalEmbeddingLoss(weight_mask=0)
    tangents = as_tensors(random_tangents(0, len(batch), 4, ["fg"]))
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage(0) as storage:
        for step in range(40):
            storage.put_scalar("total_loss", 1.0)
            loss(tangents, batch.parts, generator())
            if (step + 1) % 20 == 0:
                writer.write()
            storage.step()
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [19, 39]
    for line in lines:
        assert {"total_loss", "embedding/mean_d0", "embedding/active_object"} <= line.keys()
        assert not any("mask" in name or "clipped" in name for name in line)


def test_no_proposals_are_logged():
    found = logged(HierarchicalEmbeddingLoss(max_tangent_norm=2.5), as_tensors(
        random_tangents(0, 0, 4)), SmallBatch([[]]), 19)  # fmt: skip
    assert set(found.values()) == {0.0}


# --- settings and bad input -------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"geometry": "lorentz"},
        {"reduction": "none"},
        {"hier_form": "pair"},
        {"c": 0.0},
        {"c": math.inf},
        {"max_tangent_norm": 0.0},
        {"weight_mask": -1.0},
        {"weight_object": math.nan},
        {"weight_hier": math.inf},
        {"margin": -0.1},
        {"margin": math.nan},
        {"masks_per_image": 0},
        {"neg_per_pair": 0},
        {"object_iou": 1.2},
        {"neg_max_iou": -0.1},
        {"hier_containment": 1.01},
        {"hier_min_area_ratio": 0.9},
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HierarchicalEmbeddingLoss(**wrong)


def test_bad_tangents():
    batch = rich_batch()
    loss = HierarchicalEmbeddingLoss()
    tangents = as_tensors(random_tangents(0, len(batch), 4))
    without = {view: x for view, x in tangents.items() if view != "bg"}
    with pytest.raises(ValueError, match="bg"):
        loss(without, batch.parts, generator())
    with pytest.raises(ValueError, match="'full'"):
        loss(tangents | {"full": tangents["full"][:, :3]}, batch.parts, generator())
    with pytest.raises(ValueError, match="'fg'"):
        loss({view: x[1:] for view, x in tangents.items()}, batch.parts, generator())
    with pytest.raises(ValueError, match="image"):
        loss(tangents, [], generator())


def test_settings_of_the_config():
    """Defaults are the configuration's; every setting is read."""
    cfg = get_cfg()
    add_hierarchical_embedding_config(cfg)
    default = HierarchicalEmbeddingLoss(max_tangent_norm=2.5)
    assert HierarchicalEmbeddingLoss.from_config(cfg) == default
    changes = {
        "CURVATURE": ("c", 0.5),
        "WEIGHT_MASK": ("weight_mask", 5.0),
        "WEIGHT_OBJECT": ("weight_object", 0.5),
        "WEIGHT_HIER": ("weight_hier", 0.0),
        "MARGIN": ("margin", 0.5),
        "REDUCTION": ("reduction", "sum"),
        "MASKS_PER_IMAGE": ("masks_per_image", 4),
        "OBJECT_IOU": ("object_iou", 0.5),
        "NEG_PER_PAIR": ("neg_per_pair", 2),
        "NEG_MAX_IOU": ("neg_max_iou", 0.2),
        "HIER_CONTAINMENT": ("hier_containment", 1.0),
        "HIER_MIN_AREA_RATIO": ("hier_min_area_ratio", 1.0),
        "HIER_FORM": ("hier_form", "triplet"),
        "MAX_TANGENT_NORM": ("max_tangent_norm", 2.0),
    }
    expected = {}
    for key, (name, value) in changes.items():
        assert cfg.MODEL.HIERARCHICAL_EMBEDDING[key] != value
        cfg.MODEL.HIERARCHICAL_EMBEDDING[key] = value
        expected[name] = value
    loss = HierarchicalEmbeddingLoss.from_config(cfg)
    assert loss == HierarchicalEmbeddingLoss(**expected)
    cfg.MODEL.HIERARCHICAL_EMBEDDING.GEOMETRY = "euclidean"
    loss = HierarchicalEmbeddingLoss.from_config(cfg)
    assert loss.geometry == "euclidean"
