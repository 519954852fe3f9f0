"""Nerfstudio's commands on a checkpoint, without reading its optimizer state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.pipelines.base_pipeline import Pipeline
from nerfstudio.utils.rich_utils import CONSOLE

from gsscale_nerfstudio import checkpoint
from gsscale_nerfstudio.errors import GSScaleError, readable_errors

_Load = Callable[[Any, Pipeline], tuple[Path, int]]


def leave_moments_on_disk(kind: type[TrainerConfig]) -> None:
    """Let ``eval_setup`` map the checkpoints of such runs, where it would read all of the file.

    Most of a file are moments, which ``ns-eval``, ``ns-render``, ``ns-viewer`` and
    ``ns-export`` have no use for: mapped, they are never read. Nerfstudio has no place to say so,
    hence its loader is replaced for runs of this kind; for others it stays as it is.

    Args:
        kind: configurations whose checkpoints :func:`checkpoint.load` reads.
    """
    # Whoever is about to call it has imported it. We cannot, at the top: it imports all plugins.
    eval_utils = sys.modules.get("nerfstudio.utils.eval_utils")
    if eval_utils is not None and not hasattr(eval_utils.eval_load_checkpoint, "kind"):
        eval_utils.eval_load_checkpoint = _mapped(eval_utils.eval_load_checkpoint, kind)  # type: ignore[attr-defined]


def _mapped(original: _Load, kind: type[TrainerConfig]) -> _Load:
    @wraps(original)
    def eval_load_checkpoint(config: Any, pipeline: Pipeline) -> tuple[Path, int]:
        if not isinstance(config, kind) or config.load_dir is None:
            return original(config, pipeline)
        with readable_errors():
            step = config.load_step
            if step is None:
                step = checkpoint.newest_step(config.load_dir)  # raises where none is whole
            if step is None:
                raise GSScaleError(
                    f"there is no checkpoint in {config.load_dir}: the run ended before its first "
                    "one, every --steps-per-save steps and at the end, or was started in another "
                    "folder than the current one; train again, or start this command there"
                )
            path = checkpoint.path_of(config.load_dir, step)
            state = checkpoint.load(path)
        pipeline.load_pipeline(state["pipeline"], state["step"])
        CONSOLE.print(f":white_check_mark: Done loading checkpoint from {path}")
        return path, step

    eval_load_checkpoint.kind = kind  # type: ignore[attr-defined]
    return eval_load_checkpoint
