"""DeepMask's training: the loss against its formula, branches in turns, several processes."""

import copy

import numpy as np
import pytest
import torch
from deepmask_cases import build, config, patches
from detectron2.modeling import build_model
from detectron2.utils import comm

from unseg.engine import build_optimizer
from unseg.engine.hooks import let_idle_parameters_rest
from unseg.modeling.proposals.deepmask_losses import DeepMaskLosses, mask_loss, score_loss

LABELS = ([1, -1, 1, -1], [-1, -1, -1, 1])


def batch(labels=LABELS, seed=0):
    return [patches(own, seed=seed + i) for i, own in enumerate(labels)]


def formula(model, inputs, weight=1 / 32):
    """The losses of specs/proposals.md 1.3, in float64, from the logits in eval mode."""
    model.eval()
    masks = scores = 0.0
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for x in inputs:
        output = model([x | {"image": image}])[0]
        for n, y in enumerate(x["patch_labels"].double().tolist()):
            score = output["patch_scores"][n].double().item()
            scores += weight * np.logaddexp(0, -y * score)
            if y > 0:
                logits = output["patch_logits"][n].double().numpy()
                signs = x["patch_masks"][n].double().numpy()
                masks += (1 + y) / 2 * np.logaddexp(0, -signs * logits).mean()
    model.train()
    return masks, scores


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, inputs):
    model.zero_grad()
    losses = model(inputs)
    sum(losses.values()).backward()
    return losses, gradients(model)


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_losses_are_the_formula(kind, align_corners):
    model = build(HEAD=kind, ALIGN_CORNERS=align_corners)
    inputs = batch()
    masks, scores = formula(model, inputs)
    losses = model(inputs)
    assert set(losses) == {"loss_mask", "loss_score"}
    assert losses["loss_mask"].item() == pytest.approx(masks, rel=1e-4)
    assert losses["loss_score"].item() == pytest.approx(scores, rel=1e-4)
    assert masks > 0.1
    mean = build(HEAD=kind, ALIGN_CORNERS=align_corners, LOSS_REDUCTION="mean")(inputs)
    assert mean["loss_mask"].item() == pytest.approx(masks / 8, rel=1e-4)
    assert mean["loss_score"].item() == pytest.approx(scores / 8, rel=1e-4)


def test_weight_of_the_score_does_not_depend_on_the_batch():
    for weight in (1 / 32, 0.5, 0.0):
        model = build(SCORE_WEIGHT=weight)
        for labels in (LABELS, ([1, -1],)):
            _, scores = formula(model, batch(labels), weight)
            got = model(batch(labels))["loss_score"].item()
            assert got == pytest.approx(scores, rel=1e-4)


def test_large_logits_are_finite():
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss = mask_loss(logits, torch.tensor([[[-1, -1]]], dtype=torch.int8))
    assert loss.item() == 5000
    loss.backward()
    assert logits.grad.tolist() == [[[0.5, 0.0]]]
    assert score_loss(torch.tensor([-1e4, 3e4]), torch.tensor([1, 1])).item() == 1e4


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_negatives_have_no_say_in_masks(kind):
    """Not by their targets, whatever they hold, nor through the mask's layers."""
    model = build(HEAD=kind)
    inputs = batch()
    wanted, wanted_gradients = step(model, inputs)
    poisoned = copy.deepcopy(inputs)
    for x in poisoned:
        x["patch_masks"] = x["patch_masks"].float()
        x["patch_masks"][x["patch_labels"] < 0] = float("nan")
    losses, got = step(model, poisoned)
    assert losses["loss_mask"].item() == wanted["loss_mask"].item()
    assert all(torch.equal(got[n], wanted_gradients[n]) for n in wanted_gradients)
    # Other negatives: the same gradient of what serves the mask alone.
    for x in poisoned:
        x["patches"][x["patch_labels"] < 0] = 255 - x["patches"][x["patch_labels"] < 0]
    losses, got = step(model, poisoned)
    branch = {id(p) for m in model.head.mask_branch() for p in m.parameters()}
    names = [n for n, p in model.named_parameters() if id(p) in branch]
    assert names
    for name in names:
        torch.testing.assert_close(got[name], wanted_gradients[name], rtol=1e-4, atol=1e-6)
    assert losses["loss_score"].item() != wanted["loss_score"].item()


