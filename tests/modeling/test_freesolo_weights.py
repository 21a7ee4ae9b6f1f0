"""The names and shapes of FreeSOLO's weights, and the conversion of released checkpoints."""

import numpy as np
import pytest
import torch

from unseg.checkpoint import CheckpointError, SafeCheckpointer, convert, save_converted
from unseg.checkpoint.freesolo import expected_freesolo
from unseg.config import load_config
from unseg.modeling import FreeSOLO


def released_shapes(depth):
    """Section 4 of the specification."""
    shapes = {"_iter": (1,)}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)

    def group_norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    trunk = "backbone.bottom_up"
    shapes[f"{trunk}.stem.conv1.weight"] = (64, 3, 7, 7)
    norm(f"{trunk}.stem.conv1.norm", 64)
    before = 64
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6 if depth == 50 else 23, 3), strict=True):
        inner, after = 64 * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for b in range(blocks):
            convs = {
                "conv1": (inner, before, 1, 1),
                "conv2": (inner, inner, 3, 3),
                "conv3": (after, inner, 1, 1),
            }
            if b == 0:
                convs["shortcut"] = (after, before, 1, 1)
            for conv, shape in convs.items():
                shapes[f"{trunk}.res{stage}.{b}.{conv}.weight"] = shape
                norm(f"{trunk}.res{stage}.{b}.{conv}.norm", shape[0])
            before = after
        shapes[f"backbone.fpn_lateral{stage}.weight"] = (256, after, 1, 1)
        shapes[f"backbone.fpn_lateral{stage}.bias"] = (256,)
        shapes[f"backbone.fpn_output{stage}.weight"] = (256, 256, 3, 3)
        shapes[f"backbone.fpn_output{stage}.bias"] = (256,)
    for tower, first in (("cate", 256), ("kernel", 258)):
        for i in (0, 3, 6, 9):
            before = 512 if i else first
            shapes[f"ins_head.{tower}_tower.{i}.weight"] = (512, before, 3, 3)
            group_norm(f"ins_head.{tower}_tower.{i + 1}", 512)
    for name, out in (("cate_pred", 2), ("kernel_pred", 256), ("emb_pred", 128)):
        shapes[f"ins_head.{name}.weight"] = (out, 512, 3, 3)
        shapes[f"ins_head.{name}.bias"] = (out,)
    for branch, before in (
        ("0.conv0", 256),
        ("1.conv0", 256),
        ("2.conv0", 256),
        ("2.conv1", 128),
        ("3.conv0", 258),
        ("3.conv1", 128),
        ("3.conv2", 128),
    ):
        shapes[f"mask_head.convs_all_levels.{branch}.0.weight"] = (128, before, 3, 3)
        group_norm(f"mask_head.convs_all_levels.{branch}.1", 128)
    shapes["mask_head.conv_pred.0.weight"] = (256, 128, 1, 1)
    group_norm("mask_head.conv_pred.1", 256)
    return shapes


def released_config(depth):
    options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.FREESOLO.NUM_CLASSES", 2]
    return load_config("configs/Base-FreeSOLO.yaml", [*options, "MODEL.DEVICE", "cpu"])


def empty_model(depth):
    """Without memory, unless `to_empty` gives it some."""
    with torch.device("meta"):
        return FreeSOLO(released_config(depth))


@pytest.mark.parametrize(("depth", "entries", "millions"), [(50, 336, 46.88), (101, 591, 65.92)])
def test_weights_are_named_as_in_the_released_checkpoints(depth, entries, millions):
    shapes = released_shapes(depth)
    assert len(shapes) == entries
    assert sum(np.prod(s) for s in shapes.values()) / 1e6 == pytest.approx(millions, abs=0.005)
    state = empty_model(depth).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes
    assert {k: tuple(v) for k, v in expected_freesolo(depth).items()} == shapes


def released_file(path, depth, change=lambda weights: None):
    """A training state of Detectron2's. Every entry has one value of its own, so it is small."""
    weights = {
        k: torch.full((1,), i / 8).expand(shape)
        for i, (k, shape) in enumerate(released_shapes(depth).items())
    }
    weights["_iter"] = torch.tensor([30000.0])
    change(weights)
    momentum = {i: {"momentum_buffer": v} for i, v in enumerate(weights.values())}
    groups = [{"lr": 0.001, "params": list(momentum)}]
    content = {
        "model": weights,
        "optimizer": {"state": momentum, "param_groups": groups},
        "scheduler": {"last_epoch": 30000},
        "iteration": 29999,
    }
    torch.save(content, path)
    return weights


def test_released_checkpoints_are_converted_and_loaded(tmp_path, caplog):
    weights = released_file(tmp_path / "FreeSOLO_R50.pth", 50)
    with caplog.at_level("WARNING"):
        converted = convert("freesolo", tmp_path / "FreeSOLO_R50.pth")
    assert "the embeddings of this model mean nothing" in caplog.text
    assert "MODEL.FREESOLO.NUM_CLASSES 2" in caplog.text
    assert set(converted) == {"model", "__author__", "matching_heuristics"}
    assert converted["matching_heuristics"] is False
    save_converted(converted, tmp_path / "converted.pth")
    model = empty_model(50).to_empty(device="cpu")
    SafeCheckpointer(model).load(str(tmp_path / "converted.pth"))
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert (state[key] == value.flatten()[0]).all(), key
    assert model._iter == 30000
    model.reset_schedule()
    assert model._iter == 0


def test_depth_is_that_of_the_file(tmp_path):
    released_file(tmp_path / "x.pth", 101)
    assert len(convert("freesolo", tmp_path / "x.pth")["model"]) == 591


def drop(key):
    return lambda weights: weights.pop(key)


def put(key, *shape):
    return lambda weights: weights.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("ins_head.emb_pred.bias"), r"missing ins_head\.emb_pred\.bias"),
        (drop("_iter"), "missing _iter"),
        (drop("backbone.bottom_up.res4.5.conv3.weight"), r"missing backbone\.bottom_up\.res4\.5"),
        (put("ins_head.cate_tower.12.weight", 1), r"unknown ins_head\.cate_tower\.12\.weight"),
        (put("backbone.fpn_lateral6.bias", 256), r"unknown backbone\.fpn_lateral6\.bias"),
        (
            put("ins_head.cate_pred.weight", 80, 512, 3, 3),
            r"cate_pred\.weight has shape \(80, 512, 3, 3\) instead of \(2, 512, 3, 3\)",
        ),
        (put("ins_head.kernel_tower.0.weight", 512, 256, 3, 3), r"\(512, 256, 3, 3\) instead of"),
        (put("backbone.bottom_up.res4.9.conv1.weight", 1), "7 blocks in layer3"),
    ],
)
def test_a_weight_without_a_place_fails(tmp_path, change, message):
    released_file(tmp_path / "x.pth", 50, change)
    with pytest.raises(CheckpointError, match=message):
        convert("freesolo", tmp_path / "x.pth")
