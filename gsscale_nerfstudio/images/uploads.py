"""Images on their way to the device: the next one during the present one's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gsscale_nerfstudio.engines.streams import Mark, SideStream, wait_in_stream


class Uploads:
    """Copies of one image's tensors to the device, one image ahead of their use.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = SideStream(device)
        self._ahead: tuple[int, dict[str, Any], Mark] | None = None

    def start(self, index: int, data: dict[str, Any]) -> None:
        """Begin to copy image ``index``; overlaps with the device's work if it is page-locked."""
        with self._stream.active():
            self._ahead = index, self._copied(data), self._stream.mark()

    def take(self, index: int, data: dict[str, Any]) -> dict[str, Any]:
        """The tensors of image ``index`` on the device, in a dictionary of their own."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != index:
            return self._copied(data)
        _, copies, arrived = ahead
        wait_in_stream(arrived, self._device)
        for name, copy in copies.items():
            if isinstance(copy, Tensor) and copy is not data[name]:
                # Made on the other stream, freed when the current one has used it.
                copy.record_stream(torch.cuda.current_stream(self._device))
        return copies

    def _copied(self, data: dict[str, Any]) -> dict[str, Any]:
        # A copy of the dictionary, too: nobody is to change the cached one.
        copies = dict(data)
        for name in ("image", "mask"):
            if name in data:
                copies[name] = data[name].to(self._device, non_blocking=True)
        return copies
