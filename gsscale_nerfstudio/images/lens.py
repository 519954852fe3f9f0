"""Undistortion as Nerfstudio's full-image data manager does it, one image or no image at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import _undistort_image
from nerfstudio.data.datasets.base_dataset import InputDataset

_INTRINSICS = ("fx", "fy", "cx", "cy", "width", "height", "camera_type", "distortion_params")


def undistorted(
    dataset: InputDataset, cameras: Cameras, index: int, image_type: Literal["uint8", "float32"]
) -> dict[str, Any]:
    """One image, read and undistorted: the pixels that Nerfstudio caches.

    Args:
        dataset: reads the image.
        cameras: those of the files, not yet undistorted.
        index: of the image.
        image_type: element type; float32 from 0 to 1.

    Returns:
        ``image`` [H, W, 3 or 4], perhaps ``mask`` [H, W, 1] bool, each in one piece on the CPU, and
        what else the data set has.

    Raises:
        ValueError: the image is not as large as its camera says.
    """
    data = dataset.get_data(index, image_type=image_type)
    camera = cameras[index].reshape(())
    height, width = data["image"].shape[:2]
    if (width, height) != (int(camera.width), int(camera.height)):
        raise ValueError(
            f"the image has {width} x {height} pixels, its camera "
            f"{int(camera.width)} x {int(camera.height)}"
        )
    if not _is_distorted(camera):
        return data
    _, image, mask = _undistort(camera, data["image"].numpy(), data)
    # Undistortion cuts images out of larger ones, which would stay in memory. Copied by numpy:
    # torch would start as many threads for each of ours as there are cores.
    data["image"] = torch.from_numpy(np.ascontiguousarray(image))
    if mask is not None:
        data["mask"] = torch.from_numpy(np.ascontiguousarray(mask.numpy()))
    return data


def undistort_cameras(cameras: Cameras) -> None:
    """Give cameras, [n], the intrinsics and size of their undistorted images, in place.

    No image is read. Nerfstudio's function has no need of the pixels, but wants some: it is given
    black ones, once for each lens, however many images that has taken.
    """
    if cameras.distortion_params is None:
        return
    columns = [getattr(cameras, name).double().reshape(len(cameras), -1) for name in _INTRINSICS]
    lenses = torch.cat(columns, dim=1).numpy()
    _, first, inverse = np.unique(lenses, axis=0, return_index=True, return_inverse=True)
    originals = [cameras[int(index)].reshape(()) for index in first]
    which = torch.from_numpy(inverse.reshape(-1))
    with ThreadPoolExecutor() as threads:
        for lens, new in enumerate(threads.map(_intrinsics, originals)):
            for name, value in new.items():
                getattr(cameras, name)[which == lens] = value


def _intrinsics(camera: Cameras) -> dict[str, float]:
    """What undistortion changes of one camera, []."""
    if not _is_distorted(camera):
        return {}
    black = np.zeros((int(camera.height), int(camera.width)), np.uint8)
    K, image, _ = _undistort(camera, black, {})
    return {
        "fx": float(K[0, 0]),
        "fy": float(K[1, 1]),
        "cx": float(K[0, 2]),
        "cy": float(K[1, 2]),
        "width": image.shape[1],
        "height": image.shape[0],
    }


def _is_distorted(camera: Cameras) -> bool:
    return camera.distortion_params is not None and bool((camera.distortion_params != 0).any())


def _undistort(camera: Cameras, image: np.ndarray, data: dict[str, Any]) -> Any:
    """Nerfstudio's new intrinsics, image and mask. It may change the arrays that it is given."""
    assert camera.distortion_params is not None
    K = camera.get_intrinsics_matrices().numpy()
    return _undistort_image(camera, camera.distortion_params.numpy(), data, image, K)
