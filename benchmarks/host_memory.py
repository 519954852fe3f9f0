"""Peak host memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_host_bytes() -> int:
    """The largest resident set that this process has had (``VmHWM``).

    This counts every page in the process's page tables, among them the mapped parts of the CUDA
    libraries, torch's host tensors, and anonymous memory that was registered with
    ``cudaHostRegister`` (registering pins pages, it doesn't move them). Page-locked memory that the
    driver allocates itself (``cudaHostAlloc``, behind torch's ``pin_memory()``) is mapped from the
    driver's device file, which the kernel need not count. ``getrusage().ru_maxrss`` is the same
    number, except that a child process starts with its parent's: it is used only without /proc.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let :func:`peak_host_bytes` start anew, from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
