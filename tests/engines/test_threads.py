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


def test_all_jobs_are_waited_for_before_an_error_is_raised():
    worker, go, done = Worker(), threading.Event(), []
    worker.submit(fail, ValueError("first"))
    worker.submit(go.wait)
    worker.submit(done.append, 1)
    worker.submit(fail, ValueError("second"))
    threading.Timer(0.05, go.set).start()
    with pytest.raises(ValueError, match="first"):
        worker.wait()
    assert done == [1]
    worker.wait()


def test_an_error_is_kept_for_the_thread_whose_job_it_was():
    """The viewer's thread, which waits to render, must not take it away from training."""
    worker, met = Worker(), []
    worker.submit(fail, ValueError("no rows"))

    def render() -> None:
        with pytest.raises(ValueError, match="no rows"):
            worker.wait()
        met.append(1)

    for _ in range(2):
        viewer = threading.Thread(target=render)
        viewer.start()
        viewer.join()
    with pytest.raises(ValueError, match="no rows"):
        worker.wait()
    worker.wait()
    assert met == [1, 1]


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
