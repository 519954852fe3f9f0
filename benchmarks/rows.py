"""Nanoseconds per row of the row kernels and the culler, beside what memory and link allow.

    python benchmarks/rows.py --scene DIR --rows 20000000 --visible 0.08

The floor of a kernel is the time in which this machine's memory, its GPU's or the link between
them, at the rate measured in the same run, moves the bytes that the kernel's task needs. Where
there is no GPU, its part is left out.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console
from rich.markup import escape

from benchmarks import cli, results
from benchmarks import machine as machine_info
from benchmarks.cli import say, show
from benchmarks.plan import PlanError
from benchmarks.scene import dataparser_arguments
from benchmarks.tables import TextTable, describe_machine

if TYPE_CHECKING:
    import torch

    from benchmarks.rows_host import HostRows, Measurement

KIND = "rows"
THREADS_VARIABLE = "OMP_NUM_THREADS"
LEGEND = """\
GB/s: bytes that the task needs (read + written) over the time. of rate: share of the faster of
copy and in-place scaling (host), of device_copy (gpu), of h2d, d2h or duplex copies (link: read,
write back, both). floor: ns per row at that rate. Caches can make a kernel faster than it.
settle: all rows; cull: all rows, ms of one view; the others: a view's rows."""


@dataclass
class RowsArgs:
    """Measure the row kernels and the culler on a store of made-up rows."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0; it needs a point cloud."""
    rows: int
    """Number of rows; each takes 784 bytes of host memory."""
    visible: float = 0.08
    """Share of them that a view sees on average; the scene is tiled until it is at most 1.15 times
    this."""
    views: int = 24
    """Cameras to measure with, evenly spaced over those of the (tiled) scene."""
    threads: int | None = None
    """Threads of the kernels and of the copy. Default: the cores that this process may use."""
    seed: int = 42
    """Seed of the rows."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser: eval-interval=4."""
    output: Path | None = None
    """File to write. Default: docs/results/rows-SCENE-ROWS-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if self.rows < 1 or self.views < 1 or (self.threads is not None and self.threads < 1):
            raise PlanError("--rows, --views and --threads must be at least 1")
        if not 0 < self.visible <= 1:
            raise PlanError(f"--visible is a share, above 0 and at most 1, not {self.visible}")
        if self.output is not None and self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")
        dataparser_arguments(self.scene, list(self.dataparser_overrides))

    def command(self, threads: int) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", "benchmarks/rows.py", "--scene", self.scene.resolve().name]
        words += ["--rows", str(self.rows), "--visible", str(self.visible)]
        words += ["--views", str(self.views), "--threads", str(threads), "--seed", str(self.seed)]
        if self.dataparser_overrides:
            words += ["--dataparser-overrides", *self.dataparser_overrides]
        return shlex.join(words)


def table(report: dict[str, Any]) -> TextTable:
    """One row a kernel."""
    columns = [
        "kernel",
        "side",
        "rows",
        "ms",
        "ns/row",
        "floor ns/row",
        "bytes/row",
        "GB/s",
        "of rate",
    ]
    rows = [
        [
            kernel["kernel"],
            kernel["side"],
            f"{kernel['rows']:,.0f}",
            f"{kernel['ms']:.3f}",
            f"{kernel['ns_per_row']:.3f}",
            f"{kernel['floor_ns_per_row']:.3f}",
            f"{kernel['bytes_per_row']:,.1f}",
            f"{kernel['bytes_per_s'] / 1e9:.1f}",
            f"{kernel['share_of_memory_rate']:.0%}",
        ]
        for kernel in report["kernels"]
    ]
    return TextTable(columns, rows)


def to_dict(measurement: Measurement, rate: float) -> dict[str, Any]:
    """A measurement beside ``rate``, the bytes per second of what it has to go through."""
    return {
        **dataclasses.asdict(measurement),
        "ns_per_row": measurement.ns_per_row,
        "bytes_per_s": measurement.bytes_per_s,
        "share_of_memory_rate": measurement.bytes_per_s / rate,
        "floor_ns_per_row": measurement.bytes_per_row / rate * 1e9,
    }


def gpu_part(host: HostRows, console: Console) -> dict[str, Any] | None:
    """Rates of the GPU and its link, and its kernels beside them; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        console.print("the GPU's part is left out: there is no GPU")
        return None
    console.print("measuring the GPU and its link")
    return measure_gpu(host, torch.device("cuda"))


def measure_gpu(host: HostRows, device: torch.device) -> dict[str, Any]:
    """:func:`gpu_part` on any device."""
    from benchmarks.rows_gpu import GpuRows, measure_rates

    rates = dataclasses.asdict(measure_rates(device))
    return {
        "rates_bytes_per_s": rates,
        "kernels": [
            {**to_dict(one.measurement, rates[one.rate]), "rate": one.rate}
            for one in GpuRows(host, device).measure()
        ],
    }


def measure(args: RowsArgs, console: Console) -> dict[str, Any]:
    """Measure, write the file, print the table. Returns what was written."""
    args.check()
    scene_name = args.scene.resolve().name
    path = args.output or results.new_path(f"rows-{scene_name}-{args.rows}")
    machine, commit = machine_info.describe_apart(), machine_info.commit(args.commit)
    threads = args.threads or machine["cores"]
    # Read when the OpenMP libraries are loaded: before the imports below.
    os.environ[THREADS_VARIABLE] = str(threads)

    from benchmarks import fixed_rows, ns_config
    from benchmarks.rows_host import HostRows, memory_rate

    with tempfile.TemporaryDirectory(prefix="gsscale-rows-") as folder:
        config = ns_config.parse(
            ns_config.train_arguments(
                method="splatfacto",
                scene=args.scene,
                steps=1,
                seed=args.seed,
                engine=None,
                overrides=[],
                dataparser_overrides=list(args.dataparser_overrides),
                output_dir=Path(folder),
            )
        )
        split = fixed_rows.train_split(config)
    scene = fixed_rows.fit(split, args.rows, args.visible, args.seed)
    console.print("measuring the memory")
    rates = memory_rate(args.rows * 256, threads)
    console.print(f"making {args.rows:,} rows")
    host = HostRows(scene, args.views)
    console.print("measuring the kernels")
    report: dict[str, Any] = {
        "kind": KIND,
        "scene": scene_name,
        "rows": args.rows,
        "visible": args.visible,
        "tiles": scene.rows.tiles,
        "visible_share": host.visible_share(),
        "threads": threads,
        "memory_bytes_per_s": rates,
        "machine": machine,
        "commit": commit,
        "command": args.command(threads),
        "kernels": [to_dict(one, max(rates.values())) for one in host.measure()],
        "gpu": gpu_part(host, console),
    }
    results.write_report(path, report)
    say(f"{scene_name}, {args.rows:,} rows, {report['visible_share']:.1%} visible", console)
    say(f"{describe_machine(machine)}; {threads} threads", console)
    say(f"memory, read + written: {_shown(rates)}", console)
    show(table(report), console)
    if report["gpu"] is not None:
        say(f"GPU and link: {_shown(report['gpu']['rates_bytes_per_s'])}", console)
        show(table(report["gpu"]), console)
    say(LEGEND, console)
    console.print(f"written to {escape(str(path))}")
    return report


def _shown(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items())


def main() -> int:
    """The command line. Exit status 2 when nothing was started."""
    return cli.run(RowsArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
