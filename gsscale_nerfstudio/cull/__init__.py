"""From a camera to the ids of the rows that it may see."""

from gsscale_nerfstudio.cull.culler import Culler as Culler
from gsscale_nerfstudio.cull.pose import world_to_camera as world_to_camera
from gsscale_nerfstudio.cull.view import Slack as Slack
from gsscale_nerfstudio.cull.view import View as View
from gsscale_nerfstudio.cull.view import Window as Window
