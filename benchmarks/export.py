"""Seconds that files of many Gaussians take, beside what the disk takes for as many bytes.

    python benchmarks/export.py --rows 1e6 --work DIR

The rows are made up, over a made-up cloud: no run, no checkpoint. ``ns-export`` writes a part of
them, number by number; it is slow, and its rate does not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

import numpy as np
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from rich.console import Console
from rich.markup import escape

from benchmarks import cli, fixed_rows, results, seeding
from benchmarks import machine as machine_info
from benchmarks.cli import say, show
from benchmarks.plan import PlanError
from benchmarks.tables import TextTable, describe_machine
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.export.cli import write
from gsscale_nerfstudio.store import HostStore, RowLayout

KIND = "export"
FILES: tuple[tuple[str, Literal["sh", "rgb"]], ...] = (
    (".ply", "sh"),
    (".ply", "rgb"),
    (".spz", "sh"),
)
NS_EXPORT_ROWS = 100_000
"""Rows that ns-export writes at most."""
_POINTS = 50_000
_BLOCK = 1 << 24
LEGEND = """\
s: until the file is on the disk, from rows in memory. disk MB/s: of a plain write of as many bytes,
synchronized as well, right after it. ns-export: its writer alone. MB: 10^6 bytes. Made-up rows
compress better than trained ones."""


@dataclass
class ExportArgs:
    """Measure how long files of many Gaussians take to write."""

    rows: float
    """Number of Gaussians: 1e6. Each takes 272 bytes of host memory and 248 of the disk."""
    work: Path
    """Folder for the files, which are deleted at once."""
    seed: int = 42
    """Seed of the rows."""
    output: Path | None = None
    """File to write. Default: docs/results/export-ROWS-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if self.rows < 1:
            raise PlanError("--rows must be at least 1")
        if self.output is not None and self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")

    def command(self) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", "benchmarks/export.py", "--rows", f"{self.rows:g}", "--work", "DIR"]
        return shlex.join([*words, "--seed", str(self.seed)])


@dataclass
class Written:
    """One file.

    Attributes:
        name: what it is, and of whom.
        rows: Gaussians in it.
        bytes: its size.
        seconds: that it took.
        disk_seconds: that as many bytes took without any work.
    """

    name: str
    rows: int
    bytes: int
    seconds: float
    disk_seconds: float


def made_up(rows: int, seed: int) -> Any:
    """A model of so many Gaussians, as far as exporters look at it, with rows in a host store."""
    points = dict(zip(("points3D_xyz", "points3D_rgb"), seeding.cloud(_POINTS, seed), strict=True))
    config = SplatfactoModelConfig()
    layout = RowLayout(config.sh_degree)
    store = HostStore(layout, rows)
    split = SimpleNamespace(metadata=points)
    for values in fixed_rows.untiled(split, rows, seed, config.sh_degree).chunks():
        store.append(values, stamp=0)
    params = {name: store.column(name) for name in layout.shapes}
    return SimpleNamespace(gauss_params=params, config=config, num_points=rows)


def write_file(model: Any, folder: Path, kind: str, color: Literal["sh", "rgb"]) -> Written:
    """Write a file as ``gsscale-export`` does it."""
    path = folder / f"rows{kind}"
    start = time.perf_counter()
    written, _ = write(model, path, color)
    return _finished(f"{kind} {color}", written, path, time.perf_counter() - start)


def write_as_ns_export(writer: Any, model: Any, folder: Path) -> Written:
    """Let ns-export write at most the first :data:`NS_EXPORT_ROWS` rows.

    Args:
        writer: Nerfstudio's ``ExportGaussianSplat``.
        model: of :func:`made_up`.
        folder: for the file.
    """
    n = min(model.num_points, NS_EXPORT_ROWS)
    path, columns = folder / "ns-export.ply", ply_columns(model.gauss_params, n)
    start = time.perf_counter()
    writer.write_ply(str(path), n, columns)
    return _finished(".ply sh, ns-export", n, path, time.perf_counter() - start)


