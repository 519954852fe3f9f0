"""Files are there whole or not at all, whatever the file system can do."""

from __future__ import annotations

import errno
import os
import stat
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
