"""Settings on the command line: ``pipeline.model.cull-alpha-thresh=0.005``."""

from __future__ import annotations

import shlex

from benchmarks.errors import BenchmarkError


class OverrideError(BenchmarkError):
    """A setting that is not ``name=value``."""


def to_arguments(overrides: list[str]) -> list[str]:
    """``name=value`` to what ``ns-train`` takes; a value may hold several words (a tuple)."""
    arguments: list[str] = []
    for override in overrides:
        name, equals, value = override.partition("=")
        if not name or not equals or name.startswith("-"):
            raise OverrideError(f"{override!r} is not a setting: write name=value, without dashes")
        words = shlex.split(value)
        # Only the form with "=" takes a value that looks like an option, -1 for instance.
        arguments += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    return arguments


def for_method(overrides: list[str], method: str) -> list[str]:
    """The settings that ``method`` gets, in order.

    ``method:name=value`` goes to that method alone (without the prefix), ``name=value`` to all.
    """
    chosen = []
    for override in overrides:
        target = _target(override)
        if target is None:
            chosen.append(override)
        elif target == method:
            chosen.append(override[len(target) + 1 :])
    return chosen


def common(overrides: list[str]) -> list[str]:
    """The settings that every method gets."""
    return [override for override in overrides if _target(override) is None]


def targets(overrides: list[str]) -> set[str]:
    """The methods that some setting is meant for alone."""
    return {target for target in map(_target, overrides) if target is not None}


def _target(override: str) -> str | None:
    """The method before the colon of the name; a colon in the value doesn't count."""
    target, colon, _ = override.partition("=")[0].partition(":")
    return target if colon else None
