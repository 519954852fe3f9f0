"""What an optimizer knows of the engine that does its arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gsscale_nerfstudio.store import HostStore


class StepsRows(Protocol):
    """The side of an engine that optimizers see."""

    store: HostStore

    @property
    def step_count(self) -> int:
        """Optimizer steps done so far."""

    def attach(self, name: str, optimizer: Any) -> None:
        """Register the optimizer of a group."""

    def group_stepped(self, name: str, lr: float) -> None:
        """The group's optimizer was stepped, with learning rate ``lr``."""

    def settle(self) -> None:
        """Make every row in the store current."""

    def restart(self, step: int) -> None:
        """Rows and moments were replaced by others that are current for ``step``."""


@dataclass(frozen=True)
class RowGroup:
    """Ties an optimizer's parameter to its columns of the store.

    Attributes:
        name: one of ``store.GROUPS``.
        engine: steps the rows once all groups' optimizers were stepped.
    """

    name: str
    engine: StepsRows
