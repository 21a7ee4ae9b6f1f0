"""Runs an experiment, seeds x arms, and makes its table and plot; knows nothing of its subject.

An experiment is a list of steps. A step is one command that leaves files behind; those of an arm
and a seed also measure something. Killed at any moment, the same command line goes on: finished
steps are not done again, an unfinished one is run again (so its command must be able to go on from,
or replace, what a killed run left). Several processes may work in one folder, e.g. one on each
core: each takes the first step that is ready and that nobody works on.

In the folder:
    settings.json     what the experiment was begun with; other settings are refused
    steps/NAME.json   a finished step, written last: its command, seconds, numbers
    steps/NAME.log    what its command has printed, in all attempts
    steps/NAME.lock   locked while somebody works on it; holds the command it was begun with
    results.json, table.md, plot.png   of all that is finished
"""

import argparse
import contextlib
import fcntl
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from report import Results, write_report, write_whole

ROOT = Path(__file__).resolve().parents[2]


class ExperimentError(RuntimeError):
    """A step failed, or the folder holds something else; the message says what to do."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: names its files.
        command: arguments of Python; paths below the repository are shown relative to it.
        needs: names of the steps that come before it.
        measure: reads the numbers that the command has left; only with an arm and a seed.
        arm, seed: what the numbers are of.
    """

    name: str
    command: Sequence[str | Path]
    needs: Sequence[str] = ()
    measure: Callable[[], Mapping[str, float]] | None = None
    arm: str | None = None
    seed: int | None = None

    def words(self) -> list[str]:
        """The command as a user would type it in the repository."""
        return [str(word).replace(f"{ROOT}/", "") for word in self.command]


class Experiment:
    """A folder of steps; see the top of this file."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, patience: float = 2.0):
        """
        Args:
            folder: where everything goes.
            settings: JSON-able; what the numbers depend on, beside arm and seed.
            patience: seconds between looks at what other processes have done.

        Raises:
            ExperimentError: the folder was begun with other settings.
        """
        self.folder, self.settings, self.patience = folder, dict(settings), patience
        self.steps = folder / "steps"
        self.steps.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "settings.json", wait=True) as file:
            _agree(file, self.settings, f"{folder} was begun with other settings")

    def run(self, steps: Sequence[Step]) -> None:
        """Do all steps, and return when they are done, here or by other processes.

        After a failure, what does not need the failed step is still done.

        Raises:
            ExperimentError: steps failed, or were done by other commands.
            ValueError: two steps of one name, or one that needs what does not come before it.
        """
        _check(steps)
        failed: dict[str, ExperimentError] = {}
        waiting = False
        with _ending_on_sigterm():
            while ready := self._ready(steps, failed):
                step = next((step for step in ready if self._attempt(step, failed)), None)
                if step is None:
                    if not waiting:
                        say(f"\nothers work on {', '.join(s.name for s in ready)}: waiting")
                    time.sleep(self.patience)
                waiting = step is None
        if failed:
            missing = ", ".join(step.name for step in steps if self._record(step) is None)
            raise ExperimentError("\n".join([*map(str, failed.values()), f"not done: {missing}"]))

    def _ready(self, steps: Sequence[Step], failed: Mapping[str, Any]) -> list[Step]:
        done = {step.name for step in steps if self._record(step) is not None}
        return [s for s in steps if s.name not in done | failed.keys() and done >= {*s.needs}]

    def _attempt(self, step: Step, failed: dict[str, ExperimentError]) -> bool:
        """Do a step, or note why it failed; False if another process works on it."""
        with _locked(self.steps / f"{step.name}.lock") as file:
            if file is None:
                return False
            try:
                if self._record(step) is None:  # else it was finished in the meantime
                    _agree(file, step.words(), f"{step.name} was begun by another command")
                    self._do(step, file)
            except ExperimentError as error:
                say(f"   FAILED: {error}")
                failed[step.name] = error
        return True

    def _do(self, step: Step, lock: IO[str]) -> None:
        words, log = step.words(), self.steps / f"{step.name}.log"
        shown = f"$ python {' '.join(map(_quote, words))}"
        say(f"\n== {step.name}\n{shown}")
        start = time.monotonic()
        with open(log, "a") as file:
            file.write(f"{shown}\n")
            file.flush()
            # The command inherits the lock: if this process is killed and the command lives on,
            # nobody begins the step a second time beside it.
            status = subprocess.run(
                [sys.executable, *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
            ).returncode
        if status:
            say(log.read_text()[-3000:])
            raise ExperimentError(f"{step.name}: exit status {status}, its whole output is {log}")
        record = {"command": words, "seconds": round(time.monotonic() - start, 1)}
        if step.measure is not None:
            try:
                measured = step.measure()
            except (OSError, LookupError, ValueError) as error:
                raise ExperimentError(f"{step.name}: no numbers: {error!r}, see {log}") from error
            numbers = {k: None if math.isnan(v) else float(v) for k, v in measured.items()}
            record |= {"arm": step.arm, "seed": step.seed, "numbers": numbers}
        write_whole(self.steps / f"{step.name}.json", json.dumps(record, indent=1))
        say(f"   {record['seconds']:.0f} s, output in {log}")

    def _record(self, step: Step) -> dict[str, Any] | None:
        """What a finished step has left, or None."""
        try:
            record = json.loads((self.steps / f"{step.name}.json").read_text())
        except FileNotFoundError:
            return None
        if record["command"] != step.words():
            raise ExperimentError(
                f"{step.name} was done by another command: {shlex.join(record['command'])}; "
                "name another folder, or delete this one"
            )
        return record

    def results(self) -> Results:
        """The numbers of all finished steps in the folder, whoever did them."""
        results: Results = {}
        for path in self.steps.glob("*.json"):
            record = json.loads(path.read_text())
            if "numbers" in record:
                results.setdefault(record["arm"], {})[record["seed"]] = record["numbers"]
        return {arm: dict(sorted(seeds.items())) for arm, seeds in results.items()}

    def report(self, titles: Mapping[str, str], reference: str) -> str:
        """Write results.json, table.md and plot.png; returns the table, arms in titles' order."""
        return write_report(self.folder, self.results(), self.settings, titles, reference)


