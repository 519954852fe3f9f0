"""host_memory.py: what counts as anonymous."""

from __future__ import annotations

import mmap
import time

from benchmarks import host_memory
from benchmarks.host_memory import AnonymousPeak, peak_host_bytes

SIZE = 200_000_000


def test_the_peak_of_anonymous_memory_leaves_files_out(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "SAMPLED_S", 0.01)
    with AnonymousPeak() as peak:
        begin = peak.bytes
        ballast = bytearray(b"x") * SIZE
        time.sleep(0.2)
        del ballast
    assert SIZE < peak.bytes - begin < 1.5 * SIZE
    with (tmp_path / "file").open("wb+") as file, AnonymousPeak() as peak:
        begin = peak.bytes
        file.truncate(2 * SIZE)
        with mmap.mmap(file.fileno(), 2 * SIZE, flags=mmap.MAP_SHARED) as mapped:
            mapped[:: mmap.PAGESIZE] = b"x" * len(range(0, 2 * SIZE, mmap.PAGESIZE))
            host_memory.forget_peak()
            time.sleep(0.2)
            assert peak_host_bytes() > begin + SIZE, "or there was no file to leave out"
    assert peak.bytes - begin < SIZE / 2


def test_without_proc_nothing_is_told(monkeypatch):
    monkeypatch.setattr(host_memory, "_status", lambda name: None)
    with AnonymousPeak() as peak:
        pass
    assert peak.bytes is None and peak_host_bytes() > 0
