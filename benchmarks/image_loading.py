"""How fast images are read, and what training waits for when they come from the disk.

    python benchmarks/image_loading.py --scene DIR --output FILE.json

First the rates at which threads read a scene's training images. They set a floor: with no image in
memory, no step is shorter than the time in which all threads together read one. Then the data
manager's own path, as training uses it, beside a "training" that only sleeps: with all images
cached, and from the disk with room for all, half and hardly any of them.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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
    from gsscale_nerfstudio.datamanager import GSScaleDatamanager, GSScaleDatamanagerConfig

KIND = "image_loading"
LEGEND = """\
Pillow: decoded as Nerfstudio does it. ours: as gsscale does it. whole: with undistortion, as
training wants it; per thread: of that. in memory: share of the training images that there is room
for, those read ahead included. sleeps: of each step, in place of training. waited: steps whose
image was still being read, and the mean time they waited, over all steps. First steps, an epoch of
them, are not counted."""


@dataclass
class ImageLoadingArgs:
    """Measure the reading of images."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0."""
    output: Path
    """File to write."""
    steps: int = 300
    """Steps to time, after one epoch that is not."""
    step_ms: float = 16.0
    """Length of a step of the training that is imitated. caliterra: 60 it/s on an H200."""
    seconds: float = 3.0
    """Time for each rate, about."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser: downscale-factor=2."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if self.steps < 1 or self.step_ms < 0 or self.seconds <= 0:
            raise PlanError("--steps must be at least 1, --step-ms and --seconds not negative")
        if self.output.exists():
            raise PlanError(f"{self.output} exists: name another --output")
        dataparser_arguments(self.scene, list(self.dataparser_overrides))


def datamanager_config(args: ImageLoadingArgs) -> GSScaleDatamanagerConfig:
    """What ``ns-train gsscale --data SCENE`` would use."""
    from benchmarks import ns_config

    with tempfile.TemporaryDirectory(prefix="gsscale-images-") as folder:
        words = ns_config.train_arguments(
            method="gsscale",
            scene=args.scene,
            steps=1,
            seed=42,
            engine=None,
            overrides=[],
            dataparser_overrides=list(args.dataparser_overrides),
            output_dir=Path(folder),
        )
        return ns_config.parse(words).pipeline.datamanager  # type: ignore[return-value]


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and ``cores``."""
    return sorted({*(1 << n for n in range(cores.bit_length()) if 1 << n <= cores), cores})


def measure_rates(data: GSScaleDatamanager, seconds: float, cores: int) -> list[dict[str, Any]]:
    """Images per second of each kind of reading, by number of threads."""
    from nerfstudio.data.datasets.base_dataset import InputDataset

    from gsscale_nerfstudio.images import undistorted

    dataset = data.train_dataset
    cameras, image_type = copy.deepcopy(dataset.cameras), data.config.cache_images_type
    kinds = {
        "pillow": lambda index: InputDataset.get_numpy_image(dataset, index),
        "ours": dataset.get_numpy_image,
        "whole": lambda index: undistorted(dataset, cameras, index, image_type),
    }
    for index in range(len(dataset)):  # from here on in the system's cache: decoding is measured
        Path(dataset.image_filenames[index]).read_bytes()
    rows = []
    for threads in thread_counts(cores):
        row: dict[str, Any] = {"threads": threads}
        for name, read in kinds.items():
            row[f"{name}_images_per_s"] = _rate(read, len(dataset), threads, seconds)
        rows.append(row)
    return rows


def _rate(read: Any, images: int, threads: int, seconds: float) -> float:
    """Images per second of ``threads`` threads that read for about ``seconds``."""
    start = time.perf_counter()

    def until_the_end(first: int) -> int:
        for count in itertools.count(1):
            read((first + count * threads) % images)
            if time.perf_counter() - start > seconds:
                return count
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(until_the_end, range(threads)))
    return done / (time.perf_counter() - start)


def measure_paths(config: GSScaleDatamanagerConfig, args: ImageLoadingArgs) -> list[dict[str, Any]]:
    """Time per step of each way to keep images, with and without a training beside it."""
    rows = [_path(config, args, "cpu", None)]
    for share in (1.0, 0.5, 0.0):
        rows.append(_path(config, args, "disk", share))
    return rows


