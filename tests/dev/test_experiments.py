"""dev/experiments with toy commands; what dev/benchmarks/exemplar_freesolo.py runs and counts."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from unseg.config import load_config
from unseg.data.image import read_image
from unseg.engine.self_training import SelfTraining, SelfTrainingOptions

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def importable(*folders):
    paths = [str(ROOT / "dev" / folder) for folder in folders]
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)


with importable("experiments", "benchmarks"):
    import exemplar_freesolo as exemplar
    import report
    import runner
    from runner import Experiment, ExperimentError, Step

SETTINGS = {"iterations": 3}


def experiment(folder, **settings):
    return Experiment(folder, SETTINGS | settings, patience=0.05)


def note(file, text, code=""):
    """Arguments of Python that append a line to a file, after some code."""
    return ["-c", f"import sys, time, pathlib\n{code}\nopen({str(file)!r}, 'a').write({text!r})"]


def lines(file):
    return file.read_text().split() if file.exists() else []


def measured(name, notes, arm, seed, number, needs=()):
    return Step(name, note(notes, f"{name} "), needs, lambda: {"AP": number}, arm, seed)


# Numbers.

# Differences by seed to "a": b -1, -2, -3 and, in FP, +1 in seed 1 alone; c has seed 2 alone.
NUMBERS = {
    "a": {1: {"AP": 20.0, "FP": 1.0}, 2: {"AP": 30.0, "FP": None}, 3: {"AP": 40.0, "FP": 3.0}},
    "b": {1: {"AP": 19.0, "FP": 2.0}, 2: {"AP": 28.0, "FP": 4.0}, 3: {"AP": 37.0, "FP": None}},
    "c": {2: {"AP": 30.5}},
}


def test_statistics_by_hand():
    summary = report.summarize(NUMBERS, "a")
    assert summary["a"]["AP"] == {"value": {"mean": 30.0, "spread": 10.0, "seeds": 3}}
    assert summary["a"]["FP"]["value"] == {"mean": 2.0, "spread": pytest.approx(2**0.5), "seeds": 2}
    assert summary["b"]["AP"]["value"] == {"mean": 28.0, "spread": 9.0, "seeds": 3}
    assert summary["b"]["AP"]["difference"] == {"mean": -2.0, "spread": 1.0, "seeds": 3}
    assert summary["b"]["FP"]["difference"] == {"mean": 1.0, "spread": None, "seeds": 1}
    assert summary["c"]["AP"]["difference"] == {"mean": 0.5, "spread": None, "seeds": 1}
    alone = report.summarize({"b": NUMBERS["b"]}, "a")  # the reference is not there yet
    assert alone["b"]["AP"]["difference"] == {"mean": None, "spread": None, "seeds": 0}


def test_table_by_hand():
    titles = {"a": "plain", "c": "third", "b": "second", "d": "not begun"}
    table = report.make_table(report.summarize(NUMBERS, "a"), titles, "a")
    assert table.splitlines() == [
        "| | seeds | AP | FP |",
        "|---|---|---|---|",
        "| plain | 3 | 30.0 ± 10.0 | 2.00 ± 1.41 |",
        "| third | 1 | 30.5 | – |",
        "| second | 3 | 28.0 ± 9.0 | 3.00 ± 1.41 |",
        "| third − plain | 1 | +0.5 | – |",
        "| second − plain | 3 | -2.0 ± 1.0 | +1.00 |",
    ]


def test_no_negative_zeros():
    numbers = {"a": {1: {"AP": 1.001}}, "b": {1: {"AP": 1.0}}}
    table = report.make_table(report.summarize(numbers, "a"), {"a": "A", "b": "B"}, "a")
    assert table.splitlines()[-1] == "| B − A | 1 | +0.00 |"


# Running.


def test_steps_are_done_once_and_reported(tmp_path, capsys):
    notes, folder = tmp_path / "notes", tmp_path / "out"
    steps = [
        Step("data", note(notes, "data ", "print('hello from data')")),
        measured("x1", notes, "x", 1, 10.0, ["data"]),
        measured("y1", notes, "y", 1, 12.5, ["data"]),
        measured("y2", notes, "y", 2, float("nan"), ["data"]),
    ]
    experiment(folder).run(steps[:3])
    assert lines(notes) == ["data", "x1", "y1"]
    log = (folder / "steps/data.log").read_text()
    assert log.startswith("$ python -c ")
    assert "hello from data" in log
    again = experiment(folder)
    again.run(steps)
    assert lines(notes) == ["data", "x1", "y1", "y2"]
    assert again.results() == {"x": {1: {"AP": 10.0}}, "y": {1: {"AP": 12.5}, 2: {"AP": None}}}
    table = again.report({"y": "Y", "x": "X"}, "x")
    assert table == (folder / "table.md").read_text().rstrip()
    assert "| Y − X | 1 | +2.5 |" in table
    content = json.loads((folder / "results.json").read_text())
    assert list(content["numbers"]) == ["y", "x"]
    assert content["settings"] == SETTINGS
    assert content["summary"]["y"]["AP"]["difference"]["mean"] == 2.5
    assert min(Image.open(folder / "plot.png").size) > 100
    assert not list(folder.rglob("*.*.*"))  # temporary files
    assert "== y2\n$ python -c" in capsys.readouterr().out


def test_a_report_of_nothing(tmp_path):
    assert experiment(tmp_path).report({"x": "X"}, "x").splitlines()[0] == "| | seeds |  |"
    assert (tmp_path / "plot.png").exists()


def test_commands_are_shown_as_people_type_them():
    words = Step("x", [ROOT / "dev/x.py", f"('{ROOT}/a.json@b',)", 3, "$HOME's", "a b"]).words()
    assert words == ["dev/x.py", "('a.json@b',)", "3", "$HOME's", "a b"]
    shown = " ".join(map(runner._quote, words))
    assert shown.startswith("dev/x.py \"('a.json@b',)\" 3 ")
    echo = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True, check=True
    )
    assert echo.stdout.splitlines() == words


def test_after_a_failure_the_rest_is_done_and_the_same_call_goes_on(tmp_path, capsys):
    notes, folder, repaired = (tmp_path / name for name in ("notes", "out", "repaired"))
    condition = f"print('secret cause'); pathlib.Path({str(repaired)!r}).exists() or sys.exit(3)"
    steps = [
        Step("bad", note(notes, "bad ", condition)),
        Step("after", note(notes, "after "), ["bad"]),
        Step("last", note(notes, "last "), ["after"]),
        Step("other", note(notes, "other ")),
        Step("empty", note(notes, "empty "), measure=lambda: {"AP": {}["AP"]}, arm="x", seed=1),
    ]
    with pytest.raises(ExperimentError) as caught:
        experiment(folder).run(steps)
    message = str(caught.value)
    assert f"bad: exit status 3, its whole output is {folder}/steps/bad.log" in message
    assert "empty: no numbers: KeyError('AP')" in message
    assert message.endswith("not done: bad, after, last, empty")
    assert "secret cause" in capsys.readouterr().out
    assert lines(notes) == ["other", "empty"]
    repaired.touch()
    experiment(folder).run(steps[:4])
    assert lines(notes) == ["other", "empty", "bad", "after", "last"]
    assert (folder / "steps/bad.log").read_text().count("secret cause\n") == 2  # both attempts


def test_other_settings_and_commands_are_refused(tmp_path):
    notes, folder = tmp_path / "notes", tmp_path / "out"
    experiment(folder).run([Step("x", note(notes, "x "))])
    with pytest.raises(ExperimentError, match=r"out was begun with other settings.*3.*now.*4"):
        experiment(folder, iterations=4)
    with pytest.raises(ExperimentError, match="x was done by another command"):
        experiment(folder).run([Step("x", note(notes, "X "))])
    with pytest.raises(ExperimentError):
        experiment(folder).run([Step("y", ["-c", "1 / 0"])])
    with pytest.raises(ExperimentError, match="y was begun by another command"):
        experiment(folder).run([Step("y", note(notes, "y "))])
    assert lines(notes) == ["x"]
    for wrong in ([Step("x", ["-c", ""], ["z"])], [Step("x", ["-c", ""])] * 2):
        with pytest.raises(ValueError, match="step 'x': name taken, or needs"):
            experiment(folder).run(wrong)


# Several processes.

DRIVER = """
import signal
import sys
from pathlib import Path

