"""image_loading.py on a small scene."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from benchmarks import image_loading
from benchmarks.image_loading import ImageLoadingArgs
from benchmarks.plan import PlanError
from tests.runs import tiny_scene


def test_rates_and_paths(tmp_path, capsys):
    args = ImageLoadingArgs(
        tiny_scene(tmp_path / "scene", points=50),
        tmp_path / "out.json",
        steps=14,
        step_ms=5.0,
        seconds=0.02,
        commit="c" * 40,
    )
    report = image_loading.measure(args, Console(width=120))
    assert json.loads(args.output.read_text()) == report
    assert report["images"] == 8
    assert report["rates"][0]["threads"] == 1
    for row in report["rates"]:
        assert min(row[f"{kind}_images_per_s"] for kind in ("pillow", "ours", "whole")) > 0
    cached, all_of_them, _, hardly_any = report["paths"]
    assert cached["mode"] == "cpu" and cached["beside"]["reads"] == 0
    assert all_of_them["beside"]["reads"] == 0
    assert hardly_any["alone"]["reads"] > 0
    for row in report["paths"]:
        assert row["beside"]["ms_per_step"] > 5.0
        assert row["alone"]["ms_per_step"] >= row["alone"]["waited_ms_per_step"]
    said = " ".join(capsys.readouterr().out.split())
    assert "The floor" in said and "written to" in said


def test_thread_counts():
    assert image_loading.thread_counts(1) == [1]
    assert image_loading.thread_counts(12) == [1, 2, 4, 8, 12]
    assert image_loading.thread_counts(16) == [1, 2, 4, 8, 16]


def test_a_file_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "out.json").touch()
    with pytest.raises(PlanError, match="exists"):
        ImageLoadingArgs(tmp_path, tmp_path / "out.json").check()
