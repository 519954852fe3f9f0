"""How much memory a process may take: the machine's, and that of all cgroups around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from gsscale_nerfstudio.store import memory

GB = 10**9


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of cgroups on a machine of 100 GB, 90 of which are available."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "self")
    machine = SimpleNamespace(total=100 * GB, available=90 * GB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    return tmp_path / "cgroup"


def group(
    folder: Path, limit: int | str, used: int, files: int = 0, in_use: int = 0, slab: int = 0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 7\ninactive_file {files}\nactive_file {in_use}\nslab_reclaimable {slab}\n"
    )


def process_is_in(root: Path, *lines: str) -> None:
    (root.parent / "self").write_text("".join(f"{line}\n" for line in lines))


def test_without_cgroups_it_is_the_machine(root):
    assert (memory.memory_limit(), memory.available_memory()) == (100 * GB, 90 * GB)


def test_a_container_sees_its_limit_at_the_root(root):
    """Whatever the path, which may be one of the host's."""
    group(root, 50 * GB, 20 * GB, files=5 * GB)
    for own in ("0::/", "0::/docker/0123", "0::/../0123", "0::/../../system.slice"):
        process_is_in(root, own)
        assert (memory.memory_limit(), memory.available_memory()) == (50 * GB, 35 * GB)


@pytest.mark.parametrize("tight", ["slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_every_group_around_the_process_counts(root, tight):
    """SLURM limits a job, systemd a slice or a scope; the root of a machine has no files."""
    root.mkdir()
    for name in ("slurm", "slurm/job_7", "slurm/job_7/step_0"):
        group(root / name, "max", 60 * GB)
    group(root / tight, 64 * GB, 60 * GB, files=2 * GB)
    group(root / "slurm" / "job_8", 2 * GB, GB)  # somebody else's
    process_is_in(root, "1:name=systemd:/else", "0::/slurm/job_7/step_0")
    assert (memory.memory_limit(), memory.available_memory()) == (64 * GB, 6 * GB)


def test_limit_and_room_may_be_those_of_two_groups(root):
    group(root / "a", 80 * GB, 78 * GB)
    group(root / "a" / "b", 40 * GB, 10 * GB)
    process_is_in(root, "0::/a/b")
    assert (memory.memory_limit(), memory.available_memory()) == (40 * GB, 2 * GB)


def test_files_in_use_and_the_kernels_caches_can_be_taken_back_to_a_half(root):
    """Images that are read again in every epoch, and the names of thousands of files."""
    group(root, 50 * GB, 48 * GB, files=2 * GB, in_use=30 * GB, slab=4 * GB)
    process_is_in(root, "0::/")
    assert memory.available_memory() == (2 + 2 + 15 + 2) * GB


def group_1(folder: Path, limit: int, used: int, files: int = 0, in_use: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"active_file 1\ninactive_file 1\ntotal_active_file {in_use}\ntotal_inactive_file {files}\n"
    )


def test_version_1(root):
    """A container sees its limit at the root, whatever the path."""
    group_1(root / "memory", 30 * GB, 12 * GB, files=4 * GB, in_use=2 * GB)
    for own in ("/", "/docker/0123", "/../0123"):
        process_is_in(root, f"4:memory:{own}", "0::/")
        assert (memory.memory_limit(), memory.available_memory()) == (30 * GB, 23 * GB)


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
@pytest.mark.parametrize("tight", ["slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_every_group_of_version_1_around_the_process_counts(root, tight, controllers):
    unlimited = 9223372036854771712
    for name in ("", "slurm", "slurm/job_7", "slurm/job_7/step_0"):
        group_1(root / "memory" / name, unlimited, 60 * GB)
    group_1(root / "memory" / tight, 64 * GB, 60 * GB, files=2 * GB)
    group_1(root / "memory" / "slurm" / "job_8", 2 * GB, GB)  # somebody else's
    group_1(root / "memory" / "else", 2 * GB, GB)
    process_is_in(
        root, "11:cpuset:/else", f"9:{controllers}:/slurm/job_7/step_0",
        "1:name=systemd:/else", "0::/else",
    )  # fmt: skip
    assert (memory.memory_limit(), memory.available_memory()) == (64 * GB, 6 * GB)


def test_this_machine():
    assert 0 < memory.available_memory() <= memory.memory_limit()
