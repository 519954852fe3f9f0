"""What of a model belongs into a file, a piece at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModel
from torch import Tensor

from gsscale_nerfstudio.export.parallel import in_order
from gsscale_nerfstudio.store.layout import GROUPS

_PIECE = 1 << 15
"""Gaussians that one core converts at a time: some 20 MB."""

_FAINT = -5.5373
"""logit(1 / 255): gsplat draws nothing more transparent, and ns-export leaves it out."""


@dataclass
class Piece:
    """Some consecutive Gaussians.

    Attributes:
        where: their place in the model.
        kept: [k] bool, which of them belong into the file.
    """

    where: slice
    kept: np.ndarray


class Gaussians:
    """A trained model's Gaussians, without those that a file leaves out.

    Left out are those outside of the box, those that gsplat would not draw, and those with a value
    that is not finite.

    Args:
        model: of gsscale or splatfacto.
        box: crop box, if any.
    """

    def __init__(self, model: SplatfactoModel, box: OrientedBox | None = None) -> None:
        # Asked for once: the store settles its rows each time, and writers have threads.
        self._groups = {name: model.gauss_params[name].detach() for name in GROUPS}
        self.config = model.config
        self.n = int(model.num_points)
        starts = range(0, self.n, _PIECE)
        places = [slice(start, min(start + _PIECE, self.n)) for start in starts]
        self.pieces = list(in_order(lambda where: Piece(where, self._keep(where, box)), places))
        self.count = sum(int(piece.kept.sum()) for piece in self.pieces)

    @property
    def rest_bases(self) -> int:
        """Number of SH bases above degree 0."""
        return self._groups["features_rest"].shape[1]

    def values(self, where: slice, group: str) -> Tensor:
        """A piece of a group, [k, *shape] on the CPU, with those that are left out."""
        return self._groups[group][where].cpu()

    def first_band(self, where: slice) -> Tensor:
        """A piece's SH coefficients of degree 0, [k, 3], whatever the model keeps colours in."""
        dc = self.values(where, "features_dc")
        return dc if self.config.sh_degree > 0 else RGB2SH(torch.sigmoid(dc))

    def _keep(self, where: slice, box: OrientedBox | None) -> np.ndarray:
        keep = self.values(where, "opacities")[:, 0].numpy() >= _FAINT
        for group in self._groups:
            keep &= np.isfinite(self.values(where, group).flatten(1).numpy()).all(axis=1)
        if box is not None:
            keep &= box.within(self.values(where, "means")).reshape(-1).numpy()
        return keep
