"""Run code with narrower vector instructions: the choice is made once per process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile


def run_with_isa(arguments: list[str], isa: str) -> list[str]:
    """Words that ``python *arguments`` prints where it may use no more than ``isa``."""
    with tempfile.TemporaryDirectory() as elsewhere:
        # Not from the source tree: `python -c` would import the package there, which has no
        # compiled module, in the place of the installed one.
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env={**os.environ, "GSSCALE_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
