"""What is wrong with a data set, said before the first step: which data, why, what to do."""

from __future__ import annotations

import glob
import re
import struct
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nerfstudio.data.datasets.base_dataset import InputDataset

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images.lists import NO_LIST


@contextmanager
def explained(data: Any, *others: type[Exception]) -> Iterator[None]:
    """Nerfstudio's parsers stop where the data surprises them; say which data and what to check.

    Args:
        data: the user's name of the data.
        others: errors that are the data's, too, as long as nothing is on the GPU.
    """
    surprises: tuple[type[Exception], ...] = (AssertionError, LookupError, OSError, TypeError)
    surprises += (ValueError, EOFError, ArithmeticError, struct.error, *others)
    try:
        yield
    except GSScaleError:
        raise  # a RuntimeError that explains itself
    except surprises as error:
        raise GSScaleError(
            f"the data set {data} could not be loaded ({type(error).__name__}: {error}); "
            f"{_remedy(Path(data), error)}"
        ) from error


def _remedy(folder: Path, error: Exception) -> str:
    """What to do about a data set that could not be loaded."""
    if not folder.exists():
        return (
            "check the folder that --data names, seen from the current one (a run's config.yml "
            "names it as --data did: call this command in the folder where it was trained)"
        )
    if isinstance(error, FileNotFoundError) and "transforms.json" in str(error):
        # What nerfstudio-data begins with. Users of COLMAP forget that theirs is another format.
        model = _colmap_model(folder)
        if model is not None:
            return (
                f"it is COLMAP's; end the command with `colmap --colmap-path {model}`, after all "
                "other flags"
            )
        if (folder / "transforms_train.json").exists():
            return "end the command with `blender-data`, after all other flags"
        return (
            "check that --data names the folder of the scene, and name its format at the end of "
            "the command if it is another than nerfstudio-data (colmap, blender-data, ...)"
        )
    smaller = re.search(r"images_(\d+)", str(error))
    if isinstance(error, FileNotFoundError) and smaller and not (folder / smaller[0]).exists():
        return (
            f"--downscale-factor {smaller[1]} reads images that were made smaller before, in "
            f"{smaller[0]}; make them, or leave it out and give "
            f"--pipeline.datamanager.camera-res-scale-factor {1 / int(smaller[1]):.3g}, before the "
            "name of the data's format"
        )
    if isinstance(error, EOFError):
        return (
            "Nerfstudio asks whether it may make smaller images, and nobody can answer; start the "
            "command where you can, or end it with --downscale-factor 1 (after `colmap`)"
        )
    if "Colmap path" in str(error):
        model = _colmap_model(folder)
        there = "there is none in the usual places" if model is None else f"it is {model}"
        return (
            "give --colmap-path, after `colmap`, the folder of cameras.bin or cameras.txt, seen "
            f"from that of --data: {there}"
        )
    if isinstance(error, struct.error):
        return "a file of the COLMAP model ends too early, as an incomplete copy does; copy it anew"
    if "mat1 and mat2" in str(error):
        return (
            "the COLMAP model's points3D has no points; let COLMAP triangulate them, or end the "
            "command with --load-3D-points False, for Gaussians at random places"
        )
    if isinstance(error, FileNotFoundError) and _has_a_space(error.filename):
        return "names of images must not have spaces in a COLMAP model; rename them in both"
    if "No data found" in str(error):
        return (
            "no image is left to train with, because so few are all held out; end the command with "
            "--eval-mode all, or name the images with --pipeline.datamanager.train-list and "
            "eval-list"
        )
    if isinstance(error, ZeroDivisionError) and "downscale" in _line_of(error):
        return "--downscale-factor must be 1 or more"
    if isinstance(error, ZeroDivisionError):
        return (
            "all cameras are at one place, so that poses cannot be scaled; end the command with "
            "`nerfstudio-data --auto-scale-poses False`, after all other flags"
        )
    if NO_LIST in str(error):
        colmap = any(folder.glob("*_list.txt"))
        lists = (
            f"{folder.name} all of train_list.txt, val_list.txt and test_list.txt"
            if colmap
            else "transforms.json all of train_filenames, val_filenames and test_filenames"
        )
        return (
            f"give {lists}, or none, or name the images with --pipeline.datamanager.train-list and "
            "eval-list"
        )
    return (
        "check that it has at least one image with a pose, that its images are there, whole, and "
        "as large as their cameras say, that its format is the one named on the command line "
        "(nerfstudio-data, colmap, blender-data, ...), and that Nerfstudio knows its camera model "
        "(for others, `colmap image_undistorter` makes pinholes)"
    )


def _colmap_model(folder: Path) -> str | None:
    """Where COLMAP's model is in a folder of data, if it is in one of the usual places."""
    for model in ("sparse/0", "colmap/sparse/0", "sparse", "."):
        if any((folder / model / f"cameras.{suffix}").exists() for suffix in ("bin", "txt")):
            return model
    return None


def _line_of(error: Exception) -> str:
    """The line of code that raised it."""
    return traceback.extract_tb(error.__traceback__)[-1].line or ""


def _has_a_space(name: Any) -> bool:
    """Whether a file that is not there would be, were its name read on after a space."""
    if not isinstance(name, (str, Path)):
        return False
    file = Path(name)
    return any(file.parent.glob(glob.escape(file.name) + " *"))


def check_cameras(dataset: InputDataset) -> None:
    """Refuse cameras that have no pixels or no place.

    Raises:
        GSScaleError: names the first image concerned.
    """
    cameras = dataset.cameras
    if len(cameras) == 0:
        return  # no held-out images; the training images were checked by Nerfstudio
    placed = cameras.camera_to_worlds.isfinite().flatten(1).all(dim=1)
    if not placed.any():
        raise GSScaleError(
            "no camera has a pose that is finite. A single one in the data set's transforms.json "
            "or COLMAP model that is not is enough, because poses are centred and scaled by all of "
            "them: mend or remove it. (With --orientation-method none --center-method none "
            "--auto-scale-poses False, after the name of the data's format, its name is told.)"
        )
    checks = {
        "has no pixels": ((cameras.width < 1) | (cameras.height < 1)).flatten(),
        "has a pose that is not finite": ~placed,
        "has a focal length that is not positive and finite": ~(
            (cameras.fx > 0) & (cameras.fy > 0) & cameras.fx.isfinite() & cameras.fy.isfinite()
        ).flatten(),
    }
    for what, wrong in checks.items():
        if wrong.any():
            # Which makes images smaller, and may have made them nothing.
            also = ", or raise --pipeline.datamanager.camera-res-scale-factor" * ("pixels" in what)
            first = dataset.image_filenames[int(wrong.nonzero()[0, 0])]
            raise GSScaleError(
                f"the camera of {first} {what} ({int(wrong.sum())} of {len(wrong)} cameras); mend "
                f"or remove it in the data set's transforms.json or COLMAP model{also}"
            )
