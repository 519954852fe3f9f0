"""Bounding spheres of stepped rows on their way from the device to the culler."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from gsscale_nerfstudio.cull import Culler
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.engines.streams import Mark, SideStream, reached, wait


@dataclass(frozen=True)
class _NewSpheres:
    step: int
    ids: Tensor
    on_device: Tensor  # held until it has been copied
    staging: Staging
    on_host: Tensor
    arrived: Mark


class SphereReturns:
    """Sends spheres to the host on a stream of its own, step by step, and hands them over in order.

    The main thread sends; whoever may touch the culler takes.

    Args:
        capacity: rows of the largest step.
        device: where spheres are computed.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity, self._device = capacity, device
        self._stream = SideStream(device)
        self._under_way: deque[_NewSpheres] = deque()
        self._spare: list[Staging] = []

    def reserve(self, n: int) -> Staging:
        """Host memory for the spheres of ``n`` rows, before these are stepped.

        Raises:
            GSScaleError: it cannot be had, and nothing has changed.
        """
        staging = self._spare.pop() if self._spare else Staging(self._capacity, 4, self._device)
        staging.rows(n)
        return staging

    def send(
        self, step: int, ids: Tensor, spheres: Tensor, computed: Mark, staging: Staging
    ) -> None:
        """Queue the copy of ``spheres`` [n, 4] on the device: those of rows ``ids`` after ``step``.

        ``computed`` is reached when they are there. ``staging`` was reserved for as many.
        """
        on_host = staging.rows(len(ids))
        with self._stream.active(after=computed):
            on_host.copy_(spheres, non_blocking=True)
            arrived = self._stream.mark()
        self._under_way.append(_NewSpheres(step, ids, spheres, staging, on_host, arrived))

    def take(self, culler: Culler, n_rows: int, wait_for_all: bool) -> int | None:
        """Let the culler know of what has arrived. Returns the last step it then knows of, if new.

        Args:
            culler: to be changed.
            n_rows: rows in use.
            wait_for_all: also take what has not arrived yet.
        """
        step = None
        while self._under_way and (wait_for_all or reached(self._under_way[0].arrived)):
            new = self._under_way[0]
            wait(new.arrived)
            culler.replace(n_rows, new.ids, new.on_host)
            step = new.step
            self._under_way.popleft()
            self._spare.append(new.staging)
        return step

    def drop(self) -> None:
        """Forget what is under way: its rows are no more."""
        for new in self._under_way:
            wait(new.arrived)
        self._under_way.clear()
