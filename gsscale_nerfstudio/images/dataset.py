"""Nerfstudio's data set, with a JPEG decoder that does not hold Python's lock."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from PIL import Image, JpegImagePlugin
from torchvision.io import ImageReadMode, decode_jpeg

from gsscale_nerfstudio.errors import GSScaleError

_SUBSAMPLINGS = (0, 1, 2)
"""4:4:4, 4:2:2 and 4:2:0, in Pillow's counting: what both decoders are compared on."""

_PAUSE = 1.0
"""Seconds before a file is read again that could not be read: a file server may be back by then."""


_NEXT_TO_NOTHING = 1e-30
"""A distortion coefficient that is not 0, and that no pixel's position can tell from 0."""


class ImageDataset(InputDataset):
    """Reads colour JPEGs with torchvision, pixel for pixel as Pillow does, the rest with Pillow.

    Pillow decodes without Python's lock, but copies the pixels to numpy with it, for milliseconds
    in which the training thread stands still. torchvision never holds it, and saves the copy.

    Args:
        dataparser_outputs: files and cameras.
        scale_factor: by which images are made smaller; sizes are rounded down.
    """

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0) -> None:
        super().__init__(dataparser_outputs, scale_factor)
        # Nerfstudio computes sizes of cameras in float32, of images in float64: 0.7 of 650 pixels
        # are 454 or 455.
        for side in ("width", "height"):
            pixels = getattr(dataparser_outputs.cameras, side).double() * scale_factor
            setattr(self.cameras, side, pixels.to(torch.int64))
        _mark_ideal_fisheyes(self.cameras)

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        """The pixels of an image, [H, W, 3 or 4] uint8.

        Raises:
            OSError: the file is missing, truncated or no image.
        """
        file = self.image_filenames[image_idx]
        if self.scale_factor == 1.0 and _is_plain_jpeg(file) and same_as_pillow():
            return _decoded(np.fromfile(file, np.uint8), file)
        return super().get_numpy_image(image_idx)

    def get_data(
        self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32"
    ) -> dict[str, Any]:
        """An image, and its mask if it has one, under Nerfstudio's names.

        Raises:
            GSScaleError: one of them is missing, truncated or no image, or they differ in size.
                Where it may be the file system's fault that was so twice.
        """
        with naming(self.image_filenames[image_idx]):
            try:
                return super().get_data(image_idx, image_type)
            except OSError:
                time.sleep(_PAUSE)
                return super().get_data(image_idx, image_type)


def _mark_ideal_fisheyes(cameras: Cameras) -> None:
    """Have fisheyes, of [n] cameras, undistorted even if their coefficients are all 0, in place.

    Coefficients are what a fisheye differs by from the ideal one, which bends as much. Nerfstudio,
    and what reads the images from the disk as it does, leave images alone where all are 0.
    """
    types = [CameraType.FISHEYE.value, CameraType.FISHEYE624.value]
    fisheyes = torch.isin(cameras.camera_type, torch.tensor(types)).flatten()
    if not fisheyes.any():
        return
    coefficients = cameras.distortion_params
    if coefficients is None:
        coefficients = torch.zeros(len(cameras), 12)
    ideal = fisheyes & (coefficients == 0).all(dim=-1)
    cameras.distortion_params = coefficients.clone()  # all cameras may share one row
    cameras.distortion_params[ideal, 0] = _NEXT_TO_NOTHING


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors of reading an image name its file: decoders raise almost anything, and seldom say.

    Raises:
        GSScaleError: instead of another error.
    """
    try:
        yield
    except GSScaleError:
        raise  # it is named already
    except Exception as error:
        raise GSScaleError(
            f"the image {file} or its mask could not be read ({type(error).__name__}: {error}); "
            "mend the file, or take it out of the data set"
        ) from error


@cache
def same_as_pillow() -> bool:
    """Whether torchvision's JPEG decoder gives Pillow's pixels.

    They do if both have the same arithmetic: libjpeg-turbo, with its default transform and
    upsampling. Each brings a library of its own, so it is tried out, on small images of noise.
    """
    noise = np.random.default_rng(0).integers(0, 256, (45, 67, 3), dtype=np.uint8)
    for subsampling in _SUBSAMPLINGS:
        for progressive in (False, True):
            file = io.BytesIO()
            Image.fromarray(noise).save(
                file, "JPEG", subsampling=subsampling, progressive=progressive
            )
            content = np.frombuffer(bytearray(file.getvalue()), np.uint8)
            try:
                ours = _decoded(content, Path("noise.jpg"))
            except OSError:  # a torchvision that was built without libjpeg
                return False
            if not np.array_equal(ours, np.array(Image.open(file))):
                return False
    return True


def _is_plain_jpeg(file: Path) -> bool:
    """Whether a file is a JPEG of three channels, and subsampled as those that were compared."""
    with Image.open(file) as header:
        return (
            isinstance(header, JpegImagePlugin.JpegImageFile)
            and JpegImagePlugin.get_sampling(header) in _SUBSAMPLINGS
        )


def _decoded(content: np.ndarray, file: Path) -> np.ndarray:
    try:
        image = decode_jpeg(torch.from_numpy(content), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise OSError(f"{file}: {error}") from error
    return image.permute(1, 2, 0).numpy()
