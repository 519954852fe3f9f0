"""cli.py: what a benchmark's command ends with."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

import pytest

from benchmarks import cli
from benchmarks.errors import BenchmarkError


@dataclass
class Arguments:
    number: int
    """Of whatever."""


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["measure", "--number", "3"])
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("returned", "status"), [(0, 0), (2, 1), (None, 0), ({"ms": 1.0}, 0)])
def test_exit_status(returned, status):
    seen = []
    assert cli.run(Arguments, None, lambda args, _: [seen.append(args), returned][1]) == status
    assert seen == [Arguments(3)]


def test_what_the_user_can_mend_is_a_sentence(capsys):
    def measure(args: Arguments, _: object) -> None:
        raise BenchmarkError(f"[{args.number}] is no size; name another")

    assert cli.run(Arguments, None, measure) == 2
    assert capsys.readouterr().out == "error: [3] is no size; name another\n"


def test_sigterm_leaves_through_the_cleanup():
    cleaned = []

    def measure(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as left:
        cli.run(Arguments, None, measure)
    assert left.value.code == 143
    assert cleaned
