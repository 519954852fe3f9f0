"""A training of either method from the same beginning, and what differs at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.models.splatfacto import RGB2SH
from torch import Tensor

from benchmarks.twins import rows_of
from gsscale_nerfstudio.model import GSScaleModel
from tests.runs import seeded

N = 60
"""Gaussians to begin with."""

Settings = Mapping[str, Any]
"""Values by their flags' names, with underscores."""


def set_all(config: TrainerConfig, settings: Settings) -> TrainerConfig:
    """Change a configuration as the flags of these names would."""
    for path, value in settings.items():
        *parents, last = path.split(".")
        owner: Any = config
        for name in parents:
            owner = owner[name] if isinstance(owner, dict) else getattr(owner, name)
        if isinstance(owner, dict):
            owner[last] = value
        else:
            assert hasattr(owner, last), path
            setattr(owner, last, value)
    return config


@dataclass
class Run:
    """A training that is over.

    Attributes:
        rows: parameters, Adam's moments and statistics, a tensor [N, ...] each.
        others: outputs, losses and metrics of each step and of an evaluation; other parameters.
        gradients: the metrics that ``--log-gradients`` adds, of the last step.
        seen: the rows that each step brought to the device; empty for splatfacto.
    """

    rows: dict[str, Tensor]
    others: dict[str, Tensor]
    gradients: dict[str, float]
    seen: list[Tensor]


def gaussians(sh_degree: int) -> dict[str, Tensor]:
    """Of all shapes and colours, in a space that is larger than what one view sees."""
    random = torch.Generator().manual_seed(3)
    values = {
        "means": torch.randn(N, 3, generator=random) * 0.7,
        "scales": torch.log(10 ** (torch.rand(N, 3, generator=random) * 2 - 2.5)),
        "quats": torch.randn(N, 4, generator=random),
        "opacities": torch.randn(N, 1, generator=random),
        "features_dc": torch.randn(N, 3, generator=random),
        "features_rest": torch.randn(N, (sh_degree + 1) ** 2 - 1, 3, generator=random) * 0.3,
    }
    if sh_degree > 0:  # as black points give them
        values["features_dc"][::5] = RGB2SH(torch.zeros(3))
        values["features_rest"][::5] = 0
    return values


def train(config: TrainerConfig, steps: int, from_points: bool = False) -> Run:
    """Nerfstudio's loop, without its files; begins with :func:`gaussians` or the scene's points."""
    config.logging.steps_per_log = 1  # gsscale has no metrics of other steps
    seeded(1)
    trainer = config.setup()
    trainer.setup()
    model = trainer.pipeline.model
    if not from_points:
        begin_with(model, gaussians(config.pipeline.model.sh_degree))  # type: ignore[attr-defined]
    seeded(2)
    outputs: dict[str, Tensor | None] = {}
    get_outputs = model.get_outputs

    def remembered(camera: Any) -> dict[str, Any]:
        outputs.clear()
        outputs.update(get_outputs(camera))
        return dict(outputs)

    model.get_outputs = remembered
    others, gradients, seen = {}, {}, []
    for step in range(steps):
        trainer.pipeline.train()
        run_callbacks(trainer, step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        _, losses, metrics = trainer.train_iteration(step)
        run_callbacks(trainer, step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        gradients = {k: float(v) for k, v in metrics.items() if k.startswith("Gradients/")}
        metrics = {k: v for k, v in metrics.items() if not k.startswith("gsscale/")}  # ours alone
        for name, value in {**outputs, **losses, **metrics}.items():
            if value is not None and name not in gradients:
                others[f"{name} of step {step}"] = torch.as_tensor(value).detach().clone()
        if isinstance(model, GSScaleModel):
            assert model.engine.current is not None
            seen.append(model.engine.current.ids.long())
    for name, value in model.state_dict().items():
        if not name.startswith(("gauss_params.", "lpips.")):
            others[name] = value.clone()
    others.update(evaluated(trainer))
    return Run(rows_of(trainer), others, gradients, seen)


def begin_with(model: Any, values: dict[str, Tensor]) -> None:
    if isinstance(model, GSScaleModel):
        model.gauss_params.load_state_dict(values)
        return
    for name, value in values.items():
        model.gauss_params[name].data = value  # the optimizers have these Parameters


def run_callbacks(trainer: Trainer, step: int, where: TrainingCallbackLocation) -> None:
    for callback in trainer.callbacks:
        callback.run_callback_at_location(step, where)


def evaluated(trainer: Trainer) -> dict[str, Tensor]:
    """What an evaluation shows and says of the held-out images."""
    metrics = trainer.pipeline.get_average_eval_image_metrics()
    found = {f"evaluation's {name}": torch.tensor(value) for name, value in metrics.items()}
    for name in ("num_rays_per_sec", "fps"):
        del found[f"evaluation's {name}"]
    _, losses, metrics = trainer.pipeline.get_eval_loss_dict(step=trainer.pipeline.model.step)
    for name, value in {**losses, **metrics}.items():  # --steps-per-eval-batch
        found[f"held-out {name}"] = torch.as_tensor(value).detach()
    trainer.pipeline.eval()
    camera = trainer.pipeline.datamanager.eval_dataset.cameras[0:1]
    outputs = trainer.pipeline.model.get_outputs_for_camera(camera)
    return found | {f"evaluation's {name}": value for name, value in outputs.items()}


# -- comparison ----------------------------------------------------------------------------------


def deviations(ours: Run, theirs: Run, in_order: bool) -> dict[str, float]:
    """Difference of each quantity, as a share of its largest value; infinite if one has another.

    Args:
        ours: one run.
        theirs: another.
        in_order: whether row i of the one is row i of the other; else rows are paired.
    """
    if len(ours.rows["means"]) != len(theirs.rows["means"]):
        return {"number of Gaussians": math.inf}
    order = torch.arange(len(ours.rows["means"])) if in_order else pairs(ours.rows, theirs.rows)
    found = {n: difference(ours.rows[n][order], value) for n, value in theirs.rows.items()}
    for name in ours.others.keys() | theirs.others.keys():
        one, other = ours.others.get(name), theirs.others.get(name)
        found[name] = math.inf if one is None or other is None else difference(one, other)
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest one; of images, that of all but a hundredth of the values.

    A Gaussian whose opacity at a pixel is 1/255, but for a rounding, may be drawn there by one of
    the two alone.
    """
    if ours.shape != theirs.shape:
        return math.inf
    if torch.equal(ours, theirs):
        return 0.0
    change = (ours - theirs).abs().double().flatten()
    is_image = ours.dim() == 3 and ours.shape[-1] in (1, 3)
    largest = torch.quantile(change, 0.99) if is_image else change.max()
    return float(largest / theirs.abs().max().clamp_min(1e-30))


def pairs(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """For each of their rows, the most similar one of ours; [n], a permutation."""
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, value in theirs.items():
        if "features" not in name:
            size = value.abs().max().clamp_min(1e-30)
            for side, rows in zip(columns, (theirs, ours), strict=True):
                side.append((rows[name] / size).double().reshape(len(value), -1))
    order = torch.cdist(*(torch.cat(side, dim=1) for side in columns)).argmin(dim=1)
    assert len(order.unique()) == len(order), "two Gaussians are most similar to the same one"
    return order
