"""python -m unseg.tools.build_exemplars, as users run it."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.engine import launch
from PIL import Image

from unseg.data.datasets.synthetic import PRESETS, render_scene
from unseg.data.image import ImageReadError
from unseg.discovery import load_exemplar_pool
from unseg.tools import build_exemplars
from unseg.tools.build_exemplars import _one_line, main

NARROW = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FREESOLO.INSTANCE_CHANNELS": 32,
    "MODEL.EXEMPLAR.IN_FEATURE": "p4",
    "MODEL.EXEMPLAR.BUILD.SHORT_SIDE": 32,
    "MODEL.EXEMPLAR.BUILD.MAX_SIDE": 64,
    "MODEL.EXEMPLAR.BUILD.BATCH_SIZE": 2,
    "MODEL.EXEMPLAR.BUILD.GRABCUT_ITERATIONS": 1,
    "INPUT.MIN_SIZE_TEST": 64,
}
CONFIG = "projects/FreeSOLO/configs/freesolo_tiny.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three kinds of one scene, and two of another."""
    root = tmp_path_factory.mktemp("scenes")
    for i in range(5):
        path = root / f"kind {i // 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(render_scene(PRESETS["single"], 1, i).image).save(path)
    return root


def words(folder, output, *extra):
    opts = [str(x) for item in NARROW.items() for x in item]
    return ["--config-file", CONFIG, "--images", str(folder), "--output", str(output), *extra,
            *opts]  # fmt: skip


def run_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["build_exemplars", *map(str, arguments)])
    main()


@pytest.mark.usefixtures("restored_loggers")
@pytest.mark.skipif(
    "GLOO" not in inspect.getsource(inspect.getmodule(launch)) or torch.cuda.is_available(),
    reason="Detectron2 0.5 launches several processes on GPUs only",
)
def test_several_processes_of_one_launch(folder, tmp_path, monkeypatch):
    flags = ["--random-weights"]
    run_here(monkeypatch, *words(folder, tmp_path / "one/pool.npz", *flags))
    command = [sys.executable, "-m", "unseg.tools.build_exemplars"]
    done = subprocess.run(
        [*command, *words(folder, tmp_path / "two/pool.npz", *flags, "--num-gpus", "2")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 exemplars of 3 categories, 1 each" in done.stdout
    for name in ("pool.npz", "pool.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(list((tmp_path / "two").iterdir())) == 2
    pool = load_exemplar_pool(tmp_path / "one/pool.npz")
    assert pool.info["weights"] == "random"
    assert pool.info["embedding"]["backbone"] == "build_resnet_fpn_no_top_backbone, depth 50"
    np.testing.assert_allclose(np.linalg.norm(pool.embeddings, axis=1), 1, atol=1e-5)


@pytest.mark.usefixtures("restored_loggers")
def test_errors_are_one_line(folder, tmp_path, monkeypatch):
    output = tmp_path / "out/pool.npz"
    for extra, message in (
        (["--random-weights", "MODEL.EXEMPLAR.BUILD.SOURCE", "web"], "error: .*folder, random"),
        ([], "error: .*MODEL.WEIGHTS is empty"),
        (["MODEL.WEIGHTS", "no.pth"], r"error: MODEL\.WEIGHTS no\.pth does not exist"),
        (["--random-weights", "MODEL.EXEMPLAR.IN_FEATURE", "res9"], "error: .*'res9'"),
    ):
        flags = [word for word in extra if word.startswith("--")]
        opts = extra[len(flags) :]
        with pytest.raises(SystemExit, match=message) as caught:
            run_here(monkeypatch, *words(folder, output, *flags), *opts)
        assert "\n" not in caught.value.code  # a text: exit code 1
    with pytest.raises(SystemExit, match="error: .*no_such_config"):
        run_here(monkeypatch, "--config-file", "no_such_config.yaml", "--images", folder,
                 "--output", output)  # fmt: skip
    assert not output.parent.exists()


def test_errors_of_workers_and_ranks_are_one_line():
    text = 'Caught ImageReadError in DataLoader worker process 0.\n  File "x.py", line 1\n  x = 1\n'
    line = "/data/a: b.jpg: cannot be read as an image: truncated"
    error = ImageReadError(f"{text}unseg.data.image.ImageReadError: {line}\n")
    assert _one_line(error) == line
    assert _one_line(ImageReadError(line)) == line
    assert _one_line(ValueError("two\n  lines")) == "two; lines"

    def of_rank(last):
        return build_exemplars.ProcessRaisedException(
            f'-- Process 1 ...\n  File "y.py"\n  y = 2\n{last}', 1, 9
        )

    expected = of_rank("unseg.discovery.exemplar_pool.ExemplarError: x: y")
    assert build_exemplars._is_expected(expected)
    assert _one_line(expected) == "x: y"
    assert build_exemplars._is_expected(of_rank("FileNotFoundError: [Errno 2] none"))
    assert not build_exemplars._is_expected(of_rank("IndexError: out of range"))
    assert not build_exemplars._is_expected(of_rank("KeyError"))


def test_shards_are_below_their_number(folder, tmp_path, monkeypatch, capsys):
    for flags in (["--num-shards", "2", "--shard", "2"], ["--num-shards", "2", "--num-gpus", "2"]):
        with pytest.raises(SystemExit) as caught:
            run_here(monkeypatch, *words(folder, tmp_path / "x.npz", *flags))
        assert caught.value.code == 2
        assert "--shard must be below" in capsys.readouterr().err
