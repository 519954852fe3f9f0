"""Arguments of compare.py: settings, scenes, the runs that they make, the commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tyro

from benchmarks import machine, overrides
from benchmarks.plan import CompareArgs, PlanError
from benchmarks.scene import SceneError, dataparser_arguments


def parse(*words: str) -> CompareArgs:
    return tyro.cli(CompareArgs, args=["--scene", "/data/park", "--steps", "100", *words])


def test_settings_become_arguments():
    assert overrides.to_arguments(["a.b-c=1", "lr=-1", "shape=16 16 8", "name=x=y"]) == [
        "--a.b-c=1",
        "--lr=-1",
        *["--shape", "16", "16", "8"],
        "--name=x=y",
    ]


@pytest.mark.parametrize("bad", ["", "a", "=1", "--a=1"])
def test_bad_settings_are_refused_before_anything_runs(bad):
    with pytest.raises(overrides.OverrideError, match="name=value"):
        CompareArgs(Path("x"), 100, overrides=(bad,)).check()


def test_settings_for_one_method():
    settings = ["a=1", "gsscale:b=2", "splatfacto:c=3", "d=x:y"]
    assert overrides.for_method(settings, "gsscale") == ["a=1", "b=2", "d=x:y"]
    assert overrides.for_method(settings, "splatfacto") == ["a=1", "c=3", "d=x:y"]
    assert overrides.common(settings) == ["a=1", "d=x:y"]
    with pytest.raises(PlanError, match="gsscale"):
        CompareArgs(Path("x"), 100, methods=("splatfacto",), overrides=tuple(settings)).check()


def test_runs_of_a_call():
    args = parse(
        *["--engines", "host", "resident", "--seeds", "42", "43"],
        *["--overrides", "a=1", "gsscale:b=2"],
    )
    args.check()
    runs = [(run.method, run.engine, run.seed, run.overrides) for run in args.runs()]
    assert runs == [
        (method, engine, seed, settings)
        for seed in (42, 43)
        for method, engine, settings in (
            ("splatfacto", None, ("a=1",)),
            ("gsscale", "host", ("a=1", "b=2")),
            ("gsscale", "resident", ("a=1", "b=2")),
        )
    ]
    assert len({run.label for run in args.runs()}) == len(runs), "two runs share their files"


def test_recorded_command_makes_the_same_runs():
    args = parse(
        *["--seeds", "42", "43", "--overrides", "a=1", "b=x y", "--parallel", "2"],
        *["--dataparser-overrides", "eval-interval=4", "--output", "/tmp/x.json"],
    )
    command = args.command()
    assert command.startswith("python benchmarks/compare.py --scene park --steps 100 ")
    assert "/" not in command.removeprefix("python benchmarks/"), "a path of this machine"
    import shlex

    again = tyro.cli(CompareArgs, args=shlex.split(command)[2:])
    assert again.runs() == args.runs()
    assert again.dataparser_overrides == args.dataparser_overrides
    assert again.parallel == 2


@pytest.mark.parametrize(
    "words", [["--parallel", "0"], ["--images", "-1"], ["--seeds"], ["--methods"]]
)
def test_senseless_arguments_are_refused(words):
    with pytest.raises(PlanError):
        parse(*words).check()


def test_scene_kinds(tmp_path, colmap_scene):
    colmap = ["colmap", "--colmap-path", "sparse/0", "--downscale-factor", "1"]
    assert dataparser_arguments(colmap_scene, []) == colmap
    assert dataparser_arguments(colmap_scene, ["eval-interval=4"]) == [
        *colmap,
        "--eval-interval=4",
    ]
    (colmap_scene / "transforms.json").write_text("{}")
    assert dataparser_arguments(colmap_scene, []) == ["nerfstudio-data"]
    with pytest.raises(SceneError, match=r"transforms\.json"):
        dataparser_arguments(tmp_path, [])


def test_commit(tmp_path, monkeypatch):
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    git("init", "-q")
    with pytest.raises(machine.MachineError, match="--commit"):
        machine.commit(root=tmp_path)
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    clean = machine.commit(root=tmp_path)
    assert len(clean) == 40
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "x.json").write_text("{}")
    assert machine.commit(root=tmp_path) == clean, "a result makes the code dirty"
    (tmp_path / "b").write_text("untracked code is code too")
    assert machine.commit(root=tmp_path) == f"{clean}-dirty"
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "from-env")
    assert machine.commit(root=tmp_path) == "from-env"
    assert machine.commit("given", root=tmp_path) == "given"


def test_control_group_limits(tmp_path):
    limit = tmp_path / "cpu.max"
    limit.write_text("max 100000\n")
    assert machine._first_numbers(str(limit)) == []
    limit.write_text("250000 100000\n")
    assert machine._first_numbers(str(limit)) == [250_000, 100_000]
    assert machine._first_numbers(str(tmp_path / "absent")) == []
