"""``model.gauss_params``: the store's columns under splatfacto's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.store.host import HostStore
from gsscale_nerfstudio.store.layout import GROUPS


class GaussParams(nn.Module):
    """Dictionary-like module over a store, in the place of splatfacto's ``ParameterDict``.

    ``gauss_params["means"]`` is a view ``[n, 3]`` of the rows, settled, without a copy. The module
    stays in host memory when the model moves, and saves and loads ``gauss_params.*`` under
    splatfacto's keys, as contiguous columns.

    Args:
        store: the rows.
        settle: makes all rows current; called before anything is read or replaced.
        replaced: called after the rows were replaced by a checkpoint's.
        leaves: the working set's leaves, kept up to date by their owner. They are what this module
            has as ``parameters()``: what there is a gradient of (``--log-gradients``).
    """

    def __init__(
        self,
        store: HostStore,
        settle: Callable[[], None],
        replaced: Callable[[], None],
        leaves: dict[str, nn.Parameter],
    ) -> None:
        super().__init__()
        self._parameters = leaves  # type: ignore[assignment]
        self.store = store
        self._settle = settle
        self._replaced = replaced

    def __getitem__(self, name: str) -> Tensor:
        self._settle()
        return self.store.column(name)

    def __contains__(self, name: str) -> bool:
        return name in GROUPS

    def __iter__(self) -> Iterator[str]:
        return iter(GROUPS)

    def __len__(self) -> int:
        return len(GROUPS)

    def keys(self) -> tuple[str, ...]:
        return GROUPS

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self[name]) for name in GROUPS)

    def values(self) -> Iterator[Tensor]:
        return (self[name] for name in GROUPS)

    def _apply(self, fn: Any, recurse: bool = True) -> GaussParams:
        return self  # rows live in host memory, whatever device or dtype the model moves to

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._settle()
        for name in GROUPS:
            destination[prefix + name] = self.store.column_copy(name)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        values = {name: state_dict.get(prefix + name) for name in GROUPS}
        missing_keys += [prefix + name for name, value in values.items() if value is None]
        if any(value is None for value in values.values()):
            return
        n = len(values["means"])
        for name, value in values.items():
            expected = (n, *self.store.layout.shapes[name])
            if tuple(value.shape) != expected:
                raise GSScaleError(
                    f"the checkpoint's '{name}' has shape {tuple(value.shape)} and this model "
                    f"expects {expected}; was it trained with another "
                    "--pipeline.model.sh-degree?"
                )
        self._settle()  # rows may still be being stepped, which must not go over the loaded ones
        self.store.resize(0)
        self.store.append(values, stamp=0)
        self._replaced()

    def extra_repr(self) -> str:
        return f"{len(self.store)} rows in host memory"
