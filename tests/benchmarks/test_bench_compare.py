"""compare.py with made-up children: order, failures, appending, parallel runs, interruption."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import children, compare, machine, results
from benchmarks.plan import CompareArgs, PlanError

MEASURED = {
    "psnr": 29.5,
    "ssim": 0.9,
    "held_out_images": 3,
    "gaussians": 1000,
    "it_per_s_last_1000": 50.0,
    "timed_steps": 1000,
    "wall_s": 20.0,
    "peak_gpu_allocated_bytes": 10**9,
    "peak_gpu_reserved_bytes": 2 * 10**9,
    "peak_host_bytes": 3 * 10**9,
}
WRITE = f"open(RESULT, 'w').write({json.dumps(json.dumps(MEASURED))})"


class Bench:
    """compare() on a made-up machine, with children that are lines of Python."""

    def __init__(self, scene: Path, folder: Path) -> None:
        self.scene = scene
        self.folder = folder
        self.output = folder / "results.json"
        self.started: list[str] = []
        self.text = ""

    def run(self, behaviour: dict[str, str] | None = None, **fields) -> int:
        """Call compare(); ``behaviour`` maps a run's label to what its process does."""
        behaviour = behaviour or {}

        def command(spec, files):
            self.started.append(spec.label)
            names = {"RESULT": str(files.result), "PROGRESS": str(files.progress)}
            return [sys.executable, "-c", f"{_assign(names)}\n{behaviour.get(spec.label, WRITE)}"]

        if "append" not in fields:
            fields.setdefault("output", self.output)
        args = CompareArgs(self.scene, 2000, logs=self.folder / "logs", commit="abc", **fields)
        console = Console(file=io.StringIO(), width=200)
        try:
            return compare.compare(args, console, command)
        finally:
            self.text = console.file.getvalue()

    def runs(self) -> list[results.Run]:
        return results.load(self.output).runs


def _assign(names: dict[str, str]) -> str:
    return "\n".join(f"{name} = {value!r}" for name, value in names.items())


@pytest.fixture
def bench(colmap_scene, tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(machine, "describe_apart", lambda: {**dict.fromkeys(PARTS), "cpu": "x"})
    monkeypatch.setattr(children, "POLL_S", 0.02)
    return Bench(colmap_scene, tmp_path)


PARTS = ("gpu", "gpu_memory_gib", "cpu", "cores", "ram_gib", "python", *machine.PACKAGES)


def test_all_runs_in_one_file(bench):
    assert bench.run(seeds=(42, 43), overrides=("a=1", "gsscale:b=2")) == 0
    runs = bench.runs()
    assert [(run.method, run.engine, run.seed) for run in runs] == [
        ("splatfacto", None, 42),
        ("gsscale", "auto", 42),
        ("splatfacto", None, 43),
        ("gsscale", "auto", 43),
    ]
    assert runs[1].overrides == ["a=1", "b=2"]
    for run in runs:
        assert run.commit == "abc" and run.parallel == 1 and run.error is None
        assert {name: getattr(run, name) for name in MEASURED} == MEASURED
    comparison = results.load(bench.output)
    assert (comparison.scene, comparison.steps) == ("park", 2000)
    assert comparison.overrides == ["a=1"]
    assert "29.50" in bench.text and "1.00x" in bench.text


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("raise RuntimeError('no such flag')", "exit status 1.*RuntimeError: no such flag"),
        ("open(RESULT, 'w').write('{\"error\": \"told\"}'); raise SystemExit(1)", "^told$"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("pass", "no result was written"),
        ("open(RESULT, 'w').write('{')", "no result was written"),
        (f"{WRITE}\nimport os; os.abort()", "signal 6"),
    ],
)
def test_a_failed_run_is_recorded_and_the_others_go_on(bench, behaviour, message):
    assert bench.run({"splatfacto-seed42": behaviour}) == 1
    failed, fine = bench.runs()
    assert re.search(message, failed.error)
    assert failed.psnr is None and failed.peak_host_bytes is None
    assert fine.error is None and fine.psnr == 29.5
    assert "failed" in bench.text


def test_a_result_left_by_an_earlier_call_is_not_taken(bench, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "splatfacto-seed42.result.json").write_text(json.dumps(MEASURED))
    assert bench.run({"splatfacto-seed42": "pass"}) == 1
    assert bench.runs()[0].error == "no result was written"


def test_the_tail_of_the_log_is_shown(bench):
    child = "print('\\x1b[31mred\\x1b[0m'); print('0%\\r50%\\r100%'); raise SystemExit('the cause')"
    bench.run({"gsscale-auto-seed42": child})
    for line in ("red", "100%", "the cause"):
        assert line in bench.text
    assert "50%" not in bench.text and "\x1b[31m" not in bench.text


def test_append_does_what_is_missing(bench):
    assert bench.run({"gsscale-auto-seed42": "raise SystemExit(1)"}) == 1
    first = bench.output.read_text()
    bench.started.clear()
    assert bench.run(append=bench.output, seeds=(42, 43)) == 0
    assert bench.started == ["gsscale-auto-seed42", "splatfacto-seed43", "gsscale-auto-seed43"]
    assert len(bench.runs()) == 4 and all(run.error is None for run in bench.runs())
    assert len(results.load(bench.output).command.splitlines()) == 2
    assert bench.output.read_text() != first
    bench.started.clear()
    assert bench.run(append=bench.output, seeds=(42, 43)) == 0
    assert bench.started == []


