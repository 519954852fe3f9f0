"""The trainer config of a run, parsed by the command line parser of ``ns-train`` itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tyro
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion, all_methods
from nerfstudio.engine.trainer import TrainerConfig

from benchmarks.errors import BenchmarkError
from benchmarks.overrides import to_arguments
from benchmarks.scene import dataparser_arguments

DEFAULT_ENGINE = "auto"
"""What a model without an ``engine`` setting runs; any other name is refused for it."""

# No evaluation and no checkpoint while training (0 is "never" to Nerfstudio): they would be timed.
QUIET = [
    "--vis=tensorboard",  # the only choice without a viewer or an account
    "--steps-per-save=0",
    "--steps-per-eval-batch=0",
    "--steps-per-eval-image=0",
    "--steps-per-eval-all-images=0",
]


class ConfigError(BenchmarkError):
    """A method, an engine or a setting that Nerfstudio doesn't know."""


def train_arguments(
    method: str,
    scene: Path,
    steps: int,
    seed: int,
    engine: str | None,
    overrides: list[str],
    dataparser_overrides: list[str],
    output_dir: Path,
) -> list[str]:
    """The words after ``ns-train``. The overrides come after ours, so that they win."""
    return [
        method,
        f"--data={scene}",
        f"--output-dir={output_dir}",
        f"--max-num-iterations={steps}",
        f"--machine.seed={seed}",
        *QUIET,
        *engine_arguments(method, engine),
        *to_arguments(overrides),
        *dataparser_arguments(scene, dataparser_overrides),
    ]


def engine_arguments(method: str, engine: str | None) -> list[str]:
    """``--pipeline.model.engine`` for models that have it, nothing for those that have only one."""
    if engine is None:
        return []
    if method not in all_methods:
        raise ConfigError(f"Nerfstudio knows no method {method!r}: is its plugin installed?")
    # Nerfstudio lists plugins that it knows of and that are not installed, without a pipeline.
    pipeline = getattr(all_methods[method], "pipeline", None)
    if pipeline is None:
        raise ConfigError(f"the plugin of method {method!r} is not installed")
    model = pipeline.model
    if "engine" in {field.name for field in dataclasses.fields(model)}:
        return [f"--pipeline.model.engine={engine}"]
    if engine != DEFAULT_ENGINE:
        raise ConfigError(f"{method} has no engine setting, so it can't run engine {engine!r}")
    return []


def write_no_checkpoint(trainer: Any) -> None:
    """Nobody would read it (13 GB for 20 M Gaussians), at the end or when training is interrupted.

    Its other steps, among them the AFTER_TRAIN callbacks, stay.
    """
    trainer.save_checkpoint = lambda step: None
    trainer.save_before_the_end = lambda **how: None


def parse(arguments: list[str]) -> TrainerConfig:
    """What ``ns-train`` makes of the arguments, up to the start of training."""
    try:
        config: TrainerConfig = tyro.cli(AnnotatedBaseConfigUnion, args=arguments)
    except SystemExit as refused:
        # tyro has printed its reasons and the arguments stand above them.
        raise ConfigError("ns-train refuses these arguments, see the log") from refused
    config.pipeline.datamanager.data = config.data  # as ns-train's main() does
    config.set_timestamp()
    return config
