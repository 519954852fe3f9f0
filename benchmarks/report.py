"""Write ``docs/benchmarks.md``, and tables of other pages, from ``docs/results/*.json``.

python benchmarks/report.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]


from benchmarks import (
    big_training,
    cli,
    inlays,
    results,
    rows,
    scale,
    step,
    step_table,
    tables,
    viewer,
)
from benchmarks.results import Comparison
from benchmarks.tables import TextTable, escape_cell, markdown

ROOT = Path(__file__).resolve().parent.parent

HEAD = """\
<!-- Written by benchmarks/report.py from docs/results/*.json. Do not edit. -->

# Benchmarks

Splatfacto and gsscale on the same scene, the same machine, the same settings. Every number on this
page is read from the files in `docs/results/`; `python benchmarks/report.py` writes the page. Whole
trainings come first, then [single steps](#single-steps) at a fixed number of Gaussians, and
trainings of a size that there is no scene for.
"""

SINGLE_STEPS = """
## Single steps

Rows are Gaussians that were made from a scene's points, so that there are as many as one likes; the
truth is a random image. No quality comes of it, only time and memory.
"""


@dataclass(frozen=True)
class Kind:
    """How files of a kind that is no comparison are shown."""

    heading: Callable[[dict[str, Any]], str]
    tables: tuple[Callable[[dict[str, Any]], TextTable], ...]
    legend: str


KINDS = {
    step.KIND: Kind(
        lambda report: f"{report['scene']}, a step at {report['rows']:,} rows",
        (step_table.step_table, step_table.counter_table),
        step_table.LEGEND,
    ),
    scale.KIND: Kind(
        lambda report: f"{report['scene']}, steps of up to {report['runs'][-1]['rows']:,} rows",
        (scale.table,),
        scale.LEGEND,
    ),
    rows.KIND: Kind(
        lambda report: f"{report['scene']}, row kernels at {report['rows']:,} rows",
        (rows.table, lambda report: rows.table(report["gpu"] or {"kernels": []})),
        rows.LEGEND,
    ),
    big_training.KIND: Kind(
        lambda report: f"{report['scene']}, a training of {report['rows']:,} rows",
        (big_training.table,),
        big_training.LEGEND,
    ),
    viewer.KIND: Kind(
        lambda report: f"{report['scene']}, the viewer at {report['rows']:,} rows",
        (viewer.table,),
        viewer.LEGEND,
    ),
}
"""In the order of the page."""

SCENES = """
## Scenes

| name | what | images | starts from |
| --- | --- | --- | --- |
| `sheffield` | drone flight over houses, a park and tennis courts | 172 of 800 x 600 | \
COLMAP, 52 181 points |
| `caliterra` | drone flight over a construction site (OpenDroneMap, CC0) | 75 of 2000 x 1500 | \
COLMAP, 45 244 points |
| `fox` | hand-held capture of a stuffed fox (instant-ngp's example) | 50 of 1080 x 1920 | \
random points |
| `village` | what `make demo` makes | 40 | sparse points |

Of the first two the poses were reconstructed for this project. `caliterra` in a command stands for
its folder; any scene that Nerfstudio reads can be in its place.
"""

EMPTY = """
There are no results yet. `python benchmarks/compare.py --scene DIR --steps N` makes the first.
"""

LEGEND = """
- **PSNR**, **SSIM**: means over the images held out from training, as Nerfstudio evaluates them.
- **lowest**: PSNR of the held-out image that came out worst; something afloat before one of them
  moves the mean, too.
- **MS-SSIM** (1 is alike), **FLIP** (0 is alike; mean, 67 pixels to the degree): where asked for.
- **training PSNR**: mean over up to 40 of the images that were trained on. No proof of quality, but
  it scatters less from run to run than the mean over a few held-out images.
- **it/s**: over the last 1000 steps (the last half of a shorter run), with the GPU's queue empty at
  both ends.
- **wall s**: all training steps, loading the images included, without set-up and evaluation; of
  runs that had the machine for themselves.
- **GPU GB**: peak of torch's allocated tensors from set-up to the last step (10^9 bytes), the
  cached images included; *reserved* is what the allocator held. The CUDA context comes on top.
- **host GB**: peak resident memory of the process up to the last step.
- **ΔPSNR**, **ΔSSIM**, **Δ**, **ΔGaussians**: difference to splatfacto's mean in the same table;
  **speed**, **memory**, **reserved**: it/s, GPU GB and GPU GB reserved, as multiples of
  splatfacto's.
- **±**: standard deviation over seeds.
"""


@dataclass
class ReportArgs:
    """Write docs/benchmarks.md, and tables of the pages beside it, from docs/results/*.json."""

    check: bool = False
    """Write nothing; exit with status 1 if the page is not what the files give."""
    results: Path = ROOT / "docs" / "results"
    """Folder with the comparison files."""
    page: Path = ROOT / "docs" / "benchmarks.md"
    """The page; others in its folder have :mod:`benchmarks.inlays`."""


def page(folder: Path) -> str:
    """The whole page. JSON files of a kind that it does not know are not ours."""
    files = {path: results.read(path) for path in sorted(folder.glob("*.json"))}
    comparisons = [
        (path.name, results.from_data(data, str(path)))
        for path, data in files.items()
        if data.get("kind") == results.KIND
    ]
    comparisons.sort(key=lambda pair: (pair[1].scene, pair[1].steps, pair[0]))
    sections = [section(name, comparison) for name, comparison in comparisons]
    steps = []
    for name, kind in KINDS.items():
        of_kind = [(path, data) for path, data in files.items() if data.get("kind") == name]
        steps += [kind_section(path.name, data, kind) for path, data in of_kind]
        steps += [f"\n{kind.legend}\n"] if of_kind else []
    if not sections and not steps:
        return HEAD + EMPTY
    return "".join([HEAD, LEGEND, SCENES, *sections, *([SINGLE_STEPS, *steps] if steps else [])])


def kind_section(name: str, report: dict[str, Any], kind: Kind) -> str:
    """A file that is no comparison: where it comes from, and its tables."""
    lines = ["", f"### {kind.heading(report)}", ""]
    lines += [f"- Machine: {escape_cell(tables.describe_machine(report['machine']))}"]
    lines += [f"- Commit: `{report['commit']}`"]
    if report.get("cap_gb") is not None:
        lines += [f"- GPU memory: {report['cap_gb']:g} GB for each process in all"]
    lines += [f"- File: [`{name}`](results/{name})", "", "```sh", report["command"], "```", ""]
    for make in kind.tables:
        table = make(report)
        lines += [*markdown(table), ""] if table.rows else []
    return "\n".join(lines)


def section(name: str, comparison: Comparison) -> str:
    """One comparison: where it comes from, the summary, the runs."""
    lines = ["", f"## {comparison.scene}, {comparison.steps:,} steps", ""]
    lines += [f"- Machine: {escape_cell(tables.describe_machine(comparison.machine))}"]
    lines += [f"- Commit: `{comparison.commit}`"]
    if comparison.cap_gb is not None:
        lines += [f"- GPU memory: {comparison.cap_gb:g} GB for each run in all"]
    if comparison.overrides:
        lines += ["- Settings of all methods: " + ", ".join(f"`{o}`" for o in comparison.overrides)]
    lines += [f"- Data: `{' '.join(comparison.dataparser)}`; {_held_out(comparison)}"]
    lines += [f"- File: [`{name}`](results/{name})", "", "```sh", comparison.command, "```", ""]
    lines += markdown(tables.summary_table(comparison))
    if len({run.commit for run in comparison.runs if run.error is None}) > 1:
        lines += ["", "All commits together:", ""]
        lines += markdown(tables.quality_table(comparison.pooled()))
    lines += ["", "Every run:", ""]
    lines += markdown(tables.run_table(comparison))
    culling = tables.culling_table(comparison)
    if culling.rows:
        lines += ["", "The culler, on the held-out views:", "", *markdown(culling)]
    course = tables.course_table(comparison)
    if course.rows:
        lines += ["", "The best evaluation of a run that ended early, else the last:", ""]
        lines += markdown(course)
    evaluations = tables.evaluations_table(comparison)
    if evaluations.rows:
        lines += [
            "",
            "PSNR, SSIM and millions of Gaussians on the way:",
            "",
            *markdown(evaluations),
        ]
    kernels = tables.kernel_table(comparison)
    if kernels.rows:
        lines += ["", "Profiled steps, and what the GPU did in them:", "", *markdown(kernels)]
    failed = tables.failures(comparison)
    if failed:
        lines += ["", "Failed:", "", *[f"- {escape_cell(sentence)}" for sentence in failed]]
    notes = _notes(comparison)
    return "\n".join([*lines, *notes, ""])


def _held_out(comparison: Comparison) -> str:
    counts = sorted({run.held_out_images for run in comparison.runs if run.held_out_images})
    return f"{' or '.join(map(str, counts)) or 'unknown number of'} held-out images"


def _notes(comparison: Comparison) -> list[str]:
    """What a reader must know about single runs."""
    notes = []
    whole = [run for run in comparison.runs if run.error is None and run.ended is None]
    if any(run.wall_s is None for run in whole):
        notes.append(
            "Runs without wall time shared the machine; where they have it/s, the others waited "
            "meanwhile."
        )
    for machine in {tables.describe_machine(r.machine) for r in comparison.runs if r.machine}:
        notes.append(f"Some runs were made on another machine: {machine}.")
    return ["", *[escape_cell(note) for note in sorted(notes)]] if notes else []


def report(args: ReportArgs) -> int:
    """Write or check the pages. Returns the exit status."""
    pages = {args.page: page(args.results)}
    for other in sorted(args.page.parent.glob("*.md")):
        if other != args.page:
            pages[other] = inlays.fill(other.read_text(encoding="utf-8"), args.results)
    status = 0
    for path, text in pages.items():
        present = path.read_text(encoding="utf-8") if path.is_file() else None
        if present == text:
            continue
        if not args.check:
            results.write_text(path, text)
            continue
        print(
            f"{path} is not what {args.results} gives: run python benchmarks/report.py",
            file=sys.stderr,
        )
        status = 1
    return status


def main() -> int:
    """The command line. Exit status 1 when the page is out of date, 2 when there is none."""
    return cli.run(ReportArgs, __doc__, lambda args, _: report(args))


if __name__ == "__main__":
    sys.exit(main())
