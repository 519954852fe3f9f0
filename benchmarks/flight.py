"""A flight over every tile of a made-up scene, with the images of the real one."""

from __future__ import annotations

import dataclasses
from typing import Any

from nerfstudio.cameras.cameras import Cameras

from benchmarks.plan import PlanError
from gsscale_nerfstudio.datamanager import GSScaleDatamanager


def images_in_memory(data: GSScaleDatamanager) -> Any:
    """Have the training images read; their cameras are those of undistorted images from then on.

    Returns:
        ``DataparserOutputs`` of the training images, with these cameras.

    Raises:
        PlanError: they are not kept in memory.
    """
    if not isinstance(data.cached_train, list):
        raise PlanError(
            "the scene's images do not fit into the memory that they may take, and each is used "
            "again for every tile; let --overrides pipeline.datamanager.cache-images=cpu keep them"
        )
    return dataclasses.replace(data.train_dataparser_outputs, cameras=data.train_dataset.cameras)


def fly_over(data: GSScaleDatamanager, scene: Any, cameras: Cameras) -> None:
    """Train on ``cameras`` from now on, each once in an epoch. No image has been asked for so far.

    Args:
        data: hands out the scene's own cameras and images.
        scene: what :func:`images_in_memory` gave.
        cameras: the scene's own once for each tile, tile by tile; a view's image is that of the
            camera that it repeats.
    """
    tiles = len(cameras) // len(data.train_dataset)
    masks = scene.mask_filenames
    data.train_dataset = data.dataset_type(
        dataclasses.replace(
            scene,
            cameras=cameras,
            image_filenames=scene.image_filenames * tiles,
            mask_filenames=None if masks is None else masks * tiles,
        )
    )
    data.cached_train = data.cached_train * tiles  # a list of the same tensors
    fresh: dict[str, Any] = {"queue": [], "first_epoch": [], "last_queued": None}
    data.resume({**data.resume_state(), **fresh, "unsampled_epochs": [0.0] * len(cameras)})
