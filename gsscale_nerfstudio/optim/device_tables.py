"""The Adam history where the GPU's kernels can read it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio.optim.history import AdamHistory
from gsscale_nerfstudio.store.layout import GROUPS

GROUP_STRIDE = 8
"""Entries per step: one a group, a zero for bookkeeping columns, and one to fill up."""

_MORE_STEPS = 1 << 15
"""Steps that the per-step tables grow by: about 1 MB."""


class DeviceTables:
    """Copy of an :class:`AdamHistory` on a device, kept up to date by a few kilobytes per step.

    Args:
        history: of what the tables tell; call :meth:`record` after each of its steps.
        device: where the tables are.

    Attributes:
        skip: [K + 1, 8] float32, S(t - k, t) of each group.
        tail: [steps, 8] float32, S(s, s + K).
        eps_scale: [steps] float32.
        decay: [K + 1, 2] float32, beta1^k and beta2^k.
        sums: [steps, SUMS] float64, see :meth:`.AdamHistory.sums`; None if nothing moves all rows.
        group, eps, reach: [width] per column; group is int32.
    """

    def __init__(self, history: AdamHistory, device: torch.device) -> None:
        self.history = history
        self.device = device
        powers = np.arange(history.horizon + 1)
        self.decay = self._upload(
            np.stack([history.beta1**powers, history.beta2**powers], axis=1).astype(np.float32)
        )
        self.group = self._upload(history.layout.group_of_column)
        self.eps = self._upload(history.eps_of_column)
        self.restart()

    def restart(self) -> None:
        """Read the whole history anew: it was replaced."""
        self.reach = self._upload(self.history.reach)
        steps = self.history.step + _MORE_STEPS
        self.tail = torch.zeros(steps, GROUP_STRIDE, device=self.device)
        known = self.history.tail[: self.history.step + 1]
        self.tail[: len(known), : len(GROUPS)] = self._upload(known)
        self.eps_scale = self._upload(self.history.eps_factors(steps))
        self.skip = self._upload(self._padded(self.history.skip))
        self.sums: Tensor | None = None
        if self.history.moves_all:
            self.sums = self._upload(self.history.sums(steps))

    def foresee(self, lrs: np.ndarray) -> None:
        """Take the memory that :meth:`record` needs when a step with these learning rates is done.

        Args:
            lrs: [len(GROUPS)].
        """
        if self.history.step + 2 >= len(self.tail):
            self.restart()
        # Not over the old table: kernels of the last step may still be reading it.
        self._next_skip = self._upload(self._padded(self.history.skip_after(lrs)))

    def record(self) -> None:
        """Follow the history's latest step, which was foreseen. Takes no memory.

        Called before kernels of the next step are launched.
        """
        dropped = self.history.step - 1 - self.history.horizon
        if dropped >= 0:
            # What falls off the end of the table of gaps is S(s, s + K) of that step.
            self.tail[dropped].copy_(self.skip[-1])
        self.skip = self._next_skip
        self._note_sums()

    def _note_sums(self) -> None:
        if self.sums is not None:
            now = torch.from_numpy(self.history.sums_now)
            self.sums[self.history.step].copy_(now, non_blocking=True)

    def rebound(self) -> None:
        """Take over new bounds of future motion; no kernel is at work. Takes no memory."""
        self.reach.copy_(torch.from_numpy(self.history.reach), non_blocking=True)
        self._note_sums()  # all rows may have been settled

    def adam_step(self, lrs: np.ndarray) -> dict[str, Any]:
        """What ordinary Adam needs for step t + 1: arguments of ``settle_and_step_rows``."""
        beta1, beta2, t = self.history.beta1, self.history.beta2, self.history.step + 1
        step_sizes = np.zeros(GROUP_STRIDE, dtype=np.float32)
        step_sizes[: len(GROUPS)] = lrs / (1 - beta1**t)
        return {
            "step_size_of_group": self._upload(step_sizes),
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "inv_sqrt_bias2": 1 / math.sqrt(1 - beta2**t),
        }

    def skipped_steps(self) -> dict[str, Any]:
        """The arguments that describe skipped steps, common to all kernels that settle."""
        return {
            "group_of": self.group,
            "eps_of": self.eps,
            "skip": self.skip,
            "tail": self.tail,
            "eps_scale": self.eps_scale,
            "decay": self.decay,
            "log2_beta1": math.log2(self.history.beta1) if self.history.beta1 > 0 else -1e4,
            "log2_beta2": self.log2_beta2,
            "step": self.history.step,
            "HORIZON": self.history.horizon,
            "GROUPS": GROUP_STRIDE,
        }

    @property
    def log2_beta2(self) -> float:
        """By what second moments decay, as a logarithm."""
        return math.log2(self.history.beta2)

    def pull(self, otherwise: Tensor) -> dict[str, Any]:
        """What kernels need to pull at rows by penalties; ``otherwise`` stands for the sums.

        Weights change when rows come or go.
        """
        history = self.history
        scale, opacity = history.pull_weights
        return {
            "sums": otherwise if self.sums is None else self.sums,
            "scale_weight": scale,
            "opacity_weight": opacity,
            "m_share": 1 - history.beta1,
            "v_decay": history.beta2,
            "PULL": history.pull is not None,
        }

    @staticmethod
    def _padded(per_group: np.ndarray) -> np.ndarray:
        padding = np.zeros((len(per_group), GROUP_STRIDE - len(GROUPS)))
        return np.append(per_group, padding, axis=1).astype(np.float32)

    def _upload(self, values: np.ndarray) -> Tensor:
        # From ordinary memory: CUDA takes the few bytes along before the call returns, and does not
        # wait for the kernels that are queued, as a blocking copy would.
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)
