"""The two tables of a comparison as text cells, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Comparison, Run
from benchmarks.summary import Row, compare_groups, group_runs

MISSING = "-"


@dataclass
class TextTable:
    """Column names and rows; the first column is left-aligned, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]


def markdown(table: TextTable) -> list[str]:
    """A table in Markdown, numbers to the right."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [table.columns, rule, *[[escape_cell(cell) for cell in row] for row in table.rows]]
    return [f"| {' | '.join(row)} |" for row in rows]


def escape_cell(text: str) -> str:
    """A bar would end a table's cell, a line break its row."""
    return " ".join(text.replace("|", "\\|").split())


def run_table(comparison: Comparison) -> TextTable:
    """One row a run."""
    columns = [
        "method",
        "seed",
        "PSNR",
        "lowest",
        "SSIM",
        "Gaussians",
        "it/s",
        "wall s",
        "GPU GB",
        "GPU GB reserved",
        "host GB",
    ]
    rows = []
    for group in group_runs(comparison):
        for run in sorted(group.runs + group.failed, key=lambda run: run.seed):
            cells = _measured(run) if run.error is None else ["failed", *[MISSING] * 8]
            rows.append([group.label, str(run.seed), *cells])
    return TextTable(columns, rows)


def summary_table(comparison: Comparison) -> TextTable:
    """One row a method and engine: means over seeds, and the comparison with splatfacto.

    The Δ columns are differences to splatfacto's mean; ``speed``, ``memory`` and ``reserved`` are
    multiples of it.
    """
    columns = [
        "method",
        "runs",
        "PSNR",
        "ΔPSNR",
        "SSIM",
        "ΔSSIM",
        "training PSNR",
        "Δ",
        "Gaussians",
        "ΔGaussians",
        "it/s",
        "speed",
        "GPU GB",
        "memory",
        "reserved",
    ]
    return TextTable(columns, [_summary(row) for row in compare_groups(comparison)])


def quality_table(comparison: Comparison) -> TextTable:
    """The columns of :func:`summary_table` that say nothing of time and memory."""
    whole = summary_table(comparison)
    end = whole.columns.index("it/s")
    return TextTable(whole.columns[:end], [row[:end] for row in whole.rows])


def culling_table(comparison: Comparison) -> TextTable:
    """One row a run with a culler: the rows that it brings to the device for held-out views."""
    columns = [
        "method",
        "seed",
        "rows brought",
        "per row drawn",
        "rows dropped",
        "image difference",
    ]
    rows = [
        [
            label,
            str(run.seed),
            _text(run.visible_share, "{:.1%}"),
            _text(run.culled_per_drawn, "{:.3f}"),
            _text(run.rows_dropped, "{:,}"),
            _text(run.largest_render_difference, "{:.1e}"),
        ]
        for label, run in _runs(comparison)
        if run.visible_share is not None
    ]
    return TextTable(columns, rows)


def course_table(comparison: Comparison) -> TextTable:
    """One row a run that was evaluated on its way, ended early, or has perceptual measures."""
    columns = ["method", "seed", "PSNR", "SSIM", "MS-SSIM", "FLIP", "Gaussians", "at step", "ended"]
    rows = [
        [
            label,
            str(run.seed),
            _text(run.psnr, "{:.2f}"),
            _text(run.ssim, "{:.4f}"),
            _text(run.ms_ssim, "{:.4f}"),
            _text(run.flip, "{:.4f}"),
            _text(run.gaussians, "{:,}"),
            _text(run.at_step, "{:,}"),
            run.ended or "no",
        ]
        for label, run in _runs(comparison)
        if run.course or run.ended or run.flip is not None
    ]
    return TextTable(columns, rows)


def evaluations_table(comparison: Comparison) -> TextTable:
    """One row a step at which runs were evaluated on their way, one column a run."""
    runs = [(f"{label}, seed {run.seed}", run.course) for label, run in _runs(comparison)]
    courses = {
        label: {evaluation["at_step"]: evaluation for evaluation in course}
        for label, course in runs
        if course
    }
    rows = []
    for step in sorted({step for course in courses.values() for step in course}):
        cells = [
            "{psnr:.2f}, {ssim:.4f}, {:.2f}".format(at["gaussians"] / 1e6, **at) if at else MISSING
            for at in (course.get(step) for course in courses.values())
        ]
        rows.append([f"{step:,}", *cells])
    return TextTable(["step", *courses], rows if len(rows) > 1 else [])