# A background job, as these tests may be, ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

folder, runner, *names = sys.argv[1:]
sys.path.insert(0, runner)
from runner import Experiment, Step

code = '''
import pathlib, time
def note(text):
    open('{folder}/notes', 'a').write(text)
note('begin-{name} ')
while not pathlib.Path('{folder}/go-{name}').exists():
    time.sleep(0.02)
note('end-{name} ')
'''
steps = [Step(name, ["-c", code.format(folder=folder, name=name)]) for name in names]
Experiment(Path(folder) / "out", {}, patience=0.05).run(steps)
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes that do the named steps, and ends what is left of them.

    A step notes that it begins, waits for the file go-NAME, and notes that it ends.
    """
    (tmp_path / "driver.py").write_text(DRIVER)
    processes = []

    def begin(*names):
        words = [sys.executable, tmp_path / "driver.py", tmp_path, ROOT / "dev/experiments"]
        with open(tmp_path / f"output{len(processes)}", "w") as output:
            processes.append(subprocess.Popen([*words, *names], stdout=output, stderr=output))
        return processes[-1]

    yield begin
    for name in "abc":  # orphans
        (tmp_path / f"go-{name}").touch()
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition):
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_two_processes_share_the_work(tmp_path, start):
    notes = tmp_path / "notes"
    two = [start("a", "b", "c"), start("a", "b", "c")]
    wait_for(lambda: set(lines(notes)) == {"begin-a", "begin-b"})  # at the same time
    (tmp_path / "go-c").touch()
    (tmp_path / "go-b").touch()
    outputs = [tmp_path / f"output{number}" for number in range(2)]
    waiting = "others work on a: waiting"
    wait_for(lambda: any(waiting in output.read_text() for output in outputs))
    (tmp_path / "go-a").touch()
    assert [process.wait() for process in two] == [0, 0]
    assert sorted(lines(notes)) == sorted(f"{x}-{s}" for x in ("begin", "end") for s in "abc")
    assert sum(output.read_text().count(waiting) for output in outputs) == 1


def test_a_killed_runners_step_is_not_begun_beside_the_living_command(tmp_path, start):
    notes = tmp_path / "notes"
    killed = start("a")
    wait_for(lambda: lines(notes) == ["begin-a"])
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    second = start("a")
    wait_for(lambda: "others work on a" in (tmp_path / "output1").read_text())
    assert lines(notes) == ["begin-a"]
    (tmp_path / "go-a").touch()  # the orphan ends, but nobody has written its record
    assert second.wait() == 0
    assert lines(notes) == ["begin-a", "end-a"] * 2
    assert start("a").wait() == 0
    assert len(lines(notes)) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_runner_takes_its_command_along(tmp_path, start, number):
    notes = tmp_path / "notes"
    stopped = start("a", "b")
    wait_for(lambda: lines(notes) == ["begin-a"])
    stopped.send_signal(number)
    assert stopped.wait(timeout=60) != 0
    for go in ("a", "b"):
        (tmp_path / f"go-{go}").touch()
    assert start("a", "b").wait() == 0
    assert lines(notes) == ["begin-a", "begin-a", "end-a", "begin-b", "end-b"]


# dev/benchmarks/exemplar_freesolo.py


def boxes(*corners):
    masks = np.zeros((len(corners), 20, 40), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners):
        mask[y0:y1, x0:x1] = True
    return masks


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ((0, 0, 10, 10), "match"),
        ((0, 0, 5, 10), "match"),  # IoU of 1 / 2
        ((0, 0, 10, 20), "match"),  # the same, with half of it outside
        ((0, 0, 7, 7), "fragments"),  # 49 / 100
        ((6, 0, 11, 4), "fragments"),  # 16 of 20 pixels inside
        ((7, 0, 11, 4), "false positives"),  # 12 of 16
        ((0, 0, 10, 17), "match"),  # 100 / 170
        ((0, 0, 15, 20), "false positives"),  # 100 / 300
        ((30, 10, 35, 15), "false positives"),
        ((8, 0, 18, 10), "false positives"),  # two objects, none of them enough
    ],
)
def test_errors_by_hand(box, kind):
    objects = boxes((0, 0, 10, 10), (13, 0, 23, 10))
    counts = exemplar.count_errors(boxes(box), objects)
    expected = {"fragments": 0, "false positives": 0, "predictions": 1}
    assert counts == (expected if kind == "match" else expected | {kind: 1})


def test_errors_without_predictions_or_objects():
    some, none = boxes((0, 0, 3, 3), (5, 5, 9, 9)), boxes()
    zero = {"fragments": 0, "false positives": 0, "predictions": 0}
    assert exemplar.count_errors(none, some) == exemplar.count_errors(none, none) == zero
    assert exemplar.count_errors(some, none) == zero | {"false positives": 2, "predictions": 2}


def test_numbers_of_a_training(tmp_path, monkeypatch):
    """The truth itself as predictions, once more with a low score, and one pixel of each object."""
    numbers = {
        f"{t}/{m}": 1.0 * i for i, m in enumerate(exemplar.METRICS) for t in ("segm", "bbox")
    }
    first = json.dumps({"iteration": 1, "total_loss": 3.0})
    (tmp_path / "metrics.json").write_text(f"{first}\n{json.dumps(numbers | {'bbox/AP': 7})}\n")
    scenes = DatasetCatalog.get(exemplar.TEST_SET)
    results = []
    for scene in scenes:
        for annotation in scene["annotations"]:
            result = {"image_id": scene["image_id"], "segmentation": annotation["segmentation"]}
            results += [result | {"score": 0.3}, result | {"score": 0.29}]
    dot = np.zeros((160, 160), dtype=np.uint8, order="F")
    y, x = np.argwhere(exemplar.decode([results[0]["segmentation"]], scenes[0])[0])[0]
    dot[y, x] = 1
    rle = exemplar.mask_util.encode(dot)
    results.append(
        {
            "image_id": scenes[0]["image_id"],
            "segmentation": rle | {"counts": rle["counts"].decode()},
            "score": 0.9,
        }
    )
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/coco_instances_results.json").write_text(json.dumps(results))
    objects = sum(len(scene["annotations"]) for scene in scenes)
    found = exemplar.measure(tmp_path)
    assert found == {
        "mask AP50": 0.0,
        "mask AP": 1.0,
        "mask AR@100": 2.0,
        "box AP50": 0.0,
        "box AP": 7.0,
        "box AR@100": 2.0,
        "fragments": pytest.approx(1 / len(scenes)),
        "false positives": 0.0,
        "predictions": pytest.approx((objects + 1) / len(scenes)),
    }
    monkeypatch.setattr(exemplar, "SCENES", 2)
    exemplar.draw_scenes({"A": tmp_path, "B": tmp_path}, tmp_path / "scenes.png")
    assert min(Image.open(tmp_path / "scenes.png").size) > 300


def test_exemplars_are_scenes_of_their_category(tmp_path, monkeypatch):
    name = "unseg_synthetic_val_single"
    monkeypatch.setattr(exemplar, "EXEMPLAR_SET", name)
    monkeypatch.setattr(exemplar, "PER_CATEGORY", 2)
    exemplar.write_exemplars(tmp_path)
    scenes, names = DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes
    for number, category in enumerate(names):
        own = [s for s in scenes if s["annotations"][0]["category_id"] == number]
        written = sorted((tmp_path / category).iterdir())
        assert len(written) == min(exemplar.PER_CATEGORY, len(own)) > 0
        for path, scene in zip(written, own):
            assert np.array_equal(read_image(str(path)), read_image(scene["file_name"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.fixture
def plan(tmp_path):
    arms = ["freesolo", *exemplar.ARMS]
    args = argparse.Namespace(output=tmp_path, seeds=[1, 2], arms=arms, iterations=30, quick=False)
    return exemplar.Plan(args)


def config_of(step):
    words = step.words()
    start = 1 + max(i for i, word in enumerate(words) if word.startswith("--"))
    start += words[start - 1] != "--resume"
    config = words[words.index("--config-file") + 1]
    return load_config(str(ROOT / config), words[start:])


def test_steps_fit_together(plan):
    steps = plan.steps()
    runner._check(steps)
    assert len(steps) == 2 + 2 * (3 + 6)
    for step in steps:
        if step.name != "exemplars":
            config_of(step)  # all keys exist
    numbers = {(step.arm, step.seed) for step in steps if step.measure}
    assert numbers == {(arm, seed) for arm in exemplar.TITLES for seed in (1, 2)}


def test_arms_have_the_same_budget_and_differ_in_what_they_say(plan):
    configs = {s.arm: config_of(s) for s in plan.steps() if s.seed == 2 and s.arm != "round1"}
    reference = configs["freesolo"]
    assert reference.MODEL.META_ARCHITECTURE == "FreeSOLO"
    assert reference.MODEL.WEIGHTS.endswith("seed2/round1/round1/ema/model_final.pth")
    settings = {
        arm: (c.MODEL.META_ARCHITECTURE, c.MODEL.EXEMPLAR.WEIGHT, c.MODEL.EXEMPLAR.PER_CATEGORY)
        for arm, c in configs.items()
        if arm != "freesolo"
    }
    assert settings == {
        "lambda0.5": ("ExemplarFreeSOLO", 0.5, 1),
        "lambda1.3": ("ExemplarFreeSOLO", 1.3, 1),
        "lambda2.0": ("ExemplarFreeSOLO", 2.0, 1),
        "lambda1.3x3": ("ExemplarFreeSOLO", 1.3, 3),
        "lambda1.3x5": ("ExemplarFreeSOLO", 1.3, 5),
    }
    for cfg in configs.values():
        for node in ("SEED", "SOLVER", "INPUT", "DATASETS", "DATALOADER"):
            assert cfg[node] == reference[node]
        assert cfg.MODEL.WEIGHTS == reference.MODEL.WEIGHTS
        assert cfg.MODEL.FREESOLO == reference.MODEL.FREESOLO
        assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == (2, 30)
    assert len({cfg.OUTPUT_DIR for cfg in configs.values()}) == 6


def test_round_2_learns_what_it_would_in_self_training(plan, tmp_path):
    """masks1 is what self_train's second round learns from, and its settings are freesolo's."""
    (tmp_path / "free_masks.json").touch()
    options = SelfTrainingOptions(
        config_file=str(exemplar.FREESOLO),
        output=str(tmp_path / "seed1/round1"),
        opts=("SOLVER.MAX_ITER", "30", "SEED", "1", "DATASETS.TEST", f"('{exemplar.TEST_SET}',)"),
        masks=str(tmp_path / "free_masks.json"),
        dataset=plan.train_set,
    )
    _, labelling, training = SelfTraining(options).stages()
    steps = {step.name: config_of(step) for step in plan.steps() if step.name != "exemplars"}
    theirs = load_config(str(exemplar.FREESOLO), labelling.work.args[2].opts)
    ours = steps["seed1_masks1"]
    assert ours.DISCOVERY == theirs.DISCOVERY
    assert ours.MODEL == theirs.MODEL
    theirs = load_config(str(exemplar.FREESOLO), training.work.args[2].opts)
    ours = steps["seed1_freesolo"]
    for node in ("MODEL", "SOLVER", "INPUT", "SEED"):
        assert ours[node] == theirs[node]
    assert [name.split("@")[1] for name in ours.DATASETS.TRAIN] == [
        name.split("@")[1] for name in theirs.DATASETS.TRAIN
    ]
