"""What the GPU spends its time on, kernel by kernel."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that occupy the GPU."""

MOST_KERNELS = 15
BRACKETED = re.compile(r"<.*|\(.*")
"""What follows a kernel's name: template and other arguments."""


def gpu_profiler() -> Any:
    """Torch's profiler of what the GPU does; the host is slowed, but not watched."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def gpu_work(profile: Any) -> list[dict[str, Any]]:
    """The GPU's events of a profile that has ended: ``name``, ``ts`` and ``dur`` in microseconds.

    Raises:
        RuntimeError: there are none; CUPTI may be missing or not allowed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    work = [event for event in events if event.get("cat") in GPU_WORK]
    if not work:
        raise RuntimeError("torch's profiler saw no kernel")
    return work


def busy_ms(work: list[dict[str, Any]]) -> float:
    """Milliseconds in which the GPU did anything."""
    return covered((event["ts"], event["ts"] + event["dur"]) for event in work) / 1e3


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def ms_by_kernel(work: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Milliseconds per step of the kernels that take most, and of all others together."""
    total: Counter[str] = Counter()
    for event in work:
        name = BRACKETED.sub("", event["name"].removeprefix("void ")).strip()
        total[name or event["name"]] += event["dur"] / 1e3 / steps
    most = dict(total.most_common(MOST_KERNELS))
    most["others"] = total.total() - sum(most.values())
    return {name: round(ms, 4) for name, ms in most.items()}


class TrainingProfile:
    """Some steps of a training under the profiler.

    Args:
        begin: the number of steps after which it starts.
        steps: how many; while they last, no other clock should run.
    """

    def __init__(self, begin: int, steps: int) -> None:
        self.begin, self.steps = begin, steps
        self.result: dict[str, Any] | None = None
        """``steps``; milliseconds per step: ``ms``, ``busy_ms``, and ``kernels``, by name."""
        self._profiler: Any = None
        self._start = 0.0

    def callback(self) -> TrainingCallback:
        """The hook behind each step."""
        return TrainingCallback(
            where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=self._after_step
        )

    def _after_step(self, step: int) -> None:
        if step + 1 == self.begin:
            torch.cuda.synchronize()
            self._profiler = gpu_profiler()
            self._profiler.start()
            self._start = time.perf_counter()
        elif step + 1 == self.begin + self.steps:
            torch.cuda.synchronize()
            wall = time.perf_counter() - self._start
            self._profiler.stop()
            work = gpu_work(self._profiler)
            self.result = {
                "steps": self.steps,
                "ms": 1e3 * wall / self.steps,
                "busy_ms": busy_ms(work) / self.steps,
                "kernels": ms_by_kernel(work, self.steps),
            }
            self._profiler = None
