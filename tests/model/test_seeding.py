"""The first rows are splatfacto's first Gaussians, made in little memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from rich.console import Console

from gsscale_nerfstudio import seeding
from gsscale_nerfstudio.seeding import seed_rows
from gsscale_nerfstudio.store import GROUPS, HostStore, RowLayout
from gsscale_nerfstudio.store.order import morton_order


def cloud(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    xyz = torch.randn(n, 3, generator=random)
    xyz[:, 2] *= 0.01  # a surface, as points of real scenes lie on one
    return xyz, torch.randint(0, 256, (n, 3), generator=random, dtype=torch.uint8)


def seeded(config: SplatfactoModelConfig, points: object) -> HostStore:
    store = HostStore(RowLayout(config.sh_degree))
    torch.manual_seed(7)
    seed_rows(store, config, points)
    return store


def splatfactos(
    config: SplatfactoModelConfig, points: object, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Its own Gaussians; it asks for a GPU and a download, which are kept from it."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    monkeypatch.setattr(
        "torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity",
        lambda **_: torch.nn.Identity(),
    )
    torch.manual_seed(7)
    box = SceneBox(aabb=torch.tensor([[-1.0] * 3, [1.0] * 3]))
    model = config.setup(scene_box=box, num_train_data=1, seed_points=points)
    return {name: value.detach() for name, value in model.gauss_params.items()}


def by_place(means: torch.Tensor) -> np.ndarray:
    return np.lexsort(means.numpy().T)


@pytest.mark.parametrize("sh_degree", [0, 2])
@pytest.mark.parametrize("kind", ["colours", "no colours", "random"])
def test_rows_are_splatfactos_gaussians(kind, sh_degree, monkeypatch):
    monkeypatch.setattr(seeding, "_PIECE", 300)  # four pieces, the last one smaller
    config = SplatfactoModelConfig(
        sh_degree=sh_degree, random_init=kind == "random", num_random=1000, random_scale=3.0
    )
    xyz, rgb = cloud(1000)
    points = (xyz, rgb[:0] if kind == "no colours" else rgb)
    store = seeded(config, points)
    expected = splatfactos(config, points, monkeypatch)
    ours, theirs = by_place(store.column("means").contiguous()), by_place(expected["means"])
    for name in GROUPS:
        assert len(store.column(name)) == len(expected[name]) == 1000
        compare = torch.testing.assert_close if name == "scales" else np.testing.assert_array_equal
        compare(store.column(name)[ours], expected[name][theirs])


def test_rows_lie_along_the_morton_curve():
    config = SplatfactoModelConfig()
    xyz, rgb = cloud(5000)
    store = seeded(config, (xyz, rgb))
    assert store.unsorted_share == 0
    assert torch.equal(store.column("means"), xyz[morton_order(xyz, 0, 5000)])
    assert (store.bookkeeping("stamp") == 0).all()


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def test_memory_is_that_of_the_parameters_and_a_little_more():
    """The moments' 512 bytes per row and whole temporaries of all groups would both show."""
    n = 600_000
    points = cloud(n)
    seeded(SplatfactoModelConfig(), cloud(1000))  # what only the first call takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_bytes()
    store = seeded(SplatfactoModelConfig(), points)
    grown = peak_bytes() - before
    parameters = 4 * n * store.layout.width
    assert parameters < grown < parameters + 100 * n + 60e6


@pytest.mark.parametrize("worth", [100, 10_000])
def test_a_bar_is_shown_where_it_takes_a_while(worth, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(seeding, "CONSOLE", Console(file=written, force_terminal=True))
    monkeypatch.setattr(seeding, "_WORTH_A_BAR", worth)
    seeded(SplatfactoModelConfig(), cloud(1000))
    assert ("neighbours of 1,000 points" in written.getvalue()) == (worth == 100)
