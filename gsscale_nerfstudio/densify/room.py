"""Whether rows that are wanted have room, and what is said where they have none."""

from __future__ import annotations

from dataclasses import dataclass, field

from gsscale_nerfstudio.errors import warn
from gsscale_nerfstudio.store import HostStore

_FULL = (
    "the host store is full; from here on only the most needed Gaussians are added, as pruning "
    "makes room. Raise --pipeline.model.max-gaussians to grow further."
)
_LOW = (
    "host memory is low: training goes on, but densification adds only as many Gaussians as leave "
    "memory for checkpoints and images. Free host memory, or allow the container more, and it "
    "grows again."
)


@dataclass
class RowRoom:
    """Grants room for new rows in a store; tells the user once each why there is none."""

    _told: set[str] = field(default_factory=set)

    def grant(self, store: HostStore, wanted: int) -> int:
        """How many of ``wanted`` new rows can be added at present."""
        room = store.room()
        if wanted <= room:
            return wanted
        reason = _LOW if len(store) + room < store.capacity else _FULL
        if reason not in self._told:
            self._told.add(reason)
            warn(reason)
        return room