def experiment_parser(doc: str, output: Path, arms: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that every experiment has: --output, --seeds, --arms."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=output, help="folder of the experiment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms))
    return parser


def run_and_report(
    folder: Path,
    settings: dict[str, Any],
    steps: Sequence[Step],
    tables: Callable[[Path, Results, dict[str, Any]], Mapping[str, str]],
) -> None:
    """Do the steps and say the tables of all that has been measured; failures end the process.

    Args:
        folder, settings: see Experiment.
        steps: what to do.
        tables: writes the report of (folder, results, settings); tables by name.
    """
    failure = None
    try:
        experiment = Experiment(folder, settings)
        try:
            experiment.run(steps)
        finally:
            made = tables(folder, experiment.results(), settings)
            for name, table in made.items():
                say(f"\n## {name}: {settings['data set']}\n\n{table}")
    except ExperimentError as error:
        failure = str(error)
    if failure:
        sys.exit(f"\n{failure}")


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _check(steps: Sequence[Step]) -> None:
    before: set[str] = set()
    for step in steps:
        if step.name in before or not before.issuperset(step.needs):
            raise ValueError(f"step {step.name!r}: name taken, or needs what does not precede it")
        before.add(step.name)


def _quote(word: str) -> str:
    """For a shell, as people do it: "('x',)", not '('"'"'x'"'"',)'."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """`kill` ends the running command too, as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[IO[str] | None]:
    """The file, locked until it is closed in every process; None if another one has it."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file


def _agree(file: IO[str], value: Any, complaint: str) -> None:
    """Write the value into an empty file; refuse if it holds another one."""
    file.seek(0)
    text = file.read()
    if not text:
        file.write(json.dumps(value))
        file.flush()
    elif json.loads(text) != json.loads(json.dumps(value)):
        raise ExperimentError(
            f"{complaint}: {text}, now {json.dumps(value)}; name another folder, or delete this one"
        )
