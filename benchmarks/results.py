"""The comparison file: what was measured, on what, by which command.

One comparison is one JSON file: a scene, a number of steps, the settings that every method got, and
a list of runs. :class:`Comparison` decides which runs may share a file and which one replaces
which.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.machine import ROOT
from gsscale_nerfstudio.files import whole_file

KIND = "comparison"
"""Value of the ``kind`` key: other JSON files may lie in the same folder."""


class ResultsError(BenchmarkError):
    """A file that can't be used, or runs that must not share one; the message says what to do."""


@dataclass
class Run:
    """One training and its evaluation on the held-out images. ``None`` means not measured.

    Of a run that ended before its time (``ended``) these are the measures of its best evaluation.
    """

    method: str
    engine: str | None
    seed: int
    overrides: list[str]
    """Every setting that differs from the method's default, common and method-specific."""
    commit: str
    psnr: float | None = None
    """Mean over the held-out images, in dB."""
    ssim: float | None = None
    ms_ssim: float | None = None
    flip: float | None = None
    """This and the one before: see benchmarks/perceptual.py."""
    psnr_of_views: list[float] | None = None
    """Of each held-out image: a floater before one of them moves the mean, too."""
    training_psnr: float | None = None
    """This and the next: the same on training images, up to 40 of them. They scatter less from run
    to run than those of a few held-out images."""
    training_ssim: float | None = None
    held_out_images: int | None = None
    gaussians: int | None = None
    at_step: int | None = None
    """Steps after which all of this was measured."""
    ended: str | None = None
    """Where and why the run ended before its time."""
    course: list[dict[str, Any]] | None = None
    """The same measures on the way there."""
    it_per_s_last_1000: float | None = None
    timed_steps: int | None = None
    """Steps behind ``it_per_s_last_1000``: 1000, or half of a run shorter than 2000."""
    wall_s: float | None = None
    """First step's start (images are loaded there) to the last step's end."""
    peak_gpu_allocated_bytes: int | None = None
    peak_gpu_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None
    profile: dict[str, Any] | None = None
    """What the GPU spent its time on, see benchmarks/gpu_profile.py."""
    visible_share: float | None = None
    """This and the next three: the culler on the held-out views, see benchmarks/culling.py."""
    culled_per_drawn: float | None = None
    rows_dropped: int | None = None
    largest_render_difference: float | None = None
    parallel: int = 1
    """Runs of the call that shared the machine. Steps were timed while the others waited, or not at
    all."""
    machine: dict[str, Any] | None = None
    """Only where it is not the file's."""
    error: str | None = None

    def identity(self) -> tuple[Any, ...]:
        """Two runs with the same identity answer the same question."""
        machine = json.dumps(self.machine, sort_keys=True)
        return (self.method, self.engine, self.seed, tuple(self.overrides), self.commit, machine)

    def settles(self) -> bool:
        """Whether this run needs no repetition."""
        timed = self.it_per_s_last_1000 is not None or self.ended is not None
        return self.error is None and timed


TIMES_AND_PEAKS = (
    "it_per_s_last_1000",
    "timed_steps",
    "wall_s",
    "peak_gpu_allocated_bytes",
    "peak_gpu_reserved_bytes",
    "peak_host_bytes",
)
"""Fields of a run that depend on the machine."""


