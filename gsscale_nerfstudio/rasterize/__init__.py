"""From Gaussians and a camera to an image: gsplat on CUDA, a plain torch reference elsewhere."""

from .api import rasterize as rasterize
from .rendering import Rendering as Rendering
