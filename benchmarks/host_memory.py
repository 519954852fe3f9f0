"""Peak host memory of this process."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

SAMPLED_S = 0.05


def peak_host_bytes() -> int:
    """The largest resident set that this process has had (``VmHWM``).

    This counts every page in the process's page tables, among them the mapped parts of the CUDA
    libraries, torch's host tensors, and anonymous memory that was registered with
    ``cudaHostRegister`` (registering pins pages, it doesn't move them). Page-locked memory that the
    driver allocates itself (``cudaHostAlloc``, behind torch's ``pin_memory()``) is mapped from the
    driver's device file, which the kernel need not count. ``getrusage().ru_maxrss`` is the same
    number, except that a child process starts with its parent's: it is used only without /proc.
    """
    peak = _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


class AnonymousPeak:
    """The most memory without a file behind it (``RssAnon``) that the process has in a block.

    Rows, tensors and page-locked copies of them are of this kind; a checkpoint that is written
    through a mapping is not. The kernel keeps no mark of it: a thread looks 20 times a second.

    Attributes:
        bytes: so far; None where the kernel does not tell.
    """

    def __init__(self) -> None:
        self.bytes = _status("RssAnon")
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watching.join()

    def _watch(self) -> None:
        while True:
            over = self._over.wait(SAMPLED_S)
            now = _status("RssAnon")
            if now is not None:
                self.bytes = max(now, self.bytes or 0)
            if over:
                return


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is no such thing."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def forget_peak() -> None:
    """Let :func:`peak_host_bytes` start anew, from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
