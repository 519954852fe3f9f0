"""Densification: growing and pruning rows."""

from gsscale_nerfstudio.densify.strategy import RowStrategy as RowStrategy
from gsscale_nerfstudio.densify.strategy import pause_after_reset as pause_after_reset
