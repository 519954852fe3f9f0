"""Means over seeds, and how each method compares with splatfacto in the same file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.plan import BASELINE
from benchmarks.results import Comparison, Run


@dataclass
class Group:
    """The runs that differ in nothing but the seed."""

    method: str
    engine: str | None
    own_overrides: list[str]
    """Settings that this method got beyond the common ones."""
    commit: str | None
    """Only where it is not the file's."""
    machine: dict[str, Any] | None
    """Only where it is not the file's."""
    runs: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For tables: the method, its engine, and what sets it apart from its siblings."""
        parts = [self.method]
        if self.engine:
            parts.append(f"({self.engine})")
        parts += self.own_overrides
        if self.commit:
            parts.append(f"at {short_commit(self.commit)}")
        if self.machine:
            parts.append("on " + str(self.machine.get("gpu") or self.machine.get("cpu")))
        return " ".join(parts)

    def mean(self, name: str) -> float | None:
        """Mean of a measured field over the runs that have it."""
        return mean(self.runs, name)

    def deviation(self, name: str) -> float | None:
        """Sample standard deviation over the runs, from two runs on."""
        values = _values(self.runs, name)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass
class Row:
    """A group beside splatfacto: differences and ratios are None where a side is missing."""

    group: Group
    psnr_difference: float | None
    ssim_difference: float | None
    training_psnr_difference: float | None
    gaussians_difference: float | None
    """As a fraction of splatfacto's."""
    speed_ratio: float | None
    memory_ratio: float | None
    """Of the peak GPU memory in allocated tensors."""
    reserved_ratio: float | None
    """Of the peak GPU memory that the allocator held."""


def short_commit(commit: str) -> str:
    """Seven digits of a sha, with its ``-dirty``; anything else as it is."""
    sha, dash, rest = commit.partition("-")
    is_sha = len(sha) == 40 and set(sha) <= set("0123456789abcdef")
    return (sha[:7] if is_sha else sha) + dash + rest


def mean(runs: Sequence[Run], name: str) -> float | None:
    """Mean of a field over the runs that have it."""
    values = _values(runs, name)
    return statistics.fmean(values) if values else None


def group_runs(comparison: Comparison) -> list[Group]:
    """Groups in the order in which they first appear; seeds ascending within each."""
    groups: dict[str, Group] = {}
    for run in sorted(comparison.runs, key=lambda run: run.seed):
        commit = None if run.commit == comparison.commit else run.commit
        key = json.dumps(
            [run.method, run.engine, run.overrides, commit, run.machine], sort_keys=True
        )
        if key not in groups:
            own = [one for one in run.overrides if one not in comparison.overrides]
            groups[key] = Group(run.method, run.engine, own, commit, run.machine)
        group = groups[key]
        (group.runs if run.error is None else group.failed).append(run)
    first = {id(run): position for position, run in enumerate(comparison.runs)}
    return sorted(
        groups.values(), key=lambda group: min(first[id(r)] for r in group.runs + group.failed)
    )


def compare_groups(comparison: Comparison) -> list[Row]:
    """Each group beside the splatfacto runs of the same machine, of the same commit if possible."""
    groups = [group for group in group_runs(comparison) if group.runs]
    return [_row(group, _baseline(groups, group)) for group in groups]


def _baseline(groups: list[Group], beside: Group) -> list[Run]:
    """Splatfacto with the common settings; one with settings of its own only if that is all."""
    candidates = [g for g in groups if g.method == BASELINE and g.machine == beside.machine]
    candidates = [g for g in candidates if g.commit == beside.commit] or candidates
    plain = [group for group in candidates if not group.own_overrides]
    return [run for group in plain or candidates for run in group.runs]


def _row(group: Group, baseline: list[Run]) -> Row:
    def difference(name: str) -> float | None:
        ours, theirs = group.mean(name), mean(baseline, name)
        return None if ours is None or theirs is None else ours - theirs

    def ratio(name: str) -> float | None:
        ours, theirs = group.mean(name), mean(baseline, name)
        return None if ours is None or not theirs else ours / theirs

    gaussians = ratio("gaussians")
    return Row(
        group=group,
        psnr_difference=difference("psnr"),
        ssim_difference=difference("ssim"),
        training_psnr_difference=difference("training_psnr"),
        gaussians_difference=None if gaussians is None else gaussians - 1,
        speed_ratio=ratio("it_per_s_last_1000"),
        memory_ratio=ratio("peak_gpu_allocated_bytes"),
        reserved_ratio=ratio("peak_gpu_reserved_bytes"),
    )


def _values(runs: Sequence[Run], name: str) -> list[float]:
    return [float(value) for run in runs if (value := getattr(run, name)) is not None]
