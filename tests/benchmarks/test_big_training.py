"""big_training.py, on a few thousand rows."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from benchmarks import big_training, machine
from benchmarks.big_training import BigTrainingArgs
from benchmarks.plan import PlanError
from tests.runs import tiny_scene


@pytest.fixture
def args(tmp_path, monkeypatch, make_comparison) -> BigTrainingArgs:
    monkeypatch.setattr(machine, "describe_apart", lambda: make_comparison().machine)
    return BigTrainingArgs(
        tiny_scene(tmp_path / "scene"),
        rows=3000,
        work=tmp_path / "work",
        visible=0.5,
        steps=21,
        overrides=("machine.device-type=cpu", "pipeline.model.densify-grad-thresh=1e-9"),
        dataparser_overrides=("eval-mode=interval", "eval-interval=4"),
        output=tmp_path / "big.json",
        commit="abc",
    )


def test_all_of_it_is_done_and_measured(args):
    args.work.mkdir()
    (args.work / "mine").touch()
    console = Console(file=io.StringIO(), width=200)
    big_training.measure(args, console)
    report = json.loads(args.output.read_text())
    assert report["kind"] == "big training" and "--rows 3000" in report["command"]
    assert report["rows"] == 3000 and report["rows_after"] != 3000
    assert report["rows_after"] <= 1.02 * report["rows"]
    assert report["evaluated_views"] == 2
    assert report["tiles"] > 1 and report["views"] == 6 * report["tiles"]
    # 59 parameters and their two moments, in float32, of all rows.
    assert 0 <= report["checkpoint_bytes"] - 708 * report["rows_after"] < 300_000
    assert set(report["seconds"]) == {
        "reading images", "making rows", "training", "refinement", "checkpoint", "evaluation"
    }  # fmt: skip
    assert min(report["seconds"].values()) > 0 and report["it_per_s"] > 0
    assert report["counters"]["views"] == 21
    said = console.file.getvalue()
    assert f"3,000, {report['rows_after']:,}" in said
    assert [path.name for path in args.work.iterdir()] == ["mine"], "only its own files go"


@pytest.mark.parametrize(
    ("steps", "setting", "said"),
    [
        (15, (), "let --steps be 21"),
        (21, ("pipeline.model.use-bilateral-grid=True",), "leave camera-optimizer.mode"),
        (21, ("pipeline.model.camera-optimizer.mode=SO3xR3",), "leave camera-optimizer.mode"),
    ],
)
def test_what_cannot_be_is_refused(args, steps, setting, said):
    args.steps, args.overrides = steps, args.overrides + setting
    with pytest.raises(PlanError, match=said):
        big_training.measure(args, Console(file=io.StringIO()))
    assert not args.output.exists()
