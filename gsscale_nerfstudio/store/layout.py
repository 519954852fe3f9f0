"""Which column of a row holds what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.streamed import STREAMS

GROUPS = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")
"""The optimized attributes, under splatfacto's names, in column order."""

BOOKKEEPING = ("stamp", "grad2d", "count", "max_radius", "key")
"""One column each, behind the attributes; see :class:`RowLayout`."""

STATISTICS = ("grad2d", "count", "max_radius")
"""The bookkeeping columns that densification decides by."""

_ALIGN = 16  # floats: rows start on cache lines and SIMD loops have no remainder


@dataclass(frozen=True)
class RowLayout:
    """Columns of a row, the record of one Gaussian in the host store.

    Attributes (means 3, log-scales 3, quaternion wxyz 4, opacity logit 1, SH dc 3, SH rest
    ``3 ((d+1)^2 - 1)``) come first, then the bookkeeping columns: ``stamp`` (the optimizer step up
    to which the row is current, a whole number, exact in float32 up to 2^24), and gsplat's
    densification statistics ``grad2d``, ``count``, ``max_radius``, and ``key`` (:mod:`.keys`),
    whose bits tell rows at the same place apart (noise does not move them alike). The width is
    rounded up to 16 floats: 64 for SH degree 3.

    Args:
        sh_degree: maximum degree of the spherical harmonics, 0 to 4.
        moments: how Adam's moments are stored, float32 or bfloat16.

    Raises:
        GSScaleError: there is no such degree.
    """

    sh_degree: int
    moments: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 <= self.sh_degree <= 4:
            raise GSScaleError(
                "--pipeline.model.sh-degree is the degree of the spherical harmonics: 0 to 4, not "
                f"{self.sh_degree}"
            )

    @property
    def rest_bases(self) -> int:
        """Number of SH bases above degree 0."""
        return (self.sh_degree + 1) ** 2 - 1

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Per-row shape of each group, as splatfacto has them."""
        return {
            "means": (3,),
            "scales": (3,),
            "quats": (4,),
            "opacities": (1,),
            "features_dc": (3,),
            "features_rest": (self.rest_bases, 3),
        }

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Column range of each group."""
        start, columns = 0, {}
        for name in GROUPS:
            stop = start + int(np.prod(self.shapes[name]))
            columns[name] = slice(start, stop)
            start = stop
        return columns

    @cached_property
    def optimized(self) -> int:
        """Number of optimized columns; they are the first ones."""
        return self.columns[GROUPS[-1]].stop

    @cached_property
    def bookkeeping(self) -> dict[str, int]:
        """Column of each bookkeeping value."""
        return {name: self.optimized + i for i, name in enumerate(BOOKKEEPING)}

    @cached_property
    def width(self) -> int:
        """Floats in a row."""
        used = self.optimized + len(BOOKKEEPING)
        return (used + _ALIGN - 1) // _ALIGN * _ALIGN

    @property
    def narrow(self) -> bool:
        """Whether moments are of 16 bits."""
        return self.moments.itemsize == 2

    @property
    def cached_bytes(self) -> int:
        """Of a row with its moments: in a cache on the device, and on the link."""
        return self._bytes(self.width)

    @property
    def stored_bytes(self) -> int:
        """Of a row in the host store: with its moments and its bounding sphere."""
        return self.cached_bytes + 16

    @property
    def snapshot_bytes(self) -> int:
        """Of the copy of a row that a checkpoint holds until it is written; 0 if it needs none."""
        return 0 if STREAMS else self._bytes(self.optimized) + len(STATISTICS) * 4

    def _bytes(self, columns: int) -> int:
        return columns * (4 + 2 * self.moments.itemsize)

    def smaller(self, with_bands: bool = False) -> Iterator[tuple[RowLayout, str]]:
        """Layouts whose rows take less memory, and the flags for them; the least loss first.

        Args:
            with_bands: only those with as many SH bands, for rows that have them already.
        """
        flags = []
        if not self.narrow:
            flags.append("--pipeline.model.moment-dtype bfloat16")
            yield replace(self, moments=torch.bfloat16), flags[0]
        for degree in reversed(range(0 if with_bands else self.sh_degree)):
            layout = RowLayout(degree, self.moments if self.narrow else torch.bfloat16)
            yield layout, " ".join((*flags, f"--pipeline.model.sh-degree {degree}"))

    @cached_property
    def group_of_column(self) -> np.ndarray:
        """[width] int32: index into :data:`GROUPS`, ``len(GROUPS)`` for all other columns."""
        of = np.full(self.width, len(GROUPS), dtype=np.int32)
        for index, name in enumerate(GROUPS):
            of[self.columns[name]] = index
        return of

    @cached_property
    def kernel_columns(self) -> np.ndarray:
        """[9] int32: the columns that the C++ row kernels ask for by name."""
        b = self.bookkeeping
        return np.array(
            [
                self.columns["means"].start,
                self.columns["scales"].start,
                self.columns["quats"].start,
                self.columns["opacities"].start,
                b["stamp"],
                b["grad2d"],
                b["count"],
                b["max_radius"],
                b["key"],
            ],
            dtype=np.int32,
        )