def _path(
    config: GSScaleDatamanagerConfig, args: ImageLoadingArgs, mode: Any, share: float | None
) -> dict[str, Any]:
    import torch

    from gsscale_nerfstudio.images import DiskImages, decoded_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = copy.deepcopy(config)
    config.cache_images = mode
    data: GSScaleDatamanager = config.setup(device=device)
    if share is not None:
        sizes = decoded_bytes(data.train_dataset, config.cache_images_type, threads=4)
        # All and a little: what a number of GB is rounded to must not take the last one's place.
        data.config.image_memory_gb = (max(share * sum(sizes), 4 * max(sizes)) + 1) / 1e9
    start = time.perf_counter()
    for step in range(len(data.train_dataset)):
        data.next_train(step)
    row: dict[str, Any] = {"mode": mode, "share": share, "steps": args.steps}
    row["first_epoch_s"] = time.perf_counter() - start
    images = data.cached_train
    on_disk = images if isinstance(images, DiskImages) else None
    for name, sleep in (("alone", 0.0), ("beside", args.step_ms / 1e3)):
        counted = (on_disk.reads, on_disk.waits, on_disk.waited) if on_disk else (0, 0, 0.0)
        start = time.perf_counter()
        for step in range(args.steps):
            data.next_train(step)
            time.sleep(sleep)
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        now = (on_disk.reads, on_disk.waits, on_disk.waited) if on_disk else (0, 0, 0.0)
        reads, waits, waited = (after - before for before, after in zip(counted, now, strict=True))
        row[name] = {
            "sleep_ms": 1e3 * sleep,
            "ms_per_step": 1e3 * elapsed / args.steps,
            "reads": reads,
            "waits": waits,
            "waited_ms_per_step": 1e3 * waited / args.steps,
        }
    return row


def rate_table(report: dict[str, Any]) -> TextTable:
    """One row a number of threads."""
    columns = ["threads", "Pillow images/s", "ours", "whole", "per thread"]
    rows = []
    for row in report["rates"]:
        rates = [row[f"{name}_images_per_s"] for name in ("pillow", "ours", "whole")]
        rates.append(rates[-1] / row["threads"])
        rows.append([str(row["threads"]), *(f"{rate:.1f}" for rate in rates)])
    return TextTable(columns, rows)


def path_table(report: dict[str, Any]) -> TextTable:
    """Two rows a way to keep images: alone, and beside a training."""
    columns = ["images", "in memory", "sleeps ms", "ms/step", "waited", "waited ms", "reads/step"]
    rows = []
    for row in report["paths"]:
        share = "all" if row["share"] is None else f"{row['share']:.0%}"
        for name in ("alone", "beside"):
            part = row[name]
            rows.append(
                [
                    row["mode"],
                    share,
                    f"{part['sleep_ms']:.1f}",
                    f"{part['ms_per_step']:.2f}",
                    f"{part['waits'] / row['steps']:.0%}",
                    f"{part['waited_ms_per_step']:.2f}",
                    f"{part['reads'] / row['steps']:.2f}",
                ]
            )
    return TextTable(columns, rows)


def measure(args: ImageLoadingArgs, console: Console) -> dict[str, Any]:
    """Measure, write the file, print the tables. Returns what was written."""
    args.check()
    machine, commit = machine_info.describe_apart(), machine_info.commit(args.commit)
    config = datamanager_config(args)
    data: GSScaleDatamanager = copy.deepcopy(config).setup(device="cpu")
    cores = len(os.sched_getaffinity(0))
    console.print("measuring the rates")
    rates = measure_rates(data, args.seconds, cores)
    console.print("measuring the data manager")
    report: dict[str, Any] = {
        "kind": KIND,
        "scene": args.scene.resolve().name,
        "images": len(data.train_dataset),
        "width": int(data.train_dataset.cameras.width[0]),
        "height": int(data.train_dataset.cameras.height[0]),
        "machine": machine,
        "commit": commit,
        "rates": rates,
        "paths": measure_paths(config, args),
    }
    results.write_report(args.output, report)
    say(
        f"{report['scene']}: {report['images']} training images, the first of "
        f"{report['width']} x {report['height']} pixels; {describe_machine(machine)}",
        console,
    )
    show(rate_table(report), console)
    show(path_table(report), console)
    say(LEGEND, console)
    whole = rates[-1]["whole_images_per_s"]
    say(
        f"The floor: {cores} threads read {whole:.0f} images/s, so that with none in memory "
        f"training goes at {whole:.0f} it/s at most, with half of them at {2 * whole:.0f}.",
        console,
    )
    console.print(f"written to {escape(str(args.output))}")
    return report


def main() -> int:
    """The command line. Exit status 2 when nothing was started."""
    return cli.run(ImageLoadingArgs, __doc__, measure)


if __name__ == "__main__":
    sys.exit(main())
