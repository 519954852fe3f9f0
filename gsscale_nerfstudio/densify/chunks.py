"""Rows a million at a time: bounds the temporaries of a decision."""

from __future__ import annotations

from collections.abc import Iterator

_CHUNK = 1 << 20
"""Rows looked at together: some 20 MB."""


def chunks(n: int) -> Iterator[slice]:
    """Slices that make up ``range(n)``, in order."""
    for start in range(0, n, _CHUNK):
        yield slice(start, min(start + _CHUNK, n))
