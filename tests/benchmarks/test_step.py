"""step.py with made-up children and with a real one on the CPU, and the meter that it uses."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import children, exposed, machine, step, step_meter, step_table
from benchmarks import report as report_page
from benchmarks.clock import Clock
from benchmarks.plan import PlanError
from benchmarks.progress import ProgressFile
from benchmarks.scene import SceneError
from benchmarks.step import StepArgs
from gsscale_nerfstudio.engines.waits import LinkWaits
from gsscale_nerfstudio.store import RowLayout
from tests.engines.driving import DEVICES, drive, make_engine, random_rows
from tests.runs import tiny_scene

MEASURED: dict[str, Any] = {
    "ms_median": 20.0,
    "ms_mean": 21.0,
    "forward_ms": 5.0,
    "backward_ms": 9.0,
    "optimizer_ms": 6.0,
    "visible_rows": 1234.0,
    "exposed_transfer_ms": None,
    "gpu_busy_ms": 18.0,
    "gpu_busy_share": 0.9,
    "peak_gpu_allocated_bytes": 2 * 10**9,
    "peak_gpu_reserved_bytes": 3 * 10**9,
    "peak_host_bytes": 4 * 10**9,
    "counters": None,
    "tiles": 3,
    "views": 24,
    "planned_visible_share": 0.07,
    "image": [64, 48],
}
SPLATFACTO = {**MEASURED, "ms_mean": 42.0, "peak_gpu_allocated_bytes": 8 * 10**9}
COUNTED = {
    **MEASURED,
    "exposed_transfer_ms": 2.5,
    "counters": {"rows": 2000.0, "rows_missed": 500.0, "cull_s": 0.00125},
}


@pytest.fixture
def quick(monkeypatch, machine_facts) -> None:
    monkeypatch.setattr(machine, "describe_apart", lambda: machine_facts)
    monkeypatch.setattr(children, "POLL_S", 0.02)


@pytest.fixture
def machine_facts(make_comparison) -> dict[str, Any]:
    return make_comparison().machine


def run(args: StepArgs, answers: dict[str, Any] | None = None) -> tuple[int, str]:
    """Call step.measure; ``answers`` maps a run's label to what its process writes."""

    def command(spec, files):
        answer = (answers or {})[spec.label]
        return [sys.executable, "-c", f"open({str(files.result)!r}, 'w').write({answer!r})"]

    console = Console(file=io.StringIO(), width=220)
    failed = step.measure(args, console, None if answers is None else command)
    return failed, console.file.getvalue()  # type: ignore[attr-defined]


def arguments(scene, folder, **fields) -> StepArgs:
    fields = {"output": folder / "step.json", "commit": "abc", "logs": folder / "logs", **fields}
    return StepArgs(scene, fields.pop("rows", 1000), **fields)


def test_one_file_and_one_table(quick, colmap_scene, tmp_path):
    args = arguments(colmap_scene, tmp_path, budget_gb=8.0)
    answers = {
        "splatfacto-seed42": json.dumps(SPLATFACTO),
        "gsplat-seed42": json.dumps({"error": "RuntimeError: no [fused] loss"}),
        "gsscale-host-seed42": json.dumps(MEASURED),
        "gsscale-resident-seed42": json.dumps(COUNTED),
    }
    failed, text = run(args, answers)
    assert failed == 1
    report = json.loads(args.output.read_text())
    assert (report["kind"], report["scene"], report["rows"]) == ("step", "park", 1000)
    assert report["commit"] == "abc" and "--budget-gb 8.0" in report["command"]
    assert str(tmp_path) not in args.output.read_text(), "a path of this machine"
    page = report_page.page(args.output.parent)
    assert "park, a step at 1,000 rows" in page and report["command"] in page
    by_name = {run["method"]: run for run in report["runs"]}
    assert list(by_name) == ["splatfacto", "gsplat", "gsscale-host", "gsscale-resident"]
    assert by_name["splatfacto"] == {"method": "splatfacto", "overrides": [], **SPLATFACTO}
    assert by_name["gsplat"]["error"] == "RuntimeError: no [fused] loss"
    for engine in ("host", "resident"):
        settings = by_name[f"gsscale-{engine}"]["overrides"]
        assert settings == ["pipeline.model.vram-budget-gb=8.0"]
    table = step_table.step_table(report)
    cells = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert "gsplat" not in cells
    assert cells["splatfacto"]["speed"] == "1.00x"
    host = cells["gsscale-host"]
    assert (host["ms median"], host["speed"], host["memory"]) == ("20.00", "2.00x", "0.25x")
    assert (host["GPU busy"], host["host GB"], host["visible"]) == ("90%", "4.00", "1,234")
    assert [host[name] for name in ("exposed", "cull", "missed")] == ["-"] * 3
    cached = cells["gsscale-resident"]
    assert [cached[name] for name in ("exposed", "cull", "missed")] == ["2.50", "1.25", "25%"]
    counters = step_table.counter_table(report)
    assert counters.columns == ["per step", "gsscale-resident"]
    assert counters.rows == [["rows", "2,000"], ["rows_missed", "500"], ["cull_s", "0.00125"]]
    for piece in ("2.00x", "3 tiles, 24 views of 64 x 48", "no [fused] loss", "rows_missed"):
        assert piece in text, piece


