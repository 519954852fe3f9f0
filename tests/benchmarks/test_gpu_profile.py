"""What a profile says of the GPU's time."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_profile import MOST_KERNELS, TrainingProfile, busy_ms, covered, ms_by_kernel


def event(name: str, start: float, end: float) -> dict[str, object]:
    return {"name": name, "ts": start, "dur": end - start}


def test_intervals_that_overlap_are_counted_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert busy_ms([event("a", 0, 2000), event("b", 1000, 3000), event("a", 5000, 6000)]) == 4


def test_kernels_are_added_up_by_name():
    work = [
        event("void gsplat::draw<3u, float>(unsigned int, float const*)", 0, 3000),
        event("gsplat::draw<4u, float>(unsigned int)", 0, 1000),
        event("Memcpy HtoD (Pinned -> Device)", 0, 500),
        event("<lambda>", 0, 100),
    ]
    assert ms_by_kernel(work, 2) == {
        "gsplat::draw": 2.0,
        "Memcpy HtoD": 0.25,
        "<lambda>": 0.05,
        "others": 0.0,
    }
    many = [event(f"kernel_{i}", 0, 1000 * (i + 1)) for i in range(MOST_KERNELS + 2)]
    times = ms_by_kernel(many, 1)
    assert len(times) == MOST_KERNELS + 1 and times["others"] == 1 + 2


@pytest.mark.gpu
def test_some_steps_of_a_training_are_profiled():
    profile = TrainingProfile(begin=3, steps=2)
    hook = profile.callback()
    a = torch.rand(512, 512, device="cuda")
    for step in range(8):
        torch.mm(a, a)
        hook.run_callback(step)
        assert (profile.result is None) == (step < 4)
    result = profile.result
    assert result is not None and result["steps"] == 2
    assert 0 < result["busy_ms"] <= result["ms"]
    assert sum(result["kernels"].values()) == pytest.approx(result["busy_ms"], rel=0.05)
