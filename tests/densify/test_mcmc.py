"""Relocation and growth against gsplat's own MCMCStrategy on plain tensors; whole trainings."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from gsplat.strategy import MCMCStrategy
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
from torch import Tensor

from gsscale_nerfstudio.densify import RowMCMCStrategy, make_strategy, mcmc
from gsscale_nerfstudio.densify.relocation import share_out
from gsscale_nerfstudio.densify.sampling import draw_rows
from gsscale_nerfstudio.engines import HostEngine
from gsscale_nerfstudio.engines.packing import kernels_run_on
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.optim import MeanNoise, Pull
from gsscale_nerfstudio.regularization import term_names
from gsscale_nerfstudio.store import GROUPS, HostStore, chunks, host
from tests.densify.test_strategy import LAYOUT, as_gsplat, engine_of, random_store
from tests.engines.driving import make_optimizers
from tests.model.test_bad_input import ends_with_a_sentence
from tests.model.test_parts import trained
from tests.runs import differences, make_config, seeded, tiny_scene, train

MIN_OPACITY = 0.005


def faint_store(n: int = 4000) -> HostStore:
    """Opacities from 0.001 to 0.999; some 20 % are dead."""
    store = random_store(n)
    store.column("opacities")[:, 0] = torch.empty(n).uniform_(-6.8, 6.9)
    return store


def formula(opacities: Tensor, scales: Tensor, ratios: Tensor, binoms: Tensor) -> Any:
    """gsplat's CUDA kernel, loop by loop."""
    new = torch.empty_like(opacities)
    sizes = torch.empty_like(scales)
    for i, ratio in enumerate(ratios.clamp(1, 51).tolist()):
        opacity = opacities[i].double()
        new[i] = each = 1 - (1 - opacity) ** (1 / ratio)
        total = sum(
            math.comb(row, k) * (-1) ** k / math.sqrt(k + 1) * each ** (k + 1)
            for row in range(ratio)
            for k in range(row + 1)
        )
        sizes[i] = opacity / total * scales[i]
    return new, sizes


def as_tables(columns: list[Tensor]) -> Tensor:
    table = torch.cat([column.detach().flatten(1) for column in columns], dim=1)
    for column in (0, LAYOUT.optimized):  # copies have their source's mean; moments tell them apart
        table = table[table[:, column].argsort(stable=True)]
    return table


def table_of_store(store: HostStore) -> Tensor:
    arrays = (store.params, store.exp_avg, store.exp_avg_sq)
    return as_tables([store.column(name, array) for array in arrays for name in GROUPS])


def table_of_gsplat(params: dict, optimizers: dict) -> Tensor:
    states = {name: optimizers[name].state[params[name]] for name in GROUPS}
    columns = [params[name] for name in GROUPS]
    for key in ("exp_avg", "exp_avg_sq"):
        columns += [states[name][key] for name in GROUPS]
    return as_tables(columns)


@pytest.mark.parametrize("seed", [0, 1])
def test_relocation_and_growth_give_gsplats_rows(seed, monkeypatch, capsys):
    """On the same random choice, of which some rows are drawn several times."""
    torch.manual_seed(seed)
    store = faint_store()
    params, optimizers, _ = as_gsplat(store)
    n = len(store)
    dead = torch.sigmoid(params["opacities"][:, 0]) <= MIN_OPACITY
    chosen: list[Tensor] = []
    weighed: list[Tensor] = []

    def remember(weights: Any, n: int, count: int) -> Tensor:
        weighed.append(weights(slice(0, n)))
        chosen.append(draw_rows(weights, n, count))
        return chosen[-1]

    monkeypatch.setattr(mcmc, "draw_rows", remember)
    ours = RowMCMCStrategy(refine_start_iter=0, verbose=True, noise_lr=0)
    ours.refine(engine_of(store), 100)

    alive = torch.nonzero(~dead)[:, 0]
    # gsplat draws among those alive, by their place.
    theirs = iter([torch.searchsorted(alive, chosen[0]), chosen[1]])
    monkeypatch.setattr("gsplat.strategy.ops._multinomial_sample", lambda *a, **k: next(theirs))
    monkeypatch.setattr("gsplat.strategy.ops.compute_relocation", formula)
    gsplat = MCMCStrategy()
    binoms = gsplat.initialize_state()["binoms"]
    opacities = torch.sigmoid(params["opacities"][:, 0].detach())
    torch.testing.assert_close(weighed[0], opacities.masked_fill(dead, 0))
    relocated = gsplat._relocate_gs(params, optimizers, binoms)
    torch.testing.assert_close(weighed[1], torch.sigmoid(params["opacities"][:, 0].detach()))
    # Ours go on without the moments of the place that they left.
    for name in GROUPS:
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizers[name].state[params[name]][moment][dead] = 0
    added = gsplat._add_new_gs(params, optimizers, binoms)
    assert relocated == int(dead.sum()) > 100 and added == n // 20
    assert torch.unique(chosen[0], return_counts=True)[1].max() > 2
    torch.testing.assert_close(
        table_of_store(store), table_of_gsplat(params, optimizers), rtol=2e-5, atol=1e-5
    )
    assert capsys.readouterr().out.splitlines() == [
        f"Step 100: Relocated {relocated} GSs.",
        f"Step 100: Added {added} GSs. Now having {n + added} GSs.",
    ]


