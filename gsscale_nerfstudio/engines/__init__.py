"""Engines: what moves rows and runs Adam on them."""

from gsscale_nerfstudio.engines.base import Engine as Engine
from gsscale_nerfstudio.engines.budget import Budget as Budget
from gsscale_nerfstudio.engines.choice import make_engine as make_engine
from gsscale_nerfstudio.engines.colors import Viewpoint as Viewpoint
from gsscale_nerfstudio.engines.editing import EditableEngine as EditableEngine
from gsscale_nerfstudio.engines.host import HostEngine as HostEngine
from gsscale_nerfstudio.engines.parts import Part as Part
from gsscale_nerfstudio.engines.parts import ViewInParts as ViewInParts
from gsscale_nerfstudio.engines.resident import ResidentEngine as ResidentEngine
from gsscale_nerfstudio.engines.working_set import ScreenStatistics as ScreenStatistics
from gsscale_nerfstudio.engines.working_set import WorkingSet as WorkingSet
