"""export.py: its files on few rows, and what follows from its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import export
from benchmarks.export import ExportArgs, Written
from benchmarks.plan import PlanError


def arguments(folder, **fields) -> ExportArgs:
    return ExportArgs(3000, folder / "work", output=folder / "export.json", commit="abc", **fields)


@pytest.fixture
def console(monkeypatch) -> Console:
    monkeypatch.setattr(export.machine_info, "describe_apart", export.machine_info.describe)
    return Console(width=140, record=True)


def test_every_file_is_measured_and_none_is_left(tmp_path, console, monkeypatch):
    class Exporter:
        @staticmethod
        def write_ply(path, n, columns):
            assert len(columns) == 62
            Path(path).write_bytes(bytes(4 * n * len(columns)))

    monkeypatch.setattr(export, "ns_exporter", lambda console: Exporter)
    monkeypatch.setattr(export, "NS_EXPORT_ROWS", 500)
    args = arguments(tmp_path)
    args.work.mkdir()
    (args.work / "mine").touch()
    report = export.measure(args, console)
    assert json.loads(args.output.read_text()) == report
    assert (report["kind"], report["commit"], report["rows"]) == ("export", "abc", 3000)
    assert report["command"].endswith("--rows 3000 --work DIR --seed 42")
    by_name = {one["name"]: one for one in report["files"]}
    assert list(by_name) == [".ply sh", ".ply rgb", ".spz sh", ".ply sh, ns-export"]
    assert all(one["seconds"] > 0 and one["disk_seconds"] > 0 for one in report["files"])
    assert [one["rows"] for one in report["files"]] == [3000, 3000, 3000, 500]
    for name, width in ((".ply sh", 62 * 4), (".ply rgb", 14 * 4 + 3)):
        assert 0 < by_name[name]["bytes"] - width * 3000 < 3000, "a header and nothing else"
    assert 1000 < by_name[".spz sh"]["bytes"] < by_name[".ply sh"]["bytes"] / 4
    assert [path.name for path in args.work.iterdir()] == ["mine"], "only its own files go"
    assert ".spz sh" in console.export_text()
    with pytest.raises(PlanError, match="exists"):
        args.check()


def test_ns_export_is_given_what_it_takes(tmp_path, monkeypatch):
    """Its file and ours are the same, byte for byte."""
    exporter = pytest.importorskip("nerfstudio.scripts.exporter")  # needs open3d
    model, written = export.made_up(200, seed=1), []
    monkeypatch.setattr(
        export, "_finished", lambda name, n, path, s: written.append(path.read_bytes())
    )
    export.write_as_ns_export(exporter.ExportGaussianSplat, model, tmp_path)
    export.write_file(model, tmp_path, ".ply", "sh")
    assert written[0] == written[1] and len(written[0]) > 200 * 248


def test_without_open3d_the_others_are_measured(tmp_path, console, monkeypatch):
    monkeypatch.setitem(sys.modules, "nerfstudio.scripts.exporter", None)
    report = export.measure(arguments(tmp_path), console)
    assert len(report["files"]) == 3
    assert "ns-export is left out" in console.export_text()


def test_figures_follow_from_each_other():
    (cells,) = export.table([Written(".ply sh", 2_000_000, 496_000_000, 4.0, 0.8)]).rows
    assert cells == [".ply sh", "2,000,000", "496.0", "4.00", "2.00", "124", "620"]


def test_the_disk_is_given_as_many_bytes(tmp_path, monkeypatch):
    sizes = []
    path = tmp_path / "file"
    monkeypatch.setattr(export.os, "fsync", lambda _: sizes.append(path.stat().st_size))
    for size in (5, export._BLOCK, export._BLOCK + 7):
        assert export.disk_seconds(path, size) > 0
    assert sizes == [5, export._BLOCK, export._BLOCK + 7] and not path.exists()


def test_what_cannot_be(tmp_path, console):
    with pytest.raises(PlanError, match="--rows"):
        ExportArgs(0, tmp_path).check()
    (tmp_path / "work").touch()  # no folder
    with pytest.raises(PlanError, match="name another --work"):
        export.measure(arguments(tmp_path), console)
