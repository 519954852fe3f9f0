"""Tables in pages that people write."""

from __future__ import annotations

import json

import pytest

from benchmarks import inlays, report
from benchmarks.inlays import InlayError
from benchmarks.report import ReportArgs

PAGE = "Before.\n\n<!-- table growth: few.json many.json -->\n\n{table}After.\n"


def run(method, rows, ms, seconds, missed):
    return {
        "method": method,
        "rows": rows,
        "ms_median": ms,
        "visible_rows": 200_000.0,
        "counters": {"cull_s": seconds, "views": 1, "rows": 200_000, "rows_missed": missed},
    }


@pytest.fixture
def folder(tmp_path):
    for name, rows in (("few", 1_000_000), ("many", 30_000_000)):
        runs = [run("gsscale-host", rows, 12.04, 0.008, 200_000)]
        runs += [run("gsscale-resident", rows, 8.0, 0.003, rows / 1000)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"kind": "made up", "runs": runs}))
    return tmp_path


def test_the_table_takes_the_place_of_what_was_there(folder):
    filled = inlays.fill(PAGE.format(table=""), folder)
    assert "| 1 M | 0.2 M | 12.0 | 8.0 | 40 | 8.0 | 3.0 | 15 | 0% |\n" in filled
    assert "| 30 M | 0.2 M | 12.0 | 8.0 | 40 | 8.0 | 3.0 | 15 | 15% |\n\nAfter." in filled
    old = PAGE.format(table="| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n")
    assert inlays.fill(old, folder) == filled
    assert inlays.fill(filled, folder) == filled


@pytest.mark.parametrize("asked", ["nothing: few.json", "growth: few.json none.json"])
def test_what_there_is_not_is_named(folder, asked):
    with pytest.raises(InlayError, match=r"nothing|none\.json"):
        inlays.fill(f"<!-- table {asked} -->\n", folder)


def test_pages_beside_the_page_are_written_and_checked(folder, tmp_path, capsys):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "scale.md").write_text(PAGE.format(table=""))
    args = ReportArgs(results=folder, page=docs / "benchmarks.md")
    assert report.report(ReportArgs(check=True, results=folder, page=args.page)) == 1
    assert "scale.md" in capsys.readouterr().err
    assert report.report(args) == 0
    assert "| 30 M |" in (docs / "scale.md").read_text()
    assert report.report(ReportArgs(check=True, results=folder, page=args.page)) == 0
