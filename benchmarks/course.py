"""What a training has come to on its way: evaluations between its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation


class Course:
    """Evaluates every so many steps, but for the last ones, which are timed.

    Args:
        every: steps between two evaluations; 0 for none.
        until: number of steps after which there is none any more.
        evaluate: gives what is kept of an evaluation, after so many steps.
    """

    def __init__(self, every: int, until: int, evaluate: Callable[[int], dict[str, Any]]) -> None:
        self.every, self.until = every, until
        self.evaluations: list[dict[str, Any]] = []
        self.steps_done = 0
        self._evaluate = evaluate

    def callback(self) -> TrainingCallback:
        """The hook behind each step; append it before that of a meter."""
        return TrainingCallback(
            where_to_run=[TrainingCallbackLocation.AFTER_TRAIN_ITERATION], func=self._after_step
        )

    def best(self) -> dict[str, Any]:
        """The evaluation with the highest PSNR; there must have been one."""
        return max(self.evaluations, key=lambda evaluation: evaluation["psnr"])

    def _after_step(self, step: int) -> None:
        self.steps_done = step + 1
        if self.every and self.steps_done % self.every == 0 and self.steps_done <= self.until:
            self.evaluations.append(self._evaluate(self.steps_done))
