"""turns.py with real processes: nobody works while one is alone, and nobody waits for ever."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.turns import Turns

# A training of some steps, of which the last ones are made alone. It writes when it worked.
TRAINING = """
import sys, time
from pathlib import Path
from benchmarks.turns import Turns
turns, out, steps, alone_from = Turns(Path(sys.argv[1])), sys.argv[2], 60, int(sys.argv[3])
lines = []
for step in range(steps):
    begin = time.monotonic()
    time.sleep(0.004)
    lines.append(f"{begin} {time.monotonic()} {int(step >= alone_from)}")
    if step + 1 == alone_from:
        turns.alone()
    elif step + 1 == steps:
        turns.together()
    else:
        turns.step_ended()
Path(out).write_text("\\n".join(lines))
"""


def start(code: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=machine.ROOT)


def test_whoever_is_alone_is_alone(tmp_path: Path):
    outs = [tmp_path / f"{i}.txt" for i in range(4)]
    # The last one never wants to be alone.
    firsts = ["20", "20", "40", "60"]
    running = [
        start(TRAINING, str(tmp_path / "turns"), str(out), first)
        for out, first in zip(outs, firsts, strict=True)
    ]
    assert [child.wait(timeout=60) for child in running] == [0] * 4
    trainings = [
        [(float(a), float(b), alone == "1") for a, b, alone in map(str.split, lines)]
        for lines in (out.read_text().splitlines() for out in outs)
    ]
    together = 0
    for training in trainings:
        others = [step for other in trainings if other is not training for step in other]
        for begin, end, alone in training:
            meanwhile = [step for step in others if step[0] < end and step[1] > begin]
            assert not (alone and meanwhile)
            together += bool(meanwhile)
    assert together > 0, "they never ran at the same time, so nothing was tested"


def test_nobody_comes_back_before_one_who_wants_to_be_alone(tmp_path: Path):
    """Else two who are never out of the room together would keep it from being empty."""
    first, second, third = (Turns(tmp_path) for _ in range(3))
    with ThreadPoolExecutor(3) as pool:
        try:
            alone = pool.submit(third.alone)
            time.sleep(0.2)  # it waits for the other two
            back = [pool.submit(first.step_ended)]
            time.sleep(0.2)
            assert not back[0].done() and not alone.done()
            back.append(pool.submit(second.step_ended))
            alone.result(timeout=10)
            time.sleep(0.2)
            assert not any(one.done() for one in back)
        finally:  # or the threads wait for ever
            for turns in (third, first, second):
                fcntl.flock(turns._gate, fcntl.LOCK_UN)
                fcntl.flock(turns._room, fcntl.LOCK_UN)
        for one in back:
            one.result(timeout=10)


@pytest.mark.parametrize("where", ["turns.alone()", "pass"])
def test_one_that_is_killed_lets_the_others_go_on(tmp_path: Path, where: str):
    code = f"""
import sys, time
from pathlib import Path
from benchmarks.turns import Turns
turns = Turns(Path(sys.argv[1]))
{where}
Path(sys.argv[2]).touch()
time.sleep(600)
"""
    here = tmp_path / "here"
    child = start(code, str(tmp_path / "turns"), str(here))
    try:
        deadline = time.monotonic() + 30
        while not here.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert here.exists()
    finally:
        child.kill()
        child.wait()
    turns = Turns(tmp_path / "turns")
    turns.alone()
    turns.together()
