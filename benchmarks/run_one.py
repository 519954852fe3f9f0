"""One training and its evaluation, in this process, as ``ns-train`` would do it.

``compare.py`` starts this file once for every run; alone it prints one run as a line of JSON.
Differences to ``ns-train``: no checkpoint, evaluations only where they are asked for and not timed,
and random LPIPS weights where the real ones are missing (LPIPS is never reported); on a CPU
splatfacto draws with gsscale's reference rasterizer.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

import tyro

from benchmarks import child
from benchmarks.progress import ProgressFile

if TYPE_CHECKING:
    from benchmarks.kept import KeptViews

TRAINING_VIEWS = 40
"""Training images that are evaluated at most, for their mean."""

MEASURES = ("psnr", "ssim", "ms_ssim", "flip")
"""Of a held-out view. Not LPIPS, whose weights may be made up."""


@dataclass
class RunArgs:
    """Train one method on one scene, evaluate it, print what was measured."""

    method: str
    """Nerfstudio method."""
    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0."""
    steps: int
    """Training steps."""
    seed: int = 42
    """Random seed."""
    engine: str | None = None
    """Engine of gsscale."""
    overrides: tuple[str, ...] = ()
    """Settings as name=value."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser as name=value."""
    result: Path | None = None
    """File for the measurements."""
    progress: Path | None = None
    """File that tells how far the run is."""
    scratch: Path | None = None
    """Folder for the LPIPS placeholder, shared between runs."""
    save_images: Path | None = None
    """Folder for pictures of held-out views."""
    images: int = 3
    """Held-out views to save."""
    crop: tuple[int, int, int, int] | None = None
    """X Y W H of a detail to save of each of them."""
    name: str = "run"
    """First part of the images' names."""
    profile_steps: int = 0
    """Steps to profile, before those that are timed."""
    cap_gb: float | None = None
    """GPU memory that the run may have in all."""
    cuda_gb: float | None = None
    """What CUDA takes of it; unset if nobody else is on the GPU."""
    evaluate_every: int = 0
    """Steps between evaluations on the way; 0 for none."""
    perceptual: bool = False
    """Whether to measure MS-SSIM and FLIP, too."""
    turns: Path | None = None
    """Folder that trainings on the same GPU share: timed steps are made while the others wait."""