def ply_columns(groups: Any, n: int) -> OrderedDict[str, np.ndarray]:
    """The first ``n`` rows, in contiguous float32 arrays and order of ns-export's writer."""
    values = {name: group[:n].clone() for name, group in groups.items()}
    means, rest = values["means"], values["features_rest"].transpose(1, 2).flatten(1)
    columns = OrderedDict(zip("xyz", means.numpy().T, strict=True))
    columns.update((name, np.zeros(n, dtype=np.float32)) for name in ("nx", "ny", "nz"))
    parts = {"f_dc": values["features_dc"], "f_rest": rest, "opacity": values["opacities"]}
    for name, part in {**parts, "scale": values["scales"], "rot": values["quats"]}.items():
        for i, column in enumerate(part.numpy().T):
            columns[name if name == "opacity" else f"{name}_{i}"] = column[:, None]
    return columns


def ns_exporter(console: Console) -> Any:
    """Nerfstudio's ``ExportGaussianSplat``; None, with a word about it, where it cannot be had."""
    try:
        from nerfstudio.scripts.exporter import ExportGaussianSplat
    except (ImportError, OSError) as error:  # of Open3D, or a library that it needs
        console.print(f"ns-export is left out: {escape(str(error))}")
        return None
    return ExportGaussianSplat


def disk_seconds(path: Path, size: int) -> float:
    """Seconds that a file of ``size`` bytes takes to be on the disk, when it costs nothing else."""
    block = np.random.default_rng(0).bytes(_BLOCK)  # nothing to compress
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for done in range(0, size, _BLOCK):
            file.write(block[: size - done])
        os.fsync(file.fileno())
    took = time.perf_counter() - start
    path.unlink()
    return took


def _finished(name: str, rows: int, path: Path, seconds: float) -> Written:
    size = path.stat().st_size
    path.unlink()
    return Written(name, rows, size, seconds, disk_seconds(path, size))


def table(files: list[Written]) -> TextTable:
    """One row a file."""
    columns = ["file", "Gaussians", "MB", "s", "s per million", "MB/s", "disk MB/s"]
    rows = [
        [
            one.name,
            f"{one.rows:,}",
            f"{one.bytes / 1e6:.1f}",
            f"{one.seconds:.2f}",
            f"{one.seconds / one.rows * 1e6:.2f}",
            f"{one.bytes / 1e6 / one.seconds:.0f}",
            f"{one.bytes / 1e6 / one.disk_seconds:.0f}",
        ]
        for one in files
    ]
    return TextTable(columns, rows)


def measure(args: ExportArgs, console: Console) -> dict[str, Any]:
    """Measure, write the report, print the table. Returns what was written."""
    args.check()
    path = args.output or results.new_path(f"export-{int(args.rows)}")
    machine, commit = machine_info.describe_apart(), machine_info.commit(args.commit)
    exporter = ns_exporter(console)
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gsscale-export-", dir=args.work) as work:
            folder = Path(work)
            write_file(made_up(1000, args.seed), folder, *FILES[0])  # what is started once
            model = made_up(int(args.rows), args.seed)
            files = [write_file(model, folder, kind, color) for kind, color in FILES]
            if exporter is not None:
                files.append(write_as_ns_export(exporter, model, folder))
    except (OSError, GSScaleError) as error:
        raise PlanError(f"{error}; free disk or memory, or name another --work") from error
    report: dict[str, Any] = {
        "kind": KIND,
        "rows": int(args.rows),
        "machine": machine,
        "commit": commit,
        "command": args.command(),
        "files": [dataclasses.asdict(one) for one in files],
    }
    results.write_report(path, report)
    say(describe_machine(machine), console)
    show(table(files), console)
    say(LEGEND, console)
    console.print(f"written to {escape(str(path))}")
    return report


def main() -> int:
    """The command line. Exit status 2 when nothing was measured."""
    return cli.run(ExportArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
