"""What a resumed run begins with, what goes on in it beside rows, and what has to be as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import TrainerConfig
from torch import Tensor, nn

from gsscale_nerfstudio import checkpoint
from gsscale_nerfstudio.errors import GSScaleError, warn


class _Module(NamedTuple):
    """Parameters that are not always there, one for each training image."""

    what: str
    parameter: str
    flag: str
    """That makes them."""


_MODULES = {
    "camera_opt": _Module(
        "camera poses",
        "camera_optimizer.pose_adjustment",
        "--pipeline.model.camera-optimizer.mode (SO3xR3 or SE3, as that run had it)",
    ),
    "bilateral_grid": _Module(
        "bilateral grids", "bil_grids.grids", "--pipeline.model.use-bilateral-grid True"
    ),
}
"""By the group of their optimizer."""

_PLACEMENT = "dataparser_transforms.json"

Gradients = dict[str, list[Tensor | None]]
"""By group, one for each of its parameters."""


def checkpoint_to_load(config: TrainerConfig) -> Path | None:
    """The file that a run's settings name, None if they name none.

    Raises:
        GSScaleError: it is missing or damaged, or a step is named without a folder.
    """
    if config.load_dir is not None:
        checkpoint.require_some(config.load_dir)
        if config.load_step is None:
            config.load_step = checkpoint.newest_step(config.load_dir)
        path = checkpoint.path_of(config.load_dir, config.load_step or 0)
    elif config.load_checkpoint is not None:
        path = config.load_checkpoint
    elif config.load_step is not None:
        raise GSScaleError(
            f"--load-step {config.load_step} says which checkpoint to go on from, and nothing says "
            "where it is; add --load-dir, the folder nerfstudio_models of its run"
        )
    else:
        return None
    checkpoint.require_whole(path)
    return path


def gradients_under_way(optimizers: Optimizers, periods: Mapping[str, int], step: int) -> Gradients:
    """Gradients that later steps add to, after a step.

    Args:
        periods: steps over which each group accumulates its gradients, as in Nerfstudio: from a
            multiple of the period on.
        step: the last complete one.
    """
    return {
        name: [parameter.grad for parameter in parameters]
        for name, parameters in optimizers.parameters.items()
        if (step + 1) % periods[name] != 0
    }


def restore_gradients(optimizers: Optimizers, gradients: Gradients) -> None:
    """Take back what :func:`gradients_under_way` gave, in a run with the same groups."""
    for name, of_group in gradients.items():
        for parameter, gradient in zip(optimizers.parameters[name], of_group, strict=True):
            if gradient is not None:  # a copy, because steps add to it, and it is the file's
                parameter.grad = gradient.to(parameter.device, copy=True)


def require_groups(optimizers: Optimizers, loaded: Mapping[str, Any]) -> None:
    """Check that a run has all groups of a checkpoint; those it has beside them begin anew.

    Args:
        loaded: states of the checkpoint's optimizers, by name of their group.

    Raises:
        GSScaleError: one is not there; names the flag that makes it.
    """
    missing = [name for name in loaded if name not in optimizers.optimizers]
    if any(name not in _MODULES for name in missing):
        raise GSScaleError(
            f"the checkpoint has optimizers that no flag of gsscale makes ({', '.join(missing)}): "
            "it is another method's; load one of gsscale or splatfacto"
        )
    if missing:
        modules = [_MODULES[name] for name in missing]
        whats = " and ".join(module.what for module in modules)
        flags = " and ".join(module.flag for module in modules)
        raise GSScaleError(
            f"the checkpoint's run has trained {whats}, too; to go on from it add {flags}"
        )


def require_same_images(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Check that what a checkpoint has of each image is of as many images as there are.

    Args:
        model: splatfacto or gsscale, which has the parameters of its flags.
        loaded: the checkpoint's entry of the pipeline.

    Raises:
        GSScaleError: it is of another number of them, or grids are of another shape.
    """
    own = dict(model.named_parameters())
    for what, name, _ in _MODULES.values():
        before, now = loaded.get(f"_model.{name}"), own.get(name)
        if before is None or now is None or before.shape == now.shape:
            continue
        if len(before) != len(now):
            raise GSScaleError(
                f"the checkpoint has {what} of {len(before)} training images, and there are "
                f"{len(now)}; give the data set, the dataparser's flags and the lists of images "
                "that its run had"
            )
        shape = " ".join(str(size) for size in reversed(before.shape[2:]))  # the flag's order
        raise GSScaleError(
            f"the checkpoint's {what} are of another shape; add --pipeline.model.grid-shape {shape}"
        )


def tell_other_placement(path: Path, outputs: DataparserOutputs) -> None:
    """Warn if the data do not lie where they lay in a checkpoint's run.

    Nerfstudio moves and scales every data set, by what its dataparser's flags say, and writes down
    how, beside the folder of checkpoints.

    Args:
        path: of the checkpoint.
        outputs: of the present run's training images.
    """
    file = path.parent.parent / _PLACEMENT
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        moved = np.array(before["transform"], dtype=float)
        scale = float(before["scale"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # a checkpoint alone
    now = outputs.dataparser_transform.double().numpy()
    if moved.shape != now.shape or not (
        np.allclose(moved, now, rtol=1e-4, atol=1e-4)
        and np.isclose(scale, outputs.dataparser_scale, rtol=1e-4)
    ):
        warn(
            f"the data are moved or scaled otherwise than in the checkpoint's run (scale "
            f"{outputs.dataparser_scale:.4g}, there {scale:.4g}; {file}), so its Gaussians do not "
            "lie where the cameras look. Unless you have added images and they lie nearly there, "
            "give the data set, the dataparser and the dataparser's flags that the run had "
            "(config.yml beside that file names them)"
        )


def tell_held_out_images(before: Sequence[str] | None, held_out: Sequence[Path]) -> None:
    """Warn if images are held out now that the checkpoint's run has been trained with.

    Args:
        before: names of that run's training images; None in checkpoints of earlier versions.
        held_out: files of the present run.
    """
    seen = len({str(file) for file in held_out}.intersection(before or ()))
    if seen:
        warn(
            f"{seen:,} of the {len(held_out):,} images that are held out now are among those that "
            "the checkpoint's run was trained with, so metrics will flatter; to have the split of "
            "that run give its dataparser's flags and its --pipeline.datamanager.train-list and "
            "eval-list"
        )


def tell_overwritten(config: TrainerConfig, folder: Path) -> None:
    """Warn if a run that begins from nothing has checkpoints already, as with ``--load-config``."""
    begins = config.load_dir is None and config.load_checkpoint is None
    if begins and checkpoint.steps_in(folder):
        warn(
            f"this run begins anew, and will write over the checkpoints in {folder}; to go on from "
            f"them give --load-dir {folder} instead"
        )


def tell_other_strategy(before: str | None, now: str) -> None:
    """Warn if a run goes on with another strategy than it began with.

    Args:
        before: the checkpoint's; None in those of earlier versions.
        now: the one that the flags name.
    """
    if before not in (None, now):
        warn(
            f"the checkpoint's run had strategy {before}, and goes on with {now}; to keep "
            f"{before} give --pipeline.model.strategy {before}"
        )