def measure(args: RunArgs, output_dir: Path) -> dict[str, Any]:
    """Do the run. Returns the measured fields of :class:`benchmarks.results.Run`."""
    from nerfstudio.scripts import train as ns_train
    from nerfstudio.utils import profiler

    from benchmarks import cpu_splatfacto, images, ns_config, perceptual
    from benchmarks.course import Course
    from benchmarks.culling import check_culling
    from benchmarks.gpu_profile import TrainingProfile
    from benchmarks.kept import KeptViews
    from benchmarks.memory_cap import cap_gpu_memory, lifted
    from benchmarks.meter import TrainingMeter, timed_steps
    from benchmarks.offline import ensure_lpips_backbone
    from benchmarks.turns import Turns
    from gsscale_nerfstudio.out_of_memory import is_out_of_memory

    settings = list(args.overrides)
    budget = "pipeline.model.vram-budget-gb"
    if args.cap_gb is not None and args.engine and not any(budget in one for one in settings):
        settings.append(f"{budget}={args.cap_gb}")  # a card of that size would have said so
    arguments = ns_config.train_arguments(
        method=args.method,
        scene=args.scene,
        steps=args.steps,
        seed=args.seed,
        engine=args.engine,
        overrides=settings,
        dataparser_overrides=list(args.dataparser_overrides),
        output_dir=output_dir,
    )
    print("ns-train", *arguments, flush=True)
    config = ns_config.parse(arguments)
    config.save_config()
    ensure_lpips_backbone(args.scratch or output_dir)
    if args.method in cpu_splatfacto.METHODS and config.machine.device_type == "cpu":
        cpu_splatfacto.let_it_run()

    cuda, cap = config.machine.device_type == "cuda", None
    if args.cap_gb is not None:
        if not cuda:
            raise RuntimeError("--cap-gb is about a GPU's memory, and this run has none")
        cap = cap_gpu_memory(args.cap_gb, args.cuda_gb)
    progress = ProgressFile(args.progress, args.steps)
    progress.phase("setting up", 0)
    turns = None if args.turns is None else Turns(args.turns)
    meter = TrainingMeter(args.steps, cuda, progress.step, turns, cap)
    ns_train._set_random_seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    pipeline = trainer.pipeline
    held_out = pipeline.datamanager.eval_dataset
    if not len(held_out):
        raise RuntimeError("the scene has no held-out image; try eval-mode=interval")
    width, height = (int(side.min()) for side in (held_out.cameras.width, held_out.cameras.height))
    if args.perceptual:
        perceptual.check(min(width, height))
    if args.crop is not None:
        images.check_crop(args.crop, width, height)
    kept = KeptViews(output_dir / "views")

    def evaluate(steps: int) -> dict[str, Any]:
        looked_at = args.perceptual or args.save_images is not None
        evaluation = _evaluation(pipeline, kept if looked_at else None)
        before = [other["psnr"] for other in course.evaluations]
        counts = steps == args.steps or evaluation["psnr"] > max(before, default=-math.inf)
        kept.settle(counts)
        if counts and args.perceptual:
            evaluation.update(_perceptual(kept))
        return {"at_step": steps, **evaluation}

    untimed = args.steps - timed_steps(args.steps)

    def evaluate_on_the_way(steps: int) -> dict[str, Any]:
        engine = getattr(pipeline.model, "engine", None)  # gsscale's, which measures what is taken
        with meter.paused(getattr(engine, "give_back", None)):
            return evaluate(steps)

    course = Course(args.evaluate_every, untimed, evaluate_on_the_way)
    profile = TrainingProfile(untimed - args.profile_steps - 1, args.profile_steps)
    if args.profile_steps:
        if profile.begin < 1 or not cuda:
            raise RuntimeError(
                "--profile-steps profiles the GPU in steps before the timed ones: it takes a GPU "
                f"and a longer training than {args.steps} steps"
            )
        trainer.callbacks.append(profile.callback())
    trainer.callbacks += [course.callback(), meter.callback()]
    ns_config.write_no_checkpoint(trainer)
    meter.start()
    try:
        trainer.train()
    except RuntimeError as error:
        if not (is_out_of_memory(error) and course.evaluations):
            raise
        n = int(pipeline.model.num_points)
        ended = f"out of GPU memory in step {course.steps_done + 1}, with {n:,} Gaussians"
        peaks = meter.peaks()
        _save_pictures(kept, args)
        return {**course.best(), "course": course.evaluations, "ended": ended, **peaks}
    profiler.flush_profiler(config.logging)
    if meter.result is None:
        raise RuntimeError(f"training ended before step {args.steps}")

    progress.phase("evaluating", args.steps)
    with lifted(cap):
        last = evaluate(args.steps)
        trained = images.metrics_of_training_views(pipeline, TRAINING_VIEWS)
        culling = check_culling(pipeline)
    _save_pictures(kept, args)
    return {
        **last,
        "training_psnr": fmean(view["psnr"] for view in trained),
        "training_ssim": fmean(view["ssim"] for view in trained),
        "course": [*course.evaluations, last] if args.evaluate_every else None,
        "profile": profile.result,
        **meter.result,
        **culling,
    }


def _evaluation(pipeline: Any, kept: KeptViews | None) -> dict[str, Any]:
    """What the held-out views say of a training, as fields of :class:`benchmarks.results.Run`.

    Args:
        pipeline: of the training.
        kept: gets the views.
    """
    from benchmarks import images

    views = images.metrics_of_views(pipeline, None if kept is None else kept.add)
    return {
        **_means(views),
        "psnr_of_views": [round(float(view["psnr"]), 3) for view in views],
        "held_out_images": len(views),
        "gaussians": int(pipeline.model.num_points),
    }


def _save_pictures(kept: KeptViews, args: RunArgs) -> None:
    """Of the views that count, where asked to."""
    from benchmarks import images

    if args.save_images is not None:
        images.save_views(kept, args.save_images, args.name, args.images, args.crop)


def _perceptual(kept: KeptViews) -> dict[str, float]:
    """How the views that count look beside the photographs."""
    import torch

    from benchmarks import perceptual

    pairs = ((torch.from_numpy(truth), torch.from_numpy(render)) for _, truth, render in kept)
    return _means([perceptual.measures(*pair) for pair in pairs])


def _means(views: list[dict[str, float]]) -> dict[str, float]:
    """Of the measures that we report."""
    means = {key: fmean(view[key] for view in views) for key in views[0] if key in MEASURES}
    for key, mean in means.items():
        if not math.isfinite(mean):
            raise RuntimeError(f"{key} on the held-out images is {mean}")
    return means


def main(args: RunArgs) -> int:
    """Measure and report. Returns the exit status."""
    return child.report(lambda folder: measure(args, folder), args.result)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RunArgs)))