def test_append_elsewhere_leaves_the_first_file(bench, tmp_path):
    bench.run(methods=("splatfacto",))
    first = bench.output.read_text()
    both = tmp_path / "both.json"
    bench.run(append=bench.output, output=both)
    assert bench.output.read_text() == first
    assert len(results.load(both).runs) == 2


def test_other_work_is_refused_before_anything_runs(bench, monkeypatch):
    bench.run(methods=("splatfacto",))
    bench.started.clear()
    with pytest.raises(results.ResultsError, match="overrides"):
        bench.run(append=bench.output, overrides=("a=1",))
    with pytest.raises(PlanError, match="--append"):
        bench.run()
    other = {**dict.fromkeys(PARTS), "cpu": "another"}
    monkeypatch.setattr(machine, "describe_apart", lambda: other)
    with pytest.raises(results.ResultsError, match="machine"):
        bench.run(append=bench.output)
    assert bench.started == [] and len(bench.runs()) == 1
    bench.run(append=bench.output, allow_mixed=True, methods=("gsscale",))
    assert [run.machine for run in bench.runs()] == [None, other]


def test_parallel_runs_take_turns(bench):
    # Each waits for the other: this ends only if they run at the same time.
    meet = textwrap.dedent("""
        import os, time
        folder = os.path.dirname(RESULT)
        open(RESULT + ".here", "w").close()
        while len([n for n in os.listdir(folder) if n.endswith(".here")]) < 2:
            time.sleep(0.01)
    """)
    labels = ("splatfacto-seed42", "gsscale-auto-seed42")
    assert bench.run({label: meet + WRITE for label in labels}, parallel=2, timeout=10) == 0
    for run in bench.runs():
        assert run.parallel == 2 and run.it_per_s_last_1000 == 50.0


def test_runs_that_share_a_gpu_are_told(tmp_path):
    def words(**fields: Any) -> list[str]:
        args = CompareArgs(tmp_path, steps=10, logs=tmp_path / "logs", **fields)
        (spec, _) = args.runs()
        files = children.Files(tmp_path / "log", tmp_path / "result", tmp_path / "progress")
        return compare.child_command(args)(spec, files)

    assert "--turns" not in words()
    for fields, folder in (({"parallel": 2}, "logs/turns"), ({"turns": tmp_path / "x"}, "x")):
        told = words(**fields)
        assert told[told.index("--turns") + 1] == str(tmp_path / folder)
    told = words(cap_gb=8, cuda_gb=0.6, turns=tmp_path)
    assert told[-4:] == ["--cap-gb", "8", "--cuda-gb", "0.6"]
    for fields in ({"cap_gb": 8, "turns": tmp_path}, {"cap_gb": 8, "cuda_gb": 0.6}):
        with pytest.raises(PlanError, match="--cuda-gb goes with --cap-gb where runs share"):
            CompareArgs(tmp_path, steps=10, **fields).check()


def test_timeout(bench):
    sleep = "import time; time.sleep(60)"
    began = time.monotonic()
    assert bench.run({"splatfacto-seed42": sleep}, timeout=0.5) == 1
    assert time.monotonic() - began < 10
    assert "timeout" in bench.runs()[0].error and bench.runs()[1].error is None


def test_an_interrupt_ends_the_children_and_keeps_the_results(bench, tmp_path):
    pid_file = tmp_path / "pid"
    hang = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt(path: Path) -> tuple[str, int]:
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt
        return "training", 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children.progress_file, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench.run({"gsscale-auto-seed42": hang})
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert [run.method for run in bench.runs()] == ["splatfacto"]


def test_the_real_child_command_is_what_run_one_takes(colmap_scene, tmp_path):
    import tyro

    from benchmarks.run_one import RunArgs

    args = CompareArgs(
        colmap_scene,
        100,
        overrides=("a=1", "gsscale:b=x y"),
        dataparser_overrides=("eval-interval=4",),
        save_images=tmp_path,
        crop=(1, 2, 30, 40),
    )
    files = children.Files(tmp_path / "log", tmp_path / "result", tmp_path / "progress")
    splatfacto, gsscale = (
        tyro.cli(RunArgs, args=compare.child_command(args)(spec, files)[2:]) for spec in args.runs()
    )
    assert (splatfacto.method, splatfacto.engine) == ("splatfacto", None)
    assert splatfacto.overrides == ("a=1",)
    assert (gsscale.method, gsscale.engine) == ("gsscale", "auto")
    assert gsscale.overrides == ("a=1", "b=x y")
    assert gsscale.dataparser_overrides == ("eval-interval=4",)
    assert (gsscale.result, gsscale.progress) == (files.result, files.progress)
    assert (gsscale.steps, gsscale.seed, gsscale.images) == (100, 42, 3)
    assert gsscale.name == "park-gsscale-auto-seed42" and gsscale.crop == (1, 2, 30, 40)


@pytest.mark.parametrize("crop", [(-1, 0, 5, 5), (0, 0, 5, 0), (0, 0, 5, 5)])
def test_a_detail_that_cannot_be(colmap_scene, tmp_path, crop):
    folder = None if crop == (0, 0, 5, 5) else tmp_path
    with pytest.raises(PlanError, match="--crop takes X Y W H, and --save-images"):
        CompareArgs(colmap_scene, 100, save_images=folder, crop=crop).check()


@pytest.mark.parametrize("name", ["compare.py", "merge.py", "report.py", "run_one.py"])
def test_scripts_start_from_anywhere(name, tmp_path):
    script = machine.ROOT / "benchmarks" / name
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
