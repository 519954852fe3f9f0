"""What densification reads of the rows, and what it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSummary:
    """What decides about each row, settled: [n] float32 each, on the CPU.

    Attributes:
        gradient: screen-space gradient, mean over the views that have drawn the row.
        radius: largest radius on the screen, as a share of the longer side of the image.
        scale: largest log-scale.
        opacity: opacity logit.
    """

    gradient: Tensor
    radius: Tensor
    scale: Tensor
    opacity: Tensor

    def __len__(self) -> int:
        return len(self.gradient)


@dataclass(frozen=True)
class RowEdit:
    """Rows that take the place of others, are new, or go; no row is both rewritten and removed.

    Written rows start without moments and statistics, but for those that ``keeps_moments`` is
    about; their bookkeeping columns do not count.

    Attributes:
        rewritten: [r] int64, ascending.
        values: [r, width] float32, their new parameters.
        added: [a, width] float32, parameters of new rows.
        parents: [a] int64: rows that are seen whenever the new ones are, as far as one can tell.
        removed: [d] int64, ascending.
        keeps_moments: rewritten rows, which are settled in the store, keep their moments.
    """

    rewritten: Tensor
    values: Tensor
    added: Tensor
    parents: Tensor
    removed: Tensor
    keeps_moments: bool = False


def with_removed(edits: Iterable[RowEdit], removed: Tensor, width: int) -> Iterator[RowEdit]:
    """One large edit, in pieces: rows go where they would all at once.

    New rows take the places of removed ones, in order. What is left of these goes last, so that no
    row moves before.

    Args:
        edits: the pieces, in the order of their new rows, without removed rows.
        removed: [d] int64, ascending; none of them is rewritten.
        width: of a row.
    """
    for edit in edits:
        filled = len(edit.added)
        yield replace(edit, removed=removed[:filled])
        removed = removed[filled:]
    nobody, no_rows = torch.empty(0, dtype=torch.int64), torch.empty(0, width)
    yield RowEdit(nobody, no_rows, no_rows, nobody, removed)


@dataclass(frozen=True)
class Placement:
    """Where the rows of an edit went: int64 ids.

    Attributes:
        added: [a] places of the new rows.
        sources, targets: [m] kept rows that moved into holes, from and to.
        n: rows in use from now on.
    """

    added: Tensor
    sources: Tensor
    targets: Tensor
    n: int

    def now(self, ids: Tensor) -> Tensor:
        """Where rows ``ids`` [k] int64, which were kept, are now."""
        now = ids.clone()
        moved = ids >= self.n
        now[moved] = self.targets[torch.searchsorted(self.sources, ids[moved])]
        return now


def place(n: int, removed: Tensor, added: int) -> Placement:
    """Let new rows fill the holes of removed ones; the end gives, or takes, what is left.

    Args:
        n: rows in use.
        removed: [d] int64, ascending.
        added: how many rows are new.
    """
    n_after = n - len(removed) + added
    holes = removed[removed < n_after]
    appended = torch.arange(n, max(n, n_after))
    tail = torch.arange(min(n, n_after), n)
    stays = torch.ones(len(tail), dtype=torch.bool)
    stays[removed[removed >= n_after] - n_after] = False
    return Placement(
        added=torch.cat([holes[:added], appended]),
        sources=tail[stays],
        targets=holes[added:],
        n=n_after,
    )
