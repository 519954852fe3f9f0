"""The page of flags: every one of ours is on it, with its default."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nerfstudio.configs.method_configs import method_configs

from gsscale_nerfstudio.config import gsscale, gsscale_big
from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from gsscale_nerfstudio.demo.cli import Demo
from gsscale_nerfstudio.export.cli import Export
from gsscale_nerfstudio.model_config import GSScaleModelConfig
from gsscale_nerfstudio.optim import DeferredAdamConfig
from gsscale_nerfstudio.pipeline import GSScalePipelineConfig
from gsscale_nerfstudio.trainer import GSScaleTrainerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "flags.md").read_text()
OURS = {
    "--": GSScaleTrainerConfig,
    "--pipeline.": GSScalePipelineConfig,
    "--pipeline.model.": GSScaleModelConfig,
    "--pipeline.datamanager.": GSScaleDatamanagerConfig,
    "--optimizers.GROUP.optimizer.": DeferredAdamConfig,
}


def section(heading: str) -> dict[str, list[str]]:
    """The other cells of each row of a section's table, by the flags in the first one."""
    text = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {
        flag: [cell.strip() for cell in cells]
        for first, *cells in rows
        for flag in re.findall("`(--.+?)`", first)
    }


def shown(default: Any) -> str:
    """How the page writes a default."""
    if default is dataclasses.MISSING:
        return "required"
    return "none" if default is None else f"`{default}`"


def flags(kind: type, prefix: str) -> dict[str, str]:
    """Flags of the fields that a dataclass itself declares, with their defaults as shown."""
    return {
        prefix + field.name.replace("_", "-"): shown(field.default)
        for field in dataclasses.fields(kind)
        if field.name in kind.__annotations__ and field.name != "_target"
    }


def test_all_that_training_adds():
    added = {k: v for prefix, kind in OURS.items() for k, v in flags(kind, prefix).items()}
    assert len(added) >= 7
    assert {k: cells[0] for k, cells in section("Added: `ns-train gsscale`").items()} == added


@pytest.mark.parametrize("name, kind", [("gsscale-export", Export), ("gsscale-demo", Demo)])
def test_commands(name, kind):
    assert {k: cells[0] for k, cells in section(f"`{name}`").items()} == flags(kind, "--")


def leaves(config: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif field.name not in {"_target", "method_name", "timestamp", "optimizers"}:
            yield (prefix + field.name).replace("_", "-"), value


@pytest.mark.parametrize("ours, name", [(gsscale, "splatfacto"), (gsscale_big, "splatfacto-big")])
def test_flags_with_another_default(ours, name):
    theirs, values = dict(leaves(method_configs[name])), dict(leaves(ours.config))
    others = section("Other defaults and meanings: `ns-train gsscale`")
    differ = {flag for flag in theirs if values[flag] != theirs[flag]}
    assert differ <= {*others, *section("Added: `ns-train gsscale`")}
    device = "--machine.device-type"  # ours depends on the machine
    for flag, (default, splatfactos, _) in others.items():
        assert splatfactos == shown(theirs[flag])
        assert flag == device or default == shown(values[flag])