@pytest.mark.parametrize("times", [1, 2, 3, 10, 51, 80])
def test_shares_are_those_of_the_paper(times):
    opacities, scales = torch.tensor([0.01, 0.3, 0.9, 0.999]), torch.rand(4, 3)
    rows = torch.zeros(4, LAYOUT.width)
    rows[:, LAYOUT.columns["opacities"]] = torch.logit(opacities)[:, None]
    rows[:, LAYOUT.columns["scales"]] = scales.log()
    ratios = torch.full((4,), times)
    share_out(rows, ratios, LAYOUT, min_opacity=1e-9)
    new, sizes = formula(opacities, scales, ratios, torch.empty(0))
    torch.testing.assert_close(torch.sigmoid(rows[:, LAYOUT.columns["opacities"]][:, 0]), new)
    torch.testing.assert_close(rows[:, LAYOUT.columns["scales"]].exp(), sizes, rtol=1e-4, atol=0)
    share_out(rows, ratios, LAYOUT, min_opacity=0.25)
    assert torch.sigmoid(rows[:, LAYOUT.columns["opacities"]]).min() >= 0.2499


def test_rows_are_drawn_by_their_weight_across_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK", 7)
    weights = torch.tensor([0.0] * 9 + [1, 2, 0, 5, float("nan"), 0, 3, 1] + [0.0] * 20)
    draws = draw_rows(lambda rows: weights[rows], len(weights), 60_000)
    assert (draws.diff() >= 0).all()
    share = torch.bincount(draws, minlength=len(weights)) / 60_000
    torch.testing.assert_close(share, weights.nan_to_num(0) / 12, rtol=0, atol=0.01)
    assert not share[weights.nan_to_num(0) == 0].any()
    assert len(draw_rows(lambda rows: 0 * weights[rows].nan_to_num(), 37, 5)) == 0
    assert len(draw_rows(lambda rows: weights[rows], 0, 5)) == 0


def test_the_last_draw_stays_inside(monkeypatch):
    """A random number that is as high as it can be, and sums that are rounded."""
    monkeypatch.setattr(chunks, "_CHUNK", 3)
    highest = torch.nextafter(torch.ones(4, dtype=torch.float64), torch.zeros(4).double())
    monkeypatch.setattr(torch, "rand", lambda *a, **k: highest.clone())
    for _ in range(300):
        weights = torch.empty(9).uniform_() * 10.0 ** torch.randint(-9, 8, (9,))
        weights[-3:] = 0
        drawn = draw_rows(lambda rows, weights=weights: weights[rows], 9, 4)
        assert (weights[drawn] > 0).all()


def test_relocated_rows_are_bounded_and_keep_no_moments(monkeypatch):
    monkeypatch.setattr(mcmc, "SORT_FROM", 2.0)
    store = faint_store()
    engine = engine_of(store)
    strategy = RowMCMCStrategy(refine_start_iter=0)
    dead = torch.nonzero(torch.sigmoid(store.column("opacities")[:, 0]) <= MIN_OPACITY)[:, 0]
    n = len(store)
    strategy.refine(engine, 100)
    assert torch.sigmoid(store.column("opacities")).min() >= MIN_OPACITY * 0.999
    for array in (store.exp_avg, store.exp_avg_sq):
        assert not array[dead].any()
        assert not array[n : len(store)].any()
        assert array[:n].any(dim=1).sum() > n // 2
    centres, means = store.spheres[: len(store), :3], store.column("means")
    assert torch.equal(centres, means)
    reach = 3.33 * store.column("scales").amax(dim=1).exp()
    assert (store.spheres[: len(store), 3] >= reach * 0.999).all()
    assert len(store.bookkeeping("key").unique()) == len(store)


