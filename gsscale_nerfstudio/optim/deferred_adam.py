"""Adam that steps only the rows a view has seen, with dense Adam's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from torch import Tensor

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim.row_group import RowGroup


class DeferredAdam(torch.optim.Optimizer):
    """``torch.optim.Adam`` for one group of columns of the host store.

    A real torch optimizer, so every learning-rate scheduler and gradient clipping work on it; its
    parameter is the group's leaf of the current working set. The arithmetic is the engine's: one
    pass over the view's rows once all groups have called :meth:`step`.

    Args:
        params: the one parameter that ``GSScaleModel.get_param_groups`` gives for the group.
        lr: learning rate.
        betas: decay rates of the moments; the same for all groups.
        eps: term added to the denominator, > 0.
        weight_decay: must be 0.

    Raises:
        GSScaleError: settings that cannot be deferred, or parameters that are not row groups.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0,
    ) -> None:
        params = list(params)
        group = getattr(params[0], "row_group", None) if len(params) == 1 else None
        if group is None:
            raise GSScaleError(
                "DeferredAdam optimizes one group of the host store; use torch.optim.Adam "
                "(AdamOptimizerConfig) for ordinary parameters"
            )
        if weight_decay != 0:
            raise GSScaleError(
                f"weight decay ({weight_decay} for '{group.name}') would move every Gaussian at "
                f"every step and is not supported; remove --optimizers.{group.name}.optimizer"
                ".weight-decay"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.row_group: RowGroup = group
        group.engine.attach(group.name, self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Hand the group's learning rate to the engine; it steps once all groups have."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.row_group.engine.group_stepped(self.row_group.name, float(self.param_groups[0]["lr"]))
        return loss

    def publish(self, leaf: Tensor) -> None:
        """Make ``leaf`` the parameter whose gradient the next :meth:`step` stands for."""
        self.param_groups[0]["params"] = [leaf]

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.Adam's format, so that the file also loads into splatfacto."""
        engine, name = self.row_group.engine, self.row_group.name
        engine.settle()
        group = {k: v for k, v in self.param_groups[0].items() if k != "params"}
        adam = {"weight_decay": 0, "amsgrad": False, "maximize": False, "foreach": None}
        store = engine.store
        state = {
            "step": torch.tensor(float(engine.step_count)),
            "exp_avg": store.column_copy(name, store.exp_avg),
            "exp_avg_sq": store.column_copy(name, store.exp_avg_sq),
        }
        return {"state": {0: state}, "param_groups": [{**adam, **group, "params": [0]}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments and step count, of a gsscale or a splatfacto checkpoint."""
        engine, name = self.row_group.engine, self.row_group.name
        saved = state_dict["param_groups"][0]
        self.param_groups[0].update(
            {k: saved[k] for k in ("lr", "betas", "eps", "initial_lr") if k in saved}
        )
        state = state_dict["state"].get(0)
        if state is None:
            return
        store = engine.store
        if len(state["exp_avg"]) != len(store):
            raise GSScaleError(
                f"the checkpoint has optimizer state for {len(state['exp_avg']):,} Gaussians and "
                f"parameters for {len(store):,}; it was damaged or put together from two runs"
            )
        engine.settle()  # it may still be stepping rows, which must not go over the loaded ones
        store.column(name, store.exp_avg).copy_(state["exp_avg"])
        store.column(name, store.exp_avg_sq).copy_(state["exp_avg_sq"])
        engine.restart(int(state["step"]))


@dataclass
class DeferredAdamConfig(AdamOptimizerConfig):
    """Adam whose work on unseen Gaussians is deferred; results are those of Adam."""

    _target: type = field(default_factory=lambda: DeferredAdam)
