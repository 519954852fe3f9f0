"""How responsive Nerfstudio's viewer is beside a training of many Gaussians, and what it costs it.

python benchmarks/viewer.py --scene DIR --rows 1e7 --cap-gb 8 --seconds 20

Made-up rows are trained while nobody looks on, while somebody does whose camera rests, and while
that camera flies over the scene. The rows are nobody's picture of anything; what a view costs does
not depend on that.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from rich.console import Console
from rich.markup import escape

from benchmarks import cli, ns_config, results
from benchmarks import machine as machine_info
from benchmarks.cli import say, show
from benchmarks.made_up import MadeUpArgs, Stopwatch, close_writers, make_trainer, make_up
from benchmarks.plan import PlanError
from benchmarks.step_table import text
from benchmarks.tables import TextTable, describe_machine
from benchmarks.turns import Turns

KIND = "viewer"
ENDLESS = 10**9
"""Training steps: the viewer's client says when to stop."""


LEGEND = """\
nobody connected, camera at rest, camera moving: the phases, one after the other. The picture of a
camera is the first of it or of a later one."""


@dataclass
class ViewerArgs(MadeUpArgs):
    """Look at a training of made-up Gaussians through the viewer."""

    seconds: float = 20.0
    """How long nobody looks on, how long the camera rests, and how long it moves."""
    warmup: int = 60
    """Training steps before that."""
    stops: int = 5
    """How often the camera comes to rest on its way, until a picture of full size is there."""
    max_res: int = 512
    """The longer side of a picture of full size: "Max res" in the viewer's panel."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        super().check()
        if self.seconds <= 0 or self.warmup < 1 or self.stops < 1:
            raise PlanError("--seconds must be positive, --warmup and --stops at least 1")

    def own_settings(self) -> list[str]:
        """No densification, and no training images in front of the pictures."""
        viewer = ["quit-on-train-completion=True", "max-num-display-images=0"]
        viewer.append("websocket-host=127.0.0.1")
        return ["vis=viewer", "pipeline.model.stop-split-at=0", *(f"viewer.{v}" for v in viewer)]


def train(args: ViewerArgs, work: Path, console: Console) -> dict[str, Any]:
    """Train in this thread, look on in another one. Returns what was measured."""
    from benchmarks import camera_stamp, viewer_flight

    trainer = make_trainer(args, ENDLESS, work)
    viewer = trainer.viewer_state
    try:
        viewer.control_panel._max_res.value = args.max_res
        scene = make_up(trainer, args, Stopwatch())
        console.print(f"made {int(args.rows):,} rows under {len(scene.cameras):,} cameras")
        messages = round(args.seconds * viewer_flight.MESSAGES_PER_S)
        path = viewer_flight.path_along(scene.cameras, messages)
        camera_stamp.stamp_pictures(trainer.pipeline.model, path)
        ns_config.write_no_checkpoint(trainer)
        onlooker = viewer_flight.Onlooker(
            trainer, scene.cameras, path, args.seconds, args.warmup, args.stops
        )
        turns = None if args.turns is None else Turns(args.turns)  # kept, with its lock, to the end
        if turns is not None:
            turns.alone()  # rows were made beside the others
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(onlooker.run)
            try:
                trainer.train()
            finally:
                onlooker.over.set()
        seen = looking.result()
    finally:
        viewer.viser_server.stop()
    return {
        "rows": trainer.pipeline.model.num_points,
        "tiles": scene.rows.tiles,
        "views": len(scene.cameras),
        "planned_visible_share": scene.visible_share,
        **seen,
    }


def measure(args: ViewerArgs, console: Console) -> None:
    """Train, write the file, print the table."""
    args.check()
    scene = args.scene.resolve().name
    path = args.output or results.new_path(f"viewer-{scene}-{int(args.rows)}")
    machine, commit = machine_info.describe_apart(), machine_info.commit(args.commit)
    with tempfile.TemporaryDirectory(prefix="gsscale-viewer-") as work:
        try:
            seen = train(args, Path(work), console)
        finally:
            close_writers()
    own = "--seconds", args.seconds, "--warmup", args.warmup, "--stops", args.stops
    report = {
        "kind": KIND,
        "scene": scene,
        "seconds": args.seconds,
        "max_res": args.max_res,
        "cap_gb": args.cap_gb,
        "machine": machine,
        "commit": commit,
        "command": args.command("viewer.py", *own, "--max-res", args.max_res),
        **seen,
    }
    results.write_report(path, report)
    say(describe_machine(machine), console)
    show(table(report), console)
    console.print(f"written to {escape(str(path))}")


def table(report: dict[str, Any]) -> TextTable:
    """One line a figure."""
    wait, late = report["picture_ms_median"], report["picture_ms_p95"]
    sizes = [f"{width}x{height}" for width, height in report["moving_sizes"]]
    rest = report["full_picture_s"]
    lines = [
        ["Gaussians", f"{report['rows']:,}"],
        ["views, of how many tiles", f"{report['views']:,}, {report['tiles']:,}"],
        ["it/s, nobody connected", text(report["it_per_s_alone"], "{:.2f}")],
        ["it/s, camera at rest", text(report["it_per_s_still"], "{:.2f}")],
        ["it/s, camera moving", text(report["it_per_s_moving"], "{:.2f}")],
        ["ms from a camera to its picture, median, 95 %", f"{wait:.0f}, {late:.0f}"],
        ["pictures a second, camera moving", text(report["pictures_per_s_moving"], "{:.1f}")],
        ["their size: smallest, median, largest", ", ".join(sizes)],
        ["full size", "{}x{}".format(*report["full_size"])],
        [
            "s until it, after the camera stops: median, longest",
            f"{median(rest):.2f}, {max(rest):.2f}",
        ],
        ["s until it, after connecting", text(report["first_full_picture_s"], "{:.2f}")],
    ]
    return TextTable(["what", "how much"], lines)


def main() -> int:
    """The command line. Exit status 2 when nothing was started."""
    return cli.run(ViewerArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
