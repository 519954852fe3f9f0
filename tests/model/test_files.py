"""Files are there whole or not at all, whatever the file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gsscale_nerfstudio.files import whole_file


def refuse_fsync(monkeypatch: pytest.MonkeyPatch, of_folders: bool, code: int) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)


def write(path: Path, text: str) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_text(text)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_may_be_unable_to_keep_names(tmp_path, monkeypatch, code):
    """The file is whole and in place: nothing to end a training for."""
    refuse_fsync(monkeypatch, of_folders=True, code=code)
    write(tmp_path / "file", "whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_bytes_that_do_not_reach_the_disk_are_an_error(tmp_path, monkeypatch, code):
    write(tmp_path / "file", "earlier")
    refuse_fsync(monkeypatch, of_folders=False, code=code)
    with pytest.raises(OSError, match=os.strerror(code)):
        write(tmp_path / "file", "lost")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_a_disk_that_fails_while_it_keeps_names_is_an_error(tmp_path, monkeypatch):
    refuse_fsync(monkeypatch, of_folders=True, code=errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(tmp_path / "file", "whole")


def in_a_write(path: Path) -> subprocess.Popen[str]:
    """A process that writes until it is killed."""
    code = f"""
import time
from pathlib import Path
from gsscale_nerfstudio.files import whole_file

with whole_file(Path({str(path)!r})) as unfinished:
    unfinished.write_text("part")
    print("writing", flush=True)
    time.sleep(600)
"""
    # Not from the source tree, where the package has no compiled module.
    child = subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, cwd=path.parent)
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    return child


@pytest.mark.parametrize("stop", ["terminate", "kill"])
def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path, stop):
    """But not what a process is writing that is still alive, nor what others are called."""
    path = tmp_path / "splat[1].ply"
    others = {".splat1.ply.4194305", ".splat[1].ply.old", ".splat[1].ply.20240101"}
    others |= {".splat[1].ply.gz.4194305", ".splat[1].ply.", "splat[1].ply.4000001"}
    for name in others:
        (tmp_path / name).touch()
    child = in_a_write(path)
    left = tmp_path / f".{path.name}.{child.pid}"
    try:
        write(path, "whole")
        assert left.read_text() == "part"
    finally:
        getattr(child, stop)()
        child.communicate()
    assert left.exists()
    write(tmp_path / "other.ply", "whole")
    assert left.exists()
    write(path, "again")
    assert {file.name for file in tmp_path.iterdir()} == others | {path.name, "other.ply"}


def test_a_process_of_another_machine_may_be_alive(tmp_path):
    """Its number says nothing here, but its lock does."""
    left = tmp_path / ".file.4194305"
    with open(left, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(tmp_path / "file", "whole")
        assert left.exists()
    write(tmp_path / "file", "whole")
    assert not left.exists()
