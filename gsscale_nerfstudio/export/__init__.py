"""Trained Gaussians as files that splat viewers read."""

from gsscale_nerfstudio.export.cli import Export, entrypoint, write

__all__ = ["Export", "entrypoint", "write"]
