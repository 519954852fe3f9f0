"""Which runs a call of ``compare.py`` consists of, and the command that is recorded for them."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import overrides as settings
from benchmarks.errors import BenchmarkError

BASELINE = "splatfacto"
"""The method that the others are compared with."""

ENGINE_METHODS = "gsscale"
"""Methods whose name starts so run once for every engine."""


class PlanError(BenchmarkError):
    """Arguments that make no sense together."""


@dataclass(frozen=True)
class RunSpec:
    """One run to do."""

    method: str
    engine: str | None
    seed: int
    overrides: tuple[str, ...]
    """The common settings and those of this method alone."""

    @property
    def label(self) -> str:
        """What the run is called on the console and in file names."""
        engine = f"-{self.engine}" if self.engine else ""
        return f"{self.method}{engine}-seed{self.seed}"


def check_sharing(turns: Path | None, cap_gb: float | None, cuda_gb: float | None) -> None:
    """Raise if a cap is not all that has to be known of it, or too much."""
    if (cap_gb is None or turns is None) != (cuda_gb is None):
        raise PlanError(
            "--cuda-gb goes with --cap-gb where runs share the GPU, and only there: 0.6 on an "
            "H200, or what nvidia-smi shows when a process has only begun"
        )


@dataclass
class CompareArgs:
    """Train the same scene with several methods and write what each run gave into one file."""

    scene: Path
    """Folder with a transforms.json or with a COLMAP model in sparse/0."""
    steps: int
    """Training steps of every run."""
    methods: tuple[str, ...] = (BASELINE, "gsscale")
    """Nerfstudio methods, in the order in which they run."""
    engines: tuple[str, ...] = ("auto",)
    """Engines of gsscale; each is a run of its own."""
    seeds: tuple[int, ...] = (42,)
    """Values of --machine.seed; each is a run of its own."""
    overrides: tuple[str, ...] = ()
    """Settings for every method, as ns-train names them: pipeline.model.cull-alpha-thresh=0.005.
    With a method and a colon in front, for that method alone: gsscale:pipeline.model.x=1."""
    dataparser_overrides: tuple[str, ...] = ()
    """Settings of the dataparser, for every method: eval-interval=4."""
    parallel: int = 1
    """Runs at a time. Above 1, the timed steps of each are made while the others wait, and there is
    no wall time."""
    turns: Path | None = None
    """Folder shared with other calls that use the same GPU at the same time: the timed steps are
    made while all of their runs wait, too."""
    append: Path | None = None
    """Add to this file. Runs that it already holds are skipped; failed ones are done again."""
    output: Path | None = None
    """File to write. Default: the appended file, or docs/results/SCENE-STEPS-DATE.json."""
    allow_mixed: bool = False
    """Append runs of another commit or machine than the file's; each such run says its own."""
    commit: str | None = None
    """What is measured, where git can't tell. Default: $GSSCALE_COMMIT, then git."""
    save_images: Path | None = None
    """Folder for JPEGs of held-out views: truth | render, and the render alone (100 kB at most). Of
    a run that ends before its time they are those of its best evaluation."""
    images: int = 3
    """Held-out views to save for every run."""
    crop: tuple[int, int, int, int] | None = None
    """X Y W H, in pixels of a held-out image: save this detail of each of them as well, as PNG,
    truth | render."""
    cap_gb: float | None = None
    """GPU memory that each run may have in all, as on a card of this size; gsscale is told, too."""
    cuda_gb: float | None = None
    """What CUDA takes of --cap-gb before a run allocates anything: it can't be seen where runs
    share the GPU."""
    evaluate_every: int = 0
    """Steps between evaluations on the way, 0 for none; their time and GPU memory do not count. A
    run that runs out of memory is recorded with its best one."""
    perceptual: bool = False
    """Measure MS-SSIM and FLIP on the held-out images, too: once, at the end, or for the best
    evaluation of a run that runs out of memory; pip install flip-evaluator."""
    profile_steps: int = 0
    """GPU steps to profile, before those that are timed; wall time includes what that takes."""
    timeout: float | None = None
    """Seconds after which a run is ended and recorded as failed."""
    logs: Path = field(default_factory=lambda: Path("outputs/benchmarks"))
    """Folder for the runs' logs."""

    def check(self) -> None:
        """Raise on arguments that would only fail minutes later."""
        if min(self.steps, self.parallel) < 1:
            raise PlanError("--steps and --parallel must be at least 1")
        if min(self.images, self.profile_steps, self.evaluate_every) < 0:
            raise PlanError("--images, --profile-steps and --evaluate-every must be at least 0")
        if self.cap_gb is not None and self.cap_gb <= 0:
            raise PlanError("--cap-gb takes gigabytes")
        check_sharing(self.shared_turns, self.cap_gb, self.cuda_gb)
        if self.crop is not None and (
            self.save_images is None or min(self.crop[:2]) < 0 or min(self.crop[2:]) < 1
        ):
            raise PlanError("--crop takes X Y W H, and --save-images, where the detail goes")
        if not (self.methods and self.seeds and self.engines):
            raise PlanError("give at least one method, one engine and one seed")
        strangers = settings.targets(list(self.overrides)) - set(self.methods)
        if strangers:
            raise PlanError(
                f"a setting is meant for {', '.join(sorted(strangers))}, which is not in --methods"
            )
        for method in self.methods:
            settings.to_arguments(settings.for_method(list(self.overrides), method))
        settings.to_arguments(list(self.dataparser_overrides))

    @property
    def shared_turns(self) -> Path | None:
        """See :class:`benchmarks.turns.Turns`; None if each run has the machine for itself."""
        if self.turns is None and self.parallel > 1:
            return self.logs / "turns"
        return self.turns

    @property
    def scene_name(self) -> str:
        """The folder's own name: no path of this machine gets into the results."""
        return Path(os.path.abspath(self.scene)).name

    def runs(self) -> list[RunSpec]:
        """Every run, seed by seed, so that an interrupted call leaves comparable pairs."""
        return [
            RunSpec(
                method=method,
                engine=engine,
                seed=seed,
                overrides=tuple(settings.for_method(list(self.overrides), method)),
            )
            for seed in dict.fromkeys(self.seeds)
            for method in dict.fromkeys(self.methods)
            for engine in self._engines_of(method)
        ]

    def _engines_of(self, method: str) -> list[str | None]:
        if method.startswith(ENGINE_METHODS):
            return list(dict.fromkeys(self.engines))
        return [None]

    def command(self) -> str:
        """The call to do the same again; folders of this machine are left out."""
        words = ["python", "benchmarks/compare.py"]
        words += ["--scene", self.scene_name, "--steps", str(self.steps)]
        words += ["--methods", *self.methods]
        if any(method.startswith(ENGINE_METHODS) for method in self.methods):
            words += ["--engines", *self.engines]
        words += ["--seeds", *map(str, self.seeds)]
        if self.overrides:
            words += ["--overrides", *self.overrides]
        if self.dataparser_overrides:
            words += ["--dataparser-overrides", *self.dataparser_overrides]
        if self.parallel > 1:
            words += ["--parallel", str(self.parallel)]
        words += ["--cap-gb", str(self.cap_gb)] if self.cap_gb is not None else []
        words += ["--cuda-gb", str(self.cuda_gb)] if self.cuda_gb is not None else []
        words += ["--evaluate-every", str(self.evaluate_every)] if self.evaluate_every else []
        words += ["--perceptual"] if self.perceptual else []
        words += ["--profile-steps", str(self.profile_steps)] if self.profile_steps else []
        words += ["--turns", "DIR"] if self.turns is not None else []
        return shlex.join(words)
