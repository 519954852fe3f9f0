"""The comparison file: round trip, what may share a file, which run replaces which."""

from __future__ import annotations

import json

import pytest

from benchmarks import merge, results


def test_round_trip(tmp_path, make_run, make_comparison):
    comparison = make_comparison(
        [make_run(), make_run("gsscale", error="out of memory", psnr=None), make_run(seed=43)]
    )
    path = tmp_path / "new" / "park.json"
    results.save(comparison, path)
    assert results.load(path) == comparison
    assert [p.name for p in path.parent.iterdir()] == ["park.json"], "a temporary file was left"
    data = json.loads(path.read_text())
    assert {"scene", "steps", "machine", "commit", "command", "runs"} <= data.keys()
    assert "error" not in data["runs"][0] and data["runs"][1]["error"] == "out of memory"


def test_a_failed_write_keeps_the_file(tmp_path, make_run, make_comparison):
    path = tmp_path / "park.json"
    results.save(make_comparison([make_run()]), path)
    before = path.read_text()
    with pytest.raises(ValueError):
        results.save(make_comparison([make_run(psnr=float("nan"))]), path)
    assert path.read_text() == before
    path.unlink()
    path.mkdir()  # the rename fails
    with pytest.raises(results.ResultsError, match="another --output"):
        results.save(make_comparison([make_run()]), path)
    assert [p.name for p in tmp_path.iterdir()] == ["park.json"], "a temporary file was left"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "micro"}', '{"kind": "comparison", "runs": [{"x": 1}]}']
)
def test_other_files_are_refused(text):
    with pytest.raises(results.ResultsError, match=r"f\.json"):
        results.from_json(text, "f.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scene", "other"),
        ("steps", 1),
        ("overrides", ["pipeline.model.sh-degree=0"]),
        ("dataparser", ["nerfstudio-data"]),
    ],
)
def test_other_work_never_shares_a_file(make_comparison, field, value):
    for allow_mixed in (False, True):
        with pytest.raises(results.ResultsError, match=field):
            make_comparison().check_compatible(make_comparison(**{field: value}), allow_mixed)


@pytest.mark.parametrize(("field", "value"), [("commit", "d" * 40), ("machine", {"gpu": "other"})])
def test_other_commits_and_machines_only_when_told(make_comparison, field, value):
    other = make_comparison(**{field: value})
    with pytest.raises(results.ResultsError, match="--allow-mixed"):
        make_comparison().check_compatible(other)
    make_comparison().check_compatible(other, allow_mixed=True)


def test_which_run_stays(make_run, make_comparison):
    timed = make_run(psnr=1.0)
    timed_again = make_run(psnr=2.0)
    untimed = make_run(psnr=3.0, it_per_s_last_1000=None, parallel=2)
    failed = make_run(psnr=None, error="killed")
    failed_again = make_run(psnr=None, error="killed again")
    expected = {  # (in the file, new): what stays
        (0, 1): 1,
        (0, 2): 0,
        (0, 3): 0,
        (2, 0): 0,
        (2, 3): 2,
        (3, 0): 0,
        (3, 2): 2,
        (3, 4): 4,
    }
    runs = [timed, timed_again, untimed, failed, failed_again]
    for (present, new), stays in expected.items():
        comparison = make_comparison([make_run(seed=7), runs[present]])
        comparison.add(runs[new])
        assert comparison.runs == [make_run(seed=7), runs[stays]], (present, new)


def test_runs_that_differ_in_anything_stay_side_by_side(make_run, make_comparison):
    different = [
        make_run(),
        make_run("gsscale"),
        make_run("gsscale", engine="resident"),
        make_run(seed=43),
        make_run(overrides=["a=1"]),
        make_run(commit="d" * 40),
        make_run(machine={"gpu": "other"}),
    ]
    comparison = make_comparison()
    for run in different + different:
        comparison.add(run)
    assert comparison.runs == different


def test_longer_runs_join_by_their_evaluation_on_the_way(tmp_path, make_run, make_comparison):
    course = [{"at_step": step, "psnr": step / 1000, "gaussians": step} for step in (5000, 7000)]
    longer = make_comparison(
        [make_run(course=course), make_run("gsscale"), make_run(seed=44, course=course[:1])],
        steps=9000,
    )
    results.save(longer, tmp_path / "longer.json")
    results.save(make_comparison([make_run(seed=43)], steps=7000), tmp_path / "short.json")
    files = (tmp_path / "longer.json", tmp_path / "short.json")
    args = merge.MergeArgs(files, output=tmp_path / "joined.json", at_step=7000)
    merge.merge(args)
    joined = results.load(args.output)
    assert joined.steps == 7000 and [run.seed for run in joined.runs] == [42, 43]
    early, short = joined.runs
    assert (early.psnr, early.gaussians, early.at_step) == (7.0, 7000, 7000)
    assert early.wall_s is early.it_per_s_last_1000 is early.peak_gpu_allocated_bytes is None
    assert short == make_run(seed=43)
    args.at_step = None
    with pytest.raises(results.ResultsError, match="steps"):
        merge.merge(args)


def test_merge_files(tmp_path, make_run, make_comparison):
    other_machine = {"gpu": "other"}
    results.save(make_comparison([make_run()], command="first"), tmp_path / "a.json")
    results.save(
        make_comparison(
            [make_run("gsscale", commit="d" * 40)],
            command="first\nsecond",
            commit="d" * 40,
            machine=other_machine,
        ),
        tmp_path / "b.json",
    )
    args = merge.MergeArgs(
        files=(tmp_path / "a.json", tmp_path / "b.json"), output=tmp_path / "c.json"
    )
    with pytest.raises(results.ResultsError):
        merge.merge(args)
    assert not args.output.exists()
    args.allow_mixed = True
    merge.merge(args)
    joined = results.load(args.output)
    assert joined.command == "first\nsecond"
    assert joined.commit == "c" * 40 and joined.runs[1].commit == "d" * 40
    assert [run.machine for run in joined.runs] == [None, other_machine]
