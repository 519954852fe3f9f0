"""Results come in order, and few of them at a time."""

from __future__ import annotations

import os
import threading
import time

import pytest

from gsscale_nerfstudio.export.parallel import in_order


def test_order_is_kept_whoever_is_late():
    def late(i: int) -> int:
        time.sleep(0.001 * (i % 3))
        return i

    assert list(in_order(late, range(40))) == list(range(40))


def test_no_more_wait_than_two_for_each_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    started, lock = [], threading.Lock()

    def work(i: int) -> int:
        with lock:
            started.append(i)
        return i

    for taken, _ in enumerate(in_order(work, range(50)), start=1):
        time.sleep(0.001)
        assert len(started) <= taken + 6 - 1
    assert len(started) == 50


def test_a_failure_is_passed_on():
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda i: 1 // (5 - i), range(100)))
