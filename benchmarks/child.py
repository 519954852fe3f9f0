"""A run's end of what :mod:`benchmarks.children` starts: one result, in a file and as a line."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def report(measure: Callable[[Path], dict[str, Any]], result: Path | None) -> int:
    """Measure, write the result file, print it as one line of JSON.

    Args:
        measure: does the run, in a folder that is deleted afterwards.
        result: the file; None for none.

    Returns:
        The exit status: 1 if anything was raised, which then is the result.
    """
    with tempfile.TemporaryDirectory(prefix="gsscale-run-") as folder:
        try:
            measured = measure(Path(folder))
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            measured = {"error": f"{type(error).__name__}: {first_line}"}
    line = json.dumps(measured, allow_nan=False)
    if result is not None:
        result.write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return 1 if "error" in measured else 0
