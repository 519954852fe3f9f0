"""Rows a million at a time: bounds the temporaries of a decision."""

from __future__ import annotations

from collections.abc import Iterator

_CHUNK = 1 << 20
"""Rows looked at together: some 20 MB."""


def chunks(n: int, most: int | None = None) -> Iterator[slice]:
    """Slices that make up ``range(n)``, in order, of at most ``most`` or a million."""
    most = most or _CHUNK
    for start in range(0, n, most):
        yield slice(start, min(start + most, n))
