"""dev/demo.py deletes nothing but its own; dev/demo.sh stays in the caller's folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEV = Path(__file__).resolve().parents[2] / "dev"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(DEV))
    try:
        spec = importlib.util.spec_from_file_location("dev_demo", DEV / "demo.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DEV))
    return module


def test_only_folders_of_earlier_demos_are_deleted(demo, tmp_path):
    folder = tmp_path / "new/demo"
    demo.make_output_folder(folder)
    (folder / "logs").mkdir()
    (folder / "logs/01.log").touch()
    demo.make_output_folder(folder)  # again
    assert [p.name for p in folder.iterdir()] == [demo.MARKER]
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    demo.make_output_folder(photographs)  # empty
    (photographs / demo.MARKER).unlink()
    (photographs / "logs").mkdir()
    (photographs / "me.jpg").touch()
    with pytest.raises(SystemExit, match="photographs holds files"):
        demo.make_output_folder(photographs)
    with pytest.raises(SystemExit, match="is a file"):
        demo.make_output_folder(photographs / "me.jpg")
    assert sorted(p.name for p in photographs.iterdir()) == ["logs", "me.jpg"]


def test_the_summary_survives_masks_that_found_nothing(demo):
    def rows(*values):
        return {str(number): {"segm": {"AP50": v}} for number, v in enumerate(values)}

    assert "reach 2.00 and 2.50 times" in demo.compare(rows(20.0, 40.0, 50.0))
    assert "a mask AP50 of 0" in demo.compare(rows(0.0, 40.0, 50.0))


def test_the_script_stays_in_the_callers_folder(tmp_path):
    """A relative --output is one of that folder."""
    repository = tmp_path / "repository"
    (repository / "dev").mkdir(parents=True)
    shutil.copy(DEV / "demo.sh", repository / "dev/demo.sh")
    setup = repository / "dev/setup.sh"
    setup.write_text("#!/bin/sh\necho echo\n")  # the "interpreter" shows its arguments
    setup.chmod(0o755)
    (repository / "dev/demo.py").touch()
    (tmp_path / "user").mkdir()
    done = subprocess.run(
        ["bash", "-c", "../repository/dev/demo.sh --output here; pwd"],
        cwd=tmp_path / "user",
        env=os.environ | {"CDPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = done.stdout.splitlines()[0].split()
    assert Path(shown[0]) == repository / "dev/demo.py"
    assert shown[1:] == ["--output", "here"]
    setup.write_text("#!/bin/sh\necho pwd\n")
    done = subprocess.run(
        ["../repository/dev/demo.sh"],
        cwd=tmp_path / "user",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == tmp_path / "user"
