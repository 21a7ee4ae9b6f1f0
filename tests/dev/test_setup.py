"""setup.py's choices, and dev/setup.sh with interpreters that only write down their calls."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]

# Answers what dev/setup.sh asks; `-m venv DIR` makes DIR/bin/python, a copy that has pip.
PYTHON = """#!/usr/bin/env bash
echo "$0 $*" >> "$LOG"
case "$*" in
    "-m pip --version") [[ -e "$0.pip" ]] ;;
    "-m venv .venv") mkdir -p .venv/bin; touch .venv/bin/python.pip
        [[ -e .venv/bin/python ]] || cp "$0" .venv/bin/python ;;
    *sys.prefix*) echo "$PREFIX" ;;
esac
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of what dev/setup.sh reads, beside a folder `user` with an interpreter."""
    root = tmp_path / "repository"
    (root / "dev").mkdir(parents=True)
    (root / "unseg/layers/csrc").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "dev/setup.sh", "dev/install_detectron2.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "unseg/layers/csrc/x.cpp").touch()
    (tmp_path / "user").mkdir()
    make_python(tmp_path / "user/python", pip=True)
    return root


def make_python(path, pip):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON)
    path.chmod(0o755)
    if pip:
        path.with_name("python.pip").touch()


def set_up(repository, **variables):
    """Run dev/setup.sh from the user's folder; the interpreter that it prints, and all calls."""
    log = repository / "log"
    log.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("UNSEG_PYTHON", "PYTHON")}
    done = subprocess.run(
        ["../repository/dev/setup.sh"],
        cwd=repository.parent / "user",
        env=environment | {"LOG": str(log), "PREFIX": str(repository.parent)} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1], log.read_text()


@pytest.mark.parametrize("state", ["nothing", "without pip", "whole"])
def test_an_environment_without_pip_is_made_again(repository, state):
    """A kill in the middle of `python -m venv` leaves one."""
    python = repository / ".venv/bin/python"
    if state != "nothing":
        make_python(python, pip=state == "whole")
    used, log = set_up(repository, PYTHON="./python")  # relative to the user's folder
    assert used == str(python)
    assert ("-m venv .venv" in log) == (state != "whole")
    assert f"{python} dev/install_detectron2.py" in log
    assert set_up(repository, PYTHON="./python")[1].count("\n") == 2  # done: pip and the stamp


def test_a_relative_interpreter_is_the_callers(repository):
    used, log = set_up(repository, UNSEG_PYTHON="../user/python")
    assert Path(used).is_absolute()
    assert Path(used).samefile(repository.parent / "user/python")
    assert "install_detectron2" not in log


@pytest.mark.parametrize(
    ("visible", "given", "expected"),
    [(False, None, "7.5;8.0;9.0+PTX"), (True, None, None), (False, "8.6", "8.6")],
)
def test_architectures_are_chosen_only_without_a_gpu(monkeypatch, visible, given, expected):
    """With one, torch compiles for it; a list of ours that lacks it would give no kernel."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("UNSEG_NO_EXT", "1")
    choose = runpy.run_path(str(ROOT / "setup.py"))["choose_cuda_archs"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # restored afterwards
    del os.environ["TORCH_CUDA_ARCH_LIST"]
    if given is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = given
    choose(visible)
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == expected
