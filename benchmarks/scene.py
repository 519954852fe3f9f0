"""Which dataparser reads a scene folder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.overrides import to_arguments

COLMAP_MODELS = ("sparse/0", "colmap/sparse/0")


class SceneError(BenchmarkError):
    """A folder that neither dataparser reads."""


def dataparser_arguments(scene: Path, overrides: list[str]) -> list[str]:
    """The dataparser's subcommand and arguments for ``ns-train METHOD --data scene ...``.

    A ``transforms.json`` goes first: ``ns-process-data`` writes one beside the COLMAP model that
    it was made from. COLMAP images are used at full size; without that, the parser would ask on
    the terminal whether it may write smaller ones.
    """
    extra = to_arguments(overrides)
    if (scene / "transforms.json").is_file():
        return ["nerfstudio-data", *extra]
    for model in COLMAP_MODELS:
        if (scene / model).is_dir():
            return ["colmap", "--colmap-path", model, "--downscale-factor", "1", *extra]
    raise SceneError(
        f"{scene} is no scene: it has neither transforms.json nor {' nor '.join(COLMAP_MODELS)}"
    )
