"""The plan of memory: parts add up, nothing exceeds what there is, and refusals say what helps."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsscale_nerfstudio import memory_plan
from gsscale_nerfstudio.engines import HostEngine, ResidentEngine, sizing
from gsscale_nerfstudio.engines.budget import CONTEXT_BYTES, IN_TENSORS
from gsscale_nerfstudio.engines.staging import Staging
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.memory_plan import Circumstances, Gpu, make_plan
from gsscale_nerfstudio.store import RowLayout, layout
from gsscale_nerfstudio.store.host import PASSING_BYTES
from tests.engines.driving import drive, make_engine, random_rows
from tests.runs import make_config, tiny_scene, train

GB = 10**9

LAPTOP = Circumstances(
    RowLayout(3), rows=500_000, wanted=None, view_rows=120_000, view_pixels=2_000_000,
    memory=13 * GB, headroom=GB // 2, images=3 * GB, gpu=Gpu(free=7 * GB, images=24_000_000),
)  # fmt: skip
"""8 GB of GPU memory and 16 GB of host memory, a part of which is the desktop's."""

WORKSTATION = Circumstances(
    RowLayout(3), rows=2_000_000, wanted=40_000_000, view_rows=300_000, view_pixels=3_000_000,
    memory=120 * GB, headroom=3 * GB, images=12 * GB, gpu=Gpu(free=22 * GB, images=36_000_000),
)  # fmt: skip
"""24 GB of GPU memory and 128 GB of host memory."""


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    """As with a torch that cannot write checkpoints in place; the last test is of one that can."""
    monkeypatch.setattr(layout, "STREAMS", False)


def parts(side):
    return {part.name: (part.now, part.full) for part in side.parts}


