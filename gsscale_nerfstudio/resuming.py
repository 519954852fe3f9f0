"""What goes on in a resumed run beside rows."""

from __future__ import annotations

from collections.abc import Mapping

from nerfstudio.engine.optimizers import Optimizers
from torch import Tensor

Gradients = dict[str, list[Tensor | None]]
"""By group, one for each of its parameters."""


def gradients_under_way(optimizers: Optimizers, periods: Mapping[str, int], step: int) -> Gradients:
    """Gradients that later steps add to, after a step.

    Args:
        periods: steps over which each group accumulates its gradients, as in Nerfstudio: from a
            multiple of the period on.
        step: the last complete one.
    """
    return {
        name: [parameter.grad for parameter in parameters]
        for name, parameters in optimizers.parameters.items()
        if (step + 1) % periods[name] != 0
    }


def restore_gradients(optimizers: Optimizers, gradients: Gradients) -> None:
    """Take back what :func:`gradients_under_way` gave, in a run with the same groups."""
    for name, of_group in gradients.items():
        for parameter, gradient in zip(optimizers.parameters[name], of_group, strict=True):
            if gradient is not None:  # a copy, because steps add to it, and it is the file's
                parameter.grad = gradient.to(parameter.device, copy=True)
