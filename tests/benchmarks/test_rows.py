"""rows.py on the CPU: the kernels' figures, and what measuring does to the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import machine, rows
from benchmarks import report as report_page
from benchmarks.fixed_rows import fit
from benchmarks.plan import PlanError
from benchmarks.rows import RowsArgs
from benchmarks.rows_host import STEP, HostRows, Measurement, _cut_blocks, memory_rate
from gsscale_nerfstudio.cull import Culler
from tests.benchmarks.flat_flight import flight
from tests.engines.driving import DEVICES
from tests.runs import tiny_scene


@pytest.fixture(scope="module")
def host() -> HostRows:
    return HostRows(fit(flight(), 3000, 0.02, seed=0), views=5)


def test_the_store_is_in_the_middle_of_a_training(host):
    store, columns = host.store, host.layout.optimized
    assert len(store) == 3000 and len(host.views) == 5
    stamps = store.bookkeeping("stamp")
    assert STEP - 24 <= stamps.min() < stamps.max() <= STEP - 1
    assert (store.exp_avg_sq[:3000, :columns] > 0).all()
    assert (store.exp_avg[:3000, columns:] == 0).all()
    assert (store.exp_avg_sq[:3000, columns:] == 0).all()


def test_every_kernel_is_measured(host):
    before = host.store.params[:3000].clone()
    measured = {one.kernel: one for one in host.measure()}
    kernels = ["settle", "settle + step", "gather_settled", "cull"]
    assert list(measured) == [*kernels, "replace spheres", "plan slots"]
    for one in measured.values():
        assert one.side == "host" and one.ms > 0 and one.ns_per_row > 0
    assert measured["settle"].bytes_per_row == 2 * 768
    assert measured["settle + step"].bytes_per_row == 4 + 256 + 2 * 768 + 16
    assert measured["gather_settled"].bytes_per_row == 4 + 768 + 256
    seen = host.visible_share() * 3000
    assert measured["gather_settled"].rows == pytest.approx(seen, rel=0.02)
    # All rows stay behind, so that the next call has its work to do, and none goes anywhere.
    assert host.store.bookkeeping("stamp").max() <= STEP - 1
    assert not torch.equal(host.store.params[:3000], before), "nothing was settled"
    moved = (host.store.column("means") - before[:, host.layout.columns["means"]]).abs()
    assert moved.max() < 1e-3


def test_cut_blocks_are_those_that_are_neither_in_nor_out(host):
    """Blocks of which a view sees a part are cut, and cut ones may hold no visible row."""
    for view in host.views:
        ids = host.culler.cull(view, host.n).numpy()
        in_block = np.bincount(ids // Culler.BLOCK_ROWS, minlength=-(-host.n // Culler.BLOCK_ROWS))
        partial = ((in_block > 0) & (in_block < Culler.BLOCK_ROWS))[:-1]
        cut = _cut_blocks(host.store.blocks[: len(in_block)], view)
        assert partial.sum() <= cut <= len(in_block)


def test_figures_follow_from_each_other():
    one = rows.to_dict(Measurement("settle", "host", rows=1e6, ms=2.0, bytes_per_row=100.0), 1e11)
    assert one["ns_per_row"] == pytest.approx(2.0)
    assert one["bytes_per_s"] == pytest.approx(5e10)
    assert one["share_of_memory_rate"] == pytest.approx(0.5)
    assert one["floor_ns_per_row"] == pytest.approx(1.0)
    (cells,) = rows.table({"kernels": [one]}).rows
    assert cells[:5] == ["settle", "host", "1,000,000", "2.000", "2.000"] and cells[-1] == "50%"


@pytest.mark.parametrize("device", DEVICES)
def test_the_gpus_kernels_are_measured(host, device, monkeypatch):
    """On a CPU in Triton's interpreter, where the times say nothing."""
    from benchmarks import rows_gpu

    monkeypatch.setattr(rows_gpu, "COPIED", 1 << 16)
    store, columns = host.store, host.layout.columns["means"]
    before = store.params[:3000, columns].clone()
    report = rows.measure_gpu(host, torch.device(device))
    rates, measured = report["rates_bytes_per_s"], {k["kernel"]: k for k in report["kernels"]}
    assert set(rates) == {"device_copy", "h2d", "d2h", "duplex"}
    assert all(rate > 0 for rate in rates.values())
    expected = {
        "read missing rows": ("link", "h2d", 12 + 768),
        "write rows back": ("link", "d2h", 12 + 768),
        "both at once": ("link", "duplex", 12 + 2 * 768),
        "gather": ("gpu", "device_copy", 4 + 768 + 44 + 12 + 36),
        "settle + step": ("gpu", "device_copy", 4 + 12 + 44 + 12 + 2 * 768 + 16),
    }
    assert list(measured) == list(expected)
    seen = host.visible_share() * 3000
    for name, (side, rate, bytes_per_row) in expected.items():
        one = measured[name]
        assert (one["side"], one["rate"], one["bytes_per_row"]) == (side, rate, bytes_per_row)
        assert one["ms"] > 0
        if name == "both at once":  # as many rows as the smaller of two views
            assert 0.5 * seen < one["rows"] <= seen
        else:
            assert one["rows"] == pytest.approx(seen, rel=0.02)
        assert one["floor_ns_per_row"] == pytest.approx(bytes_per_row / rates[rate] * 1e9)
    assert [cells[0] for cells in rows.table(report).rows] == list(expected)
    json.dumps(report, allow_nan=False)
    # Rows went to and fro, none got lost or mixed up, and none is ahead of the history.
    assert (store.params[:3000, columns] - before).abs().max() < 1e-3
    assert store.bookkeeping("stamp").max() <= STEP - 1


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_only_cross_the_link_stay_the_same(host, device):
    from benchmarks.rows_gpu import GpuRows

    arrays = host.store.params, host.store.exp_avg, host.store.exp_avg_sq
    before = [array[:3000].clone() for array in arrays]
    gpu = GpuRows(host, torch.device(device))
    gpu.link()
    first, second = gpu.views[0], gpu.views[1]
    n = min(len(first), len(second))
    moved, times = gpu._exchange(second[:n], first[:n])
    assert moved == n and len(times) == 5
    cached = gpu.cache.params, gpu.cache.exp_avg, gpu.cache.exp_avg_sq
    for array, old, here in zip(arrays, before, cached, strict=True):
        assert torch.equal(array[:3000], old)
        assert torch.equal(here[:n].cpu(), old[second[:n].long()])


