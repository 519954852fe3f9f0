"""The engine's worker: order, errors, and what it lets go of."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from gsscale_nerfstudio.engines.threads import Worker


class Result:
    """Something that can be seen to be gone."""


def fail(error: Exception) -> None:
    raise error


def test_jobs_are_done_in_order_and_waited_for():
    worker, go, done = Worker(), threading.Event(), []
    worker.submit(go.wait)
    jobs = [worker.submit(done.append, i) for i in range(5)]
    assert not any(job.done() for job in jobs)
    go.set()
    worker.wait()
    assert done == [0, 1, 2, 3, 4]


def test_an_error_is_raised_by_who_waits_and_once():
    worker = Worker()
    job = worker.submit(fail, ValueError("no rows"))
    worker.submit(lambda: None).result()  # which must not let the error be forgotten
    with pytest.raises(ValueError, match="no rows"):
        worker.wait()
    worker.wait()
    assert job.exception() is not None


def test_that_there_was_no_memory_is_for_who_asks_for_the_result():
    worker = Worker()
    job = worker.submit(fail, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    worker.wait()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        job.result()


def test_results_are_not_held():
    worker = Worker()
    job = worker.submit(Result)
    gone = weakref.ref(job.result())
    del job
    worker.submit(lambda: None).result()
    gc.collect()
    assert gone() is None
