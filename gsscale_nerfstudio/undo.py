"""Taking back what ordinary optimizers have done in a step that has to be done again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Undo:
    """Copies of what a step changes beside rows, kept until the step is complete.

    An optimizer of torch's takes memory while it writes, so an error can leave it half-way. These
    are small beside the rows: poses, and bilateral grids, of which a step passes over all anyway.

    Args:
        optimizers: by name of their group.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizers = dict(optimizers)
        self._values: list[tuple[Tensor, Tensor]] = []  # tensors and their copies
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._states: list[tuple[Optimizer, Tensor, dict[str, Any]]] = []
        for optimizer in self._optimizers.values():
            optimizer.register_step_pre_hook(self._save)

    @property
    def names(self) -> list[str]:
        """The groups' names."""
        return list(self._optimizers)

    def begin(self, accumulating: Iterable[str]) -> None:
        """A step begins.

        Args:
            accumulating: groups whose gradients this step adds to those of earlier ones.
        """
        self.end()
        for name in accumulating:
            for parameter in _parameters(self._optimizers[name]):
                self._gradients.append((parameter, parameter.grad))
                if parameter.grad is not None:
                    self._values.append((parameter.grad, parameter.grad.clone()))

    @torch.no_grad()
    def _save(self, optimizer: Optimizer, *_: Any) -> None:
        """Called before an optimizer steps. Its memory is taken before anything is noted down."""
        values, states = [], []
        for parameter in _parameters(optimizer):
            state = dict(optimizer.state.get(parameter, {}))
            states.append((optimizer, parameter, state))
            tensors = [parameter, *(v for v in state.values() if isinstance(v, Tensor))]
            values += [(tensor, tensor.clone()) for tensor in tensors]
        self._values += values
        self._states += states

    @torch.no_grad()
    def take_back(self) -> None:
        """Put everything back to where it was when the step began; takes no memory."""
        for tensor, copy in self._values:
            tensor.copy_(copy)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for optimizer, parameter, state in self._states:
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state
        # Gradients are still those to go back to: the step begins anew.
        gradients = {id(gradient) for _, gradient in self._gradients}
        self._values = [pair for pair in self._values if id(pair[0]) in gradients]
        self._states.clear()

    def end(self) -> None:
        """The step is complete, or given up."""
        self._values.clear()
        self._gradients.clear()
        self._states.clear()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
