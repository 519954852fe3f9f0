"""A client of Nerfstudio's viewer without a page: it sends cameras and receives pictures.

It speaks viser's protocol with viser's own messages, as the page in a browser does.
"""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from nerfstudio.viewer.viewer import VISER_NERFSTUDIO_SCALE_RATIO
from numpy.typing import NDArray
from PIL import Image
from viser import transforms
from viser._messages import (
    BackgroundImageMessage,
    GuiAddButtonMessage,
    GuiUpdateMessage,
    Message,
    ViewerCameraMessage,
)
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

_STEP = re.compile(r"Step: (\d+)")


@dataclass(frozen=True)
class Picture:
    """What the viewer has drawn."""

    arrived: float
    """``time.perf_counter()`` when its message was there."""
    encoded: bytes

    def size(self) -> tuple[int, int]:
        """Width and height; nothing is decoded for it."""
        return Image.open(io.BytesIO(self.encoded)).size

    def pixels(self) -> NDArray[np.float64]:
        """[h, w, 3], 0 to 255."""
        return np.asarray(Image.open(io.BytesIO(self.encoded)).convert("RGB"), dtype=float)


class ViewerClient:
    """A connection to the viewer at a port of this machine.

    The viewer draws nothing for a client before its first camera.
    """

    def __init__(self, port: int) -> None:
        self.pictures: list[Picture] = []
        """All that have come, in order."""
        self.step: int | None = None
        """The training step that the panel shows."""
        self._buttons: dict[str, str] = {}
        # Without a socket of ours a proxy in the environment would be asked. A panel with point
        # clouds and images is larger than what websockets takes by default.
        connection = socket.create_connection(("127.0.0.1", port))
        self._socket = connect(f"ws://127.0.0.1:{port}", sock=connection, max_size=None)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> ViewerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._listener.join()

    def look(self, pose: NDArray[np.floating[Any]], fov: float, aspect: float) -> float:
        """Move the camera.

        Args:
            pose: [3, 4], camera to world, as Nerfstudio's cameras have it.
            fov: vertical field of view, radians.
            aspect: width by height.

        Returns:
            ``time.perf_counter()`` when it was sent.
        """
        # Nerfstudio looks along -z with y up; viser along z with y down, in a larger world.
        turned = transforms.SO3.from_matrix(pose[:, :3]) @ transforms.SO3.from_x_radians(np.pi)
        position = VISER_NERFSTUDIO_SCALE_RATIO * pose[:, 3]
        message = ViewerCameraMessage(
            wxyz=tuple(turned.wxyz),
            position=tuple(position),
            fov=fov,
            aspect=aspect,
            look_at=tuple(position - pose[:, 2]),
            up_direction=tuple(pose[:, 1]),
        )
        sent = time.perf_counter()
        self._send(message)
        return sent

    def press(self, label: str) -> None:
        """Press a button of the panel."""
        self._send(GuiUpdateMessage(self._buttons[label], {"value": True}))

    def _send(self, message: Message) -> None:
        self._socket.send(msgspec.msgpack.encode(message.as_serializable_dict()))

    def _listen(self) -> None:
        try:
            while True:
                window = self._socket.recv()
                arrived = time.perf_counter()
                assert isinstance(window, bytes)
                for fields in msgspec.msgpack.decode(window):
                    self._handle(fields, arrived)
        except ConnectionClosed:
            pass  # by one of the two

    def _handle(self, fields: dict[str, Any], arrived: float) -> None:
        kind = fields["type"]
        if kind == BackgroundImageMessage.__name__:
            self.pictures.append(Picture(arrived, fields["rgb_bytes"]))
        elif kind == GuiAddButtonMessage.__name__:
            self._buttons[fields["label"]] = fields["id"]
        elif kind == GuiUpdateMessage.__name__:
            said = _STEP.match(fields["updates"].get("markdown", ""))
            if said:
                self.step = int(said[1])
