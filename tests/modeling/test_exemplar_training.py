"""Exemplar-FreeSOLO in the trainer: the pool's file, kills and resumption, the log, evaluation."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from detectron2.utils.events import EventStorage
from exemplar_cases import (
    EXEMPLAR,
    FREESOLO,
    contrast_slowly,
    make_pool,
    narrow_config,
    write_scenes,
)

from unseg.checkpoint import CheckpointError, file_hash
from unseg.discovery import ExemplarError, save_exemplar_pool
from unseg.engine import SelfTrainingError, SelfTrainingOptions, Trainer
from unseg.engine import exemplars as module
from unseg.engine.self_training import SelfTraining
from unseg.modeling import ExemplarContrast
from unseg.structures import ExemplarPool


@pytest.fixture
def scenes(tmp_path, register):
    return register(write_scenes(tmp_path), "exemplar_scenes", thing_classes=["object"])


@pytest.fixture
def pool(tmp_path):
    """The path of a pool of five exemplars, of three and two of a category."""
    save_exemplar_pool(tmp_path / "pool.npz", make_pool(5, dim=128))
    return str(tmp_path / "pool.npz")


def make_cfg(scenes, output, pool="", path=EXEMPLAR, **changes):
    options = {
        "DATASETS__TRAIN": (scenes,),
        "DATASETS__TEST": (),
        "INPUT__MIN_SIZE_TRAIN": (64,),
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__MAX_ITER": 5,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        "SOLVER__WARMUP_ITERS": 1,
        # Some objects have a positive and a negative, some lack one of them.
        "MODEL__EXEMPLAR__ALPHA": 0.71,
        "MODEL__EXEMPLAR__BETA": 0.71,
        "MODEL__EXEMPLAR__POOL": pool,
        "OUTPUT_DIR": str(output),
        "SEED": 3,
    }
    output.mkdir(exist_ok=True)
    return narrow_config(path, **options | changes)


def make_trainer(cfg, resume=False):
    torch.manual_seed(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


def train(cfg, resume=False, stop_after=None):
    """The trainer and the losses of each step; killed before the step `stop_after`."""
    trainer = make_trainer(cfg, resume)
    losses, original = {}, trainer.run_step

    def run_step():
        if trainer.iter == stop_after:
            raise KeyboardInterrupt
        original()
        losses[trainer.iter] = {k: v.item() for k, v in trainer._watch.losses.items()}

    trainer.run_step = run_step
    if stop_after is None:
        trainer.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer, losses


def final_weights(folder):
    return torch.load(folder / "model_final.pth")["model"]


def same(x, y):
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_without_a_pool_no_training_begins(scenes, tmp_path, pool):
    out = tmp_path / "out"
    with pytest.raises(ExemplarError, match=r"MODEL\.EXEMPLAR\.POOL is empty: .*build_exemplars"):
        Trainer(make_cfg(scenes, out))
    with pytest.raises(ExemplarError, match=r"nowhere\.npz: no such exemplar pool"):
        Trainer(make_cfg(scenes, out, str(tmp_path / "nowhere.npz")))
    with np.load(pool) as file:
        arrays = {k: v for k, v in file.items() if "/" not in k}
    header = json.loads(arrays["info"].item()) | {"exemplars": []}
    arrays |= {"info": np.array(json.dumps(header)), "embeddings": arrays["embeddings"][:0]}
    np.savez(tmp_path / "none.npz", **arrays)
    with pytest.raises(ExemplarError, match=r"none\.npz: the pool holds no exemplars"):
        Trainer(make_cfg(scenes, out, str(tmp_path / "none.npz")))
    assert not list(out.glob("*.pth"))


def test_the_config_decides_about_the_pool(scenes, tmp_path, pool):
    changes = {
        "MODEL__EXEMPLAR__PER_CATEGORY": 1,
        "MODEL__EXEMPLAR__UPDATE_PERIOD": 7,
        "MODEL__EXEMPLAR__BUILD__BATCH_SIZE": 3,
    }
    head = make_trainer(make_cfg(scenes, tmp_path / "a", pool, **changes)).model.exemplars
    assert [x.file_name for x in head.encoder.pool.exemplars] == ["0.jpg", "3.jpg"]
    assert (head.encoder.period, head.encoder.batch_size) == (7, 3)
    changes = {"MODEL__EXEMPLAR__UPDATE_PERIOD": 0}
    head = make_trainer(make_cfg(scenes, tmp_path / "b", pool, **changes)).model.exemplars
    assert head.pool_embeddings.tolist() == make_pool(5, dim=128).embeddings.tolist()


def test_weight_0_is_freesolo_to_the_last_bit(scenes, tmp_path):
    """One row of a table may stand for both: two configs with two builders of backbones."""
    runs = []
    for name, path in (("plain", FREESOLO), ("zero", EXEMPLAR)):
        changes = {
            "MODEL__FREESOLO__DATA__COPY_PASTE": True,
            "MODEL__FREESOLO__DATA__APPEND_WEAK_VIEW": True,
            "SOLVER__EMA__ENABLED": True,
            "MODEL__EXEMPLAR__WEIGHT": 0.0 if name == "zero" else 1.3,
            "SOLVER__MAX_ITER": 3,
        }
        trainer, losses = train(make_cfg(scenes, tmp_path / name, path=path, **changes))
        runs.append((trainer, losses, {k: p.grad for k, p in trainer.model.named_parameters()}))
    (plain, expected, gradients), (zero, losses, ours) = runs
    names = [type(x.model).__name__ for x in (plain, zero)]
    assert names == ["FreeSOLO", "ExemplarFreeSOLO"]
    assert type(plain.model.backbone) is not type(zero.model.backbone)
    assert losses == expected
    assert list(losses) == [0, 1, 2]
    assert same(ours, gradients)
    for file in ("model_final.pth", "ema/model_final.pth"):
        weights = [torch.load(tmp_path / name / file)["model"] for name in ("plain", "zero")]
        assert same(*weights)


def test_a_killed_run_goes_on_with_the_embeddings_it_had(scenes, tmp_path, pool, monkeypatch):
    changes = {"MODEL__EXEMPLAR__UPDATE_PERIOD": 100}
    _, expected = train(make_cfg(scenes, tmp_path / "whole", pool, **changes))
    assert all(expected[n]["loss_exemplar"] > 0 for n in (2, 3, 4)), "choose another threshold"
    cfg = make_cfg(scenes, tmp_path / "cut", pool, **changes)
    train(cfg, stop_after=3)
    trainer, rest = train(cfg, resume=True)
    assert rest == {n: expected[n] for n in (2, 3, 4)}
    assert same(final_weights(tmp_path / "cut"), final_weights(tmp_path / "whole"))
    assert trainer.model.exemplars.encoder.step == 5
    # It does matter: encoded when resumed, they would be others.
    monkeypatch.setattr(module.ExemplarHook, "load_state_dict", lambda self, state: None)
    (tmp_path / "cut/model_final.pth").unlink()
    (tmp_path / "cut/last_checkpoint").write_text("model_0000001.pth")
    _, other = train(cfg, resume=True)
    assert other[2]["loss_exemplar"] != expected[2]["loss_exemplar"]


def test_another_pool_is_no_pool_to_go_on_with(scenes, tmp_path, pool):
    cfg = make_cfg(scenes, tmp_path / "out", pool)
    train(cfg, stop_after=3)
    save_exemplar_pool(tmp_path / "other.npz", make_pool(5, dim=128, seed=1))
    match = "begun with another exemplar pool.*train without --resume"
    for changes in ({"pool": str(tmp_path / "other.npz")}, {"MODEL__EXEMPLAR__PER_CATEGORY": 1}):
        with pytest.raises(CheckpointError, match=match):
            make_trainer(make_cfg(scenes, tmp_path / "out", **{"pool": pool} | changes), True)
    (tmp_path / "pool.npz").rename(tmp_path / "moved.npz")
    assert (
        make_trainer(
            make_cfg(scenes, tmp_path / "out", str(tmp_path / "moved.npz")), True
        ).start_iter
        == 2
    )


def test_the_log_counts_what_finds_exemplars(scenes, tmp_path, pool, monkeypatch):
    """Per step, also right after a kill; Detectron2 writes every 20 steps and at the end."""
    monkeypatch.setattr(module, "_LOG_PERIOD", 5)
    cfg = make_cfg(scenes, tmp_path / "out", pool, MODEL__EXEMPLAR__BETA=0.69)
    train(cfg, stop_after=3)
    trainer = make_trainer(cfg, resume=True)
    head, counted = trainer.model.exemplars, []

    def count(_, args, embeddings):
        rows = list(embeddings.detach().double())
        counted.append(contrast_slowly(rows, head.pool_embeddings, 0.71, 0.69, 0.1)[1])

    head.embed.register_forward_hook(count)
    trainer.train()
    assert len(counted) == 3
    total = {key: sum(c[key] for c in counted) for key in counted[0]}
    expected = {k: total[k] / 3 for k in ("objects", "positives", "used")}
    expected["negatives"] = total["negatives"] / total["objects"]
    assert len(set(expected.values())) == 4, "choose another threshold"
    line = json.loads((tmp_path / "out/metrics.json").read_text().splitlines()[-1])
    assert line["iteration"] == 4
    found = {k.removeprefix("exemplar/"): v for k, v in line.items() if k.startswith("exemplar/")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert not head.tally.any(), "counting begins anew"


@pytest.mark.parametrize(
    ("origin", "period", "said"),
    [
        ({"feature": "res4", "backbone": "build_x_resnet_backbone, depth 101"}, 0, "depth 101"),
        ({"feature": "res3", "backbone": None}, 0, "embeddings of res3"),
        ({"feature": "res3", "backbone": None}, 100, None),  # encoded anew
        ({"feature": "res4", "backbone": None}, 0, None),
        (None, 0, None),  # of another maker
    ],
)
def test_embeddings_of_another_backbone(scenes, tmp_path, origin, period, said):
    changes = {"MODEL__EXEMPLAR__UPDATE_PERIOD": period, "MODEL__EXEMPLAR__IN_FEATURE": "res4"}
    cfg = make_cfg(scenes, tmp_path / "out", str(tmp_path / "made.npz"), **changes)
    if origin is not None and origin["backbone"] is None:
        name, depth = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.DEPTH
        origin = origin | {"backbone": f"{name}, depth {depth}"}
    info = {} if origin is None else {"embedding": origin | {"channels": 128}}
    made = ExemplarPool(make_pool(3, dim=128).exemplars, info)
    save_exemplar_pool(tmp_path / "made.npz", made)
    if said is None:
        assert make_trainer(cfg).model.exemplars.encoder is not None
        return
    with pytest.raises(ExemplarError, match=f"made.npz has .*{said}.*UPDATE_PERIOD"):
        make_trainer(cfg)


def test_objects_that_find_no_exemplars_are_said_once(monkeypatch):
    hook = module.ExemplarHook(ExemplarContrast())
    said = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *args: said.append(text % args))
    # Objects, positives, used, negatives of 20 steps each.
    periods = [
        (40, 9, 3, 5),
        (40, 9, 0, 5),
        (40, 0, 0, 0),
        (0, 0, 0, 0),
        (9, 1, 1, 1),
        (8, 1, 0, 0),
    ]
    with EventStorage() as storage:
        for number, tally in enumerate(periods):
            for step in range(20):
                hook.trainer = SimpleNamespace(iter=20 * number + step, storage=storage)
                hook.head.tally = torch.tensor(tally, dtype=torch.float32)
                hook.after_step()
    assert len(said) == 2
    assert "none of 40 objects in 20 steps" in said[0]
    assert "none of 8 objects" in said[1]


def test_checkpoints_go_into_freesolo_and_back(scenes, tmp_path, pool, caplog):
    train(make_cfg(scenes, tmp_path / "ours", pool, SOLVER__MAX_ITER=1))
    weights = str(tmp_path / "ours/model_final.pth")
    cfg = make_cfg(
        scenes, tmp_path / "plain", path=FREESOLO, MODEL__WEIGHTS=weights, SOLVER__MAX_ITER=1
    )
    with caplog.at_level("WARNING"):
        there = make_trainer(cfg)
        there.train()
        file = str(tmp_path / "plain/model_final.pth")
        back = make_trainer(make_cfg(scenes, tmp_path / "back", pool, MODEL__WEIGHTS=file))
    assert same(
        back.model.state_dict(), final_weights(tmp_path / "plain") | {"_iter": torch.zeros(1)}
    )
    messages = [r.getMessage() for r in caplog.records]
    assert not [m for m in messages if "not found" in m or "not used" in m or "Skip" in m]


def test_self_training_is_planned_with_the_content_of_the_pool(tmp_path, pool):
    (tmp_path / "masks.json").write_text("{}")

    def plan(path):
        options = SelfTrainingOptions(
            EXEMPLAR,
            str(tmp_path / "out"),
            ("MODEL.EXEMPLAR.POOL", path),
            masks=f"{tmp_path}/masks.json@{tmp_path}",
        )
        return SelfTraining(options)._plan()

    expected = plan(pool)
    assert expected["learner"]["MODEL"]["EXEMPLAR"]["POOL"] == file_hash(pool)
    (tmp_path / "pool.npz").rename(tmp_path / "moved.npz")
    assert plan(str(tmp_path / "moved.npz")) == expected
    save_exemplar_pool(pool, make_pool(5, dim=128, seed=1))
    assert plan(pool) != expected
    with pytest.raises(SelfTrainingError, match=r"POOL .*nowhere\.npz does not exist"):
        plan("nowhere.npz")
    assert yaml.safe_load(open(EXEMPLAR))["MODEL"]["EXEMPLAR"]["POOL"], "the config names one"