def kernel_table(comparison: Comparison) -> TextTable:
    """One row a kernel: GPU milliseconds of a step in the profiled runs, seed by seed."""
    runs = [
        (f"{label}, seed {run.seed}", run.profile)
        for label, run in _runs(comparison)
        if run.profile is not None
    ]
    names = list(dict.fromkeys(name for _, profile in runs for name in profile["kernels"]))
    longest = sorted(names, key=lambda name: -max(p["kernels"].get(name, 0.0) for _, p in runs))
    rows = [["a step", *(_text(p["ms"], "{:.2f}") for _, p in runs)]]
    rows += [["the GPU is busy", *(_text(p["busy_ms"], "{:.2f}") for _, p in runs)]]
    rows += [
        [name, *(_text(p["kernels"].get(name), "{:.2f}") for _, p in runs)] for name in longest
    ]
    return TextTable(["ms", *(label for label, _ in runs)], rows if runs else [])


def failures(comparison: Comparison) -> list[str]:
    """A sentence for every failed run."""
    return [
        f"{group.label}, seed {run.seed}: {run.error}"
        for group in group_runs(comparison)
        for run in group.failed
    ]


def describe_machine(machine: dict[str, Any]) -> str:
    """The machine on one line."""
    gpu = "no GPU"
    if machine.get("gpu"):
        gpu = f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB)"
    hardware = f"{gpu}; {machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB RAM"
    versions = [f"{name} {machine[name]}" for name in ("torch", "gsplat", "nerfstudio", "python")]
    return f"{hardware}; {', '.join(versions)}"


def _runs(comparison: Comparison) -> list[tuple[str, Run]]:
    """Every run that gave something, with its group's label; seeds ascending in a group."""
    return [(group.label, run) for group in group_runs(comparison) for run in group.runs]


def _measured(run: Run) -> list[str]:
    return [
        _text(run.psnr, "{:.2f}"),
        _text(min(run.psnr_of_views) if run.psnr_of_views else None, "{:.1f}"),
        _text(run.ssim, "{:.4f}"),
        _text(run.gaussians, "{:,}"),
        _text(run.it_per_s_last_1000, "{:.1f}"),
        _text(run.wall_s, "{:.0f}"),
        _text(run.peak_gpu_allocated_bytes, "{:.2f}", _gb),
        _text(run.peak_gpu_reserved_bytes, "{:.2f}", _gb),
        _text(run.peak_host_bytes, "{:.2f}", _gb),
    ]


def _summary(row: Row) -> list[str]:
    group = row.group
    psnr, ssim, trained = (
        _text(group.mean(name), form) + _text(group.deviation(name), " ± " + form, missing="")
        for name, form in (("psnr", "{:.2f}"), ("ssim", "{:.4f}"), ("training_psnr", "{:.2f}"))
    )
    return [
        group.label,
        str(len(group.runs)),
        psnr,
        _text(row.psnr_difference, "{:+.2f}"),
        ssim,
        _text(row.ssim_difference, "{:+.4f}"),
        trained,
        _text(row.training_psnr_difference, "{:+.2f}"),
        _text(group.mean("gaussians"), "{:,.0f}"),
        _text(row.gaussians_difference, "{:+.1%}"),
        _text(group.mean("it_per_s_last_1000"), "{:.1f}"),
        _text(row.speed_ratio, "{:.2f}x"),
        _text(group.mean("peak_gpu_allocated_bytes"), "{:.2f}", _gb),
        _text(row.memory_ratio, "{:.2f}x"),
        _text(row.reserved_ratio, "{:.2f}x"),
    ]


def _gb(value: float) -> float:
    return value / 1e9


def _text(
    value: float | None,
    form: str,
    scale: Callable[[float], float] | None = None,
    missing: str = MISSING,
) -> str:
    if value is None:
        return missing
    return form.format(scale(value) if scale else value)
