"""Watching processes; and one, for tests, that does nothing but end with its parent."""

import os
import time
from pathlib import Path


def live(pid_file):
    from unseg.engine.stages import end_with_parent  # seconds, which the parent need not spend

    end_with_parent()
    new = Path(f"{pid_file}.new")
    new.write_text(str(os.getpid()))
    new.rename(pid_file)
    time.sleep(600)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
