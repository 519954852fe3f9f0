"""The tables of ``step.py``."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from benchmarks.cli import say, show
from benchmarks.plan import BASELINE
from benchmarks.tables import MISSING, TextTable, describe_machine

LEGEND = """\
ms: median and mean of a step over the timed window. speed, memory: multiples of splatfacto's ms
(mean) and allocated GPU GB. forward (with the loss), backward, optimizer: medians of a second pass,
between CUDA events of the current stream; waiting for other streams or the host is part of them.
exposed: median time in which the current stream waits for rows on the link; what kernels read over
it themselves (hot rows of the host engine) is in forward. cull: the worker's time to cull the view
that comes next. missed: share of a view's rows that were not on the device (host engine: not handed
on by the view before). GPU busy: union of kernels and copies under the profiler. GPU GB, host GB:
peaks of a training, 10^9 bytes, with one image. visible: rows drawn, or (gsscale) brought by the
culler."""


def step_table(report: dict[str, Any]) -> TextTable:
    """One row a method."""
    columns = [
        "method",
        "ms median",
        "ms mean",
        "speed",
        "forward",
        "backward",
        "optimizer",
        "exposed",
        "cull",
        "missed",
        "GPU busy",
        "GPU GB",
        "reserved",
        "memory",
        "host GB",
        "visible",
    ]
    runs = [run for run in report["runs"] if "error" not in run]
    base: dict[str, Any] = next((run for run in runs if run["method"] == BASELINE), {})
    rows = []
    for run in runs:
        speed = _ratio(base.get("ms_mean"), run["ms_mean"])
        memory = _ratio(run["peak_gpu_allocated_bytes"], base.get("peak_gpu_allocated_bytes"))
        counters = run["counters"] or {}
        cull_s = counters.get("cull_s")
        missed = _ratio(counters.get("rows_missed"), counters.get("rows"))
        rows.append(
            [
                run["method"],
                text(run["ms_median"], "{:.2f}"),
                text(run["ms_mean"], "{:.2f}"),
                text(speed, "{:.2f}x"),
                *(text(run[f"{phase}_ms"], "{:.2f}") for phase in columns[4:7]),
                text(run.get("exposed_transfer_ms"), "{:.2f}"),  # not in older files
                text(None if cull_s is None else 1e3 * cull_s, "{:.2f}"),
                text(missed, "{:.0%}"),
                text(run["gpu_busy_share"], "{:.0%}"),
                text(gb(run["peak_gpu_allocated_bytes"]), "{:.2f}"),
                text(gb(run["peak_gpu_reserved_bytes"]), "{:.2f}"),
                text(memory, "{:.2f}x"),
                text(gb(run["peak_host_bytes"]), "{:.2f}"),
                text(run["visible_rows"], "{:,.0f}"),
            ]
        )
    return TextTable(columns, rows)


def counter_table(report: dict[str, Any]) -> TextTable:
    """One row a counter of the engines, one column a method: per timed step."""
    runs = [run for run in report["runs"] if run.get("counters")]
    names = list(dict.fromkeys(name for run in runs for name in run["counters"]))
    rows = [[name, *(text(run["counters"].get(name), "{:,.6g}") for run in runs)] for name in names]
    return TextTable(["per step", *(run["method"] for run in runs)], rows)


def show_report(report: dict[str, Any], console: Console) -> None:
    """All there is to say about a report of ``step.py``."""
    say(f"{report['scene']}, {report['rows']:,} rows", console)
    say(describe_machine(report["machine"]), console)
    for run in report["runs"]:
        if "error" not in run:  # the same for all: it follows from the arguments
            width, height = run["image"]
            share, tiles = run["planned_visible_share"], run["tiles"]
            say(
                f"{tiles} tiles, {run['views']} views of {width} x {height}, which see {share:.1%} "
                "of the rows on average (the culler's count in a sample)",
                console,
            )
            break
    show(step_table(report), console)
    counters = counter_table(report)
    if counters.rows:
        show(counters, console)
    say(LEGEND, console)
    for run in report["runs"]:
        if "error" in run:
            say(f"failed: {run['method']}: {run['error']}", console)


def text(value: float | None, form: str) -> str:
    """A cell."""
    return MISSING if value is None else form.format(value)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def gb(value: float | None) -> float | None:
    """Bytes in 10^9."""
    return None if value is None else value / 1e9
