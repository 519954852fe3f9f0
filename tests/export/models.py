"""Models to export, without what training needs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from nerfstudio.models.splatfacto import SplatfactoModel


def trained(n: int, sh_degree: int, antialiased: bool = False) -> SplatfactoModel:
    """A splatfacto with random Gaussians."""
    model = SplatfactoModel.__new__(SplatfactoModel)
    torch.nn.Module.__init__(model)
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "means": (3,),
        "scales": (3,),
        "quats": (4,),
        "features_dc": (3,),
        "features_rest": ((sh_degree + 1) ** 2 - 1, 3),
        "opacities": (1,),
    }
    model.gauss_params = torch.nn.ParameterDict(
        {name: torch.randn(n, *shape, generator=generator) for name, shape in shapes.items()}
    )
    model.gauss_params.requires_grad_(False)
    model.gauss_params["opacities"] *= 4  # some are too faint to be drawn
    mode = "antialiased" if antialiased else "classic"
    model.config = SimpleNamespace(sh_degree=sh_degree, rasterize_mode=mode)
    return model
