"""A GPU of which a benchmark's processes have a part, or that they share with others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan import check_sharing


@dataclass(kw_only=True)
class SharedGpu:
    """Flags of benchmarks that make up rows, and take steps on them."""

    cap_gb: float | None = None
    """GPU memory that each process may have in all, as on a card of this size."""
    turns: Path | None = None
    """Folder shared with other benchmarks that use the same GPU at the same time: steps are made
    while all of their runs wait (``turns.py``)."""
    cuda_gb: float | None = None
    """What CUDA takes of --cap-gb before anything is allocated: it can't be seen where others are
    on the GPU, too."""

    def check_sharing(self) -> None:
        """Raise on flags that do not go together."""
        check_sharing(self.turns, self.cap_gb, self.cuda_gb)

    def sharing_words(self, recorded: bool) -> list[str]:
        """These flags on a command line; one that is recorded names no folder of this machine."""
        words = ["--cap-gb", str(self.cap_gb)] if self.cap_gb is not None else []
        words += ["--cuda-gb", str(self.cuda_gb)] if self.cuda_gb is not None else []
        if self.turns is not None:
            words += ["--turns", "DIR" if recorded else str(self.turns)]
        return words
