"""Means, differences and the generated page."""

from __future__ import annotations

import pytest

from benchmarks import report, results, summary, tables
from benchmarks.report import ReportArgs


def test_the_page_in_the_repository_is_what_the_results_give():
    assert report.report(ReportArgs(check=True)) == 0, "run python benchmarks/report.py"


def test_comparison_with_splatfacto(make_run, make_comparison):
    comparison = make_comparison(
        [
            make_run(psnr=29.0, ssim=0.88, it_per_s_last_1000=90.0),
            make_run(seed=43, psnr=30.0, ssim=0.90, it_per_s_last_1000=110.0),
            make_run("gsscale", psnr=29.6, gaussians=880_000, it_per_s_last_1000=150.0),
            make_run(
                "gsscale",
                seed=43,
                psnr=29.8,
                gaussians=880_000,
                it_per_s_last_1000=None,
                peak_gpu_allocated_bytes=1_000_000_000,
            ),
            make_run("gsscale", seed=44, psnr=None, error="out of memory"),
        ]
    )
    splatfacto, gsscale = summary.compare_groups(comparison)
    assert splatfacto.psnr_difference == 0 and splatfacto.speed_ratio == 1
    assert splatfacto.group.deviation("psnr") == pytest.approx(0.5**0.5)
    assert gsscale.psnr_difference == pytest.approx(0.2)
    assert gsscale.ssim_difference == pytest.approx(-0.01)
    assert gsscale.gaussians_difference == pytest.approx(0.1)
    assert gsscale.speed_ratio == pytest.approx(1.5), "an untimed run counts"
    assert gsscale.memory_ratio == pytest.approx(0.75)
    assert len(gsscale.group.runs) == 2 and len(gsscale.group.failed) == 1


def test_no_ratio_without_a_splatfacto_run_of_the_same_machine(make_run, make_comparison):
    only = make_comparison([make_run("gsscale")])
    failed = make_comparison([make_run("gsscale"), make_run(error="killed")])
    elsewhere = make_comparison([make_run(), make_run("gsscale", machine={"gpu": "other"})])
    for comparison in (only, failed, elsewhere):
        row = summary.compare_groups(comparison)[-1]
        if comparison is failed:
            row = summary.compare_groups(comparison)[0]
        assert row.group.method == "gsscale"
        assert row.speed_ratio is None and row.psnr_difference is None
        assert row.memory_ratio is None and row.gaussians_difference is None


def test_commits_are_compared_with_their_own_splatfacto_and_pooled(
    tmp_path, make_run, make_comparison
):
    other = {**make_comparison().machine, "gpu": "other"}
    old = {"commit": "d" * 40, "machine": other}
    comparison = make_comparison(
        [
            make_run(psnr=29.0),
            make_run("gsscale", psnr=29.1),
            make_run(psnr=27.0, commit="e" * 40),
            make_run(psnr=28.0, **old),
            make_run("gsscale", psnr=27.7, **old),
        ]
    )
    differences = {
        row.group.label: row.psnr_difference for row in summary.compare_groups(comparison)
    }
    assert differences["gsscale (host)"] == pytest.approx(0.1)
    assert differences["gsscale (host) at ddddddd on other"] == pytest.approx(-0.3)
    table = tables.quality_table(comparison.pooled())
    assert [row[:4] for row in table.rows] == [
        ["splatfacto", "3", "28.00 ± 1.00", "+0.00"],
        ["gsscale (host)", "2", "28.40 ± 0.99", "+0.40"],
    ]
    assert "it/s" not in table.columns and len(table.rows[0]) == len(table.columns)
    results.save(comparison, tmp_path / "a.json")
    assert "All commits together" in report.page(tmp_path)
    results.save(make_comparison([make_run()]), tmp_path / "a.json")
    assert "All commits together" not in report.page(tmp_path)


def test_groups_tell_engines_settings_commits_apart(make_run, make_comparison):
    comparison = make_comparison(
        [
            make_run(overrides=["a=1"]),
            make_run("gsscale", overrides=["a=1"]),
            make_run("gsscale", overrides=["a=1"], engine="resident"),
            make_run("gsscale", overrides=["a=1", "b=2"]),
            make_run("gsscale", overrides=["a=1"], commit="d" * 40 + "-dirty"),
        ],
        overrides=["a=1"],
    )
    assert [group.label for group in summary.group_runs(comparison)] == [
        "splatfacto",
        "gsscale (host)",
        "gsscale (resident)",
        "gsscale (host) b=2",
        "gsscale (host) at ddddddd-dirty",
    ]


def test_tables(make_run, make_comparison):
    comparison = make_comparison([make_run(), make_run("gsscale", error="killed")])
    runs = tables.run_table(comparison)
    assert runs.rows[0] == [
        *["splatfacto", "42", "29.00", "27.0", "0.8800", "800,000", "100.0", "150"],
        *["2.00", "2.50", "3.00"],
    ]
    assert runs.rows[1][:3] == ["gsscale (host)", "42", "failed"]
    means = tables.summary_table(comparison)
    assert [row[0] for row in means.rows] == ["splatfacto"]
    for table in (runs, means):
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert tables.failures(comparison) == ["gsscale (host), seed 42: killed"]


