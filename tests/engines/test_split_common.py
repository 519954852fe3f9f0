"""Common and other ids of two views beside numpy's set operations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsscale_nerfstudio import _C


def split(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    n, m = len(a), len(b)
    sizes = (min(n, m), min(n, m), n, m)
    # One more than asked for, to see that nothing is written there.
    out = [np.full(size + 1, -7, dtype=np.int32) for size in sizes]
    k = _C.split_common(a, b, *out)
    ends = (k, k, n - k, m - k)
    for values, size, end in zip(out, sizes, ends, strict=True):
        assert (values[:end] >= 0).all()
        assert values[size] == -7
    return tuple(values[:end] for values, end in zip(out, ends, strict=True))


def check(a: np.ndarray, b: np.ndarray) -> None:
    common_a, common_b, only_a, only_b = split(a, b)
    _, at_a, at_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    np.testing.assert_array_equal(common_a, at_a)
    np.testing.assert_array_equal(common_b, at_b)
    np.testing.assert_array_equal(only_a, np.setdiff1d(np.arange(len(a)), at_a))
    np.testing.assert_array_equal(only_b, np.setdiff1d(np.arange(len(b)), at_b))


ids = st.lists(st.integers(0, 200) | st.integers(0, 2**31 - 1), unique=True, max_size=80)


@settings(max_examples=300, deadline=None)
@given(ids, ids, st.booleans())
def test_equals_numpy(a, b, shared):
    if shared:
        b = list({*b, *a[::2]})
    check(np.array(sorted(a), dtype=np.int32), np.array(sorted(b), dtype=np.int32))


@pytest.mark.usefixtures("four_threads")
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(*[st.integers(0, 500_000)] * 2),
    spread=st.sampled_from([1, 3, 50, 3000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_numpy_where_several_threads_work(sizes, spread, seed):
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 300_000, 2)
    a, b = (
        np.unique(start + rng.integers(0, spread * n + 1, n)).astype(np.int32)
        for start, n in zip(starts, sizes, strict=True)
    )
    check(a, b)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("first", [0, 2**31 - 300_000])
def test_the_same_apart_and_inside_one_another(first):
    everything = np.arange(first, first + 300_000, dtype=np.int64).astype(np.int32)
    none = everything[:0]
    for a in (everything, everything[::2], everything[100_000:100_500], everything[:1], none):
        for b in (everything, everything[1::2], everything[99_990:100_010], everything[-1:], none):
            check(a, b)


@pytest.mark.parametrize("bad", [[3, 3], [5, 4], [0, 1, 9, 8]])
def test_ids_that_do_not_ascend_are_refused(bad):
    bad, good = np.array(bad, dtype=np.int32), np.arange(6, dtype=np.int32)
    for a, b in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="ascend"):
            split(a, b)


def test_outputs_without_room_are_refused():
    a, b = np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32)
    sizes = [3, 3, 3, 5]
    for place in range(4):
        out = [np.empty(n - (i == place), dtype=np.int32) for i, n in enumerate(sizes)]
        with pytest.raises(ValueError, match="room"):
            _C.split_common(a, b, *out)
    with pytest.raises(TypeError):
        _C.split_common(a.astype(np.int64), b, *[np.empty(5, dtype=np.int32)] * 4)
