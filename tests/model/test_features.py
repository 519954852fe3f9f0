"""The table of features: nothing is left out of it, and what it names is there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from nerfstudio.configs.method_configs import method_configs

from gsscale_nerfstudio.config import gsscale, gsscale_big


@pytest.mark.parametrize("ours, name", [(gsscale, "splatfacto"), (gsscale_big, "splatfacto-big")])
def test_defaults_are_splatfactos(ours: Any, name: str) -> None:
    config, theirs = ours.config, method_configs[name]
    for field in dataclasses.fields(theirs.pipeline.model):
        if field.name != "_target":
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
