"""Engines: what moves rows and runs Adam on them."""

from gsscale_nerfstudio.engines.base import Engine as Engine
from gsscale_nerfstudio.engines.base import WorkingSet as WorkingSet
from gsscale_nerfstudio.engines.host import HostEngine as HostEngine
