"""Passes over the same steps: how long they take, what they consist of, what the GPU waits for.

They are separate so that measuring one doesn't slow the other: the first does nothing between its
ends but record an event a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.exposed import exposed_transfer
from benchmarks.gpu_profile import busy_ms, gpu_profiler, gpu_work
from benchmarks.host_memory import peak_host_bytes
from benchmarks.progress import ProgressFile
from benchmarks.step_methods import Method

PHASES = ("forward_ms", "backward_ms", "optimizer_ms")
PHASE_STEPS = 10
PROFILED_STEPS = 5

UPCOMING = 24
"""Views that a method is told of in advance, like those of an epoch are known to a data manager."""


def view_order(views: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Endless pairs (view, those that follow); every epoch is another permutation of the views."""
    random = torch.Generator().manual_seed(seed)
    coming: list[int] = []
    while True:
        while len(coming) <= UPCOMING:
            coming += torch.randperm(views, generator=random).tolist()
        yield coming[0], coming[1 : 1 + UPCOMING]
        del coming[0]


def measure(
    method: Method,
    order: Iterator[tuple[int, list[int]]],
    warmup: int,
    steps: int,
    device: torch.device,
    progress: ProgressFile,
) -> dict[str, Any]:
    """Warm up, then the passes.

    Returns:
        ``ms_median`` (between the marks at the steps' ends) and ``ms_mean`` (wall time; the GPU's
        queue is empty at both ends and nowhere else), memory peaks from the first warm-up step to
        the last timed one, ``counters`` per timed step; then ``forward_ms``, ``backward_ms``,
        ``optimizer_ms`` and ``visible_rows`` of a second pass with marks inside of the steps; then
        ``exposed_transfer_ms`` of a third one with marks around the waits for the link; then
        ``gpu_busy_ms`` per step and ``gpu_busy_share`` of a fourth one under torch's profiler.
    """
    clock = Clock(device)
    clock.synchronize()
    if clock.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for done in range(warmup):
        method.step(*next(order), mark=_nothing)
        progress.phase("warming up", done + 1)

    before = method.counters()
    start = clock.synchronize()
    marks = [clock.mark()]
    for done in range(steps):
        method.step(*next(order), mark=_nothing)
        marks.append(clock.mark())
        progress.step(done + 1)
    end = clock.synchronize()
    after = method.counters()
    result: dict[str, Any] = {
        "ms_median": median(clock.milliseconds(marks)),
        "ms_mean": (end - start) * 1e3 / steps,
        "peak_gpu_allocated_bytes": torch.cuda.max_memory_allocated() if clock.cuda else None,
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved() if clock.cuda else None,
        "peak_host_bytes": peak_host_bytes(),
        "counters": None
        if before is None or after is None
        else {name: (after[name] - before.get(name, 0.0)) / steps for name in after},
    }
    progress.phase("phases", steps)
    result.update(_phases(method, order, clock))
    progress.phase("waits", steps)
    result.update(exposed_transfer(method, order, clock))
    progress.phase("profiling", steps)
    result.update(gpu_busy(method, order, clock))
    return result


def _nothing() -> None:
    pass


def _phases(method: Method, order: Iterator[tuple[int, list[int]]], clock: Clock) -> dict[str, Any]:
    """Medians of each phase, and the mean number of rows that the views saw."""
    steps, visible = [], []
    for _ in range(PHASE_STEPS):
        marks: list[Any] = []

        def mark(marks: list[Any] = marks) -> None:
            marks.append(clock.mark())

        method.step(*next(order), mark=mark)
        visible.append(method.visible())
        clock.synchronize()
        steps.append(clock.milliseconds(marks))
    phases = {name: median(step[i] for step in steps) for i, name in enumerate(PHASES)}
    return {**phases, "visible_rows": fmean(visible)}


def gpu_busy(
    method: Method, order: Iterator[tuple[int, list[int]]], clock: Clock
) -> dict[str, Any]:
    """Time in which the GPU ran a kernel or a copy, per step and as a share of the profiled time.

    The profiler slows the host, so the share is a lower bound where the host is what limits.
    """
    nothing = {"gpu_busy_ms": None, "gpu_busy_share": None}
    if not clock.cuda:
        return nothing
    try:
        with gpu_profiler() as profile:
            start = clock.synchronize()
            for _ in range(PROFILED_STEPS):
                method.step(*next(order), mark=_nothing)
            wall = (clock.synchronize() - start) * 1e3
        busy = busy_ms(gpu_work(profile))
    except (RuntimeError, OSError, ValueError) as error:
        print(f"no profile: {error}", flush=True)  # CUPTI may be missing or not allowed
        return nothing
    return {"gpu_busy_ms": busy / PROFILED_STEPS, "gpu_busy_share": busy / wall}