@pytest.mark.parametrize("mode", ["joint", "alternate"])
@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
@pytest.mark.parametrize("labels", [LABELS, ([-1, -1],), ([1, 1],)])
def test_every_weight_has_a_gradient(kind, mode, labels):
    """In every step, or distributed training would wait for it."""
    model = build(HEAD=kind, TRAIN_MODE=mode)
    for _ in range(4 if mode == "alternate" else 1):
        losses, got = step(model, batch(labels))
        assert set(losses) == {"loss_mask", "loss_score"}
        assert all(v.requires_grad and v.isfinite() for v in losses.values())
        assert set(got) == {n for n, _ in model.named_parameters()}
        if labels == ([-1, -1],):
            assert losses["loss_mask"].item() == 0
            for module in model.head.mask_branch():
                assert not any(p.grad.any() for p in module.parameters())


def test_half_precision_losses_are_float32():
    model = build()
    wanted = model(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(wanted[name].item(), rel=0.1)


def test_uint8_patches_are_the_same():
    model = build()
    inputs = batch()
    for x in inputs:
        x["patches"] = x["patches"].round()
    wanted = model(inputs)
    for x in inputs:
        x["patches"] = x["patches"].to(torch.uint8)
    for name, value in model(inputs).items():
        assert value.item() == pytest.approx(wanted[name].item())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_two_processes_follow_one(reduction, monkeypatch):
    """DistributedDataParallel's average of gradients is the one process's gradient."""
    model = build(LOSS_REDUCTION=reduction)
    inputs = batch()
    wanted_losses, wanted = step(model, inputs)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    halves = [step(model, [x]) for x in inputs]
    for name, value in wanted.items():
        average = (halves[0][1][name] + halves[1][1][name]) / 2
        torch.testing.assert_close(average, value, rtol=1e-3, atol=1e-5)
    for name, value in wanted_losses.items():  # and what is logged
        average = (halves[0][0][name] + halves[1][0][name]) / 2
        assert average.item() == pytest.approx(value.item(), rel=1e-4)


# In turns.


def coins(model, count):
    """The branches of so many steps, by which weights are idle."""
    score = {id(p) for p in model.head.score.parameters()}
    drawn = []
    for _ in range(count):
        model._next_branch()
        idle = {id(p) for p in model.idle_parameters()}
        drawn.append("mask" if idle == score else "score")
    return drawn


def test_the_coin_is_fair_and_everywhere_the_same():
    model = build(TRAIN_MODE="alternate")
    drawn = coins(model, 400)
    assert 170 < drawn.count("mask") < 230  # 3 standard deviations
    pairs = list(zip(drawn, drawn[1:]))
    assert all(70 < pairs.count((a, b)) < 130 for a in ("mask", "score") for b in ("mask", "score"))
    torch.manual_seed(99)  # another process draws other numbers
    assert coins(build(seed=5, TRAIN_MODE="alternate"), 400) == drawn
    resumed = build(TRAIN_MODE="alternate")
    first = coins(resumed, 10)
    other = build(TRAIN_MODE="alternate")
    other.load_state_dict(resumed.state_dict())
    assert first + coins(other, 20) == drawn[:30]
    other.reset_schedule()
    assert coins(other, 10) == first
    seeds = [[DeepMaskLosses(coin_seed=s).coin(i) for i in range(40)] for s in range(3)]
    assert seeds[0] == drawn[:40]
    assert seeds[0] != seeds[1] != seeds[2]


@pytest.mark.parametrize("kind", ["shared", "paper", "full"])
def test_in_turns(kind):
    """One branch learns, from the patches that count; the other one and its momentum stand still,
    the trunk always moves."""
    cfg = config().clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM = 1e-5, 0.9
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.1
    model = build(HEAD=kind, TRAIN_MODE="alternate")
    optimizer = build_optimizer(cfg, model)
    let_idle_parameters_rest(optimizer, model)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    branches = {"mask": model.head.mask_branch(), "score": model.head.score_branch()}
    names = {id(p): n for n, p in model.named_parameters()}
    owned = {b: {names[id(p)] for m in ms for p in m.parameters()} for b, ms in branches.items()}
    inputs, kinds = batch(), []
    model._iter.fill_(7)  # from where coins change often
    for iteration in range(7, 13):
        branch = model.losses.coin(iteration)
        kinds.append(branch)
        other = "score" if branch == "mask" else "mask"
        expected = formula(model, inputs)[branch == "score"]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        momentum = {names[id(p)]: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
        seen.clear()
        losses, _ = step(model, inputs)
        assert seen == [3 if branch == "mask" else 8]
        assert losses[f"loss_{branch}"].item() == pytest.approx(expected, rel=1e-3)
        assert losses[f"loss_{other}"].item() == 0
        optimizer.step()
        assert {names[id(p)] for p in model.idle_parameters()} == owned[other]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name in owned[other]), name
            if name in owned[other] and name in momentum:
                buffer = optimizer.state[parameter]["momentum_buffer"]
                assert torch.equal(buffer, momentum[name])
    assert kinds.count("mask") > 1
    assert kinds.count("score") > 1


def test_one_joint_step_is_a_mask_step_and_a_score_step():
    """By their gradients, without dropout: nothing is lost or counted twice."""
    joint = build()
    _, wanted = step(joint, batch())
    model = build(TRAIN_MODE="alternate")
    total = {}
    found = set()
    while len(found) < 2:
        branch = model.losses.coin(int(model._iter))
        if branch in found:
            model._next_branch()
            continue
        found.add(branch)
        _, got = step(model, batch())
        for name, value in got.items():
            total[name] = total.get(name, 0) + value
    for name, value in wanted.items():
        torch.testing.assert_close(total[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["joint", "alternate"])
def test_learns_eight_patches(mode):
    torch.manual_seed(0)
    model = build_model(config(TRAIN_MODE=mode, LOSS_REDUCTION="mean", SCORE_WEIGHT=1.0))
    inputs = batch()
    for x in inputs:  # a bright square where the mask is, none in negatives
        signs = torch.full((len(x["patch_labels"]), 12, 12), -1, dtype=torch.int8)
        for n, y in enumerate(x["patch_labels"].tolist()):
            x["patches"][n] = 60 + x["patches"][n] / 8
            if y > 0:
                signs[n, 3 + n : 9, 2:7] = 1
                x["patches"][n, :, 8 + 8 + 8 * n // 3 : 8 + 24, 8 + 5 : 8 + 19] = 250
        x["patch_masks"] = signs * (x["patch_labels"] > 0)[:, None, None]
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    let_idle_parameters_rest(optimizer, model)
    first = formula(model, inputs, 1.0)
    for _ in range(25 if mode == "joint" else 50):
        optimizer.zero_grad()
        sum(model(inputs).values()).backward()
        optimizer.step()
    last = formula(model, inputs, 1.0)
    assert last[0] < 0.5 * first[0]
    assert last[1] < 0.5 * first[1]


def test_one_state_and_no_counter_without_turns():
    assert "_iter" not in build().state_dict()
    assert build().idle_parameters() == []
    build().reset_schedule()
    assert not any("pixel" in name for name in build().state_dict())


def test_bad_batches_are_refused():
    model = build()
    x = patches([1, -1])
    with pytest.raises(ValueError, match="0.png: training needs patch_masks .*PatchMapper"):
        model([{k: v for k, v in x.items() if k != "patch_masks"}])
    with pytest.raises(ValueError, match=r"patches must be \(2, 3, 48, 48\).*\(2, 3, 40, 40\)"):
        model([x | {"patches": torch.zeros(2, 3, 40, 40)}])
    with pytest.raises(ValueError, match=r"patch_masks must be \(2, 12, 12\)"):
        model([x | {"patch_masks": torch.zeros(2, 13, 12)}])
    with pytest.raises(ValueError, match="must have patches"):
        model([patches([])])


def test_images_without_patches_in_a_batch():
    model = build()
    wanted = model([patches([1, -1], seed=3)])
    got = model([patches([]), patches([1, -1], seed=3)])
    for name in wanted:
        assert got[name].item() == pytest.approx(wanted[name].item())


def test_training_with_a_scorer_is_refused():
    model = build(TEST__SCORER=True)
    with pytest.raises(ValueError, match="TEST.SCORER is for inference.*merge_scorer"):
        model(batch())
    model.eval()([{"image": torch.zeros(3, 20, 20, dtype=torch.uint8)} | patches([1, -1])])
