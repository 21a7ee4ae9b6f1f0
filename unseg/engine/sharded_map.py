"""Apply a function to a whole data set: in shards, with progress, killed and resumed at will.

The unit of work is fixed by the caller (a batch cut from a sorted list) and never depends on the
number of processes: network outputs differ in the last bits between batch sizes, which is enough
to flip a threshold. Each process appends the results of whole units to its own file, one line a
unit; collecting them reads the lines in the order of the units. So one process, many, and a killed
and resumed run all give the same bytes.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from unseg.checkpoint.files import atomic_write

logger = logging.getLogger(__name__)

_LOG_PERIOD_SECONDS = 20.0


class WorkDir:
    """The partial results of one job.

    A folder with ``job.json`` (what the job is) and one ``shard-*.jsonl`` per process that ever
    worked on it, each line ``{"unit": i, "result": ...}``.
    """

    def __init__(self, path: str | os.PathLike, job: dict[str, Any], num_units: int):
        """
        Args:
            path: the folder.
            job: JSON-able description of everything the results depend on. A folder that was made
                for another job is refused.
            num_units: units of work in the whole job.
        """
        self.path = Path(path)
        self.num_units = num_units
        self.job = json.loads(json.dumps({"job": job, "num_units": num_units}))

    def open(self, *, resume: bool) -> None:
        """Create the folder, or check that an existing one is of the same job.

        Args:
            resume: keep what an earlier run finished; otherwise it is removed.

        Raises:
            ValueError: the folder belongs to a job with other settings; the message names them.
        """
        if not resume:
            self.remove()
        self.path.mkdir(parents=True, exist_ok=True)
        marker = self.path / "job.json"
        if not marker.exists():
            with atomic_write(marker) as file:
                json.dump(self.job, file, indent=1, sort_keys=True)
        found = json.loads(marker.read_text())
        if found != self.job:
            changed = ", ".join(sorted(differences(found, self.job))) or "the format"
            raise ValueError(
                f"{self.path} holds the partial results of another job; different: {changed}. "
                "Use the same settings, or start over without --resume."
            )

    def finished(self) -> dict[int, tuple[Path, int]]:
        """File and offset of the result of each finished unit."""
        places = {}
        for file in sorted(self.path.glob("shard-*.jsonl")):
            with open(file, "rb") as lines:
                offset = 0
                for line in lines:
                    # A line without its end was being written when the process died.
                    if line.endswith(b"\n"):
                        places[_unit_of(line)] = (file, offset)
                    offset += len(line)
        return places

    def missing(self) -> list[int]:
        """Units that are not finished, in order."""
        done = self.finished()
        return [unit for unit in range(self.num_units) if unit not in done]

    def results(self) -> Iterator[Any]:
        """The results of all units, in order.

        Raises:
            RuntimeError: some units are not finished.
        """
        places = self.finished()
        missing = self.num_units - len(places)
        if missing:
            raise RuntimeError(f"{self.path}: {missing} of {self.num_units} units are missing")
        files = {path: open(path, "rb") for path in {path for path, _ in places.values()}}
        try:
            for unit in range(self.num_units):
                path, offset = places[unit]
                files[path].seek(offset)
                yield json.loads(files[path].readline())["result"]
        finally:
            for file in files.values():
                file.close()

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the folder for one process, waiting for others; False if it is gone by then.

        Raises:
            OSError: the file system cannot lock files.
        """
        marker = self.path / "job.json"
        try:
            # Writable, because NFS gives exclusive locks on no other files.
            file = open(marker, "r+")
        except FileNotFoundError:
            yield False
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                # It may have been finished and removed in the meantime.
                yield marker.exists()
            finally:
                # Closing is not enough while a forked process holds the same open file.
                fcntl.flock(file, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Delete the folder and everything in it; killed midway, it is still of the same job."""
        for shard in self.path.glob("shard-*"):
            shard.unlink()
        shutil.rmtree(self.path, ignore_errors=True)


def _unit_of(line: bytes) -> int:
    # Results can be long: read the number without parsing the rest.
    return int(line[: line.index(b",")].partition(b":")[2])


def differences(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    """Names of the keys at which two JSON objects differ, in no particular order."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix


class _Units(Dataset):
    """Loads units by number, in data-loader workers."""

    def __init__(self, load: Callable[[int], Any], units: Sequence[int]):
        self.load = load
        self.units = units

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        unit = self.units[index]
        return unit, self.load(unit)


def sharded_map(
    load: Callable[[int], Any],
    process: Callable[[Any], tuple[Any, int]],
    work_dir: WorkDir,
    units: Sequence[int],
    *,
    name: str = "0",
    num_workers: int = 0,
    noun: str = "images",
) -> None:
    """Work through some units.

    Args:
        load: loads the unit of a number (runs in the workers).
        process: turns what `load` returned into a JSON-able result and the number of items in it.
        work_dir: an opened job; results are appended to it, each unit at once.
        units: numbers of the units.
        name: of this process's share, in the name of its file; no two processes have the same.
        num_workers: data-loading processes.
        noun: what the items are called in the log.

    Raises:
        RuntimeError: another process works under the same name.
    """
    own = work_dir.path / f"shard-{name}.jsonl"
    with open(own, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is working on {own}") from error
        _drop_unfinished_line(own)
        loader = DataLoader(
            _Units(load, units), batch_size=None, num_workers=num_workers, collate_fn=_identity
        )
        progress = _Progress(len(units), noun)
        for unit, loaded in loader:
            result, count = process(loaded)
            line = json.dumps({"unit": unit, "result": result}, separators=(",", ":"))
            file.write(line.encode() + b"\n")
            file.flush()
            progress.step(count)
        os.fsync(file.fileno())
    progress.finish()


def _drop_unfinished_line(path: Path) -> None:
    """Truncate a file after its last newline (reading back from its end, it may be large)."""
    end = path.stat().st_size
    with open(path, "rb") as file:
        while end > 0:
            start = max(0, end - (1 << 20))
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
    if end < path.stat().st_size:
        os.truncate(path, end)


def _identity(x: Any) -> Any:
    return x


class _Progress:
    """Logs units, items per second and the time that is left."""

    def __init__(self, total: int, noun: str):
        self.total, self.noun = total, noun
        self.units = self.items = 0
        self.start = self.logged = time.perf_counter()

    def step(self, items: int) -> None:
        self.units += 1
        self.items += items
        if time.perf_counter() - self.logged > _LOG_PERIOD_SECONDS:
            self._log()

    def finish(self) -> None:
        if self.units:
            self._log()

    def _log(self) -> None:
        self.logged = time.perf_counter()
        seconds = self.logged - self.start
        left = seconds / self.units * (self.total - self.units)
        logger.info(
            "%d/%d batches, %d %s, %.1f %s/s, ETA %s",
            self.units,
            self.total,
            self.items,
            self.noun,
            self.items / seconds,
            self.noun,
            time.strftime("%H:%M:%S", time.gmtime(left)),
        )