@pytest.mark.parametrize("opacity_reg", [0.0, 0.01])
def test_rows_that_no_view_shows_die(opacity_reg, monkeypatch):
    """As gsplat's do: there the penalty of opacities is all that acts on them, at every step."""
    monkeypatch.setattr(mcmc, "SORT_FROM", 2.0)
    store = faint_store()
    store.column("opacities")[:] = 1.0
    unseen = torch.arange(0, 4000, 7)
    store.exp_avg[:4000] = 0
    store.exp_avg_sq[:4000] = 1e-8  # views have left that
    store.exp_avg_sq[unseen] = 0
    strategy = RowMCMCStrategy(
        cap_max=4000,
        refine_start_iter=0,
        verbose=False,
        noise_lr=0,
        opacity_reg=opacity_reg,
        scale_reg=0.01,
    )
    engine = HostEngine(store, torch.device("cpu"))
    engine.pull = strategy.pull
    make_optimizers(engine.parameters(), True, 1)
    engine.restart(2000)
    for _ in range(100):  # of views that show none of these rows
        engine.history.advance(engine.learning_rates)
        engine._settled = False
    before = store.column("scales").clone()
    means = store.column("means").clone()
    strategy.refine(engine, 100)
    moved = (store.column("means") != means).any(dim=1)
    expected = torch.zeros_like(moved)
    expected[unseen] = opacity_reg > 0
    assert torch.equal(moved, expected)
    kept = ~moved
    kept[unseen] = False
    assert (store.column("scales")[kept] < before[kept]).float().mean() > 0.95


def test_growth_ends_at_the_smaller_limit():
    for most, capacity in ((4100, 12_000), (9000, 4150)):
        store = faint_store()
        store.capacity = capacity
        engine = engine_of(store)
        strategy = RowMCMCStrategy(cap_max=most, refine_start_iter=0)
        for step in (100, 200, 300):
            strategy.refine(engine, step)
        assert len(store) == min(most, capacity)


def test_more_seeds_than_the_limit_stay():
    store = faint_store()
    RowMCMCStrategy(cap_max=100, refine_start_iter=0).refine(engine_of(store), 100)
    assert len(store) == 4000


def test_growth_stops_when_host_memory_is_low(monkeypatch, capsys):
    store = faint_store()
    engine, strategy = engine_of(store), RowMCMCStrategy(refine_start_iter=0)
    monkeypatch.setattr(host, "available_memory", lambda: 0)
    for step in (100, 200):
        strategy.refine(engine, step)
    assert len(store) == 4000
    assert " ".join(capsys.readouterr().out.split()).count("host memory is low") == 1


def test_a_scene_without_anything_alive_is_left_alone():
    store = faint_store(100)
    store.column("opacities")[:] = -50
    before = store.params[:100, : LAYOUT.optimized].clone()
    strategy = RowMCMCStrategy(refine_start_iter=0)
    engine = engine_of(store)
    assert strategy._relocate(engine, engine.summarize().opacity) == 0
    assert torch.equal(store.params[:100, : LAYOUT.optimized], before)


