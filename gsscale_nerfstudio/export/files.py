"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gsscale_nerfstudio.errors import GSScaleError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under a temporary name beside ``path`` until it is on the disk.

    Raises:
        GSScaleError: it could not be written; what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise GSScaleError(
            f"could not write {path}: {error}; free disk space or choose another --output"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
