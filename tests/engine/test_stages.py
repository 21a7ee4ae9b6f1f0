"""Stages in processes: their failures are told, and they end with the command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import is_alive, wait_until

from unseg.engine import Stage, StageError
from unseg.engine.stages import run_in_process


def refuse():
    raise ValueError("no such thing\nafter a longer report: none")


def test_a_failed_stage_is_named_with_its_reason_and_log(tmp_path):
    log = tmp_path / "new/log.txt"
    message = r"^second has failed \(after a longer report: none\); its log is .*new/log\.txt$"
    with pytest.raises(StageError, match=message):
        run_in_process(Stage("second", refuse, log, (), bool))
    assert "ValueError: no such thing" in log.read_text()


_PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from processes import live

if __name__ == "__main__":
    import multiprocessing
    multiprocessing.get_context("spawn").Process(target=live, args=({pid_file!r},)).start()
    time.sleep(600)
"""


def test_a_stage_ends_when_its_command_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    pid_file = tmp_path / "pid"
    tests = str(Path(__file__).parent)
    script.write_text(_PARENT.format(tests=tests, pid_file=str(pid_file)))
    parent = subprocess.Popen([sys.executable, str(script)])
    wait_until(pid_file.exists)
    pid = int(pid_file.read_text())
    assert is_alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_alive(pid), 20)
