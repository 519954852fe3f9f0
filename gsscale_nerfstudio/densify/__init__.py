"""Densification: growing and pruning rows."""

from gsscale_nerfstudio.densify.choice import make_strategy as make_strategy
from gsscale_nerfstudio.densify.mcmc import RowMCMCStrategy as RowMCMCStrategy
from gsscale_nerfstudio.densify.strategy import RowStrategy as RowStrategy
from gsscale_nerfstudio.densify.strategy import pause_after_reset as pause_after_reset
