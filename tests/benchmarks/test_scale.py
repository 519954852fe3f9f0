"""scale.py with made-up children and with a real one on the CPU, and the cap on GPU memory."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import children, fixed_rows, machine, scale
from benchmarks import report as report_page
from benchmarks.errors import BenchmarkError
from benchmarks.memory_cap import cap_gpu_memory
from benchmarks.plan import PlanError
from benchmarks.scale import ScaleArgs
from benchmarks.step import child_command
from tests.benchmarks.flat_flight import flight
from tests.benchmarks.test_step import COUNTED, MEASURED


@pytest.fixture(autouse=True)
def _quick(monkeypatch, make_comparison) -> None:
    monkeypatch.setattr(machine, "describe_apart", lambda: make_comparison().machine)
    monkeypatch.setattr(children, "POLL_S", 0.02)


def arguments(scene, folder, rows, **fields) -> ScaleArgs:
    fields = {"output": folder / "scale.json", "commit": "abc", "logs": folder / "logs", **fields}
    return ScaleArgs(scene, rows, **fields)


def run(args: ScaleArgs, answer) -> tuple[int, str, list]:
    """Call scale.measure; ``answer(label, rows)`` is what a run's process writes."""
    asked = []

    def command(spec, files):
        rows = int(files.log.parent.name.removeprefix("rows-"))
        asked.append((spec.label, rows))
        text = json.dumps(answer(spec.label, rows))
        return [sys.executable, "-c", f"open({str(files.result)!r}, 'w').write({text!r})"]

    console = Console(file=io.StringIO(), width=200)
    failed = scale.measure(args, console, command)
    return failed, console.file.getvalue(), asked


def test_a_method_that_is_out_of_memory_is_not_asked_for_more(colmap_scene, tmp_path):
    def answer(label: str, rows: int) -> dict:
        if label.startswith("splatfacto") and rows > 2000:
            return {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
        return COUNTED if "resident" in label else MEASURED

    methods = ("splatfacto", "gsscale-resident")
    args = arguments(colmap_scene, tmp_path, (1e3, 3e3, 4e3), methods=methods, cap_gb=8)
    failed, said, asked = run(args, answer)
    assert failed == 0, "that there is no more memory is an answer"
    assert [rows for label, rows in asked if label.startswith("splatfacto")] == [1000, 3000]
    assert [rows for label, rows in asked if "resident" in label] == [1000, 3000, 4000]
    report = json.loads(args.output.read_text())
    assert report["kind"] == "scale" and report["cap_gb"] == 8
    page = report_page.page(args.output.parent)
    assert "park, steps of up to 4,000 rows" in page and "8 GB for each process" in page
    assert "| splatfacto | 3,000 | out of memory |" in page
    assert "--rows 1000 3000 4000" in report["command"] and "--cap-gb 8" in report["command"]
    table = scale.table(report)
    cells = {(line[0], line[1]): dict(zip(table.columns, line, strict=True)) for line in table.rows}
    assert cells["splatfacto", "3,000"]["ms"] == "out of memory"
    resident = cells["gsscale-resident", "4,000"]
    assert (resident["host"], resident["missed"], resident["GPU GB"]) == ("1.2", "25%", "2.00")
    assert "out of memory" in said


def test_another_failure_is_one(colmap_scene, tmp_path):
    args = arguments(colmap_scene, tmp_path, (1e3, 2e3), methods=("gsscale-host",))
    failed, said, asked = run(args, lambda *_: {"error": "ValueError: no"})
    assert (failed, len(asked)) == (1, 1)
    assert "failed" in said


def test_as_many_rows_are_visible_whatever_their_number(colmap_scene, tmp_path):
    args = arguments(colmap_scene, tmp_path, (1e3, 4e3), visible_rows=500.0, cap_gb=8.0)
    assert [args.steps_at(rows).visible for rows in (100.0, *args.rows)] == [1.0, 0.5, 0.125]
    spec = args.steps_at(1e3).spec("gsscale-resident")
    assert spec.overrides == ("pipeline.model.vram-budget-gb=8.0",)
    assert args.steps_at(1e3).spec("splatfacto").overrides == ()


def test_a_number_of_visible_rows_that_cannot_be_kept_is_refused(
    colmap_scene, tmp_path, monkeypatch
):
    """A view of the flight sees a 40th of the rows, or less where there are more tiles."""
    monkeypatch.setattr(fixed_rows, "train_split", lambda config: flight())

    def asked(visible_rows: float) -> list:
        fields = {"visible_rows": visible_rows, "methods": ("gsscale-host",)}
        args = arguments(colmap_scene, tmp_path, (2e4, 6e4), **fields)
        return [rows for _, rows in run(args, lambda *_: COUNTED)[2]]

    with pytest.raises(PlanError, match=r"20,000 rows a view sees [\d,]+ at best.* 2000") as told:
        asked(2000)
    seen = float(str(told.value).partition("let it be ")[2].partition(",")[0])
    assert 500 < seen < 1500
    assert asked(seen) == [20_000, 60_000]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rows": (2e3, 1e3)}, "ascending"),
        ({"rows": ()}, "at least one"),
        ({"cap_gb": 0.0}, "cap"),
        ({"visible_rows": 0.0}, "positive"),
        ({"cap_gb": 8.0, "turns": Path("x")}, "--cuda-gb goes with --cap-gb"),
        ({"cap_gb": 8.0, "cuda_gb": 0.6}, "--cuda-gb goes with --cap-gb"),
    ],
)
def test_what_cannot_be(colmap_scene, tmp_path, fields, said):
    args = arguments(colmap_scene, tmp_path, **{"rows": (1e3,), **fields})
    with pytest.raises(PlanError, match=said):
        args.check()


def test_steps_are_made_while_others_on_the_gpu_wait(colmap_scene, tmp_path):
    shared = {"cap_gb": 8.0, "cuda_gb": 0.6, "turns": tmp_path / "turns"}
    args = arguments(colmap_scene, tmp_path, (1e3,), methods=("gsscale-host",), **shared)
    args.check()
    assert "--cuda-gb 0.6 --turns DIR" in args.command()
    steps = args.steps_at(1e3)
    words = child_command(steps)(steps.spec("gsscale-host"), children.Files(*[tmp_path / "x"] * 3))
    assert words[words.index("--turns") + 1] == str(tmp_path / "turns")
    assert words[words.index("--cuda-gb") + 1] == "0.6"


def test_the_cap_counts_what_is_taken_already(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (99e9, 100e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    cap_gpu_memory(8)
    cap_gpu_memory(8, cuda_gigabytes=0.5)  # where others have taken the rest
    assert shares == [pytest.approx(0.07), pytest.approx(0.075)]
    with pytest.raises(BenchmarkError, match=r"1\.00 GB of the GPU are taken"):
        cap_gpu_memory(0.9)


@pytest.mark.gpu
def test_under_a_cap_memory_runs_out_where_a_small_card_would_end():
    code = (
        "import torch; from benchmarks.memory_cap import cap_gpu_memory\n"
        "free, total = torch.cuda.mem_get_info()  # others may be on this GPU, too\n"
        "cap_gpu_memory((total - free) / 1e9 + 1.5)\n"
        "kept = [torch.empty(10**9, dtype=torch.uint8, device='cuda')]\n"
        "try: kept.append(torch.empty(10**9, dtype=torch.uint8, device='cuda'))\n"
        "except torch.cuda.OutOfMemoryError: print('ended')"
    )
    # Python may have been told not to look into the current folder.
    found = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(machine.ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": found.lstrip(os.pathsep)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "ended", done.stderr