@dataclass
class Comparison:
    """All runs of one scene at one number of steps under the same common settings."""

    scene: str
    steps: int
    overrides: list[str]
    """The settings given to every method."""
    dataparser: list[str]
    """The dataparser subcommand and its arguments."""
    machine: dict[str, Any]
    commit: str
    command: str
    """One line for each call that added runs; the scene's path is cut to its name."""
    cap_gb: float | None = None
    """GPU memory that each run might have in all."""
    runs: list[Run] = field(default_factory=list)

    def check_compatible(self, other: Comparison, allow_mixed: bool = False) -> None:
        """Raise unless the runs of ``other`` may be added to this file.

        Another commit or machine is refused unless ``allow_mixed``; other work never fits.
        """
        keys = ["scene", "steps", "overrides", "dataparser", "cap_gb"]
        keys += [] if allow_mixed else ["commit", "machine"]
        for key in keys:
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                remedy = "write another file"
                if key in ("commit", "machine"):
                    remedy += ", or pass --allow-mixed and each run keeps its own"
                raise ResultsError(
                    f"the file's {key} is {mine!r}, the new runs' is {theirs!r}: {remedy}"
                )

    def find(self, identity: tuple[Any, ...]) -> Run | None:
        """The run with this identity, if the file has it."""
        return next((run for run in self.runs if run.identity() == identity), None)

    def add(self, run: Run) -> None:
        """Add ``run``; it replaces one with the same identity unless that one says more."""
        present = self.find(run.identity())
        if present is None:
            self.runs.append(run)
            return
        loses_timing = present.settles() and not run.settles()
        if not (present.error is None and (run.error is not None or loses_timing)):
            self.runs[self.runs.index(present)] = run

    def merge(self, other: Comparison, allow_mixed: bool = False) -> None:
        """Take over the runs of ``other``; each keeps its commit, and its machine if it differs."""
        self.check_compatible(other, allow_mixed)
        for run in other.runs:
            machine = other.machine if run.machine is None else run.machine
            self.add(dataclasses.replace(run, machine=None if machine == self.machine else machine))
        self.add_command(other.command)

    def at_step(self, steps: int) -> Comparison:
        """What the runs had come to after so many steps, as trainings that ended there.

        That holds as long as no setting follows the number of steps; Nerfstudio's schedules don't.
        Runs that were not evaluated at that step are left out; nothing is known of times and peaks.
        """
        if steps == self.steps:
            return self
        runs = []
        for run in self.runs:
            for evaluation in run.course or []:
                if evaluation["at_step"] == steps:
                    known = {"parallel": run.parallel, "machine": run.machine, **evaluation}
                    key = (run.method, run.engine, run.seed, run.overrides, run.commit)
                    runs.append(Run(*key, **known))
        return dataclasses.replace(self, steps=steps, runs=runs)

    def pooled(self) -> Comparison:
        """The runs of all commits and machines as if they were of one, without what is timed."""
        nothing: dict[str, Any] = dict.fromkeys(TIMES_AND_PEAKS)
        runs = [
            dataclasses.replace(run, commit=self.commit, machine=None, **nothing)
            for run in self.runs
        ]
        return dataclasses.replace(self, runs=runs)

    def add_command(self, command: str) -> None:
        """Append the lines of ``command`` that the file doesn't have."""
        lines = self.command.splitlines()
        lines += [line for line in command.splitlines() if line not in lines]
        self.command = "\n".join(lines)


def to_json(comparison: Comparison) -> str:
    """The file's text. Keys that say nothing new (``machine`` of a run) are left out."""
    data = dataclasses.asdict(comparison)
    for run in data["runs"]:
        for key in ("machine", "error", "ended", "course"):
            if run[key] is None:
                del run[key]
    return json.dumps({"kind": KIND, **data}, indent=1, allow_nan=False) + "\n"


def from_json(text: str, name: str) -> Comparison:
    """The inverse of :func:`to_json`; ``name`` is for the error message."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ResultsError(f"{name} is no comparison file: {error}") from error
    return from_data(data, name)


def from_data(data: dict[str, Any], name: str) -> Comparison:
    """What :func:`from_json` makes of a file that has been parsed."""
    try:
        if data.get("kind") != KIND:
            raise ResultsError(f"{name} is no comparison: its 'kind' is not {KIND!r}")
        fields = {key: value for key, value in data.items() if key != "kind"}
        runs = [Run(**run) for run in fields.pop("runs")]
        return Comparison(runs=runs, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultsError(f"{name} is no comparison file: {error}") from error


def load(path: Path) -> Comparison:
    """Read a comparison file."""
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error


def read(path: Path) -> dict[str, Any]:
    """A JSON file of any kind; ``{}`` if it has none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def save(comparison: Comparison, path: Path) -> None:
    """Write the file under a temporary name and rename it: never half a file."""
    write_text(path, to_json(comparison))


def new_path(name: str) -> Path:
    """A file of this moment in ``docs/results``."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return ROOT / "docs" / "results" / f"{name}-{date}.json"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a file that is no comparison, as :func:`save` does."""
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` with ``text`` in one rename."""
    try:
        with whole_file(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"could not write {path}: {error}; name another --output") from error
