"""The table of features: nothing is left out of it, and what it names is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.configs.method_configs import method_configs
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.splatfacto import SplatfactoModelConfig

from gsscale_nerfstudio.config import gsscale, gsscale_big
from gsscale_nerfstudio.densify import make_strategy
from tests.model.test_same_as_splatfacto import DENSIFICATION, FLAGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "features.md").read_text()


def flags_of(config: type, prefix: str = "") -> set[str]:
    names = {field.name for field in dataclasses.fields(config)} - {"_target"}
    return {prefix + name.replace("_", "-") for name in names}


def named_under(heading: str) -> set[str]:
    """The flags in the first column of a section's table."""
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [flag for row in rows for flag in re.findall("`(.+?)`", row)]
    assert len(named) == len(set(named))
    return set(named)


def test_every_flag_is_in_the_table() -> None:
    expected = flags_of(SplatfactoModelConfig) - {"camera-optimizer"}
    expected |= flags_of(CameraOptimizerConfig, "camera-optimizer.")
    assert named_under("The model") == expected


def test_every_flag_of_trainer_and_data_manager_is_in_the_table() -> None:
    assert named_under("Images and cameras") == flags_of(FullImageDatamanagerConfig)
    named = {flag.split(".")[0] for flag in named_under("The trainer")}  # with what is inside
    assert named == flags_of(TrainerConfig, "--") - {"--pipeline", "--optimizers"}


def test_every_test_that_is_named_exists() -> None:
    files = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(files), re.MULTILINE))
    named = re.findall(r"`(test_\w+)(?:\[(.+?)\])?`", PAGE)
    assert {function for function, _ in named} <= defined
    cases = {"test_flag": FLAGS, "test_densification_flag": DENSIFICATION}
    for function, table in cases.items():
        assert {case for f, case in named if f == function and case} == set(table)
    assert all(function in cases for function, case in named if case)
    paths = re.findall(r"`(tests/.+?)`", PAGE)
    assert paths and all((ROOT / path).exists() for path in paths)


@pytest.mark.parametrize("ours, name", [(gsscale, "splatfacto"), (gsscale_big, "splatfacto-big")])
def test_defaults_are_splatfactos(ours: Any, name: str) -> None:
    config, theirs = ours.config, method_configs[name]
    # Left unset, because that of strategy mcmc is another one.
    strategy = make_strategy(config.pipeline.model, num_images=10)
    assert strategy.prune_opa == theirs.pipeline.model.cull_alpha_thresh
    for field in dataclasses.fields(theirs.pipeline.model):
        if field.name not in {"_target", "cull_alpha_thresh"}:
            value = getattr(theirs.pipeline.model, field.name)
            assert getattr(config.pipeline.model, field.name) == value, field.name
    assert config.optimizers.keys() == theirs.optimizers.keys()
    for group, settings in theirs.optimizers.items():
        optimizer = config.optimizers[group]["optimizer"]
        for key, value in vars(settings["optimizer"]).items():
            assert key == "_target" or getattr(optimizer, key) == value, (group, key)
        assert config.optimizers[group]["scheduler"] == settings["scheduler"]
    # Where images are kept, and the device of a machine without a GPU, are documented.
    apart = {"_target", "method_name", "machine", "pipeline", "optimizers", "timestamp"}
    for field in dataclasses.fields(theirs):
        if field.name not in apart:
            assert getattr(config, field.name) == getattr(theirs, field.name), field.name
    manager = theirs.pipeline.datamanager
    for field in dataclasses.fields(manager):
        if field.name not in {"_target", "cache_images"}:
            value = getattr(manager, field.name)
            assert getattr(config.pipeline.datamanager, field.name) == value, field.name
