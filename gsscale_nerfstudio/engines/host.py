"""The host engine: Adam runs on the CPU, the device sees working sets (GS-Scale, section 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from gsscale_nerfstudio import _C
from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.engines.base import Engine, WorkingSet
from gsscale_nerfstudio.store import HostStore
from gsscale_nerfstudio.store.memory import ReservedArray


class _Staging:
    """Page-locked rows on their way to or from the device."""

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self._array = ReservedArray(capacity, width)
        self._event: torch.cuda.Event | None = None
        self.device = device

    def rows(self, n: int) -> Tensor:
        """The first ``n`` rows, once no copy reads or writes them any more."""
        if self.device.type == "cuda":
            if self._event is not None:
                # The last copy out of this buffer may still be under way: it must not see new rows.
                self._event.synchronize()
            self._array.pin_whole(n)
        return self._array.tensor[:n]

    def copied(self) -> None:
        """Mark the point in the device's current stream up to which this buffer is in use."""
        if self.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()


class HostEngine(Engine):
    """Settles a view's rows into staging, and steps them in the store when gradients are back.

    Device memory holds one working set, its gradients and what the rasterizer needs; host memory
    sees one pass over the view's rows to send them and one to step them.
    """

    def __init__(self, store: HostStore, device: torch.device) -> None:
        width = store.layout.width
        self._outgoing = _Staging(store.capacity, width, device)
        self._incoming = _Staging(store.capacity, width, device)
        super().__init__(store, device)

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        self._outgoing.device = self._incoming.device = device

    def _fetch(self, view: View, training: bool) -> WorkingSet:
        ids = self.culler.cull(view, len(self.store))
        staging = self._outgoing.rows(len(ids))
        _C.gather_settled(self.store.kernel_rows, self.history.tables, ids.numpy(), staging.numpy())
        rows = staging.to(self.device, non_blocking=True)
        self._outgoing.copied()
        leaves: dict[str, Tensor] = {}
        for name, columns in self.store.layout.columns.items():
            # The rasterizer wants each attribute contiguous; on the CPU this is also what detaches
            # the leaf from the staging buffer.
            leaf = rows[:, columns].clone(memory_format=torch.contiguous_format)
            leaf = leaf.unflatten(1, self.store.layout.shapes[name])
            leaves[name] = Parameter(leaf) if training else leaf
        return WorkingSet(ids, leaves)

    @torch.no_grad()
    def _step_rows(self, working: WorkingSet, lrs: np.ndarray) -> None:
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
        self._incoming.copied()
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

    def settle(self) -> None:
        if not self._settled:
            _C.settle_range(self.store.kernel_rows, self.history.tables, 0, len(self.store))
            self._settled = True

    def refresh_bounds(self) -> None:
        # Spheres bound a row's motion from its stamp on, by the learning rates of today; steps that
        # a row skipped under a higher learning rate must be behind it.
        self.settle()
        _C.refresh_spheres(self.store.kernel_rows, self.history.tables, 0, len(self.store))
        self.culler.refresh(len(self.store))