def test_what_needs_a_gpu_is_skipped_on_the_cpu(quick, colmap_scene, tmp_path):
    args = arguments(colmap_scene, tmp_path, device="cpu")
    answer = json.dumps({**MEASURED, "peak_gpu_allocated_bytes": None, "gpu_busy_share": None})
    labels = ("gsscale-host-seed42", "gsscale-resident-seed42")
    failed, text = run(args, dict.fromkeys(labels, answer))
    assert failed == 0
    assert "splatfacto is skipped: it needs a GPU" in text
    assert len(json.loads(args.output.read_text())["runs"]) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("nerfacto",)}, "--methods takes splatfacto"),
        ({"methods": ()}, "not nothing"),
        ({"rows": 0}, "--rows"),
        ({"steps": 0}, "--steps"),
        ({"warmup": -1}, "--warmup"),
        ({"visible": 0.0}, "--visible"),
        ({"visible": 1.5}, "--visible"),
        ({"budget_gb": 0.0}, "--budget-gb"),
        ({"overrides": ("nope:a=1",)}, "nope"),
    ],
)
def test_arguments_without_sense_are_refused(colmap_scene, tmp_path, fields, message):
    args = arguments(colmap_scene, tmp_path, **fields)
    with pytest.raises(PlanError, match=message):
        step.measure(args, Console(file=io.StringIO()))
    assert not args.output.exists()


def test_files_that_do_not_fit_are_refused(colmap_scene, tmp_path):
    with pytest.raises(SceneError):
        arguments(tmp_path / "nowhere", tmp_path).check()
    args = arguments(colmap_scene, tmp_path)
    args.output.write_text("mine")
    with pytest.raises(PlanError, match="exists"):
        args.check()


def test_the_command_does_the_same_again(colmap_scene, tmp_path):
    import tyro

    args = arguments(
        colmap_scene,
        tmp_path,
        methods=("gsscale-host",),
        budget_gb=2.5,
        device="cpu",
        overrides=("gsscale:a=1",),
        dataparser_overrides=("eval-interval=4",),
    )
    again = tyro.cli(StepArgs, args=args.command().split()[2:])
    assert again.command() == args.command()
    assert again.spec("gsscale-host") == args.spec("gsscale-host")


