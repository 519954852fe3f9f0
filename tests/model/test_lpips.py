"""LPIPS: left out where it cannot be had, and within bounds of memory where it can."""

from __future__ import annotations

import pytest
import torch
import torchmetrics.image.lpip

from benchmarks.offline import ensure_lpips_backbone
from gsscale_nerfstudio.lpips import LazyLPIPS

IMAGE = torch.rand(1, 3, 64, 80)


@pytest.fixture
def backbone(tmp_path):
    before = torch.hub.get_dir()
    ensure_lpips_backbone(tmp_path)
    yield
    torch.hub.set_dir(before)


def test_a_machine_without_its_weights_is_told_once(monkeypatch, capsys):
    def offline(**options):
        raise OSError("no network")

    name = "LearnedPerceptualImagePatchSimilarity"
    monkeypatch.setattr(torchmetrics.image.lpip, name, offline)
    lpips = LazyLPIPS()
    assert lpips(IMAGE, IMAGE) is None and lpips(IMAGE, IMAGE) is None
    assert capsys.readouterr().out.count("LPIPS is left out") == 1


def test_it_draws_no_random_numbers(backbone):
    before = torch.random.get_rng_state()
    lpips = LazyLPIPS()
    assert lpips(IMAGE, IMAGE) == 0
    assert lpips(IMAGE, 1 - IMAGE) > 0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.gpu
def test_a_large_image_takes_little_memory(backbone):
    """Evaluating such images took 13 GB on an H200, where cuDNN was free to choose."""
    truth, render = torch.rand(2, 1, 3, 1500, 2000, device="cuda")
    lpips = LazyLPIPS()
    lpips(truth[..., :64, :64], render[..., :64, :64])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert lpips(truth, render) > 0
    assert torch.cuda.max_memory_allocated() - before < 1.5e9
    assert torch.backends.cudnn.enabled
