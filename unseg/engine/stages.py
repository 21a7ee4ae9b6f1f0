"""Steps of a long run, each in a process of its own that ends with the one that started it.

Detectron2's loggers and catalogs accumulate in a process, and only its end surely gives back the
memory of a GPU.
"""

import functools
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from detectron2.engine import launch


class StageError(RuntimeError):
    """A stage has failed; the message names it, the reason and its log."""


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        title: what it is called in messages.
        work: does it, as a picklable callable (a ``functools.partial`` of an importable function).
        log: where its log goes; the traceback of a failure is added.
        traces: the files and folders that it makes; none of them exists before it has begun.
        is_finished: whether it has been done, asked before it is.
    """

    title: str
    work: Callable[[], None]
    log: Path
    traces: tuple[Path, ...]
    is_finished: Callable[[], bool]

    def has_begun(self) -> bool:
        """Whether it, or a part of it, has been done."""
        return any(path.exists() for path in self.traces)


def run_in_process(stage: Stage) -> None:
    """Do a stage in a new process, and wait for it.

    Raises:
        StageError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    reasons = context.SimpleQueue()
    # A daemon could not have children: data-loading workers, one process per GPU.
    process = context.Process(target=_work, args=(stage.work, stage.log, reasons), daemon=False)
    process.start()
    try:
        process.join()
    except BaseException:  # Ctrl-C
        process.terminate()
        process.join()
        raise
    if process.exitcode:
        reason = f"exit code {process.exitcode}" if reasons.empty() else reasons.get()
        raise StageError(f"{stage.title} has failed ({reason}); its log is {stage.log}")


def _work(work: Callable[[], None], log: Path, reasons: SimpleQueue) -> None:
    end_with_parent()
    try:
        work()
    except Exception as error:
        # A failed rank's message ends with the lines of its traceback. Short, so that it is sent
        # whole or not at all.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reasons.put(lines[-1][:1000])
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        raise


def launch_ranks(function: Callable[..., Any], num_processes: int, *args: Any) -> None:
    """Detectron2's launch on this machine, of processes that end with this one."""
    # The first rank that is done with its masks waits for the last one: half an hour is too short.
    launch(
        _run_rank, num_processes, dist_url="auto", args=(function, args), timeout=timedelta(days=7)
    )


def _run_rank(function: Callable[..., Any], args: tuple) -> None:
    end_with_parent()
    function(*args)


@functools.cache
def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has, even by ``kill -9``.

    Does nothing in a process that `multiprocessing` did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    # Files are written whole or not at all, so nothing needs to be put in order.
    os._exit(1)
