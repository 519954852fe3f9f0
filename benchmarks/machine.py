"""What a run was measured on: the machine, the library versions, the commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script: find the package, and let its modules shadow nothing
    _here = Path(__file__).resolve().parent
    sys.path[:] = [*(p for p in sys.path if Path(p).resolve() != _here), str(_here.parent)]

from benchmarks.errors import BenchmarkError

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "GSSCALE_COMMIT"
PACKAGES = ("torch", "gsplat", "nerfstudio")
GENERATED = ("docs/results", "docs/images", "docs/benchmarks.md")
"""What measuring itself writes; it doesn't make the measured code another one."""


class MachineError(BenchmarkError):
    """The machine or the commit can't be told; the message says what to do."""


def describe() -> dict[str, Any]:
    """The machine as it is written to the results, with RAM and GPU memory in GiB.

    Cores and RAM are those that this process may use (affinity, control group), not the host's.
    Starts CUDA when there is a GPU: use :func:`describe_apart` from a process that starts runs.
    """
    import torch

    gpu = None
    gpu_memory = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = properties.name
        gpu_memory = round(properties.total_memory / 2**30)
    return {
        "gpu": gpu,
        "gpu_memory_gib": gpu_memory,
        "cpu": _cpu_model(),
        "cores": _cores(),
        "ram_gib": round(_ram_bytes() / 2**30),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{package: _version(package) for package in PACKAGES},
    }


def describe_apart() -> dict[str, Any]:
    """:func:`describe` in a process of its own: no CUDA context stays beside the runs."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MachineError(f"cannot describe the machine:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def commit(given: str | None = None, root: Path = ROOT) -> str:
    """The commit measured: ``given``, ``$GSSCALE_COMMIT``, or git's, with ``-dirty`` if it applies.

    Dirty means that a file differs from the commit or is not in it, apart from generated ones.
    """
    told = given or os.environ.get(COMMIT_VARIABLE)
    if told:
        return told
    sha = _git(root, "rev-parse", "HEAD")
    if sha is None:
        raise MachineError(f"git can't name the commit: pass --commit or set {COMMIT_VARIABLE}")
    excluded = [f":(exclude){path}" for path in GENERATED]
    changes = _git(root, "status", "--porcelain", "--", ".", *excluded)
    return f"{sha}-dirty" if changes else sha


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """The first ``model name`` of /proc/cpuinfo; Arm cores have none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return os.uname().machine


def _cores() -> int:
    """Cores this process may use: its affinity, or less where the control group gives less time."""
    cores = len(os.sched_getaffinity(0))
    quota = _first_numbers("/sys/fs/cgroup/cpu.max")
    if len(quota) < 2:  # version 1 keeps the two numbers in two files
        quota = _first_numbers("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        quota += _first_numbers("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0] > 0:
        cores = min(cores, max(1, round(quota[0] / quota[1])))
    return cores


def _ram_bytes() -> int:
    """Host memory, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        total = min([total, *_first_numbers(name)])
    return total


def _first_numbers(path: str) -> list[int]:
    """The integers of a control group file; none if it is absent or says ``max``."""
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [int(word) for word in words] if all(w.lstrip("-").isdigit() for w in words) else []


if __name__ == "__main__":
    # This folder's modules must not shadow others.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    print(json.dumps(describe()))
