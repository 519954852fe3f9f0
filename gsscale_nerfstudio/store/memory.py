"""Host memory that grows without being copied."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gsscale_nerfstudio.errors import GSScaleError

# Python names this flag from 3.13 on only; the value is Linux's on every architecture we build for.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_PIN_CHUNKS = 16 << 20, 256 << 20
"""Bytes per cudaHostRegister call, at first and at most: locking takes the memory, so a small scene
gets small chunks; a large one would need too many of them."""


def pin_chunk(locked: int) -> int:
    """Bytes that are page-locked at a time, and so at most ahead of use, behind ``locked`` ones."""
    smallest, largest = _PIN_CHUNKS
    return max(smallest, min(locked, largest))


def with_spare(size: int) -> int:
    """Bytes that are page-locked in one piece when ``size`` are needed: the next may be larger."""
    return size + size // 4


_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def memory_limit() -> int:
    """Bytes of physical memory this process may use: the machine's, or the smallest of a cgroup
    that it is in."""
    return min([psutil.virtual_memory().total, *(group.limit for group in _limited_groups())])


def available_memory() -> int:
    """Bytes of physical memory that can still be taken without swapping or being killed."""
    rooms = (group.limit - group.used + _reclaimable(group.folder) for group in _limited_groups())
    return min([psutil.virtual_memory().available, *rooms])


@dataclass(frozen=True)
class _LimitedGroup:
    """A cgroup that limits memory; in bytes. What counts as used includes files in the cache."""

    folder: Path
    limit: int
    used: int


def _limited_groups() -> Iterator[_LimitedGroup]:
    trees = (  # version 2 has one tree, for controllers that it does not list
        (_CGROUPS, "", "memory.max", "memory.current"),
        (_CGROUPS / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for root, controller, *names in trees:
        for folder in _own_folders(root, controller):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                yield _LimitedGroup(folder, limit, used)


def _own_folders(root: Path, controller: str) -> list[Path]:
    """Of the cgroup of this process in a tree and all that are around it: each limits it."""
    try:
        lines = [line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        lines = []
    own = next((path.strip("/") for _, of, path in lines if controller in of.split(",")), "")
    # Seen from a container it may be outside, as "/..", or a folder of the host that is not here.
    inside = Path(own) if ".." not in Path(own).parts else Path()
    return [root / part for part in (inside, *inside.parents)]


def _reclaimable(group: Path) -> int:
    """Bytes of a cgroup's memory that the kernel can take back without swapping.

    Its own estimate for a machine, MemAvailable, keeps of files and of its caches the low watermark
    or, if that is more than half, half. A cgroup has no watermark, so it is half, but for files
    that nobody has used lately. Images that are read in every epoch are among those in use.
    """
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = {name: int(value) for name, value in map(str.split, lines)}

    def of(name: str) -> int:
        return values.get(f"total_{name}", values.get(name, 0))  # version 1: with inner groups

    return of("inactive_file") + (of("active_file") + of("slab_reclaimable")) // 2


def _number(file: Path) -> int | None:
    """The whole number that a file holds; None if it is missing or says "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def bits_of(array: Tensor) -> Tensor:
    """``array`` as kernels take it: neither NumPy nor Triton's interpreter computes with bfloat16,
    which becomes int16, the upper halves of floats."""
    return array.view(torch.int16) if array.dtype == torch.bfloat16 else array


class ReservedArray:
    """An array ``[capacity, width]`` of reserved, not yet used, host memory.

    Address space for the capacity is taken once (anonymous, not reserved against swap), so growing
    never moves or copies a row; the kernel supplies zeroed pages, huge ones where it can, when they
    are first written.

    Args:
        capacity: number of rows that address space is taken for.
        width: elements per row.
        dtype: element type.

    Raises:
        GSScaleError: the system refuses the address space (``ulimit -v``, strict overcommit).
    """

    def __init__(self, capacity: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        self._row_bytes = width * dtype.itemsize
        size = max(1, capacity) * self._row_bytes
        try:
            self._map = mmap.mmap(-1, size, flags=_MAP_FLAGS)
        except (OSError, ValueError, OverflowError) as error:
            raise GSScaleError(
                f"the system refused {size / 2**30:.1f} GiB of address space for {capacity:,} "
                f"Gaussians ({error}); lower --pipeline.model.max-gaussians, or raise `ulimit -v` "
                "and allow overcommit (sysctl vm.overcommit_memory=1)"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages: slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._map, dtype=dtype, count=size // dtype.itemsize)
        self.tensor: Tensor = flat.view(max(1, capacity), width)
        self._pinned: list[tuple[int, int]] = []  # start and size of each chunk, in bytes

    @property
    def pinned_rows(self) -> int:
        """Rows that lie in page-locked memory."""
        return self._pinned_end // self._row_bytes

    @property
    def _pinned_end(self) -> int:
        last = self._pinned[-1:]  # at once: another thread may be locking
        return sum(last[0]) if last else 0

    def pin(self, rows: int) -> None:
        """Page-lock, in chunks, the memory of the first ``rows`` rows.

        Kernels on the GPU may read across chunks; copies (``cudaMemcpy``) must not.

        Raises:
            GSScaleError: CUDA could not lock the memory.
        """
        while self._pinned_end < min(rows * self._row_bytes, self._total_bytes):
            self._lock(pin_chunk(self._pinned_end))

    def pin_whole(self, rows: int) -> None:
        """Page-lock the memory of the first ``rows`` rows as one piece, for copies.

        Nothing may be reading or writing it: what is locked now is unlocked first.

        Raises:
            GSScaleError: the system does not have the memory, or CUDA could not lock it.
        """
        more = self.to_be_locked(rows)
        if more == 0:
            return
        available = available_memory()
        if more > available:  # locking takes it at once, and the process would be killed
            more = (
                min(rows * self._row_bytes, self._total_bytes) - self._pinned_end
            )  # none to spare
        if more > available:
            raise GSScaleError(
                f"buffers for {rows:,} Gaussians on their way to or from the GPU need "
                f"{more / 1e9:.1f} GB more host memory, and {available / 1e9:.1f} GB are available "
                "(in a container, within its limit); free host memory, or go on from the last "
                "checkpoint (--load-dir) with a larger --pipeline.model.vram-budget-gb"
            )
        size = self._pinned_end + more
        self.unpin()
        self._lock(size)

    def to_be_locked(self, rows: int) -> int:
        """Bytes that :meth:`pin_whole` would take, beyond what is locked already."""
        wanted = min(rows * self._row_bytes, self._total_bytes)
        if self._pinned_end >= wanted:
            return 0
        return min(max(_PIN_CHUNKS[0], with_spare(wanted)), self._total_bytes) - self._pinned_end

    @property
    def _total_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def _lock(self, size: int) -> None:
        """Page-lock ``size`` bytes, or what there is, behind those that are locked already."""
        start = self._pinned_end
        size = min(size, self._total_bytes - start)
        if size > 0:
            code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr() + start, size, 0)
            if int(code) != 0:
                raise GSScaleError(
                    f"CUDA could not page-lock {size >> 20} MiB of host memory (error "
                    f"{int(code)}); raise the limit of locked memory (`ulimit -l unlimited`, or "
                    "--ulimit memlock=-1 for a container) or free host memory"
                )
            self._pinned.append((start, size))

    def unpin(self) -> None:
        """Give page-locked memory back to the system; the rows stay."""
        for start, _ in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr() + start)
        self._pinned.clear()

    def __del__(self) -> None:
        if getattr(self, "_pinned", None):
            self.unpin()
