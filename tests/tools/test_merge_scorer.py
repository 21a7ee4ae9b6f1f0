"""Joining the masks of one DeepMask with the scores of another."""

import pickle
import sys

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from unseg.checkpoint import CheckpointError, SafeCheckpointer, save_converted
from unseg.config import load_config
from unseg.tools import merge_scorer as merge_scorer_tool
from unseg.tools.merge_scorer import merge_scorer

SMALL = {
    "MODEL.META_ARCHITECTURE": "DeepMask",
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_MEAN": (120.0, 120.0, 120.0),
    "MODEL.PIXEL_STD": (60.0, 60.0, 60.0),
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.OUT_FEATURES": ["res3"],
    "MODEL.DEEPMASK.IN_FEATURE": "res3",
    "MODEL.DEEPMASK.INPUT_SIZE": 32,
    "MODEL.DEEPMASK.CONTEXT": 16,
    "MODEL.DEEPMASK.OUT_SIZE": 8,
    "MODEL.DEEPMASK.GT_SIZE": 16,
    "MODEL.DEEPMASK.EMBED_DIM": 16,
    "MODEL.DEEPMASK.REDUCE_DIM": 8,
    "MODEL.DEEPMASK.SCORE_HIDDEN": 12,
    "MODEL.DEEPMASK.TEST.SCALES": (-0.5, 0.0),
    "MODEL.DEEPMASK.TEST.TOPK": 1000,
}


def build(*opts):
    settings = [x for pair in SMALL.items() for x in pair]
    return build_model(load_config("", [*settings, *opts])).eval()


def random_model(seed):
    model = build()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = 0.1 if parameter.dim() == 1 else 2 / parameter[0].numel() ** 0.5
        parameter.data.normal_(std=spread, generator=generator)
    return model


def by_window(model):
    """Window -> (score, probabilities) of all windows on one image."""
    generator = torch.Generator().manual_seed(9)
    image = torch.randint(0, 256, (3, 40, 56), generator=generator, dtype=torch.uint8)
    proposals = model([{"image": image}])[0]["proposals"]
    windows = proposals.pred_masks
    return {
        tuple(box.tolist()): (float(score), p)
        for box, score, p in zip(windows.boxes, proposals.objectness_logits, windows.probabilities)
    }


def run(monkeypatch, *arguments):
    """The command line, without the seconds that another process takes."""
    monkeypatch.setattr(sys, "argv", ["merge_scorer", *map(str, arguments)])
    monkeypatch.setattr(merge_scorer_tool, "setup_logger", lambda **_: None)
    merge_scorer_tool.main()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    models = {name: random_model(seed) for seed, name in enumerate(("masks", "scores"))}
    for name, model in models.items():
        torch.save(
            {"model": model.state_dict(), "optimizer": {}, "iteration": 3}, folder / f"{name}.pth"
        )
    return folder, models


def test_masks_of_one_and_scores_of_the_other(files, tmp_path, monkeypatch):
    folder, models = files
    paths = [folder / "masks.pth", folder / "scores.pth", tmp_path / "new" / "both.pth"]
    run(monkeypatch, *paths)
    merged = build("MODEL.DEEPMASK.TEST.SCORER", True)
    left = SafeCheckpointer(merged).load(str(paths[2]))
    assert "optimizer" not in left
    both, masks, scores = (by_window(m) for m in (merged, models["masks"], models["scores"]))
    shared = both.keys() & masks.keys() & scores.keys()
    assert len(shared) > 30
    for window in shared:
        assert both[window][0] == pytest.approx(scores[window][0], abs=1e-4)
        torch.testing.assert_close(both[window][1], masks[window][1])
    # The two models differ, so that the above says something.
    assert max(abs(masks[w][0] - scores[w][0]) for w in shared) > 0.1
    assert max((masks[w][1] - scores[w][1]).abs().max() for w in shared) > 0.1


def test_all_weights_find_their_place(files):
    folder, models = files
    merged = merge_scorer(folder / "masks.pth", folder / "scores.pth")
    model = build("MODEL.DEEPMASK.TEST.SCORER", True)
    model.load_state_dict(merged["model"], strict=True)
    for name, module in (("masks", model), ("scores", model.scorer)):
        for key, value in models[name].state_dict().items():
            assert torch.equal(module.state_dict()[key], value)


def test_masks_of_a_sharpmask(files, tmp_path):
    """Its head has no mask layer."""
    folder, models = files
    state = {k: v for k, v in models["masks"].state_dict().items() if "head.mask." not in k}
    state["refinement.predict.bias"] = torch.ones(1)
    torch.save(state, tmp_path / "sharp.pth")
    merged = merge_scorer(tmp_path / "sharp.pth", folder / "scores.pth")["model"]
    assert merged.keys() >= state.keys() | {"scorer.head.score.fc1.weight"}


def test_pickles_of_arrays_and_bare_dicts(files, tmp_path):
    folder, models = files
    state = models["scores"].state_dict()
    arrays = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "x"}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(arrays))
    torch.save(dict(state), tmp_path / "bare.pth")
    wanted = merge_scorer(folder / "masks.pth", folder / "scores.pth")["model"]
    for name in ("arrays.pkl", "bare.pth"):
        got = merge_scorer(folder / "masks.pth", tmp_path / name)["model"]
        assert got.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_array_equal(got[key], wanted[key])


def test_what_does_not_fit_is_refused(files, tmp_path):
    folder, models = files
    good = str(folder / "masks.pth")
    state = models["scores"].state_dict()

    def refused(content, message, swap=False):
        torch.save(content, tmp_path / "bad.pth")
        pair = (good, str(tmp_path / "bad.pth"))
        with pytest.raises(CheckpointError, match=message):
            merge_scorer(*(pair[::-1] if swap else pair))

    for swap in (False, True):
        refused({"model": {"fc.weight": torch.zeros(2)}}, "bad.pth is no DeepMask", swap)
        refused([1, 2], "holds a list", swap)
        refused({"model": state | {"scorer.head.x": torch.zeros(1)}}, "merged before", swap)
        refused({"model": print}, "damaged or holds more than weights", swap)
        fewer = {k: v for k, v in state.items() if not k.startswith("backbone.res3.0.conv1")}
        refused({"model": fewer}, r"only one of them has backbone\.res3\.0\.conv1", swap)
        other = state | {"head.embed.weight": torch.zeros(16, 8, 5, 5)}
        refused({"model": other}, r"head\.embed\.weight has shape", swap)
        # HEAD paper: a layer in its score branch that the shared head lacks.
        paper = state | {"head.score.embed.weight": torch.zeros(16, 32, 2, 2)}
        refused({"model": paper}, r"only one of them has head\.score\.embed\.weight", swap)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        merge_scorer(good, tmp_path / "nowhere.pth")


def test_failure_leaves_the_output_as_it_was(files, tmp_path, monkeypatch):
    folder, _ = files
    output = tmp_path / "out.pth"
    save_converted({"model": {"old": torch.ones(1)}}, output)
    before = output.read_bytes()
    torch.save({"model": {}}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="no DeepMask"):
        run(monkeypatch, folder / "masks.pth", tmp_path / "bad.pth", output)
    assert output.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth", "out.pth"]
