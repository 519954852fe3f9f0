"""Nerfstudio's full-image data manager, with data sets checked before training starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from nerfstudio.data.datamanagers.full_images_datamanager import (
    FullImageDatamanager,
    FullImageDatamanagerConfig,
)
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from gsscale_nerfstudio.errors import GSScaleError


@dataclass
class GSScaleDatamanagerConfig(FullImageDatamanagerConfig):
    """Options of splatfacto's data manager."""

    _target: type = field(default_factory=lambda: GSScaleDatamanager)


class GSScaleDatamanager(FullImageDatamanager):
    """Hands out whole images and their cameras.

    Raises:
        GSScaleError: the data set cannot be loaded, or has cameras that cannot be rendered.
    """

    def __init__(
        self, config: GSScaleDatamanagerConfig, device: torch.device | str = "cpu", **kwargs: Any
    ) -> None:
        with _explained(config.data or config.dataparser.data):
            super().__init__(config, device=device, **kwargs)
        for dataset in (self.train_dataset, self.eval_dataset):
            check_cameras(dataset)
        if torch.device(device).type == "cpu":
            # "gpu" means the device; "cpu" would page-lock the images, which needs CUDA.
            self.config.cache_images = "gpu"

    def _load_images(
        self, split: Literal["train", "eval"], cache_images_device: Literal["cpu", "gpu"]
    ) -> list[dict[str, Tensor]]:
        with _explained(self.config.data):
            return super()._load_images(split, cache_images_device)


@contextmanager
def _explained(data: Any) -> Iterator[None]:
    """Nerfstudio's parsers stop where the data surprises them; say which data and what to check."""
    try:
        yield
    except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
        raise GSScaleError(
            f"the data set {data} could not be loaded ({type(error).__name__}: {error}); check "
            "that the folder exists, that it has at least one image with a pose, that its images "
            "are there, whole, and as large as their cameras say, and that its format is the one "
            "named on the command line (nerfstudio-data, colmap, blender-data, ...)"
        ) from error


def check_cameras(dataset: InputDataset) -> None:
    """Refuse cameras that have no pixels or no place.

    Raises:
        GSScaleError: names the first image concerned.
    """
    cameras = dataset.cameras
    if len(cameras) == 0:
        return  # no held-out images; the training images were checked by Nerfstudio
    checks = {
        "has no pixels": ((cameras.width < 1) | (cameras.height < 1)).flatten(),
        "has a pose that is not finite": ~cameras.camera_to_worlds.isfinite().flatten(1).all(dim=1),
        "has a focal length that is not positive and finite": ~(
            (cameras.fx > 0) & (cameras.fy > 0) & cameras.fx.isfinite() & cameras.fy.isfinite()
        ).flatten(),
    }
    for what, wrong in checks.items():
        if wrong.any():
            first = dataset.image_filenames[int(wrong.nonzero()[0, 0])]
            raise GSScaleError(
                f"the camera of {first} {what} ({int(wrong.sum())} of {len(wrong)} cameras); mend "
                "or remove it in the data set's transforms.json or COLMAP model. One bad pose "
                "spoils all if poses are centred (--orientation-method, --center-method)"
            )
