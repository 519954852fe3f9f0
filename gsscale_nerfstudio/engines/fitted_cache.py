"""The row cache, as large as the budget and the views allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from gsscale_nerfstudio.engines.sizing import CacheSizing
from gsscale_nerfstudio.engines.streams import Mark
from gsscale_nerfstudio.out_of_memory import is_out_of_memory
from gsscale_nerfstudio.store import HostStore

if TYPE_CHECKING:  # its kernels need Triton, which a machine without a GPU can do without
    from gsscale_nerfstudio.engines.cache import RowCache


class FittedCache:
    """The cache, made and made anew between views; there is none until it is first fitted.

    Args:
        store: the rows.
        device: where the cache is.
        sizing: how large it may be.
        told: the user knows of it.

    Attributes:
        cache: None if there is no room for a view in it.
        views_ahead: how many views are to be admitted ahead.
        outdated: rows were added or removed since it was fitted.
    """

    def __init__(
        self, store: HostStore, device: torch.device, sizing: CacheSizing, told: bool = False
    ) -> None:
        self._store, self._device, self._sizing = store, device, sizing
        self.cache: RowCache | None = None
        self.views_ahead = 1
        self.outdated = False
        self._told = told

    @property
    def partial(self) -> bool:
        """Whether there is a cache that does not hold all rows."""
        return self.cache is not None and len(self.cache) < len(self._store)

    def fit(self, stepped: Mark) -> None:
        """Make the cache as large as it may be and has to be, if there is room for a view.

        Args:
            stepped: reached when its rows have been stepped.
        """
        have = len(self.cache) if self.cache is not None else 0
        rows = len(self._store)
        self.outdated = False
        if self.cache is not None:
            self._sizing.observe(have)
        limit = self._sizing.limit(have)
        wanted = min(limit, rows + rows // 8)
        scarce = limit < 2 * wanted
        if scarce:
            wanted = limit  # at once: there will be no room for a copy that is larger
        # A little over is let be, and a little under: a new cache costs more.
        if self.cache is not None and have <= 1.03 * limit:
            if have >= min(rows, (0.85 if scarce else 0.97) * wanted):
                return
            if not scarce:
                self._grow(self.cache, wanted)
                return
        self.replace(wanted, stepped)
        if self.cache is not None and not self._told:
            self._told = True
            CONSOLE.print(
                f"gsscale: engine resident{self._sizing.why()}. The GPU has room for {limit:,} "
                "Gaussians with their Adam state; beyond that the least needed ones wait in host "
                "memory."
            )

    def _grow(self, cache: RowCache, slots: int) -> None:
        self.synchronize()  # rows may be on their way into the arrays that are replaced
        try:
            cache.grow(slots)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._sizing.too_many(slots, enough=len(cache))
        self.synchronize()
        self.views_ahead = self._sizing.views_ahead(len(cache), len(self._store))

    def replace(self, slots: int, stepped: Mark) -> None:
        """Have an empty cache of so many rows, or fewer; none if that is too few for a view."""
        from gsscale_nerfstudio.engines.cache import RowCache

        self.remove(stepped)
        while self.cache is None and slots >= self._sizing.largest:
            try:
                self.cache = RowCache(self._store, self._device, slots)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                slots = self._sizing.too_many(slots)
        self.views_ahead = self._sizing.views_ahead(slots, len(self._store))
        # Its memory may have been another stream's, which has to be done with it.
        self.synchronize()

    def remove(self, stepped: Mark) -> None:
        """Write all rows back, and have no cache."""
        if self.cache is not None:
            self.cache.write_back(stepped)
            self.cache = None
            self._sizing.give_back()  # or it would count as in use

    def synchronize(self) -> None:
        """Wait until the device is at rest."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
