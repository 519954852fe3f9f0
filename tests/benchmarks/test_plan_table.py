"""The page about scenes that do not fit: its numbers are the plan's."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import plan_table
from gsscale_nerfstudio.engines import HostEngine, ResidentEngine
from gsscale_nerfstudio.engines.budget import CONTEXT_BYTES
from gsscale_nerfstudio.store import RowLayout

PAGE = (Path(__file__).parents[2] / "docs" / "big-scenes.md").read_text()


@pytest.mark.parametrize("title", plan_table.page())
def test_tables_on_the_page_are_the_scripts(title):
    assert plan_table.page()[title] in PAGE, "run python benchmarks/plan_table.py"


def test_bytes_on_the_page():
    row, millions = RowLayout(3), 10**6
    engines = ResidentEngine, HostEngine
    staging = [engine.staging_bytes(row, 0, millions) / millions for engine in engines]
    lists = [engine.staging_bytes(row, 1, 0) for engine in engines]
    said = {
        "host store": [row.stored_bytes],
        "host, lists for densification and the culler": lists,
        "host, staging": staging,
        "GPU, cache of the resident engine": [row.cached_bytes],
    }
    for where, sizes in said.items():
        (cell,) = re.findall(rf"^\| {where} \| (.+?) \|", PAGE, re.MULTILINE)
        assert [int(size) for size in re.findall(r"\b\d+\b", cell)] == sizes
    smaller = [RowLayout(degree).stored_bytes for degree in range(3)]
    assert "takes {}, {} and {} bytes".format(*smaller) in PAGE
    assert f"CUDA {CONTEXT_BYTES / 1e9:.2f} GB" in PAGE


def test_more_memory_never_keeps_less():
    order = ["refused", "parts", "host"]

    def rank(cell: str) -> float:
        return (
            order.index(cell)
            if cell in order
            else 200
            if cell == "all"
            else 3 + int(cell.split()[0])
        )

    for share in plan_table.SHARES:
        cards = [[rank(cell) for cell in row[1:]] for row in plan_table.of_cards(share).rows]
        for smaller, larger in pairwise(cards):
            assert all(a >= b for a, b in zip(smaller, larger, strict=True))
        assert all(row == sorted(row) for row in cards)
        assert len({cell for row in cards for cell in row}) > 4
    for machines in zip(*(row[1:] for row in plan_table.of_machines().rows), strict=True):
        sizes = [int(cell.split()[0]) for cell in machines]
        assert sizes == sorted(set(sizes))


def test_a_machine_holds_what_the_table_says():
    """32 GB with 4 for the system, 4 for images, a reserve, and rows that are locked ahead."""
    rows = plan_table.most(32, 0.1, 24)
    others = (4 << 30) + 4 * 10**9 + (32 << 30) // 50 + 3 * (256 << 20)
    assert rows * (784 + 50 + 120 * 0.1) == pytest.approx((32 << 30) - others, rel=1e-6)
