"""Join comparison files that were measured separately into one.

python benchmarks/merge.py docs/results/a.json docs/results/b.json --output docs/results/ab.json

With ``--at-step``, runs that were evaluated on their way (``compare.py --evaluate-every``) join as
trainings that ended there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

import tyro

from benchmarks import cli, results


@dataclass
class MergeArgs:
    """Join comparison files of the same scene, steps and settings."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The first one's machine and commit become the file's."""
    output: Path
    """File to write; it may be one of the files."""
    at_step: int | None = None
    """Take longer runs, too, by their evaluation after so many steps."""
    allow_mixed: bool = False
    """Join runs of different commits or machines; each run says its own."""


def merge(args: MergeArgs) -> None:
    """Write the joined file."""
    if not args.files:
        raise results.ResultsError("name the files to join")
    joined, *others = (
        one if args.at_step is None else one.at_step(args.at_step)
        for one in map(results.load, args.files)
    )
    for other in others:
        joined.merge(other, args.allow_mixed)
    results.save(joined, args.output)


def main() -> int:
    """The command line. Exit status 2 when nothing was written."""
    return cli.run(MergeArgs, __doc__, lambda args, _: merge(args))


if __name__ == "__main__":
    sys.exit(main())
