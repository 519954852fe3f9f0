"""One method's steps in this process; ``step.py`` starts this file once for every method."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

import tyro

from benchmarks import child
from benchmarks.progress import ProgressFile

GSPLAT = "gsplat"
"""The one method that is not Nerfstudio's; it takes splatfacto's settings."""


@dataclass
class ChildArgs:
    """Measure the training step of one method at a fixed number of rows."""

    method: str
    """splatfacto, gsplat or gsscale."""
    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0."""
    rows: int
    """Number of Gaussians."""
    visible: float
    """Share of them that a view may see."""
    steps: int
    """Timed steps."""
    warmup: int
    """Steps before them."""
    seed: int = 42
    """Seed of rows and view order."""
    engine: str | None = None
    """Engine of gsscale."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to train."""
    cap_gb: float | None = None
    """GPU memory that this process may have in all."""
    cuda_gb: float | None = None
    """What CUDA takes of it; unset if nobody else is on the GPU."""
    turns: Path | None = None
    """Folder that others on the same GPU share: steps are made while they wait."""
    overrides: tuple[str, ...] = ()
    """Settings as name=value."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser as name=value."""
    result: Path | None = None
    """File for the measurements."""
    progress: Path | None = None
    """File that tells how far this is."""
    scratch: Path | None = None
    """Folder for the LPIPS placeholder, shared between methods."""


def run(args: ChildArgs, output_dir: Path) -> dict[str, Any]:
    """Build the method over its rows and measure it."""
    progress = ProgressFile(args.progress, args.steps)
    progress.phase("reading the scene", 0)

    import torch
    from nerfstudio.scripts import train as ns_train

    from benchmarks import fixed_rows, ns_config, offline, step_meter
    from benchmarks.memory_cap import cap_gpu_memory
    from benchmarks.step_methods import GSScale, Method, Splatfacto
    from benchmarks.turns import Turns

    if args.cap_gb is not None:
        cap_gpu_memory(args.cap_gb, args.cuda_gb)
    name = "splatfacto" if args.method == GSPLAT else args.method
    arguments = ns_config.train_arguments(
        method=name,
        scene=args.scene,
        steps=step_meter.PHASE_STEPS,  # of no effect: there is no trainer
        seed=args.seed,
        engine=args.engine,
        overrides=[f"machine.device-type={args.device}", *args.overrides],
        dataparser_overrides=list(args.dataparser_overrides),
        output_dir=output_dir,
    )
    print("ns-train", *arguments, flush=True)
    config = ns_config.parse(arguments)
    split = fixed_rows.train_split(config)
    sh_degree = config.pipeline.model.sh_degree  # type: ignore[attr-defined]
    scene = fixed_rows.fit(split, args.rows, args.visible, args.seed, sh_degree)

    progress.phase("making rows", 0)
    device = torch.device(args.device)
    ns_train._set_random_seed(args.seed)
    method: Method
    if args.method == GSPLAT:
        from benchmarks.gsplat_baseline import GsplatTrainer

        method = GsplatTrainer(config, scene, device)
    elif args.method == "splatfacto":
        offline.ensure_lpips_backbone(args.scratch or output_dir)
        method = Splatfacto(config, split, scene, device)
    else:
        method = GSScale(config, split, scene, device)
    turns = None if args.turns is None else Turns(args.turns)  # kept, with its lock, to the end
    if turns is not None:
        turns.alone()  # rows were made beside the others
    order = step_meter.view_order(len(scene.cameras), args.seed)
    measured = step_meter.measure(method, order, args.warmup, args.steps, device, progress)
    return {
        **measured,
        "tiles": scene.rows.tiles,
        "views": len(scene.cameras),
        "planned_visible_share": scene.visible_share,
        "image": [int(scene.cameras.width[0]), int(scene.cameras.height[0])],
    }


def main(args: ChildArgs) -> int:
    """Measure and report. Returns the exit status."""
    return child.report(lambda folder: run(args, folder), args.result)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(ChildArgs)))
