"""Work on many pieces, on all cores, with few of them in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map`` on threads; at any time there are at most two results for each core.

    numpy, torch and zlib let go of Python's lock while they are busy.
    """
    cores = len(os.sched_getaffinity(0))
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) == 2 * cores:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
