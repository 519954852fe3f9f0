"""Tables in pages that people write, made from ``docs/results/``.

A page names a table and its files in a comment, and ``report.py`` writes the table under it::

    <!-- table growth: scale-curve-30m.json scale-curve-100m.json -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import big_training, results, scale, tables, viewer
from benchmarks.errors import BenchmarkError
from benchmarks.step_table import gb, text
from benchmarks.tables import MISSING, TextTable, markdown

_INLAY = re.compile(r"^<!-- table (?P<name>\w+): (?P<files>[^>]+?) -->\n\n*(?:\|.*\n)*\n?", re.M)


class InlayError(BenchmarkError):
    """A page asks for a table that cannot be made."""


def fill(page: str, folder: Path) -> str:
    """The page with all its tables as the files in ``folder`` give them.

    Raises:
        InlayError: a table or a file that there is not.
    """

    def filled(match: re.Match[str]) -> str:
        name, files = match["name"], match["files"].split()
        if name not in TABLES:
            raise InlayError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise InlayError(f"{folder} has no {', '.join(missing)}")
        table = TABLES[name]([(file, results.read(folder / file)) for file in files])
        comment = f"<!-- table {name}: {' '.join(files)} -->"
        return "\n".join([comment, "", *markdown(table), "", ""])

    return _INLAY.sub(filled, page)


Files = Sequence[tuple[str, dict[str, Any]]]


def growth(files: Files) -> TextTable:
    """What a step costs both engines at each number of rows."""
    cells: dict[int, dict[str, dict[str, Any]]] = {}
    for _, report in files:
        for run in report["runs"]:
            cells.setdefault(run["rows"], {})[run["method"]] = run
    columns = ["Gaussians", "visible"]
    for engine in ("host", "resident"):
        columns += [f"`{engine}`: ms a step", "of CPU threads", "ns a visible row"]
    lines = []
    for rows, runs in sorted(cells.items()):
        line = [_millions(rows), _millions(runs["gsscale-host"]["visible_rows"])]
        for engine in ("host", "resident"):
            run = runs[f"gsscale-{engine}"]
            work = scale.host_work(run)
            line += [text(run["ms_median"], "{:.1f}"), text(work and 1e3 * work, "{:.1f}")]
            line += [text(work and 1e9 * work / run["visible_rows"], "{:.0f}")]
        lines.append([*line, text(scale.missed(runs["gsscale-resident"]), "{:.0%}")])
    return TextTable([*columns, "missed"], lines)


def largest(files: Files) -> TextTable:
    """Numbers of rows that were tried within a cap."""
    columns = ["GPU memory", "method", "Gaussians", "seen", "ms a step, median (mean)", "it/s"]
    columns += ["GPU GB (reserved)", "host GB", "commit", "file"]
    lines = []
    for file, report in files:
        words = report["command"]
        bits = ", 16-bit moments" if "moment-dtype=bfloat16" in words else ""
        for run in report["runs"]:
            line = [f"{report['cap_gb']:g} GB", run["method"] + bits, _millions(run["rows"])]
            if "error" in run:
                line += [MISSING, scale.failure(run), *[MISSING] * 3]
            else:
                peaks = [gb(run[f"peak_gpu_{what}_bytes"]) for what in ("allocated", "reserved")]
                line += [
                    text(run["planned_visible_share"], "{:.1%}"),
                    f"{run['ms_median']:.1f} ({run['ms_mean']:.1f})",
                    f"{1e3 / run['ms_mean']:.0f}",
                    "{} ({})".format(*(text(peak, "{:.2f}") for peak in peaks)),
                    text(gb(run["peak_host_bytes"]), "{:.1f}"),
                ]
            lines.append([*line, f"`{report['commit'][:7]}`", f"`{file}`"])
    return TextTable(columns, lines)


def course(files: Files) -> TextTable:
    """The best evaluation of runs that ended early, the last one of others."""
    ((file, report),) = files
    return tables.course_table(results.from_data(report, file))


def best(files: Files) -> TextTable:
    """The evaluation with the highest PSNR of each run that was evaluated on its way."""
    columns = ["method", "PSNR", "SSIM", "MS-SSIM", "FLIP", "median of views"]
    columns += ["Gaussians", "at step", "file"]
    lines = []
    for file, report in files:
        for run in results.from_data(report, file).runs:
            top = max(run.course or [], key=lambda evaluation: evaluation["psnr"])
            lines.append(
                [
                    run.method,
                    text(top["psnr"], "{:.2f}"),
                    text(top["ssim"], "{:.4f}"),
                    text(top.get("ms_ssim"), "{:.4f}"),
                    text(top.get("flip"), "{:.4f}"),
                    text(median(top["psnr_of_views"]), "{:.2f}"),
                    f"{top['gaussians']:,}",
                    f"{top['at_step']:,}",
                    f"`{file}`",
                ]
            )
    return TextTable(columns, lines)


def _export(report: dict[str, Any]) -> TextTable:
    from benchmarks import export  # the writers come with it, and torch

    return export.table([export.Written(**file) for file in report["files"]])


def _alone(make: Callable[[dict[str, Any]], TextTable]) -> Callable[[Files], TextTable]:
    """The table that a benchmark itself prints, of one file."""

    def table(files: Files) -> TextTable:
        ((_, report),) = files
        return make(report)

    return table


def _millions(rows: float) -> str:
    return f"{rows / 1e6:.3g} M"


TABLES: dict[str, Callable[[Files], TextTable]] = {
    "growth": growth,
    "largest": largest,
    "course": course,
    "best": best,
    "big": _alone(big_training.table),
    "viewer": _alone(viewer.table),
    "export": _alone(_export),
}
