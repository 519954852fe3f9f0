"""Time and memory of a training, taken from the training loop by a Nerfstudio callback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation

from benchmarks.host_memory import peak_host_bytes
from benchmarks.memory_cap import lifted
from benchmarks.turns import Turns

TIMED_STEPS = 1000


def timed_steps(steps: int) -> int:
    """The last 1000 steps, or the last half where there are fewer than 2000."""
    return min(TIMED_STEPS, max(1, steps // 2))


class TrainingMeter:
    """Clock and memory marks of one training on one device.

    Create it before ``trainer.setup()`` (GPU peaks start there), append :meth:`callback` to the
    trainer's callbacks, call :meth:`start` right before ``trainer.train()``. What is read is read
    in the last step, so neither the evaluation nor the end-of-training work is part of it.

    Args:
        steps: steps of the training.
        cuda: whether it runs on a CUDA device. GPU peaks are torch's allocator's (allocated
            tensors; reserved blocks), without the CUDA context and other libraries' memory.
        on_step: told the number of steps done, after each step.
        turns: taken with trainings that share the machine; the timed steps are made alone. None
            where there are no others.
        cap: share of the GPU's memory that the training may have; None for all.
    """

    def __init__(
        self,
        steps: int,
        cuda: bool,
        on_step: Callable[[int], None],
        turns: Turns | None = None,
        cap: float | None = None,
    ) -> None:
        self.steps = steps
        self.cuda = cuda
        self.on_step = on_step
        self._turns = turns
        self._cap = cap
        self.result: dict[str, Any] | None = None
        """The measurements, under the names of :class:`benchmarks.results.Run`."""
        self._window = timed_steps(steps)
        self._window_start = 0.0
        self._start = 0.0
        self._peaks = (0, 0)  # of the GPU's memory, before the last pause
        self._paused = 0.0
        if cuda:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()

    def callback(self) -> TrainingCallback:
        """The hook behind each step; append it last, so that it sees the others' work."""
        return TrainingCallback(
            where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=self._after_step
        )

    def start(self) -> None:
        """Start the clock of the whole training."""
        self._start = time.perf_counter()

    @contextmanager
    def paused(self, give_back: Callable[[], None] | None = None) -> Iterator[None]:
        """Time and GPU memory of what is done inside, between two steps, do not count.

        There is no cap meanwhile.

        Args:
            give_back: lets the GPU have what torch keeps of that memory, which the training did not
                have before; None for torch's way.
        """
        self._peaks, begin = self._gpu_peaks(), self._now()
        with lifted(self._cap):
            try:
                yield
            finally:
                if self.cuda:
                    (give_back or torch.cuda.empty_cache)()
                    torch.cuda.reset_peak_memory_stats()
                self._paused += self._now() - begin

    def _gpu_peaks(self) -> tuple[int, int]:
        """Bytes of torch's tensors, and of its allocator."""
        if not self.cuda:
            return self._peaks
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return max(self._peaks[0], allocated), max(self._peaks[1], reserved)

    def _after_step(self, step: int) -> None:
        done = step + 1
        # Nothing but these two synchronizations is ours: the queue of GPU work must be empty at
        # both ends of the timed window, and a synchronization at every step would slow both sides.
        if done == self.steps - self._window:
            if self._turns is not None:
                self._turns.alone()
            self._window_start = self._now()
        elif done == self.steps:
            self._finish(self._now())
            if self._turns is not None:
                self._turns.together()
        elif self._turns is not None:
            self._turns.step_ended()
        self.on_step(done)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _finish(self, now: float) -> None:
        # A run of one step has no step before its window.
        window = now - (self._window_start or self._start)
        self.result = {
            "it_per_s_last_1000": self._window / window,
            "timed_steps": self._window,
            # Beside others, it says nothing.
            "wall_s": None if self._turns else now - self._start - self._paused,
            **self.peaks(),
        }

    def peaks(self) -> dict[str, int | None]:
        """Of memory, until now; the host's is the process's, pauses included."""
        allocated, reserved = self._gpu_peaks()
        return {
            "peak_gpu_allocated_bytes": allocated if self.cuda else None,
            "peak_gpu_reserved_bytes": reserved if self.cuda else None,
            "peak_host_bytes": peak_host_bytes(),
        }