def test_what_the_gpu_did_stands_below_the_runs(tmp_path, make_run, make_comparison):
    profile = {"steps": 20, "ms": 17.4, "busy_ms": 16.0, "kernels": {"copy": 1.0, "draw": 9.5}}
    slow = {**profile, "kernels": {"adam": 20.0, "copy": 3.0}}
    comparison = make_comparison(
        [make_run(profile=slow), make_run("gsscale", profile=profile), make_run(seed=43)]
    )
    table = tables.kernel_table(comparison)
    assert table.columns == ["ms", "splatfacto, seed 42", "gsscale (host), seed 42"]
    assert table.rows == [
        ["a step", "17.40", "17.40"],
        ["the GPU is busy", "16.00", "16.00"],
        ["adam", "20.00", "-"],
        ["draw", "-", "9.50"],
        ["copy", "3.00", "1.00"],
    ]
    results.save(comparison, tmp_path / "a.json")
    assert "| draw | - | 9.50 |" in report.page(tmp_path)
    assert not tables.kernel_table(make_comparison([make_run()])).rows


def test_runs_that_ended_early_have_a_table(tmp_path, make_run, make_comparison):
    ended = "out of GPU memory in step 901, with 5 Gaussians"
    early = make_run(ended=ended, at_step=800, flip=0.1, ms_ssim=0.97, it_per_s_last_1000=None)
    comparison = make_comparison([early, make_run("gsscale", at_step=15_000, flip=0.05)], cap_gb=8)
    rows = tables.course_table(comparison).rows
    assert rows[0][4:] == ["0.9700", "0.1000", "800,000", "800", ended]
    assert rows[1][4:] == ["-", "0.0500", "800,000", "15,000", "no"]
    results.save(comparison, tmp_path / "a.json")
    page = report.page(tmp_path)
    assert ended in page and "8 GB for each run" in page
    assert early.settles(), "it cannot be timed"
    assert not tables.course_table(make_comparison([make_run()])).rows
    with pytest.raises(results.ResultsError, match="cap_gb"):
        comparison.check_compatible(make_comparison([]))


def test_evaluations_on_the_way_stand_side_by_side(make_run, make_comparison):
    def at(step: int, psnr: float) -> dict:
        return {"at_step": step, "psnr": psnr, "ssim": 0.9, "gaussians": 1_230_000}

    runs = [
        make_run(course=[at(1000, 25.0)]),
        make_run("gsscale", course=[at(1000, 26.0), at(2000, 27.0)]),
        make_run("gsscale", seed=43),
    ]
    table = tables.evaluations_table(make_comparison(runs))
    assert table.columns == ["step", "splatfacto, seed 42", "gsscale (host), seed 42"]
    assert table.rows == [
        ["1,000", "25.00, 0.9000, 1.23", "26.00, 0.9000, 1.23"],
        ["2,000", "-", "27.00, 0.9000, 1.23"],
    ]
    assert not tables.evaluations_table(make_comparison(runs[:1])).rows  # the runs' table has it


def test_empty_page(tmp_path):
    text = report.page(tmp_path)
    assert "no results yet" in text and "it/s" not in text


def test_page_says_where_its_numbers_come_from(tmp_path, make_run, make_comparison):
    comparison = make_comparison(
        [make_run(), make_run("gsscale", error="a | b\nc"), make_run(seed=43, wall_s=None)],
        overrides=["pipeline.model.cull-alpha-thresh=0.005"],
    )
    results.save(comparison, tmp_path / "park.json")
    (tmp_path / "micro.json").write_text('{"kind": "something else"}')
    text = report.page(tmp_path)
    for part in (
        "## park, 15,000 steps",
        "Test GPU (24 GiB); Test CPU, 8 cores, 64 GiB RAM; torch 2.0",
        f"`{'c' * 40}`",
        comparison.command,
        "`pipeline.model.cull-alpha-thresh=0.005`",
        "22 held-out images",
        "results/park.json",
        "a \\| b c",
        "shared the machine",
        "| splatfacto | 42 | 29.00 |",
    ):
        assert part in text, part
    assert "micro" not in text


def test_check(tmp_path, make_run, make_comparison, capsys):
    args = ReportArgs(results=tmp_path / "results", page=tmp_path / "page.md")
    results.save(make_comparison([make_run()]), args.results / "park.json")
    check = ReportArgs(check=True, results=args.results, page=args.page)
    assert report.report(check) == 1, "there is no page"
    assert not args.page.exists()
    assert report.report(args) == 0
    assert report.report(check) == 0
    args.page.write_text(args.page.read_text().replace("29.00", "29.01"))
    assert report.report(check) == 1, "a number was typed by hand"
    assert "report.py" in capsys.readouterr().err
    assert report.report(args) == 0
    results.save(make_comparison([make_run(psnr=28.0)]), args.results / "park.json")
    assert report.report(check) == 1, "a result has changed"


def test_a_broken_file_is_no_empty_page(tmp_path):
    (tmp_path / "park.json").write_text('{"kind": "comparison"')
    with pytest.raises(results.ResultsError, match=r"park\.json"):
        report.page(tmp_path)
