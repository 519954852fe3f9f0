"""Kernels: block bounds and compaction against the row test written out in numpy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsscale_nerfstudio import _C
from tests.isa import run_with_isa

BLOCK = _C.BLOCK_ROWS
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17, 64 * BLOCK, 70 * BLOCK - 5, 130 * BLOCK]


def rows(n: int, seed: int = 0) -> np.ndarray:
    """Spheres [n, 4] in neighbourhoods, as Morton order leaves them: blocks of all three kinds."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-10, 10, (n // BLOCK + 1, 3)).repeat(BLOCK, axis=0)[:n]
    spheres = np.empty((n, 4), dtype=np.float32)
    spheres[:, :3] = centres + rng.normal(0, 0.5, (n, 3))
    spheres[:, 3] = rng.lognormal(-2, 1, n)
    return spheres


def region(n_planes: int = 6, seed: int = 0) -> np.ndarray:
    """Planes [n_planes, 5] around a part of what :func:`rows` fills."""
    rng = np.random.default_rng(seed)
    normals = rng.standard_normal((n_planes, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    offsets, growths = rng.uniform(0, 8, n_planes), rng.uniform(1, 2, n_planes)
    return np.column_stack([normals, offsets, growths]).astype(np.float32)


def blocks_for(spheres: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    blocks = np.empty((-(-len(spheres) // BLOCK), 8), dtype=np.float32)
    _C.update_blocks(spheres, blocks, len(spheres), ids)
    return blocks


def cull(spheres: np.ndarray, planes: np.ndarray, n_rows: int | None = None) -> np.ndarray:
    out = np.full(len(spheres), -1, dtype=np.int32)
    n_rows = len(spheres) if n_rows is None else n_rows
    n = _C.cull(spheres, blocks_for(spheres), n_rows, planes, out)
    assert (out[n:] == -1).all()
    return out[:n]


def one_by_one(spheres: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Ids by the definition, with the kernel's order of operations and rounding."""
    x, y, z, r = spheres.T
    kept = np.ones(len(spheres), dtype=bool)
    with np.errstate(invalid="ignore"):
        for nx, ny, nz, d, k in planes:
            kept &= ~(nx * x + ny * y + nz * z + d + k * r < 0)
    return np.flatnonzero(kept)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_planes", [0, 1, 6, 32])
def test_blocks_change_nothing(n: int, n_planes: int) -> None:
    spheres, planes = rows(n), region(n_planes)
    np.testing.assert_array_equal(cull(spheres, planes), one_by_one(spheres, planes))


@given(st.integers(0, 40 * BLOCK), st.integers(0, 10), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_blocks_change_nothing_in_random_regions(n: int, n_planes: int, seed: int) -> None:
    spheres, planes = rows(n, seed), region(n_planes, seed)
    np.testing.assert_array_equal(cull(spheres, planes), one_by_one(spheres, planes))


@pytest.mark.parametrize("shift", [-1e9, 1e9])
def test_all_blocks_outside_or_inside(shift: float) -> None:
    spheres, planes = rows(70 * BLOCK + 3), region()
    planes[:, 3] = shift
    np.testing.assert_array_equal(
        cull(spheres, planes), np.arange(len(spheres) if shift > 0 else 0)
    )


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("offset", range(-9, 10, 3))
def test_ties_are_decided_alike(axis: int, offset: int) -> None:
    """On a grid, many rows and block corners lie on a plane but for rounding."""
    spheres = np.round(rows(20 * BLOCK))
    for other in (axis + 1) % 3, (axis + 2) % 3, 3:
        plane = np.zeros((1, 5), dtype=np.float32)
        plane[0, axis], plane[0, 3] = 0.1, 0.1 * offset
        plane[0, other if other < 3 else 4] = -0.3
        np.testing.assert_array_equal(cull(spheres, plane), one_by_one(spheres, plane))


@pytest.mark.parametrize(
    ("column", "value"), [(0, np.nan), (1, np.nan), (2, np.nan), (3, np.nan), (3, np.inf)]
)
def test_rows_that_are_not_finite_are_kept(column: int, value: float) -> None:
    spheres, planes = rows(9 * BLOCK + 100), region()
    broken = np.random.default_rng(1).choice(len(spheres), 40, replace=False)
    spheres[broken, column] = value
    ids = cull(spheres, planes)
    assert np.isin(broken, ids).all()
    np.testing.assert_array_equal(ids, one_by_one(spheres, planes))
    planes[:, 3] = -1e6
    np.testing.assert_array_equal(cull(spheres, planes), np.sort(broken))


def test_planes_that_are_not_finite_reject_nothing() -> None:
    spheres = rows(3 * BLOCK)
    np.testing.assert_array_equal(
        cull(spheres, np.full((6, 5), np.nan, dtype=np.float32)), np.arange(len(spheres))
    )


@pytest.mark.parametrize("n", [0, 5, BLOCK, 5 * BLOCK + 1])
def test_only_rows_in_use_count(n: int) -> None:
    spheres, planes = rows(9 * BLOCK), region()
    spheres[n:] = np.nan  # memory that was never written
    expected = one_by_one(spheres[:n], planes)
    blocks = np.full((9, 8), 7, dtype=np.float32)
    _C.update_blocks(spheres, blocks, n)
    assert (blocks[-(-n // BLOCK) :] == 7).all()
    out = np.empty(n, dtype=np.int32)
    count = _C.cull(spheres, blocks, n, planes, out)
    np.testing.assert_array_equal(out[:count], expected)


def test_block_bounds() -> None:
    spheres = rows(2 * BLOCK + 9)
    spheres[BLOCK + 3, 1] = np.nan
    blocks = blocks_for(spheres)
    for b in (0, 2):
        part = spheres[b * BLOCK : (b + 1) * BLOCK]
        np.testing.assert_array_equal(blocks[b], [*part.min(axis=0), *part.max(axis=0)])
    np.testing.assert_array_equal(blocks[1], [-np.inf] * 4 + [np.inf] * 4)


@given(st.integers(1, 90 * BLOCK), st.floats(0, 0.5), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_refreshing_changed_rows_is_refreshing_all(n: int, share: float, seed: int) -> None:
    spheres = rows(n, seed)
    blocks = blocks_for(spheres)
    ids = np.flatnonzero(np.random.default_rng(seed).random(n) < share).astype(np.int32)
    spheres[ids] += 1
    _C.update_blocks(spheres, blocks, n, ids)
    np.testing.assert_array_equal(blocks, blocks_for(spheres))
    np.testing.assert_array_equal(blocks_for(spheres, np.arange(n, dtype=np.int32)), blocks)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    spheres, planes = rows(700 * BLOCK), region(3)
    blocks = np.empty((700, 8), dtype=np.float32)
    _C.update_blocks(spheres, blocks, len(spheres), None, threads)
    np.testing.assert_array_equal(blocks, blocks_for(spheres))
    blocks[:] = np.nan
    some = np.arange(0, len(spheres), 99, dtype=np.int32)  # of every block
    _C.update_blocks(spheres, blocks, len(spheres), some, threads)
    np.testing.assert_array_equal(blocks, blocks_for(spheres))
    out = np.empty(len(spheres), dtype=np.int32)
    n = _C.cull(spheres, blocks, len(spheres), planes, out, threads)
    np.testing.assert_array_equal(out[:n], one_by_one(spheres, planes))


def test_two_views_at_once() -> None:
    spheres = rows(300 * BLOCK)
    seeds = list(range(20)) * 3
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda seed: cull(spheres, region(6, seed)), seeds))
    for seed, ids in zip(seeds, results, strict=True):
        np.testing.assert_array_equal(ids, one_by_one(spheres, region(6, seed)))


HASH = """
import hashlib, numpy as np
from gsscale_nerfstudio import _C
rng = np.random.default_rng(5)
n = 400_001
spheres = np.round(rng.normal(0, 5, (n, 4))).astype(np.float32)  # a grid, for ties
spheres = np.ascontiguousarray(spheres[np.argsort(spheres[:, 0])])
blocks = np.empty((-(-n // _C.BLOCK_ROWS), 8), np.float32)
_C.update_blocks(spheres, blocks, n)
out = np.empty(n, np.int32)
digest = hashlib.sha256(blocks.tobytes())
for _ in range(20):
    planes = np.round(rng.normal(0, 10, (6, 5))).astype(np.float32) * np.float32(0.1)
    planes[:, 3] += 8
    digest.update(out[: _C.cull(spheres, blocks, n, planes, out)].tobytes())
print(_C.isa(), digest.hexdigest())
"""


def test_instruction_sets_agree() -> None:
    names = ["baseline", "avx2", "avx512"]
    seen = dict(run_with_isa(["-c", HASH], name) for name in names[: names.index(_C.isa()) + 1])
    assert _C.isa() in seen and "baseline" in seen
    assert len(set(seen.values())) == 1, seen


def test_a_short_output_is_not_written() -> None:
    spheres, planes = rows(70 * BLOCK), region(1)
    wanted = one_by_one(spheres, planes)
    out = np.full(len(wanted) - 1, -1, dtype=np.int32)
    assert _C.cull(spheres, blocks_for(spheres), len(spheres), planes, out) == len(wanted)
    assert (out == -1).all()


@pytest.mark.parametrize("stray", [[-1], [600], [0, 300, 9999], [5, 599, 601], [-7, 0]])
def test_ids_outside_of_the_rows_are_refused(stray: list[int]) -> None:
    spheres = rows(600)
    blocks = np.empty((3, 8), dtype=np.float32)
    with pytest.raises(ValueError, match="row id"):
        _C.update_blocks(spheres, blocks, 600, np.array(stray, dtype=np.int32))


def test_arguments_are_checked_not_converted() -> None:
    spheres, planes, out = rows(600), region(), np.empty(600, dtype=np.int32)
    blocks = blocks_for(spheres)
    good = (spheres, blocks, 600, planes, out)

    def swapped(index: int, value: object) -> tuple:
        return (*good[:index], value, *good[index + 1 :])

    # A converted copy of an array that we write to would be lost without a sound.
    for index, value in [
        (0, spheres.astype(np.float64)),
        (0, np.asfortranarray(spheres)),
        (1, blocks[:, ::-1]),
        (3, planes.astype(np.float64)),
        (4, out.astype(np.int64)),
        (4, np.empty(1200, dtype=np.int32)[::2]),
    ]:
        with pytest.raises(TypeError):
            _C.cull(*swapped(index, value))
    with pytest.raises(TypeError):
        _C.update_blocks(spheres, blocks.astype(np.float64), 600)
    with pytest.raises(TypeError):
        _C.update_blocks(spheres, blocks, 600, np.zeros(1, dtype=np.int64))

    for index, value, message in [
        (0, np.empty((600, 3), dtype=np.float32), "spheres"),
        (1, np.empty((3, 7), dtype=np.float32), "blocks"),
        (1, blocks[:2], "blocks"),
        (2, 601, "n_rows"),
        (2, -1, "n_rows"),
        (3, planes[:, :4].copy(), "planes"),
        (3, np.zeros((33, 5), dtype=np.float32), "planes"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.cull(*swapped(index, value))
