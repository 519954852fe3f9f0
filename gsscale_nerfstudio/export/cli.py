"""``gsscale-export``: trained Gaussians as a file, at the speed of the disk."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
import yaml
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.splatfacto import SplatfactoModel
from nerfstudio.utils.eval_utils import eval_setup
from rich.progress import Progress

from gsscale_nerfstudio.errors import GSScaleError, readable_errors
from gsscale_nerfstudio.export.gaussians import Gaussians
from gsscale_nerfstudio.export.ply import write_ply
from gsscale_nerfstudio.export.spz import write_spz
from gsscale_nerfstudio.files import whole_file

_WRITERS = {".ply": write_ply, ".spz": write_spz}


@dataclass
class Export:
    """Write the Gaussians of a gsscale or splatfacto run as a file that splat viewers read."""

    load_config: Path
    """config.yml of the run."""
    output: Path = Path("splat.ply")
    """The file to write; its name says in which format. NAME.ply: all that there is, as ns-export
    writes it. NAME.spz: Niantic's compressed format, a fifth of the size or less."""
    color: Literal["sh", "rgb"] = "sh"
    """sh: spherical harmonics. rgb: one colour per Gaussian (.ply: as red, green and blue)."""
    obb_center: tuple[float, float, float] | None = None
    """Centre of a box, as in the viewer's crop box; Gaussians outside of it are left out. Needs the
    other two as well. A box with none inside is refused."""
    obb_rotation: tuple[float, float, float] | None = None
    """Its roll, pitch and yaw, in radians."""
    obb_scale: tuple[float, float, float] | None = None
    """Its edges' lengths."""

    def main(self) -> None:
        """Load the run and write the file.

        Raises:
            GSScaleError: the file's name is of no known format or it could not be written, the
                box is incomplete or empty, or there is no such run, or it is of another kind.
        """
        box = self.box()
        _check_name(self.output)
        try:
            _, pipeline, _, _ = eval_setup(self.load_config, test_mode="inference")
        except Exception:
            _check_config(self.load_config)
            raise
        if not isinstance(pipeline.model, SplatfactoModel):
            raise GSScaleError(f"{self.load_config} is no run of gsscale or splatfacto")
        written, of = write(pipeline.model, self.output, self.color, box)
        print(f"{self.output}: {written:,} of {of:,} Gaussians")

    def box(self) -> OrientedBox | None:
        """The crop box, if there is one."""
        parts = (self.obb_center, self.obb_rotation, self.obb_scale)
        if all(part is None for part in parts):
            return None
        if any(part is None for part in parts):
            raise GSScaleError(
                "a box needs all of --obb-center, --obb-rotation and --obb-scale; give the missing "
                "ones, or none"
            )
        if not all(edge > 0 for edge in self.obb_scale or ()):
            raise GSScaleError(
                "--obb-scale is the lengths of a box's edges: each more than 0, not "
                f"{' '.join(f'{edge:g}' for edge in self.obb_scale or ())}"
            )
        return OrientedBox.from_params(*parts)  # type: ignore[arg-type]


@torch.no_grad()
def write(
    model: SplatfactoModel, path: Path, color: Literal["sh", "rgb"], box: OrientedBox | None = None
) -> tuple[int, int]:
    """Write a model's Gaussians in the format that the file's name ends in.

    Left out are those outside of the box, those that gsplat would not draw, and those with a value
    that is not finite. Memory does not grow with the scene, but for a byte per Gaussian.

    Returns:
        How many were written, and how many there are.

    Raises:
        GSScaleError: the name is of no known format, nothing is inside of the box, or the file
            could not be written.
    """
    _check_name(path)
    gaussians = Gaussians(model, box)
    if box is not None and gaussians.count == 0:
        raise GSScaleError(
            "no Gaussian is inside of the box, and nothing was written; give the box as the "
            "viewer has it: set a crop box there, and its Export tab shows these flags"
        )
    write_to = _WRITERS[path.suffix.lower()]
    try:
        with (
            whole_file(path) as unfinished,
            unfinished.open("wb") as file,
            Progress(transient=True) as progress,
        ):
            bar = progress.add_task(f"writing {path.name}", total=1.0)
            for share in write_to(file, gaussians, color):
                progress.update(bar, completed=share)
    except OSError as error:
        remedy = "free disk space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise GSScaleError(
            f"could not write {path}: {error.strerror or error}; {remedy}choose another --output"
        ) from error
    return gaussians.count, gaussians.n


def _check_name(path: Path) -> None:
    if path.suffix.lower() not in _WRITERS:
        raise GSScaleError(
            f"{path.name} names no format that can be written; let --output end in "
            f"{' or '.join(_WRITERS)}"
        )


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise GSScaleError(
            f"there is no file {path}; give --load-config the config.yml of a run, as "
            "outputs/.../config.yml"
        )
    with path.open("rb") as file:
        if not file.read(20).startswith(b"!!python/object"):
            raise GSScaleError(
                f"{path} is no config.yml of a run; it is in the run's folder, as "
                "outputs/.../config.yml"
            )
    try:
        known = yaml.load(path.read_text(), Loader=yaml.Loader).method_name in all_methods
    except Exception:  # whatever yaml makes of a file that ends too early, or of unknown classes
        known = False
    if not known:
        raise GSScaleError(
            f"{path} is damaged, or of a method that is not installed here; install that method's "
            "package, or give the config.yml of another run, as outputs/.../config.yml"
        )


def entrypoint() -> None:
    """What ``gsscale-export`` runs."""
    with readable_errors():
        tyro.cli(Export, description=__doc__).main()
