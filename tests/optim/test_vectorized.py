"""The row kernels' square root is a vector instruction in every build for x86."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from gsscale_nerfstudio import _C


@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils' objdump")
@pytest.mark.parametrize(
    "isa, instruction, register",
    [("baseline", "sqrtps", "xmm"), ("avx2", "vsqrtps", "ymm"), ("avx512", "vsqrtps", "zmm")],
)
def test_square_root_is_a_vector_instruction(isa, instruction, register):
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = [
        line
        for line in listing.splitlines()
        if instruction in line.split()[1:2] and f"%{register}" in line
    ]
    # gather, settle and step have one each.
    assert len(found) >= 3, isa