def test_a_laptop():
    plan = make_plan(LAPTOP)
    host, gpu = parts(plan.host), parts(plan.gpu)
    # 784 bytes a row, and the chunk of 256 MiB that each of three arrays may be ahead.
    ahead = 3 * (256 << 20)
    assert host["host store"][1] == plan.capacity * 784 + ahead
    # Staging: 25 bytes for the summary of a row, 16 for decisions about it, 9 for the table of what
    # is in the cache, and 120 for those that a view sees.
    row = 784 + 720 + 25 + 16 + 9 + 120 * 0.24
    assert plan.capacity == pytest.approx((13 * GB - ahead - 3 * GB - GB // 2) / row, abs=2)
    assert host["copy while a checkpoint is written"][0] == 500_000 * 720
    assert host["images"] == (3 * GB, 3 * GB)
    assert 13 * GB - 2000 < plan.host.full <= 13 * GB
    assert gpu["working set of a view"][0] == 135_000 * 700 + 2_000_000 * 130
    for at, rows in enumerate((500_000, plan.capacity)):  # all, with some room to grow
        assert gpu["cached rows"][at] == (rows + rows // 8) * 768
    assert plan.gpu.full <= 7 * GB
    assert plan.advice == ()


def test_a_workstation():
    plan = make_plan(WORKSTATION)
    assert plan.capacity == 40_000_000
    assert parts(plan.host)["copy while a checkpoint is written"][1] == 28_800_000_000
    assert 75 * GB < plan.host.full < 80 * GB
    assert 22 * GB - 768 < plan.gpu.full <= 22 * GB  # the cache takes what is left
    assert plan.advice == ()


def test_without_a_gpu_there_is_the_host_half():
    plan = make_plan(replace(LAPTOP, gpu=None))
    assert plan.gpu is None
    assert plan.host.parts[0].now == 500_000 * 784


amounts = st.integers(0, 200 * GB)


@st.composite
def circumstances(draw):
    rows = draw(st.integers(1, 50_000_000))
    view_rows = draw(st.integers(0, rows))
    budget = draw(st.none() | st.integers(0, 60 * GB))
    gpu = Gpu(
        draw(st.integers(0, 80 * GB)), budget, draw(st.integers(0, 10 * GB)), draw(st.booleans())
    )
    return Circumstances(
        RowLayout(draw(st.integers(0, 4))),
        rows,
        draw(st.none() | st.integers(rows, 300_000_000)),
        view_rows,
        draw(st.integers(1, 50_000_000)),
        draw(amounts),
        draw(st.integers(0, 5 * GB)),
        draw(st.integers(0, 50 * GB)),
        draw(st.booleans()),
        draw(st.none() | st.just(gpu)),
    )


@settings(max_examples=300, deadline=None)
@given(circumstances())
def test_a_plan_that_is_not_refused_keeps_to_the_memory(c):
    try:
        plan = make_plan(c)
    except GSScaleError as refusal:
        assert ";" in str(refusal)  # cause; remedy
        if "train with" in str(refusal):
            memory_plan._grown(with_flags(c, str(refusal)))  # all but the GPU's side
        return
    assert c.rows <= plan.capacity <= (c.wanted or 1 << 28)
    assert plan.host.now == sum(now for now, _ in parts(plan.host).values())
    assert plan.host.full == sum(full for _, full in parts(plan.host).values())
    assert 0 <= plan.host.now <= plan.host.full <= plan.host.available == c.memory
    assert min(size for pair in parts(plan.host).values() for size in pair) >= 0
    if c.wanted is None and c.gpu is None and plan.capacity < 1 << 28:
        with pytest.raises(GSScaleError):  # as many as fit, and not one more
            make_plan(replace(c, wanted=plan.capacity + 1))
    if c.gpu is not None:
        assert plan.gpu.available <= c.gpu.free
        assert all(full >= 0 for _, full in parts(plan.gpu).values())
        tight = max(plan.gpu.now, plan.gpu.full) > plan.gpu.available
        assert not tight or any("does not fit into the GPU" in line for line in plan.advice)


def refusal(c):
    with pytest.raises(GSScaleError) as refused:
        make_plan(c)
    return str(refused.value)


def number(pattern, text):
    return float(re.search(pattern + r" ([\d,.]*\d)", text)[1].replace(",", ""))


def test_more_gaussians_than_host_memory_holds():
    text = refusal(replace(LAPTOP, wanted=6_000_000))
    assert "copy while a checkpoint is written 4.32 GB" in text
    most = int(number("--pipeline.model.max-gaussians to at most", text))
    assert most == make_plan(LAPTOP).capacity
    assert make_plan(replace(LAPTOP, wanted=most)).capacity == most
    refusal(replace(LAPTOP, wanted=most + 1))


@pytest.mark.parametrize("bounded", [False, True])
def test_images_that_leave_no_room_for_rows(bounded):
    text = refusal(replace(LAPTOP, images=12 * GB, images_bounded=bounded))
    assert ("--pipeline.datamanager.cache-images disk" in text) == (not bounded)
    images = number("image-memory-gb to" if bounded else "image-memory-gb", text)
    make_plan(replace(LAPTOP, images=int(images * 1e9)))


def test_more_points_than_host_memory_holds():
    text = refusal(replace(LAPTOP, rows=20_000_000, images=0))
    assert "free host memory, or begin with fewer points" in text


CROWDED = replace(
    LAPTOP, rows=30_000_000, view_rows=1_000_000, memory=22 * GB, images=GB // 10,
)  # fmt: skip
"""More points than host memory holds as they are. With moments of 16 bits it does."""


def with_flags(c, text):
    """The circumstances after the flags for smaller rows that a refusal names."""
    narrow = "moment-dtype bfloat16" in text
    degree = re.search(r"sh-degree (\d)", text)
    layout = RowLayout(
        int(degree[1]) if degree else c.layout.sh_degree,
        torch.bfloat16 if narrow else c.layout.moments,
    )
    most = re.search(r"max-gaussians (\d+)", text)
    return replace(c, layout=layout, wanted=int(most[1]) if most else c.wanted)


@pytest.mark.parametrize(
    "memory, degree, named",
    [
        (22, 3, "train with --pipeline.model.moment-dtype bfloat16, free"),
        (17, 3, "train with --pipeline.model.moment-dtype bfloat16 --pipeline.model.sh-degree 2,"),
        (12, 3, "train with --pipeline.model.moment-dtype bfloat16 --pipeline.model.sh-degree 1,"),
        (8, 3, "bfloat16 --pipeline.model.sh-degree 0 is not enough ("),
        (8, 0, "even --pipeline.model.moment-dtype bfloat16 is not enough ("),
    ],
)
def test_flags_for_too_many_points_are_those_that_are_enough(memory, degree, named, monkeypatch):
    monkeypatch.setattr(layout, "STREAMS", True)
    c = replace(CROWDED, layout=RowLayout(degree), memory=memory * GB)
    text = refusal(c)
    assert named in text and text.endswith("free host memory, or begin with fewer points")
    if "train with" in text:
        make_plan(with_flags(c, text))
    else:
        assert float(re.search(r"is not enough \(([\d.]+) GB\)", text)[1]) > memory


def test_rows_of_a_checkpoint_keep_their_bands(monkeypatch):
    """Another --pipeline.model.sh-degree is refused there."""
    monkeypatch.setattr(layout, "STREAMS", True)
    text = refusal(replace(CROWDED, memory=17 * GB, resumed=True))
    assert "even --pipeline.model.moment-dtype bfloat16 is not enough" in text
    assert "sh-degree" not in text


def test_rows_that_cannot_be_smaller():
    c = replace(CROWDED, layout=RowLayout(0, torch.bfloat16), memory=8 * GB)
    assert "; free host memory, or begin with fewer points" in refusal(c)


def test_flags_for_present_points_name_a_capacity_that_fits(monkeypatch):
    monkeypatch.setattr(layout, "STREAMS", True)
    c = replace(CROWDED, wanted=60_000_000)
    text = refusal(c)
    assert "--pipeline.model.max-gaussians" in text
    assert make_plan(with_flags(c, text)).capacity >= c.rows


def test_memory_that_is_left_only_to_others_does_not_refuse():
    """A resumed run may find a little less memory than the one that grew."""
    plan = make_plan(replace(LAPTOP, rows=LAPTOP.rows, memory=make_plan(LAPTOP).host.now - GB // 4))
    assert plan.capacity == LAPTOP.rows
    assert parts(plan.host)["left to others"] == (GB // 4, GB // 4)
    assert "host memory is tight" in plan.advice[0]


def test_a_budget_below_what_one_view_takes():
    least = CONTEXT_BYTES + 24_000_000 + 120_000 // 64 * 300 + 2_000_000 * 130
    make_plan(replace(LAPTOP, gpu=replace(LAPTOP.gpu, budget=least)))
    for caches in (True, False):
        gpu = replace(LAPTOP.gpu, budget=least - 1, caches=caches)
        text = refusal(replace(LAPTOP, gpu=gpu))
        needed = number("--pipeline.model.vram-budget-gb to at least", text)
        allowed = int(needed * 1e9 * IN_TENSORS)
        assert least <= allowed < least + 0.1 * GB
        make_plan(replace(LAPTOP, gpu=replace(gpu, budget=allowed)))


def test_a_card_that_is_too_small():
    text = refusal(replace(LAPTOP, gpu=Gpu(free=GB, images=GB)))
    assert "--pipeline.datamanager.cache-images cpu" in text
    text = refusal(replace(LAPTOP, gpu=Gpu(free=GB // 2)))
    assert "--pipeline.datamanager.camera-res-scale-factor" in text


@pytest.mark.parametrize("pixel, short, helps", [(330, 0, True), (330, 1, False), (130, 1, False)])
def test_a_newer_torch_is_named_where_a_view_would_fit_with_it(pixel, short, helps, monkeypatch):
    monkeypatch.setattr(sizing, "_PIXEL_BYTES", pixel)
    fused = CONTEXT_BYTES + 24_000_000 + 120_000 // 64 * 300 + 2_000_000 * 130
    for gpu in (
        replace(LAPTOP.gpu, budget=fused - short),
        replace(LAPTOP.gpu, free=fused - short),
    ):
        text = refusal(replace(LAPTOP, gpu=gpu))
        assert ("PyTorch 2.8 or newer" in text) == helps
        assert not helps or f"{fused / 1e9:.2f} GB are enough" in text


def test_a_budget_above_the_cards_memory_is_clipped():
    plan = make_plan(replace(LAPTOP, gpu=replace(LAPTOP.gpu, budget=24 * GB)))
    assert plan.gpu == make_plan(LAPTOP).gpu
    assert "allows 24.00 GB, but the card has 7.00 GB" in plan.advice[0]


def test_advice_says_from_when_on_adam_runs_on_the_cpu():
    c = replace(LAPTOP, wanted=1_500_000, gpu=replace(LAPTOP.gpu, budget=int(1.4e9)))
    (line,) = make_plan(c).advice
    assert "Adam runs on the CPU" in line
    assert "--pipeline.model.vram-budget-gb" in line
    rows = int(number("from some", line))
    assert rows > LAPTOP.rows
    for n, cached in ((rows, True), (rows + 100, False)):
        view = -(-n * 120_000 // 500_000)
        plan = make_plan(replace(c, rows=n, view_rows=view))
        assert (parts(plan.gpu)["cached rows"][0] > 0) == cached
        assert ("already now" in plan.advice[0]) == (not cached)


def test_advice_says_from_when_on_a_view_does_not_fit():
    c = replace(LAPTOP, gpu=replace(LAPTOP.gpu, free=GB + 300_000_000, caches=False))
    (line,) = make_plan(c).advice
    assert "smaller images or --pipeline.model.max-gaussians" in line
    rows = int(number("from some", line))
    least_too_many = replace(c, rows=rows + 100, view_rows=-(-(rows + 100) * 12 // 50))
    assert make_plan(least_too_many).gpu.now > c.gpu.free
    assert make_plan(replace(c, rows=rows, view_rows=-(-rows * 12 // 50))).gpu.now <= c.gpu.free


@pytest.mark.parametrize("kind", [HostEngine, ResidentEngine])
def test_staging_is_what_an_engine_touches(kind, monkeypatch):
    """Nobody adds a buffer and leaves it out of the plan."""
    touched: dict[Staging, int] = {}
    rows_of = Staging.rows

    def rows(self, n):
        tensor = rows_of(self, n)
        touched[self] = max(touched.get(self, 0), tensor.nbytes)
        return tensor

    monkeypatch.setattr(Staging, "rows", rows)
    layout, n, largest = RowLayout(1), 400, 0
    slots = n if kind is ResidentEngine else None
    engine = make_engine(random_rows(n, layout), layout, "cpu", slots)
    assert isinstance(engine, kind)
    cull = engine._cull

    def culled(*args, **kwargs):
        nonlocal largest
        ids = cull(*args, **kwargs)
        largest = max(largest, len(ids))
        return ids

    monkeypatch.setattr(engine, "_cull", culled)
    drive(engine, 10)
    engine.summarize()
    total = sum(touched.values())
    slot_table = 9 if kind is ResidentEngine else 0
    planned = kind.staging_bytes(layout, n, largest) - n * (PASSING_BYTES + slot_table)
    # On a CPU nothing is page-locked with something to spare.
    assert 1.25 * total <= planned < 2.5 * total


def test_training_tells_the_plan_once(tmp_path, capsys, monkeypatch):
    scene = tiny_scene(tmp_path / "scene")
    monkeypatch.setattr(memory_plan, "headroom", lambda: 0)
    given = []
    make = memory_plan.make_plan
    monkeypatch.setattr(memory_plan, "make_plan", lambda c: given.append(c) or make(c))
    trainer = train(make_config(scene, tmp_path, max_gaussians=5000))
    said = capsys.readouterr().out
    assert said.count("memory plan") == 1 and "no effect" not in said
    assert "now, 300 Gaussians" in said and "at most, 5,000" in said
    assert "host memory" in said and "GPU memory" not in said
    (c,) = given
    assert (c.rows, c.wanted, c.view_pixels, c.gpu) == (300, 5000, 64 * 48, None)
    assert 100 < c.view_rows <= 300
    data, store = trainer.pipeline.datamanager, trainer.pipeline.model.engine.store
    assert c.images == 8 * 64 * 48 * 3
    # Training's were read, the held-out ones were not.
    assert store.claims() == len(data.eval_dataset) * 64 * 48 * 3
    assert store.beside_row == HostEngine.staging_bytes(c.layout, 300, c.view_rows) / 300


def test_a_gpus_budget_without_a_gpu_is_said_to_have_no_effect(tmp_path, capsys):
    train(make_config(tiny_scene(tmp_path / "scene"), tmp_path, steps=1, vram_budget_gb=4.0))
    assert "vram-budget-gb has no effect" in " ".join(capsys.readouterr().out.split())


def test_training_that_cannot_work_ends_before_images_are_read(tmp_path, capsys, monkeypatch):
    scene = tiny_scene(tmp_path / "scene")
    monkeypatch.setattr(memory_plan, "available_memory", lambda: 300_000)
    with pytest.raises(SystemExit):
        train(make_config(scene, tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "gsscale: training the present 300 Gaussians takes" in said
    assert "undistorting" not in said and "begin with fewer points" in said


def test_without_a_copy_a_scene_grows_further(monkeypatch):
    smaller = make_plan(LAPTOP).capacity
    monkeypatch.setattr(layout, "STREAMS", True)
    plan = make_plan(LAPTOP)
    assert parts(plan.host)["copy while a checkpoint is written"] == (0, 0)
    assert plan.capacity > 1.8 * smaller
