"""Views that are drawn in parts, because their rows do not fit: what comes out is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import gsscale_nerfstudio.model
from gsscale_nerfstudio.cull import Window
from gsscale_nerfstudio.engines import ViewInParts, sizing
from gsscale_nerfstudio.rasterize import rasterize
from gsscale_nerfstudio.store import GROUPS
from tests.runs import edit_json, make_config, seeded, tiny_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("parts") / "scene")


def train(config: Any, before: Callable[[Any], None]) -> Any:
    seeded(0)
    trainer = config.setup()
    trainer.setup()
    before(trainer)
    trainer.train()
    return trainer


def trained(scene: Path, folder: Path, most_rows: int | None, steps: int, **settings: Any) -> Any:
    """A trainer after some steps; views of more rows than ``most_rows`` came in parts."""
    config = make_config(scene, folder, steps=steps, engine="host", **settings)
    parts: list[int] = []

    def limit(trainer: Any) -> None:
        engine = trainer.pipeline.model.engine
        if most_rows is not None:
            engine._sizing.most = most_rows
        bring = engine._bring

        def counted(*args: Any) -> Any:
            whole = bring(*args)
            parts.append(len(whole.parts) if isinstance(whole, ViewInParts) else 1)
            return whole

        engine._bring = counted

    trainer = train(config, before=limit)
    trainer.parts = parts
    return trainer


TRAINED = 10
"""Steps after which Gaussians have shapes; needles are pulled at in every tenth step."""

SETTINGS = {
    "plain": {},
    "antialiased, random background": {
        "rasterize_mode": "antialiased",
        "background_color": "random",
    },
    "depth, regularized": {
        "output_depth_during_training": True,
        "use_scale_regularization": True,
        "max_gauss_ratio": 1.01,
    },
    "bilateral grid": {"use_bilateral_grid": True},
    "no SH": {"sh_degree": 0},
    "masks, no absgrad": {"images": "masks", "use_absgrad": False},
    "RGBA, random background": {"images": "RGBA", "background_color": "random"},
}
"""``images``: see :func:`scene_of`."""


def scene_of(kind: str | None, folder: Path) -> Path:
    """The tiny scene, with a mask for each image or with images that fade out."""
    scene = tiny_scene(folder / "scene")

    def change(transforms: dict[str, Any]) -> None:
        for i, frame in enumerate(transforms["frames"]):
            path = scene / frame["file_path"]
            image = Image.open(path).convert("RGB")
            if kind == "masks":
                mask = Image.new("L", image.size, 255)
                mask.paste(0, (5, i, 30, i + 20))
                frame["mask_path"] = f"mask{i}.png"
                mask.save(scene / frame["mask_path"])
            else:
                image.putalpha(Image.linear_gradient("L").resize(image.size))
                frame["file_path"] = str(path.with_suffix(".png").relative_to(scene))
                image.save(scene / frame["file_path"])

    edit_json(scene, change)
    return scene


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("steps", "bound"), [(1, 1e-5), (4, 3e-2)])
def test_training_in_parts_is_training(scene, tmp_path, name, steps, bound):
    """The first step's moments are its gradients. Later on Adam, which divides a gradient by its
    size, makes much of the rounding of those that are almost 0."""
    settings = {"sh_degree_interval": 1, **SETTINGS[name]}
    if kind := settings.pop("images", None):
        scene = scene_of(kind, tmp_path)
    whole = trained(scene, tmp_path / "whole", None, steps, **settings)
    parts = trained(scene, tmp_path / "parts", 60, steps, **settings)
    assert set(whole.parts) == {1} and min(parts.parts) > 3
    store, other = (t.pipeline.model.engine.store for t in (whole, parts))
    # At first Gaussians are round, so that their quaternions' gradients are rounding; opacities are
    # reset, which forgets their moments; and there is one band of SH.
    groups = ("means", "scales", "features_dc") if steps == 1 else GROUPS
    for group in groups:
        expected, got = (s.column(group, s.exp_avg) for s in (store, other))
        if expected.numel():
            assert expected.any()
            error = (got - expected).abs().max() / expected.abs().max()
            assert error < bound, (group, float(error))
    for column in ("grad2d", "count", "max_radius"):
        expected = store.bookkeeping(column)
        assert expected.any()
        torch.testing.assert_close(other.bookkeeping(column), expected, rtol=bound, atol=1e-7)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_trained_view_in_parts_has_the_loss_and_the_gradients_of_the_whole(scene, tmp_path, name):
    """Of all groups, once Gaussians have shapes, and colours all bands of SH.

    Scales learn quickly, because a quaternion's gradient is a difference of terms that are equal
    for a round Gaussian: of nearly round ones it is rounding in the fifth place already.
    """
    settings = {"sh_degree_interval": 1, **SETTINGS[name]}
    if kind := settings.pop("images", None):
        scene = scene_of(kind, tmp_path)

    def config_of(folder: str, steps: int) -> Any:
        config = make_config(scene, tmp_path / folder, steps, engine="host", **settings)
        config.optimizers["scales"]["optimizer"].lr = 0.05
        return config

    before = train(config_of("before", TRAINED), before=lambda _: None)

    def one_step(most_rows: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config = config_of(str(most_rows), 1)
        config.load_dir = before.checkpoint_dir
        losses: dict[str, Tensor] = {}

        def start(trainer: Any) -> None:
            model = trainer.pipeline.model
            if most_rows is not None:
                model.engine._sizing.most = most_rows
            # So that the step's first moments are its gradients, times 1 - beta.
            model.engine.store.exp_avg[: model.num_points].zero_()
            get = model.get_loss_dict
            model.get_loss_dict = lambda *args: losses.update(get(*args)) or losses

        trainer = train(config, before=start)
        engine = trainer.pipeline.model.engine
        assert isinstance(engine.current, ViewInParts) == (most_rows is not None)
        gradients = {name: engine.store.column(name, engine.store.exp_avg) for name in GROUPS}
        for grids in trainer.optimizers.parameters.get("bilateral_grid", []):
            gradients["bilateral_grid"] = grids.grad
        return {term: value.detach() for term, value in losses.items()}, gradients

    (losses, gradients), (in_parts, got) = one_step(None), one_step(60)
    assert losses["main_loss"] > 0 and (losses["scale_reg"] > 0) == (name == "depth, regularized")
    for term, value in losses.items():
        torch.testing.assert_close(in_parts[term], value, rtol=1e-5, atol=0)
    assert ("bilateral_grid" in gradients) == (name == "bilateral grid")
    for group, expected in gradients.items():
        if expected.numel():
            assert expected.any(), group
            error = (got[group] - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, (group, float(error))


def test_a_scene_grows_in_parts_as_it_does_as_a_whole(scene, tmp_path):
    settings = {"warmup_length": 2, "refine_every": 4, "densify_grad_thresh": 0.02}
    counts = []
    for most_rows in (None, 60):
        trainer = trained(scene, tmp_path / str(most_rows), most_rows, 14, **settings)
        counts.append(trainer.pipeline.model.num_points)
    assert counts[0] > 320 and abs(counts[0] - counts[1]) <= 0.01 * counts[0]


def test_poses_get_the_gradient_of_all_parts(scene, tmp_path):
    def poses(most_rows: int | None) -> Tensor:
        config = make_config(scene, tmp_path / str(most_rows), steps=6, engine="host")
        config.pipeline.model.camera_optimizer.mode = "SO3xR3"

        def limit(trainer: Any) -> None:
            if most_rows is not None:
                trainer.pipeline.model.engine._sizing.most = most_rows

        return train(config, before=limit).pipeline.model.camera_optimizer.pose_adjustment.detach()

    whole, parts = poses(None), poses(60)
    assert whole.abs().max() > 1e-7
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_a_render_in_parts_is_the_render(scene, tmp_path):
    trainer = trained(scene, tmp_path, None, 3)
    model = trainer.pipeline.model.eval()
    camera, _ = next(iter(trainer.pipeline.datamanager.fixed_indices_eval_dataloader))
    with torch.no_grad():
        whole = model.get_outputs(camera)
        model.engine._sizing.most = 40
        parts = model.get_outputs(camera)
    assert whole["accumulation"].max() > 0.5
    for name in ("rgb", "depth", "accumulation"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [295, 2])
def test_a_view_for_which_memory_runs_out_is_drawn_in_parts(
    scene, tmp_path, monkeypatch, capsys, most
):
    """Of half as many rows each time, until they fit; later views begin with that. When windows
    cannot be smaller, it ends."""
    drawn = []

    def small(means: Tensor, *args: Any, **options: Any) -> Any:
        if len(means) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        drawn.append(len(means))
        return rasterize(means, *args, **options)

    monkeypatch.setattr(gsscale_nerfstudio.model, "rasterize", small)
    monkeypatch.setattr(sizing, "_FEWEST", 1)
    if most == 2:
        with pytest.raises(SystemExit):
            trained(scene, tmp_path, None, 3)
        said = " ".join(capsys.readouterr().out.split())
        assert "nothing is left that could be given up" in said
        return
    trainer = trained(scene, tmp_path, None, 3)
    engine = trainer.pipeline.model.engine
    assert engine.step_count == 3 and engine._sizing.most <= most
    assert trainer.parts[0] == 1 and min(trainer.parts[-2:]) > 1
    assert max(drawn) <= most
    said = " ".join(capsys.readouterr().out.split())
    assert f"views of more than {engine._sizing.most} Gaussians are drawn in parts" in said


def test_windows_are_halved_at_the_borders_of_tiles():
    assert Window(0, 0, 100, 40).halves(16) == (Window(0, 0, 64, 40), Window(64, 0, 100, 40))
    assert Window(64, 0, 100, 40).halves(16) == (Window(64, 0, 100, 32), Window(64, 32, 100, 40))
    assert Window(0, 0, 17, 16).halves(16) == (Window(0, 0, 16, 16), Window(16, 0, 17, 16))
    assert Window(16, 16, 32, 32).halves(16) is None
    assert Window(96, 0, 100, 3).halves(16) is None
