"""Noise on means, which exploration by Markov chain Monte Carlo adds at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gsscale_nerfstudio.store.layout import GROUPS

_MEANS = GROUPS.index("means")


@dataclass(frozen=True)
class MeanNoise:
    r"""Every step i moves each mean by :math:`\Sigma z\,g(o)\,\rho\,lr_i`, with z standard normal.

    :math:`\Sigma` is the Gaussian's covariance, o its opacity, lr the learning rate of means, and
    :math:`g(o) = 1 / (1 + e^{100 (o - 0.005)})`, as in gsplat. Steps that a row skips are made up
    for by one draw of their common variance, with covariance and opacity as they are afterwards.

    Attributes:
        rate: :math:`\rho`, nerfstudio's ``noise_lr``, > 0.
        horizon: steps for which a bounding sphere must hold. All of them have to be computed anew
            within as many steps.
    """

    rate: float
    horizon: int

    def variance(self, lrs: np.ndarray) -> float:
        """Of one step, before covariance and opacity. ``lrs`` is [len(GROUPS)]."""
        return float((self.rate * lrs[_MEANS]) ** 2)

    def room(self, lr_bounds: np.ndarray) -> float:
        """Standard deviations that ``horizon`` steps add up to, with learning rates up to these."""
        return 1.01 * math.sqrt(self.horizon * self.variance(lr_bounds))
