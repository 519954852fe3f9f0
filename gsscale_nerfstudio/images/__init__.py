"""Where training images come from: all in memory, or from the disk as they are needed."""

from gsscale_nerfstudio.images.checks import check_cameras, explained
from gsscale_nerfstudio.images.dataset import ImageDataset
from gsscale_nerfstudio.images.disk import DiskImages
from gsscale_nerfstudio.images.evaluation import EvalImages
from gsscale_nerfstudio.images.lens import undistort_cameras, undistorted
from gsscale_nerfstudio.images.lists import ListedImages
from gsscale_nerfstudio.images.placement import Placement, decoded_bytes, place
from gsscale_nerfstudio.images.uploads import Uploads

__all__ = [
    "DiskImages",
    "EvalImages",
    "ImageDataset",
    "ListedImages",
    "Placement",
    "Uploads",
    "check_cameras",
    "decoded_bytes",
    "explained",
    "place",
    "undistort_cameras",
    "undistorted",
]
