"""Held-out images, one at a time on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nerfstudio.cameras.cameras import Cameras

from gsscale_nerfstudio.images.disk import Data, DiskImages


class EvalImages:
    """Cameras and images for evaluation, each brought to the device when it is asked for.

    Args:
        cameras: [n].
        images: as many; from the disk, the one after is read meanwhile.
        device: where they are used.
        before_each: called before an image is brought.
    """

    def __init__(
        self,
        cameras: Cameras,
        images: list[Data] | DiskImages,
        device: torch.device,
        before_each: Callable[[], None],
    ) -> None:
        self._cameras, self._images, self._device = cameras, images, device
        self._before_each = before_each

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Cameras, Data]:
        self._before_each()
        if isinstance(self._images, DiskImages):
            self._images.announce(range(len(self))[index : index + 2])
        data = dict(self._images[index])
        data["image"] = data["image"].to(self._device)
        return self._cameras[index : index + 1].to(self._device), data
