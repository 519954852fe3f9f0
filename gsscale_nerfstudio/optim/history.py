"""What Adam did at past steps, in the form that lets a row catch up in one go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim.noise import MeanNoise
from gsscale_nerfstudio.optim.pull import Pull
from gsscale_nerfstudio.store.layout import GROUPS, RowLayout

_NEGLIGIBLE = 1e-12
"""Skipped terms smaller than this share of the first one are dropped (float32 holds 6e-8)."""

_LONGEST_HORIZON = 4096

SUMS = 3
"""Of what moves all rows at every step: variances of noise, a_i of scales, a_i of opacities."""

_PULLED = [GROUPS.index("scales"), GROUPS.index("opacities")]


@dataclass
class _Moment:
    """The history after some step; what earlier steps leave behind for good is kept elsewhere."""

    step: int
    lr: np.ndarray
    skip: np.ndarray
    lr_bound: np.ndarray
    sums: np.ndarray
    tables: _C.SkipTables | None = None


class AdamHistory:
    r"""Tables of the deferred Adam update (GS-Scale, section 4.3; here without a cap).

    An element's state (w, m, v) is current for step s and its gradient is zero for s+1 .. t. With
    :math:`r = \beta_1/\sqrt{\beta_2}` and
    :math:`a_i = lr_i \sqrt{1-\beta_2^i} / (1-\beta_1^i)`, dense Adam's moves add up to

    .. math::
        w_t = w_s - S(s,t) \frac{m_s}{\sqrt{v_s} + \epsilon f_s}, \quad
        S(s,t) = \sum_{i=s+1}^{t} r^{i-s} a_i, \quad
        f_s = \sqrt{(1-\beta_2^{s+1})/\beta_2}

    and :math:`m_t = \beta_1^{t-s} m_s`, :math:`v_t = \beta_2^{t-s} v_s`. :math:`f_s` makes the
    first skipped step exact for any eps; later ones differ by the growth of
    :math:`\epsilon/\sqrt{v}`, nothing at Nerfstudio's eps of 1e-15.

    ``skip[k] = S(t-k, t)`` for k up to the horizon K follows from step to step as
    ``skip[k+1] <- skip[k] + r^(k+1) a_t``. Terms beyond K are below rounding, so
    :math:`S(s,t) = S(s,s+K)`, the entry that drops off the end of ``skip``: it is kept in ``tail``,
    one float per step and group.

    Args:
        layout: the columns of a row.
        lr: learning rate of each group, for step 1.
        eps: eps of each group, > 0.
        betas: Adam's decay rates, the same for all groups.
        noise: what every step adds to means; None for nothing.
        pull: penalties that every step has; None for none.
        count: number of all rows, at present; for ``pull``.

    Raises:
        GSScaleError: betas or eps for which the closed form does not hold.
    """

    def __init__(
        self,
        layout: RowLayout,
        lr: Mapping[str, float],
        eps: Mapping[str, float],
        betas: tuple[float, float] = (0.9, 0.999),
        noise: MeanNoise | None = None,
        pull: Pull | None = None,
        count: Callable[[], int] = lambda: 1,
    ) -> None:
        self.layout = layout
        self.noise, self.pull, self._count = noise, pull, count
        self.beta1, self.beta2 = betas
        ratio = self.beta1 / math.sqrt(self.beta2)
        self.horizon = _horizon(ratio)
        if not 0 < self.horizon <= _LONGEST_HORIZON:
            raise GSScaleError(
                f"betas {betas} cannot be deferred: beta1 must stay clearly below sqrt(beta2), as "
                "in Adam's default (0.9, 0.999)"
            )
        for name, value in eps.items():
            if not value > 0:
                raise GSScaleError(
                    f"the optimizer of '{name}' has eps {value}; gsscale needs eps > 0 (splatfacto "
                    "uses 1e-15), because rows that were never seen have zero moments"
                )
        self.step = 0
        self._power = ratio ** np.arange(self.horizon + 1)
        self._skip = np.zeros((self.horizon + 1, len(GROUPS)))
        self._tail = np.zeros((1024, len(GROUPS)), dtype=np.float32)
        self._eps_scale = np.zeros(1024, dtype=np.float32)
        self._eps_scale[0] = self._eps_factor(0)
        self._sums_now = np.zeros(SUMS)  # over all steps since rows were last all settled
        self._sums_before = np.zeros((1024, SUMS))
        steps = np.arange(self.horizon + 1)
        self._decay1 = (self.beta1**steps).astype(np.float32)
        self._decay2 = (self.beta2**steps).astype(np.float32)
        of = layout.group_of_column
        self._group = of
        self._eps = np.append([eps[name] for name in GROUPS], 1.0)[of].astype(np.float32)
        # sup of a_i / lr_i: the first step's value, or 1 in the limit.
        self._peak = max(1.0, math.sqrt(1 - self.beta2) / (1 - self.beta1))
        self._lr_bound = np.array([lr[name] for name in GROUPS], dtype=np.float64)
        # What rounding adds to bounds. Moments of 16 bits are off by up to 2^-7 each time that they
        # are stored, v by some percent of itself in the course of its average.
        self._slack = 1.15 if layout.narrow else 1.01
        self._reach: tuple[np.ndarray, np.ndarray] | None = None
        self._tables: _C.SkipTables | None = None
        self._next: _Moment | None = None

    def _eps_factor(self, step: int) -> float:
        return math.sqrt((1 - self.beta2 ** (step + 1)) / self.beta2)

    def advance(self, lr: np.ndarray) -> bool:
        """Record step ``self.step + 1``.

        Args:
            lr: [len(GROUPS)] learning rates in force at that step.

        Returns:
            True if a learning rate has outgrown the bound that the rows' spheres were computed
            with, so that they must be refreshed (:meth:`rebound`) before the next culling.
        """
        after = self._after(lr)
        outgrown = after.lr_bound is not self._lr_bound
        self.step, self._skip, self._lr_bound = after.step, after.skip, after.lr_bound
        self._sums_now = after.sums
        self._tables, self._next = after.tables, None
        return outgrown

    def ahead(self, lr: np.ndarray) -> _C.SkipTables:
        """:attr:`tables` as they will be after ``advance(lr)``, which may follow or not.

        The next view's rows can be settled with them before the present step is recorded.
        """
        after = self._after(lr)
        if after.tables is None:
            after.tables = self._make_tables(after)
        return after.tables

    def skip_after(self, lr: np.ndarray) -> np.ndarray:
        """:attr:`skip` as it will be after ``advance(lr)``; not to be kept or changed."""
        return self._after(lr).skip

    def _after(self, lr: np.ndarray) -> _Moment:
        if self._next is not None and np.array_equal(self._next.lr, lr):
            return self._next
        t = self.step + 1
        if t >= len(self._tail):
            self._tail = np.concatenate([self._tail, np.zeros_like(self._tail)])
            self._eps_scale = np.concatenate([self._eps_scale, np.zeros_like(self._eps_scale)])
            self._sums_before = np.concatenate(
                [self._sums_before, np.zeros_like(self._sums_before)]
            )
        # Tables of earlier steps share these arrays but read none of the entries, and they are the
        # same whatever `lr` is: they can be written before the step is taken.
        if t > self.horizon:
            self._tail[t - 1 - self.horizon] = self._skip[-1]
        self._eps_scale[t] = self._eps_factor(t)
        self._sums_before[t - 1] = self._sums_now
        a = lr * math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t)
        skip = np.zeros_like(self._skip)
        np.multiply(self._power[1:, None], a, out=skip[1:])
        skip[1:] += self._skip[:-1]
        # Schedulers compute the initial rate with rounding; bounds have 1 % of room.
        lr_bound, outgrown = self._lr_bound, lr > 1.001 * self._lr_bound
        if outgrown.any():
            # Room to grow, or a warm-up would force a refresh at every step.
            lr_bound = np.where(outgrown, 2 * lr, lr_bound)
        variance = self.noise.variance(lr) if self.noise else 0.0
        sums = self._sums_now + np.array([variance, *a[_PULLED]])
        self._next = _Moment(t, np.array(lr), skip, lr_bound, sums)
        return self._next

    def rebound(self, lr: np.ndarray) -> None:
        """Bound future motion by the learning rates ``lr``; all spheres must be refreshed."""
        self._lr_bound = np.array(lr, dtype=np.float64)
        self._tables = self._next = None

    def all_settled(self) -> None:
        """All rows are current: nobody will ask any more what the steps so far add to them.

        What follows does not depend on when it began then, not even by rounding.
        """
        self._sums_now = np.zeros(SUMS)
        self._tables = self._next = None

    @property
    def moves_all(self) -> bool:
        """Whether every step moves every row, by noise or by a pull."""
        return self.noise is not None or self.pull is not None

    def sums(self, steps: int) -> np.ndarray:
        """[steps, SUMS] float64, more than t: over all steps up to s, 0 from t + 1 on.

        Entries of steps before rows were last all settled mean nothing.
        """
        sums = np.zeros((steps, SUMS))
        sums[: self.step] = self._sums_before[: self.step]
        sums[self.step] = self._sums_now
        return sums

    @property
    def sums_now(self) -> np.ndarray:
        """[SUMS], the last of :meth:`sums` that is known; not to be changed."""
        return self._sums_now

    @property
    def pull_weights(self) -> tuple[float, float]:
        """See :meth:`.Pull.weights`; 0 without a pull."""
        return (0.0, 0.0) if self.pull is None else self.pull.weights(self._count())

    @property
    def pull_reach(self) -> float:
        """See :meth:`.Pull.reach`; 0 without a pull."""
        return self._pull_reach(self._lr_bound)

    def _pull_reach(self, lr_bound: np.ndarray) -> float:
        if self.pull is None:
            return 0.0
        return self.pull.reach(self._count(), self._peak * lr_bound, self.beta2)

    @property
    def noise_room(self) -> float:
        """Standard deviations of noise that bounding spheres hold for."""
        return 0.0 if self.noise is None else self.noise.room(self._lr_bound)

    @property
    def skip(self) -> np.ndarray:
        """[K + 1, len(GROUPS)] float64: S(t - k, t); not to be kept, the next step changes it."""
        return self._skip

    @property
    def tail(self) -> np.ndarray:
        """[> t - K - 1, len(GROUPS)] float32: S(s, s + K)."""
        return self._tail

    @property
    def eps_of_column(self) -> np.ndarray:
        """[width] float32: eps of each column's group, 1 for bookkeeping columns."""
        return self._eps

    def eps_factors(self, steps: int) -> np.ndarray:
        """[steps] float32: f_s."""
        s = np.arange(steps, dtype=np.float64)
        return np.sqrt((1 - self.beta2 ** (s + 1)) / self.beta2).astype(np.float32)

    def stride(self, steps: int) -> dict[str, float]:
        r"""Bound of how far ``steps`` steps can move an element of each group, seen or skipped.

        By Cauchy-Schwarz :math:`|m| \le \sqrt{v}\,(1-\beta_1)/\sqrt{(1-\beta_2)
        (1-\beta_1^2/\beta_2)}`, 7.3 for Adam's defaults, whatever the gradients were.
        """
        ratio = (1 - self.beta1) / math.sqrt((1 - self.beta2) * (1 - self.beta1**2 / self.beta2))
        bounds = self._slack * steps * ratio * self._peak * self._lr_bound
        return dict(zip(GROUPS, bounds.tolist(), strict=True))

    @property
    def reach(self) -> np.ndarray:
        """[width] float32: bound of S(step, infinity) of each column."""
        return self._reach_of(self._lr_bound)

    def _reach_of(self, lr_bound: np.ndarray) -> np.ndarray:
        # Bounds seldom change, and are then new arrays.
        if self._reach is None or self._reach[0] is not lr_bound:
            ratio = self.beta1 / math.sqrt(self.beta2)
            per_group = self._slack * lr_bound * self._peak * ratio / (1 - ratio)
            reach = np.append(per_group, 0.0)[self._group].astype(np.float32)
            self._reach = lr_bound, reach
        return self._reach[1]

    @property
    def tables(self) -> _C.SkipTables:
        """The kernels' view of this history at the present step."""
        if self._tables is None:
            now = _Moment(self.step, np.empty(0), self._skip, self._lr_bound, self._sums_now)
            self._tables = self._make_tables(now)
        return self._tables

    def _make_tables(self, moment: _Moment) -> _C.SkipTables:
        moves: dict[str, Any] = {}
        if self.moves_all:
            moves["sums_before"], moves["sums_now"] = self._sums_before, moment.sums.tolist()
        if self.noise is not None:
            moves["noise_rate"] = self.noise.rate
            moves["noise_room"] = self.noise.room(moment.lr_bound)
        if self.pull is not None:
            moves["pull_scale"], moves["pull_opacity"] = self.pull_weights
            moves["pull_reach"] = self._pull_reach(moment.lr_bound)
        return _C.SkipTables(
            step=moment.step,
            skip=moment.skip,
            tail=self._tail,
            eps_scale=self._eps_scale,
            decay1=self._decay1,
            decay2=self._decay2,
            eps=self._eps,
            reach=self._reach_of(moment.lr_bound),
            group=self._group,
            beta1=self.beta1,
            beta2=self.beta2,
            **moves,
        )

    def restart(self, step: int) -> None:
        """Continue from ``step`` with every row current for it (a loaded checkpoint)."""
        self.step = step
        size = max(1024, 1 << (step + 1).bit_length())
        self._skip = np.zeros_like(self._skip)
        self._tail = np.zeros((size, len(GROUPS)), dtype=np.float32)
        self._eps_scale = np.zeros(size, dtype=np.float32)
        self._eps_scale[step] = self._eps_factor(step)
        self._sums_before = np.zeros((size, SUMS))
        self.all_settled()


def _horizon(ratio: float) -> int:
    """Number of skipped steps after which r^k is negligible; 0 if it never is."""
    if ratio >= 1:
        return 0
    return max(1, math.ceil(math.log(_NEGLIGIBLE) / math.log(ratio))) if ratio > 0 else 1