def test_refines_at_gsplats_steps(monkeypatch):
    settings = dict(refine_start_iter=500, refine_stop_iter=2500, refine_every=100)
    expected, got, bounded = [], [], []
    theirs, ours = MCMCStrategy(**settings), RowMCMCStrategy(**settings)
    monkeypatch.setattr(theirs, "_relocate_gs", lambda *a: expected.append(("relocate",)) or 0)
    monkeypatch.setattr(theirs, "_add_new_gs", lambda *a: expected.append(("add",)) or 0)
    monkeypatch.setattr("gsplat.strategy.mcmc.inject_noise_to_position", lambda **k: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(ours, "_relocate", lambda *a: got.append(("relocate",)) or 0)
    monkeypatch.setattr(ours, "_grow", lambda *a: got.append(("add",)) or 0)
    engine = engine_of(faint_store(10))
    for step in range(3000):
        monkeypatch.setattr(engine, "rows_changed", lambda step=step: bounded.append(step))
        state = theirs.initialize_state() if step == 0 else state  # noqa: F821
        theirs.step_post_backward({"means": torch.zeros(1)}, {}, state, step, {}, lr=1.0)
        ours.refine(engine, step)
        assert ours.changes_rows(step) == (step in bounded)
    assert got == expected and len(got) == 38
    assert bounded == list(range(0, 3000, 100))  # noise goes on
    assert ours.noise == MeanNoise(rate=5e5, horizon=101)
    pulling = RowMCMCStrategy(**settings, noise_lr=0, scale_reg=0.01)
    assert pulling.pull == Pull(opacity=0.0, scale=0.01, horizon=101)
    assert [s for s in range(3000) if pulling.changes_rows(s)] == bounded
    still = RowMCMCStrategy(**settings, noise_lr=0)
    assert still.noise is None and still.pull is None
    assert [s for s in range(3000) if still.changes_rows(s)] == list(range(600, 2500, 100))


def test_has_every_field_of_gsplats_strategy():
    ours = {f.name: f.default for f in dataclasses.fields(RowMCMCStrategy)}
    for f in dataclasses.fields(MCMCStrategy):
        assert ours[f.name] == f.default


# -- whole trainings -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("mcmc") / "scene")


def mcmc_config(scene: Path, output: Path, steps: int, **settings: Any):
    settings = {"warmup_length": 5, "refine_every": 10, "sh_degree": 1, **settings}
    return make_config(scene, output, steps=steps, strategy="mcmc", **settings)


def evaluated(trainer: Any) -> dict[str, float]:
    trainer.pipeline.eval()
    metrics = trainer.pipeline.get_average_eval_image_metrics()
    trainer.pipeline.train()
    return metrics


def test_it_trains(scene, tmp_path, capsys):
    config = mcmc_config(scene, tmp_path, steps=81, max_gs_num=400)
    losses: list[float] = []
    trainer = config.setup()
    trainer.setup()
    model = trainer.pipeline.model
    get_loss_dict = model.get_loss_dict

    def watched(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        loss = get_loss_dict(*args, **kwargs)
        losses.append(float(loss["main_loss"].detach()))
        assert 0 < loss["mcmc_opacity_reg"] <= 0.01 and loss["mcmc_scale_reg"] > 0
        return loss

    model.get_loss_dict = watched
    untrained = evaluated(trainer)
    trainer.train()
    printed = capsys.readouterr().out
    assert len(re.findall(r"Relocated \d+ GSs", printed)) == 8
    assert len(model.means) == 400  # 300 grow by 5 % eight times, as far as they may
    early, late = (sum(part) / len(part) for part in (losses[:8], losses[-8:]))
    assert late < 0.8 * early
    trained = evaluated(trainer)
    assert trained["psnr"] > untrained["psnr"] + 1.5 and trained["ssim"] > untrained["ssim"]


def test_noise_moves_faint_rows_only(scene, tmp_path):
    """The same training with and without: gradients differ but by what noise has done."""
    ends = []
    for rate in (0.0, 5e5):
        seeded(3)
        config = mcmc_config(scene, tmp_path / str(rate), 4, noise_lr=rate, refine_every=100)
        config.pipeline.model.engine = "host"
        trainer = config.setup()
        trainer.setup()
        store = trainer.pipeline.model.engine.store
        store.column("opacities")[:150] = 3.0
        store.column("opacities")[150:] = -5.0
        trainer.train()
        ends.append(store.column("means").clone())
    moved = (ends[1] - ends[0]).norm(dim=1)
    assert moved[:150].max() < 0.05 * moved[150:].median()


@pytest.mark.parametrize(
    "engine",
    [
        "host",
        pytest.param(
            "resident",
            marks=pytest.mark.skipif(
                not kernels_run_on(torch.device("cpu")),
                reason="Triton before 3.4 does not interpret our kernels",
            ),
        ),
    ],
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(scene, tmp_path, engine):
    def config(name: str, steps: int):
        made = mcmc_config(scene, tmp_path / name, steps, refine_every=7, engine=engine)
        made.steps_per_save = 19
        made.save_only_latest_checkpoint = False
        return made

    def last(trainer: Any) -> dict[str, Any]:
        return torch.load(trainer.checkpoint_dir / "step-000000039.ckpt", weights_only=True)

    seeded(1)
    whole = train(config("whole", 40))
    seeded(1)
    stopped = train(config("stopped", 20))
    # Sums begin anew at a checkpoint, or their rounding would depend on what was before.
    assert not stopped.pipeline.model.engine.history.sums_now.any()
    seeded(2)
    going_on = config("resumed", 20)
    going_on.load_dir = stopped.checkpoint_dir
    resumed = train(going_on)
    assert resumed._start_step == 20
    assert differences(last(whole), last(resumed)) == []


def test_penalties_have_the_weight_of_dense_ones(scene, tmp_path):
    trainer = mcmc_config(scene, tmp_path, steps=1).setup()
    trainer.setup()
    model = trainer.pipeline.model
    opacities, scales = model.opacities.clone(), model.scales.clone()
    every = {"opacities": opacities, "scales": scales}
    of_all = model.penalties(every)
    named = dict(zip(term_names(model.config), of_all, strict=True))
    torch.testing.assert_close(named["mcmc_opacity_reg"], 0.01 * torch.sigmoid(opacities).mean())
    torch.testing.assert_close(named["mcmc_scale_reg"], 0.01 * torch.exp(scales).mean())
    halves = [model.penalties({k: v[part] for k, v in every.items()}) for part in PARTS]
    torch.testing.assert_close(halves[0] + halves[1], of_all)
    model.config.mcmc_opacity_reg = 0.0
    assert term_names(model.config) == ("scale_reg", "mcmc_scale_reg")
    assert len(model.penalties(every)) == 2


PARTS = (slice(0, 100), slice(100, None))


def test_views_in_parts_are_pulled_at_as_whole_ones(scene, tmp_path):
    """The first step's moments are its gradients, here mostly those of the regularizations."""
    settings = {"strategy": "mcmc", "mcmc_opacity_reg": 5.0, "mcmc_scale_reg": 5.0}
    stores = []
    for most_rows in (None, 60):
        trainer = trained(scene, tmp_path / str(most_rows), most_rows, 1, **settings)
        assert (min(trainer.parts) > 3) == (most_rows is not None)
        stores.append(trainer.pipeline.model.engine.store)
    for group in ("means", "scales", "opacities"):
        expected, got = (store.column(group, store.exp_avg) for store in stores)
        torch.testing.assert_close(
            got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=group
        )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"densify_grad_thresh": 0.0005}, ["--pipeline.model.densify-grad-thresh", "defaults"]),
        ({"reset_alpha_every": 10}, ["--pipeline.model.reset-alpha-every", "strategy mcmc"]),
        ({"max_gs_num": 0}, ["max-gs-num must be at least 1"]),
        ({"noise_lr": -1.0}, ["noise-lr must be 0 or more"]),
        ({"mcmc_scale_reg": float("nan")}, ["mcmc-scale-reg must be 0 or more"]),
        ({"cull_alpha_thresh": 1.5}, ["cull-alpha-thresh", "below 1"]),
        ({"strategy": "default", "noise_lr": 1.0}, ["strategy default", "noise-lr"]),
    ],
)
def test_settings_that_mean_nothing_end_in_a_sentence(scene, tmp_path, capsys, settings, words):
    config = mcmc_config(scene, tmp_path, steps=1)
    for name, value in settings.items():
        setattr(config.pipeline.model, name, value)
    ends_with_a_sentence(config, capsys, *words)


def test_the_opacity_threshold_can_be_set(scene, tmp_path):
    """To that of the other strategy, too."""
    for given, expected in (({}, 0.005), ({"cull_alpha_thresh": 0.1}, 0.1)):
        trainer = mcmc_config(scene, tmp_path, steps=1, **given).setup()
        trainer.setup()
        assert trainer.pipeline.model.strategy.min_opacity == expected


def test_big_takes_it_too():
    """What gsscale-big sets for the other strategy nobody has asked for; what is given, somebody
    has."""
    flags = ["gsscale-big", "--pipeline.model.strategy", "mcmc"]
    settings = tyro.cli(AnnotatedBaseConfigUnion, args=flags).pipeline.model
    assert make_strategy(settings, 10).min_opacity == 0.005
    flags += ["--pipeline.model.densify-grad-thresh", "0.0008"]
    settings = tyro.cli(AnnotatedBaseConfigUnion, args=flags).pipeline.model
    with pytest.raises(GSScaleError, match=r"no use for .*densify-grad-thresh"):
        make_strategy(settings, 10)
