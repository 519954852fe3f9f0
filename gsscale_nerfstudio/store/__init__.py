"""Rows in host memory."""

from gsscale_nerfstudio.store.host import HostStore as HostStore
from gsscale_nerfstudio.store.layout import GROUPS as GROUPS
from gsscale_nerfstudio.store.layout import RowLayout as RowLayout
