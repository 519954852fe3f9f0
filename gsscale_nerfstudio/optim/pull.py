"""Penalties on size and opacity, whose gradient pulls at every row at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gsscale_nerfstudio.store.layout import GROUPS

_OPACITIES = GROUPS.index("opacities")


@dataclass(frozen=True)
class Pull:
    r"""Every step's loss has :math:`\lambda_o \overline{o} + \lambda_s \overline{e^{s}}`.

    The means are over the opacities o and log-scales s of all N Gaussians. For those that a view
    shows the loss has these terms itself; steps that a row skips are made up for as it is settled,
    see ``csrc/kernels/pull.h``.

    Attributes:
        opacity: :math:`\lambda_o`, nerfstudio's ``mcmc_opacity_reg``.
        scale: :math:`\lambda_s`, nerfstudio's ``mcmc_scale_reg``.
        horizon: steps for which a bounding sphere must hold, as that of :class:`.MeanNoise`.
    """

    opacity: float
    scale: float
    horizon: int

    def weights(self, n: int) -> tuple[float, float]:
        """Of the exponential of one log-scale, and of one opacity, among ``n`` rows."""
        return self.scale / max(1, 3 * n), self.opacity / max(1, n)

    def reach(self, n: int, strides: np.ndarray, beta2: float) -> float:
        r"""Bound of an opacity logit's fall in ``horizon`` skipped steps, times :math:`\sqrt{v}`.

        Infinite if v fades away meanwhile.

        Args:
            n: number of rows.
            strides: [len(GROUPS)] bound of a step's :math:`a_i` of each group.
            beta2: Adam's.
        """
        steepest = 0.25 * self.weights(n)[1]
        way = 1.01 * self.horizon * float(strides[_OPACITIES]) * steepest
        faded = math.sqrt(beta2**self.horizon)
        return way / faded if faded > 0 else math.inf
