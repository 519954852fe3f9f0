"""gsscale: 3D Gaussian Splatting scenes larger than the GPU, as a Nerfstudio method."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gsscale-nerfstudio")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
