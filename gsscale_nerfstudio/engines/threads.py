"""Who works on rows at what time: the engine's worker, the main thread and the viewer's."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.out_of_memory import is_out_of_memory

T = TypeVar("T")


class Worker:
    """One thread that does an engine's jobs in their order, while the main thread does others.

    Jobs read and write the store and the culler: whoever touches these on the main thread waits for
    the worker first.
    """

    def __init__(self) -> None:
        # Its kernels leave some cores to the main thread, backward's and the driver's: one that had
        # to share its core would hold up all the others at the end of each loop.
        threads = 3 * len(os.sched_getaffinity(0)) // 4
        self._thread = ThreadPoolExecutor(1, "gsscale-engine", _C.set_threads, (threads,))
        # Each with the thread that wants it done.
        self._jobs: dict[Future[Any], int] = {}

    def submit(self, job: Callable[..., T], *args: Any) -> Future[T]:
        """Have ``job(*args)`` done when the worker has done all jobs before."""
        # Results are large: they are not held for longer than those who asked for them do.
        self._jobs = {
            job: thread
            for job, thread in self._jobs.items()
            if not job.done() or job.exception() is not None
        }
        future = self._thread.submit(_delayed, job, *args)
        self._jobs[future] = threading.get_ident()
        return future

    def wait(self) -> None:
        """Make sure that it is at rest.

        Raises:
            Exception: what a job has raised, the first of several, but for a lack of GPU memory,
                which is for those to know who ask for the job's result.
        """
        # All of them before any error: later jobs may touch rows, too.
        errors = {job: job.exception() for job in self._jobs}
        failed = [
            (job, e) for job, e in errors.items() if e is not None and not is_out_of_memory(e)
        ]
        # The viewer's thread may be the first to meet the error of a step. It is kept for the
        # thread that wanted the job done, or training would go on with rows that were not stepped.
        here = threading.get_ident()
        self._jobs = {job: self._jobs[job] for job, _ in failed if self._jobs[job] != here}
        if failed:
            raise failed[0][1]


def _delayed(job: Callable[..., T], *args: Any) -> T:
    Stress.delay()
    return job(*args)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Nothing inside is cut short by Nerfstudio's viewer.

    It renders in a thread of its own, under a trace function that raises at any line of Python once
    the camera has moved: with half of a step done, for instance.
    """
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)


def hand_over_quickly() -> None:
    """Let Python's threads change places within a fraction of a step.

    The worker needs Python's lock some dozen times for a view. The main thread gives it back at
    each call into torch, but takes it again before the worker has woken up, and Python makes it
    wait only after 5 ms: several steps' worth. Measured on 20 M rows, the worker took 15 ms for a
    view's admission, whose work is 3 ms, and the GPU waited for it.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), 1e-4))
