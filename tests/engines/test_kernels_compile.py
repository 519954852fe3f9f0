"""Triton's kernels are machine code for real GPUs, whether there is one here or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gsscale_nerfstudio.loss import FUSED

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "compile_kernels.py"


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile(capability, tmp_path):
    """The interpreter, which the other tests use, accepts what the compiler does not."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), capability],
        cwd=tmp_path,  # not the source tree, which has no compiled module
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(sizes) == (24 if FUSED else 22) and min(sizes) > 1000
