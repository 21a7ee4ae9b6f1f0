"""Files are whole or absent."""

import os
import stat

import pytest

from unseg.checkpoint import atomic_write


def test_writes_text_and_bytes(tmp_path):
    with atomic_write(tmp_path / "new" / "a.txt") as file:
        file.write("héllo")
    with atomic_write(tmp_path / "b.bin", "wb") as file:
        file.write(b"\x00\x01")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "héllo"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\x01"
    with open(tmp_path / "plain", "w"):
        pass
    modes = [stat.S_IMODE(os.stat(tmp_path / n).st_mode) for n in ("plain", "b.bin")]
    assert modes[0] == modes[1]


def test_a_failure_changes_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("half of the new")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_mode(tmp_path):
    with pytest.raises(ValueError, match="'a'"), atomic_write(tmp_path / "x", "a"):
        pass
