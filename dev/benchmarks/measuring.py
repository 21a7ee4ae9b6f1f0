"""What the benchmarks share: times, memory, COCO-like boxes, a report that counts what is wrong."""

import ctypes
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

Calls = dict[str, Callable[[], object]]

STATUS = Path("/proc/self/status")


def draw_boxes(count: int, size: tuple[int, int], *, whole: bool, seed: int = 0) -> np.ndarray:
    """(count, 4) int XYXY that fill the image, or in uniform positions: sqrt(area / image area) is
    log-normal (median 0.10, sigma 1.0; in COCO 0.10 and 1.0) and log(width / height) normal (-0.15,
    0.75; in COCO -0.15 and 0.75)."""
    height, width = size
    if whole:
        return np.tile([0, 0, width, height], (count, 1))
    rng = np.random.default_rng(seed)
    side = np.exp(rng.normal(math.log(0.10), 1.0, count)) * math.sqrt(height * width)
    ratio = np.exp(rng.normal(-0.15, 0.75, count) / 2)
    w = np.clip(np.round(side * ratio), 1, width)
    h = np.clip(np.round(side / ratio), 1, height)
    x, y = rng.uniform(size=(2, count)) * (width - w, height - h)
    return np.stack([x, y, x + w, y + h], axis=1).astype(int)


def measure(calls: Calls, rounds: int) -> dict[str, float]:
    """Typical ms of each call, all of them in turn in each round; the first does not count."""
    single = torch.get_num_threads() == 1
    clock = time.process_time if single else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            result = call()
            elapsed = clock() - start
            del result
            if round_:
                times[name].append(1e3 * elapsed)
    return {name: statistics.median(t) if single else min(t) for name, t in times.items()}


def memory_of_process(key: str) -> int:
    """Bytes: VmRSS is the memory in use, VmHWM the most since it was reset."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())[1])


def peak_bytes(call: Callable[[], object]) -> int | None:
    """By how much the process grows meanwhile; None where the system does not tell (not Linux)."""
    if not STATUS.exists():
        return None
    call()
    ctypes.CDLL(None).malloc_trim(0)  # what others have freed would hide a part of it
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = memory_of_process("VmRSS")
    call()
    return memory_of_process("VmHWM") - before


class Report:
    """Writes lines and counts what is wrong."""

    def __init__(self, write: Callable[[str], object], goals: bool):
        self.write, self.goals, self.failures = write, goals, 0

    def check(self, ok: bool, text: str) -> str:
        self.failures += not ok
        return f"{text} {'met' if ok else 'NOT MET'}"

    def compare(self, title: str, plain: float, fast: float, unit: str, goal: float = 0) -> None:
        note = self.check(plain >= goal * fast, f"goal {goal:g}x") if goal and self.goals else ""
        self.write(f"  {title:9} plain{plain:9.1f} {unit}   unseg{fast:9.1f} {unit}")
        self.write(f"{plain / fast:8.1f}x   {note}\n")
