"""The host engine: Adam runs on the CPU, the device sees working sets (GS-Scale, section 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.base import Engine
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.engines.streams import mark_current
from gsscale_nerfstudio.engines.working_set import WorkingSet, working_set
from gsscale_nerfstudio.store import HostStore


class HostEngine(Engine):
    """Settles a view's rows into staging, and steps them in the store when gradients are back.

    Device memory holds one working set, its gradients and what the rasterizer needs; host memory
    sees one pass over the view's rows to send them and one to step them.
    """

    def __init__(self, store: HostStore, device: torch.device) -> None:
        self._set_up_staging(store, device)
        super().__init__(store, device)

    def _set_up_staging(self, store: HostStore, device: torch.device) -> None:
        self._outgoing = Staging(store.capacity, store.layout.width, device)
        self._incoming = Staging(store.capacity, store.layout.width, device)

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        self._set_up_staging(self.store, device)

    def _prepare(self, view: View, step: int) -> Any:
        return self._cull(view, step)

    def _bring(self, prepared: Any) -> WorkingSet:
        return self._send(prepared, training=True)

    def _fetch(self, view: View) -> WorkingSet:
        return self._send(self._cull(view, self.step_count), training=False)

    def _send(self, ids: Tensor, training: bool) -> WorkingSet:
        staging = self._outgoing.rows(len(ids))
        _C.gather_settled(self.store.kernel_rows, self.history.tables, ids.numpy(), staging.numpy())
        rows = staging.to(self.device, non_blocking=True)
        self._outgoing.used_until(mark_current(self.device))
        # The rasterizer wants each attribute contiguous; on the CPU this is also what detaches the
        # leaves from the staging buffer.
        columns = dict(self.store.layout.columns)
        columns["sh"] = slice(columns.pop("features_dc").start, columns.pop("features_rest").stop)
        attributes = {
            name: rows[:, where].clone(memory_format=torch.contiguous_format)
            for name, where in columns.items()
        }
        attributes["sh"] = attributes["sh"].unflatten(1, (-1, 3))
        return working_set(ids, attributes, training)

    @torch.no_grad()
    def _step_rows(self, working: WorkingSet, lrs: np.ndarray) -> None:
        self._wait_for_worker()  # spheres and rows are about to change
        n, layout = len(working), self.store.layout
        grads = torch.zeros(n, layout.width, device=self.device)
        for name, columns in layout.columns.items():
            grad = working.leaves[name].grad
            if grad is not None:
                grads[:, columns] = grad.flatten(1)
        if working.statistics is not None:
            norms, seen, radii = working.statistics()
            grads[:, layout.bookkeeping["grad2d"]] = norms
            grads[:, layout.bookkeeping["count"]] = seen
            grads[:, layout.bookkeeping["max_radius"]] = radii
        staging = self._incoming.rows(n)
        staging.copy_(grads, non_blocking=True)
        self._incoming.used_until(mark_current(self.device))
        # Waits for the copy, and with it for this view's backward pass.
        staging = self._incoming.rows(n)
        per_column = np.append(lrs, 0.0)[layout.group_of_column].astype(np.float32)
        _C.settle_and_step(
            self.store.kernel_rows,
            self.history.tables,
            working.ids.numpy(),
            staging.numpy(),
            per_column,
        )
        self.culler.refresh(len(self.store), working.ids)
        self._bounds_step = self.step_count + 1

    def _settle(self) -> None:
        _C.settle_range(self.store.kernel_rows, self.history.tables, 0, len(self.store))

    def _refresh_spheres(self) -> None:
        _C.refresh_spheres(self.store.kernel_rows, self.history.tables, 0, len(self.store))
        self.culler.refresh(len(self.store))
