"""What a training does with memory and link, in numbers for TensorBoard and the viewer's panel."""

from __future__ import annotations

import time

import psutil
import torch

from gsscale_nerfstudio.engines import Engine
from gsscale_nerfstudio.engines.waits import COUNTER as LINK_WAIT

_SUMS = ("views", "rows", "rows_missed", "link_bytes", "host_wait_s", "cull_s", LINK_WAIT)


class Monitor:
    """Tells what an engine has done since it was last asked; whoever asks has one of his own.

    Nothing is done on the engine's side but adding to its counters, and asking does not wait for
    the device: any thread may.

    Args:
        engine: whose counters.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._process = psutil.Process()
        self._sums, self._at = self._read(), time.perf_counter()

    def _read(self) -> dict[str, float]:
        return {name: self.engine.counters.get(name, 0.0) for name in _SUMS}

    def ask(self) -> dict[str, float]:
        """The present state, and means and sums over the views trained since the last ones.

        Returns:
            By name, see ``docs/monitoring.md``. The latter are left out if no view was trained, and
            what is of a GPU, or of a cache, where there is none.
        """
        sums, now = self._read(), time.perf_counter()
        since = {name: value - self._sums[name] for name, value in sums.items()}
        if since["views"] == 0:
            return self._state()  # a step that takes long has its time counted with its views
        seconds, self._sums, self._at = now - self._at, sums, now
        return self._state() | self._means(since, seconds)

    def _state(self) -> dict[str, float]:
        engine, device = self.engine, self.engine.device
        state = {
            "rows": float(len(engine.store)),
            "host_memory_gb": self._process.memory_info().rss / 1e9,
        }
        if device.type == "cuda":
            state["gpu_allocated_gb"] = torch.cuda.memory_allocated(device) / 1e9
            state["gpu_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
        cached = engine.cached
        if cached is not None:
            state["cached_rows"], state["cache_capacity"] = map(float, cached)
        return state

    def _means(self, since: dict[str, float], seconds: float) -> dict[str, float]:
        views = since["views"]
        means = {
            "visible_rows": since["rows"] / views,
            "hit_rate": 1 - since["rows_missed"] / max(1.0, since["rows"]),
            "hits": since["rows"] - since["rows_missed"],  # a sum, as the next one
            "misses": since["rows_missed"],
            "link_mb": since["link_bytes"] / views / 1e6,
            "link_gb_per_s": since["link_bytes"] / seconds / 1e9,
            "host_wait_ms": since["host_wait_s"] / views * 1e3,
            "cull_ms": since["cull_s"] / views * 1e3,
        }
        if self.engine.device.type == "cuda":
            means["link_wait_ms"] = since[LINK_WAIT] / views * 1e3
        return means
