"""Files written in place are those of ``torch.save``."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gsscale_nerfstudio import checkpoint, streamed
from gsscale_nerfstudio.errors import GSScaleError
from tests.runs import differences
from tests.store.work_on_rows import most_beside


def state() -> dict[str, Any]:
    rows = torch.arange(3000.0).view(100, 30)
    return {
        "step": 7,
        "columns": {"means": rows[:, :3], "rest": rows[:, 5:11].unflatten(1, (2, 3))},
        "nothing": {"of": rows[:0, :3], "none": None},
        "list": [torch.tensor(2.5), torch.tensor([1, 2]), (True, "text", 1.5)],
        "parameter": torch.nn.Parameter(rows[3:5, 2]),
        "same again": rows[:, :3],
        "bytes": torch.arange(200, dtype=torch.uint8),
    }


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_what_is_saved_is_loaded(tmp_path, monkeypatch, streams, mapped):
    if streams and not streamed.STREAMS:
        pytest.skip("this torch copies")
    monkeypatch.setattr(streamed, "STREAMS", streams)
    monkeypatch.setattr(streamed, "_PART", 7)
    path = tmp_path / "state"
    streamed.save(state(), path)
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert differences(loaded, state()) == []
    assert loaded["columns"]["means"].is_contiguous()
    assert path.stat().st_size < 12_000  # columns, not the rows behind them
    assert checkpoint.is_whole(path)


NO_MAPS = os.strerror(errno.ENODEV)


@pytest.mark.skipif(not streamed.STREAMS, reason="this torch copies")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENODEV, NO_MAPS), RuntimeError(f"unable to mmap 9 bytes: {NO_MAPS} (19)")],
)
def test_a_file_system_may_be_unable_to_map(tmp_path, monkeypatch, error, device):
    """torch says so by a RuntimeError."""

    def refused(*_: Any) -> None:
        raise error

    saved = state() | {"columns": {"means": torch.ones(9, 9, device=device)[:, :3]}}
    path = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "from_file", refused)
        streamed.save(saved, path)
    copied = torch.load(path, weights_only=True)
    assert path.stat().st_size < 12_000 and checkpoint.is_whole(path)
    streamed.save(saved, path)
    assert differences(copied, torch.load(path, weights_only=True)) == []
    assert copied["columns"]["means"].is_cpu and differences(copied["bytes"], saved["bytes"]) == []


@pytest.mark.skipif(not streamed.STREAMS, reason="this torch copies")
def test_a_file_system_may_be_unable_to_make_room(tmp_path, monkeypatch):
    """glibc then writes a byte into each block, and reads it first where the file has one."""

    def allocate(descriptor: int, start: int, size: int) -> None:
        for place in range(start, start + size, 512):
            os.pwrite(descriptor, os.pread(descriptor, 1, place), place)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    streamed.save(state(), tmp_path / "state")
    assert differences(torch.load(tmp_path / "state", weights_only=True), state()) == []


def test_a_full_disk_is_a_sentence(tmp_path):
    """Found when room for the file is made, not by a signal while it is filled."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from gsscale_nerfstudio import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder = Path({str(tmp_path)!r})
checkpoint.save({{"rows": torch.zeros(100_000)}}, folder / "made" / "step-000000001.ckpt", folder)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert GSScaleError.__name__ in done.stderr and "free disk space" in done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not streamed.STREAMS, reason="this torch copies")
def test_saving_takes_no_copy(tmp_path):
    """A column of 80 MB, of rows whose memory is there already."""
    rows = torch.ones(2_000_000, 16)
    path: Path = tmp_path / "state"
    streamed.save({"warm": rows[:10, :3]}, path)
    beside = most_beside(lambda: streamed.save({"column": rows[:, :10]}, path))
    assert path.stat().st_size > 80_000_000
    assert beside < 20_000_000
