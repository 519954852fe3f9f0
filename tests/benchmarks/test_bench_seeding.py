"""seeding.py: its figures on small clouds."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from benchmarks import seeding
from benchmarks.plan import PlanError
from benchmarks.seeding import Seeding, SeedingArgs


def test_clouds_of_each_size_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(seeding.machine_info, "describe_apart", seeding.machine_info.describe)
    path = tmp_path / "seeding.json"
    args = SeedingArgs(points=(2000, 200_000), output=path, commit="abc")
    console = Console(width=120, record=True)
    report = seeding.measure(args, console)
    assert json.loads(path.read_text()) == report
    assert report["kind"] == "seeding" and report["commit"] == "abc"
    assert report["command"].endswith("--points 2000 200000 --seed 42")
    small, large = report["seedings"]
    assert (small["points"], large["points"]) == (2000, 200_000)
    assert large["total_s"] > large["tree_s"] > small["tree_s"] > 0
    assert 0 < large["extra_bytes"] < 100 * 200_000 + 60e6
    assert "200,000" in console.export_text()
    with pytest.raises(PlanError, match="exists"):
        args.check()


def test_figures_follow_from_each_other():
    (cells,) = seeding.table([Seeding(2_000_000, 1.0, 0.5, 2.5, 150_000_000)]).rows
    assert cells == ["2,000,000", "1.00", "0.50", "2.50", "4.00", "2.00", "0.15"]


def test_clouds_are_surfaces_in_any_order():
    xyz, rgb = seeding.cloud(10_000, seed=3)
    assert xyz.isfinite().all() and len(rgb) == 10_000
    near = xyz[xyz.abs().max(dim=1).values < 1]
    assert 9000 < len(near) < 10_000 and near[:, 2].abs().max() < 0.5


@pytest.mark.parametrize("points", [(), (100, 1)])
def test_sizes_that_cannot_be(points):
    with pytest.raises(PlanError, match="--points"):
        SeedingArgs(points=points).check()