def test_views_come_in_epochs_and_know_the_next():
    order = step_meter.view_order(5, seed=1)
    pairs = list(itertools.islice(order, 20))
    views = [view for view, _ in pairs]
    assert [upcoming[0] for _, upcoming in pairs[:-1]] == views[1:]
    epochs = [views[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert list(itertools.islice(step_meter.view_order(5, seed=1), 20)) == pairs
    assert next(step_meter.view_order(1, seed=0)) == (0, [0] * step_meter.UPCOMING)


class Counting:
    """A method that does nothing but count."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def step(self, view, upcoming, mark) -> None:
        self.seen.append((view, upcoming))
        for _ in range(4):
            mark()

    def visible(self) -> int:
        return 7

    def counters(self) -> dict[str, float]:
        # One appears only when the first step is done.
        return {"steps": float(len(self.seen)), **({"late": 8.0} if len(self.seen) > 3 else {})}


def test_counters_are_per_timed_step():
    method = Counting()
    device = torch.device("cpu")
    order = step_meter.view_order(5, seed=0)
    result = step_meter.measure(method, order, 3, 4, device, ProgressFile(None, 4))
    assert result["counters"] == {"steps": 1.0, "late": 2.0}
    assert len(method.seen) == 3 + 4 + step_meter.PHASE_STEPS
    assert result["visible_rows"] == 7 and result["gpu_busy_share"] is None
    assert result["ms_mean"] >= 0 and result["peak_host_bytes"] > 0
    assert result["exposed_transfer_ms"] is None, "there is no link"


class Waiting(Counting):
    """A method that waits for the link once, twice, and not at all, in turn."""

    def step(self, view, upcoming, mark) -> None:
        super().step(view, upcoming, mark)
        for _ in range(len(self.seen) % 3):
            LinkWaits({}).wait(None, torch.device("cpu"))


def test_waits_for_the_link_are_timed_per_step(monkeypatch):
    monkeypatch.setattr(exposed, "wait_in_stream", lambda mark, device: time.sleep(0.003))
    method, clock = Waiting(), Clock(torch.device("cpu"))
    order = step_meter.view_order(5, seed=0)
    waits = exposed.waits_per_step(method, order, clock)
    assert len(waits) == len(method.seen) == exposed.STEPS
    assert all(waited >= 3 * (i % 3) for i, waited in enumerate(waits, 1))
    assert all(waited == 0 for waited in waits[2::3])
    clock.cuda = True
    monkeypatch.setattr(exposed, "waits_per_step", lambda *_: [1.0, 4.0, 2.0])
    assert exposed.exposed_transfer(method, order, clock) == {"exposed_transfer_ms": 2.0}
    monkeypatch.setattr(method, "counters", lambda: None)  # no engine
    assert exposed.exposed_transfer(method, order, clock) == {"exposed_transfer_ms": None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache_rows", [None, 200])
def test_engines_wait_where_the_timing_looks(device, cache_rows):
    layout, clock = RowLayout(0), Clock(torch.device(device))
    engine = make_engine(random_rows(200, layout), layout, device, cache_rows)
    with exposed.timed_waits(clock) as waits:
        drive(engine, 4)
    clock.synchronize()
    assert len(waits) >= 3 and all(clock.milliseconds(list(pair))[0] >= 0 for pair in waits)


def test_engines_wait_as_ever_when_the_timing_is_over():
    untouched = LinkWaits.wait
    with pytest.raises(KeyError), exposed.timed_waits(Clock(torch.device("cpu"))) as waits:
        assert LinkWaits.wait is not untouched
        LinkWaits({}).wait(None, torch.device("cpu"))
        raise KeyError
    assert len(waits) == 1
    assert LinkWaits.wait is untouched


@pytest.mark.slow
def test_a_real_step_on_the_cpu(tmp_path):
    """The whole way: a scene on disk, a process, gsscale's model and engine, the file."""
    scene = tiny_scene(tmp_path / "village")
    args = arguments(
        scene,
        tmp_path,
        rows=500,
        visible=0.5,
        steps=3,
        warmup=1,
        device="cpu",
        methods=("gsscale-host", "splatfacto"),
    )
    failed, text = run(args)
    assert failed == 0, text
    (only,) = json.loads(args.output.read_text())["runs"]
    assert only["method"] == "gsscale-host"
    assert only["image"] == [64, 48] and only["tiles"] > 1
    assert 0 < only["visible_rows"] <= 300
    assert only["visible_rows"] / 500 == pytest.approx(only["planned_visible_share"], rel=0.5)
    for name in ("ms_median", "ms_mean", "forward_ms", "backward_ms", "optimizer_ms"):
        assert only[name] > 0, name
    assert only["peak_gpu_allocated_bytes"] is None and only["peak_host_bytes"] > 1e8
