"""Seconds and bytes that the first Gaussians of a large point cloud take.

    python benchmarks/seeding.py --points 1000000 5000000 20000000

The clouds are made up: hilly ground, walls on it, a hundredth of the points far off, in random
order.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

import numpy as np
import torch
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from rich.console import Console
from rich.markup import escape

from benchmarks import cli, results
from benchmarks import machine as machine_info
from benchmarks.cli import say, show
from benchmarks.host_memory import forget_peak, peak_host_bytes
from benchmarks.plan import PlanError
from benchmarks.tables import TextTable, describe_machine
from gsscale_nerfstudio.seeding import neighbour_tree, place_rows, size_rows
from gsscale_nerfstudio.store import HostStore, RowLayout

KIND = "seeding"
CELLS = 20
"""Walls stand on the lines of a grid with this many cells to a side of length 1."""
LEGEND = """\
rows: Morton order, random draws and colours, written to the store. tree: neighbours' tree, on one
thread. neighbours: distances of all points, on all of them. extra: peak host memory beside the
cloud and the rows' parameters."""


@dataclass
class SeedingArgs:
    """Measure how long the Gaussians of a point cloud take to initialize."""

    points: tuple[int, ...] = (1_000_000, 2_000_000, 5_000_000)
    """Sizes of the clouds. A point takes 271 bytes, and up to 100 more for a while."""
    seed: int = 42
    """Seed of the clouds."""
    output: Path | None = None
    """File to write. Default: docs/results/seeding-DATE.json."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if not self.points or min(self.points) < 2:
            raise PlanError("--points takes one or more numbers, each at least 2")
        if self.output is not None and self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")

    def command(self) -> str:
        """The call to do the same again."""
        sizes = [str(n) for n in self.points]
        words = ["python", "benchmarks/seeding.py", "--points", *sizes, "--seed", str(self.seed)]
        return shlex.join(words)


@dataclass
class Seeding:
    """One cloud.

    Attributes:
        points: their number.
        rows_s, tree_s, neighbours_s: seconds of each part, see ``LEGEND``.
        extra_bytes: peak host memory beside the cloud and the rows' parameters.
    """

    points: int
    rows_s: float
    tree_s: float
    neighbours_s: float
    extra_bytes: int

    @property
    def total_s(self) -> float:
        return self.rows_s + self.tree_s + self.neighbours_s


def cloud(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """xyz [n, 3] float32 of surfaces and outliers, rgb [n, 3] uint8."""
    random = np.random.default_rng(seed)
    xyz = np.empty((n, 3), dtype=np.float32)
    xyz[:, :2] = 2 * random.random((n, 2), dtype=np.float32) - 1
    xyz[:, 2] = 0.05 * np.sin(7 * xyz[:, 0]) * np.cos(5 * xyz[:, 1])
    walls = random.random(n, dtype=np.float32) < 0.2
    xyz[walls, 0] = np.round(xyz[walls, 0] * CELLS) / CELLS
    xyz[walls, 2] += 0.03 * random.random(walls.sum(), dtype=np.float32)
    xyz += 5e-4 * random.standard_normal((n, 3), dtype=np.float32)
    far = random.random(n, dtype=np.float32) < 0.01
    xyz[far] *= 1 + np.abs(10 * random.standard_normal((far.sum(), 1), dtype=np.float32))
    return torch.from_numpy(xyz), torch.from_numpy(random.integers(0, 256, (n, 3), dtype=np.uint8))


def seed_cloud(n: int, seed: int) -> Seeding:
    """Initialize the Gaussians of one cloud."""
    points = cloud(n, seed)
    config = SplatfactoModelConfig()
    store = HostStore(RowLayout(config.sh_degree))
    forget_peak()
    before, start = peak_host_bytes(), time.perf_counter()
    place_rows(store, config, points)
    placed = time.perf_counter()
    size_rows(store)
    sized = time.perf_counter()
    extra = peak_host_bytes() - before - 4 * n * store.layout.width
    again = time.perf_counter()
    neighbour_tree(store.column("means"))
    tree_s = time.perf_counter() - again
    return Seeding(n, placed - start, tree_s, sized - placed - tree_s, extra)


def table(seedings: list[Seeding]) -> TextTable:
    """One row a cloud."""
    columns = [
        "points",
        "rows s",
        "tree s",
        "neighbours s",
        "in all s",
        "s per million",
        "extra GB",
    ]
    rows = [
        [
            f"{one.points:,}",
            f"{one.rows_s:.2f}",
            f"{one.tree_s:.2f}",
            f"{one.neighbours_s:.2f}",
            f"{one.total_s:.2f}",
            f"{one.total_s / one.points * 1e6:.2f}",
            f"{one.extra_bytes / 1e9:.2f}",
        ]
        for one in seedings
    ]
    return TextTable(columns, rows)


def measure(args: SeedingArgs, console: Console) -> dict[str, Any]:
    """Measure, write the file, print the table. Returns what was written."""
    args.check()
    path = args.output or results.new_path("seeding")
    machine, commit = machine_info.describe_apart(), machine_info.commit(args.commit)
    seed_cloud(1000, args.seed)  # what is loaded and started once
    seedings = []
    for n in args.points:
        console.print(f"seeding {n:,} points")
        seedings.append(seed_cloud(n, args.seed))
    report: dict[str, Any] = {
        "kind": KIND,
        "torch_threads": torch.get_num_threads(),
        "machine": machine,
        "commit": commit,
        "command": args.command(),
        "seedings": [{**dataclasses.asdict(one), "total_s": one.total_s} for one in seedings],
    }
    results.write_report(path, report)
    say(describe_machine(machine), console)
    show(table(seedings), console)
    say(LEGEND, console)
    console.print(f"written to {escape(str(path))}")
    return report


def main() -> int:
    """The command line. Exit status 2 when nothing was started."""
    return cli.run(SeedingArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
