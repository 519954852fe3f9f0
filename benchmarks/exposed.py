"""Time in which the device waits for rows that are still crossing the link."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.clock import Clock
from benchmarks.step_methods import Method
from gsscale_nerfstudio.engines.streams import Mark, wait_in_stream
from gsscale_nerfstudio.engines.waits import LinkWaits

STEPS = 20
"""More than the views that are prepared ahead: the first of them find everything arrived."""


def exposed_transfer(
    method: Method, order: Iterator[tuple[int, list[int]]], clock: Clock
) -> dict[str, Any]:
    """Time per step in which the current stream does nothing but wait for the engine's transfers.

    The steps follow each other as in training. Waiting for each of them to end, as the pass for
    the phases does, would give the link time to catch up.

    Returns:
        ``exposed_transfer_ms``, median over steps; None without a GPU, and for methods without an
        engine.
    """
    if not clock.cuda or method.counters() is None:
        return {"exposed_transfer_ms": None}
    return {"exposed_transfer_ms": median(waits_per_step(method, order, clock))}


def waits_per_step(
    method: Method, order: Iterator[tuple[int, list[int]]], clock: Clock
) -> list[float]:
    """Milliseconds that the current stream waits in each of :data:`STEPS` steps."""
    steps = []
    with timed_waits(clock) as waits:
        for _ in range(STEPS):
            method.step(*next(order), mark=lambda: None)
            steps.append(list(waits))
            waits.clear()
    clock.synchronize()
    return [sum(clock.milliseconds(list(pair))[0] for pair in step) for step in steps]


@contextmanager
def timed_waits(clock: Clock) -> Iterator[list[tuple[Any, Any]]]:
    """Put marks before and behind each wait for the link that engines queue; gives their list."""
    waits: list[tuple[Any, Any]] = []

    def timed(_: LinkWaits, mark: Mark, device: torch.device) -> None:
        before = clock.mark()
        wait_in_stream(mark, device)
        waits.append((before, clock.mark()))

    with mock.patch.object(LinkWaits, "wait", timed):
        yield waits