def test_memory_rate(monkeypatch):
    monkeypatch.setattr("benchmarks.rows_host.COPIED", (1 << 20, 1 << 22))
    rates = memory_rate(1, threads=1)
    assert set(rates) == {"copy", "in_place"}
    assert all(1e8 < rate < 1e13 for rate in rates.values())


@pytest.mark.parametrize(
    "fields", [{"rows": 0}, {"views": 0}, {"threads": 0}, {"visible": 0.0}, {"visible": 2.0}]
)
def test_arguments_without_sense_are_refused(colmap_scene, fields):
    with pytest.raises(PlanError):
        RowsArgs(**{"scene": colmap_scene, "rows": 1000, **fields}).check()


@pytest.mark.slow
def test_the_command(tmp_path):
    scene, output = tiny_scene(tmp_path / "village"), tmp_path / "rows.json"
    words = [sys.executable, str(machine.ROOT / "benchmarks" / "rows.py"), "--scene", str(scene)]
    words += ["--rows", "20000", "--visible", "0.3", "--views", "3", "--threads", "1"]
    done = subprocess.run(
        [*words, "--output", str(output), "--commit", "abc"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "7"},  # ours counts
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert (report["kind"], report["rows"], report["threads"]) == ("rows", 20_000, 1)
    assert 0 < report["visible_share"] <= 0.35 and len(report["kernels"]) == 6
    assert "--threads 1" in report["command"] and str(tmp_path) not in output.read_text()
    page = report_page.page(output.parent)
    assert "row kernels at 20,000 rows" in page and "| gather_settled | host |" in page
    assert "gather_settled" in done.stdout and "floor" in done.stdout
    if torch.cuda.is_available():
        assert len(report["gpu"]["kernels"]) == 5 and "write rows back" in done.stdout
    else:
        assert report["gpu"] is None and "there is no GPU" in done.stdout
    again = subprocess.run(
        [*words, "--output", str(output)], capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 2 and "exists" in again.stdout
