"""Make the ``benchmarks`` package importable; shared made-up results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Appended, so that an installed gsscale_nerfstudio keeps going before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.results import Comparison, Run

MakeRun = Callable[..., Run]
MakeComparison = Callable[..., Comparison]

MACHINE: dict[str, Any] = {
    "gpu": "Test GPU",
    "gpu_memory_gib": 24,
    "cpu": "Test CPU",
    "cores": 8,
    "ram_gib": 64,
    "python": "3.11",
    "torch": "2.0",
    "gsplat": "1.0",
    "nerfstudio": "1.0",
}


def _make_run(method: str = "splatfacto", seed: int = 42, **fields: Any) -> Run:
    """A successful, timed run."""
    values: dict[str, Any] = {
        "engine": "host" if method.startswith("gsscale") else None,
        "overrides": [],
        "commit": "c" * 40,
        "psnr": 29.0,
        "psnr_of_views": [31.0, 27.0],
        "ssim": 0.88,
        "held_out_images": 22,
        "gaussians": 800_000,
        "it_per_s_last_1000": 100.0,
        "timed_steps": 1000,
        "wall_s": 150.0,
        "peak_gpu_allocated_bytes": 2_000_000_000,
        "peak_gpu_reserved_bytes": 2_500_000_000,
        "peak_host_bytes": 3_000_000_000,
    }
    return Run(method=method, seed=seed, **{**values, **fields})


def _make_comparison(runs: list[Run] | None = None, **fields: Any) -> Comparison:
    """A comparison on the made-up machine."""
    values: dict[str, Any] = {
        "scene": "park",
        "steps": 15_000,
        "overrides": [],
        "dataparser": ["colmap", "--colmap-path", "sparse/0", "--downscale-factor", "1"],
        "machine": dict(MACHINE),
        "commit": "c" * 40,
        "command": "python benchmarks/compare.py --scene park --steps 15000",
    }
    return Comparison(runs=runs or [], **{**values, **fields})


@pytest.fixture
def colmap_scene(tmp_path: Path) -> Path:
    """A folder that looks like a COLMAP scene."""
    scene = tmp_path / "park"
    (scene / "sparse" / "0").mkdir(parents=True)
    return scene


@pytest.fixture
def make_run() -> MakeRun:
    """``make_run(method, seed, **fields)``."""
    return _make_run


@pytest.fixture
def make_comparison() -> MakeComparison:
    """``make_comparison(runs, **fields)``."""
    return _make_comparison
