"""Errors as torch raises them when GPU memory runs out, at chosen places."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of "
    "which 1.00 GiB is free."
)

DEVICE_MODULES = (
    "gsscale_nerfstudio.engines.cache",
    "gsscale_nerfstudio.engines.colors",
    "gsscale_nerfstudio.engines.packing",
    "gsscale_nerfstudio.engines.working_set",
    "gsscale_nerfstudio.optim.device_tables",
)
"""Where the engines allocate device memory, but for the following functions."""

ON_HOST = ("residents", "lookup", "write_back")


class Shortage:
    """Lets functions fail once each, in the order that is asked for.

    Attributes:
        wanted: names of the places that will fail; the first of them that is come to does.
        later: what to want after these.
        hits: names of those that did.
        when_hit: called before it does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.wanted: list[str] = []
        self.later: list[str] = []
        self.hits: list[str] = []
        self.when_hit: Callable[[], None] = lambda: None

    def place(self, name: str, target: str, static: bool = False, late: bool = False) -> None:
        """Let the function ``target``, a dotted name, fail when ``name`` is wanted.

        ``late``: after it has done its work.
        """
        original = pkgutil.resolve_name(target)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if late:
                result = original(*args, **kwargs)
                self.fail(name)
                return result
            self.fail(name)
            return original(*args, **kwargs)

        self._patch.setattr(target, staticmethod(wrapper) if static else wrapper)

    def fail(self, name: str) -> None:
        """Raise, if ``name`` is wanted."""
        if name in self.wanted:
            self.wanted.remove(name)
            self.hits.append(name)
            self.when_hit()
            raise torch.cuda.OutOfMemoryError(MESSAGE)


class FailingBackward(torch.autograd.Function):
    """Passes a value on; its gradient passes through ``fail``."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, fail: Callable[[], None]) -> torch.Tensor:
        ctx.fail = fail
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.fail()
        return gradients[0], None


@contextmanager
def failing_allocation(nth: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ``nth`` allocation (from 0) of device memory in the engines fails, in any thread.

    Yields the list of the functions that asked for memory, in order.
    """
    asked: list[str] = []

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_code.co_name.startswith("<"):  # comprehensions
                frame = frame.f_back
            where = frame.f_code.co_name
            if frame.f_globals["__name__"] in DEVICE_MODULES and where not in ON_HOST:
                asked.append(where)
                if len(asked) == nth + 1:
                    raise torch.cuda.OutOfMemoryError(MESSAGE)
            return original(*args, **kwargs)

        return allocate

    with monkeypatch.context() as patch:
        for name in ("empty", "zeros", "zeros_like", "from_numpy"):
            patch.setattr(torch, name, failing(getattr(torch, name)))
        yield asked
