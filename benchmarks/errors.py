"""What a benchmark's command line tells its user in one sentence."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """Nothing can be measured, or a file cannot be used; the message says what to do."""
