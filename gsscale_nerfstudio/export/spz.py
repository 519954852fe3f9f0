"""Niantic's SPZ, version 3 (github.com/nianticlabs/spz): attributes of few bits, gzipped.

No library writes it in pieces, and this is most of what there is to the format.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from gsscale_nerfstudio.errors import warn
from gsscale_nerfstudio.export.gaussians import Gaussians, Piece
from gsscale_nerfstudio.export.parallel import in_order

_MAGIC, _VERSION, _ANTIALIASED = 0x5053474E, 3, 1
_HEADER = struct.Struct("<IIIBBBB")  # magic, version, count, SH degree, fraction bits, flags, 0

_MOST_READ = 10_000_000
"""Niantic's reader, which others are built on, refuses more Gaussians."""

_LARGEST = (1 << 23) - 1  # a coordinate's 24 bits
_FRACTION = range(12, 21)
"""Bits behind the point: 12, what everybody takes, up to what float32 has near 1."""

_SH_BUCKET = 2
"""SH coefficients from -1 to 1 keep 7 of their 8 bits. The format's usual 5 and 4 made the file of
a small scene a third smaller and its images 11 dB worse."""

_LEVEL = 6  # of zlib

Encoder = Callable[[slice], np.ndarray]


def write_spz(file: BinaryIO, gaussians: Gaussians, color: str) -> Iterator[float]:
    """Write all of the file; yields the share that is done, now and then.

    Coordinates are the model's, as in the PLY file: no axis is turned.

    Args:
        file: open for writing.
        gaussians: what to write.
        color: ``sh`` or, without bands above 0, ``rgb``.
    """
    if gaussians.count > _MOST_READ:
        warn(
            f"{gaussians.count:,} Gaussians are more than many readers of .spz take "
            f"({_MOST_READ:,}); cut a part out with --obb-center, --obb-rotation and --obb-scale, "
            "or write a .ply"
        )
    attributes = Attributes(gaussians)
    encoders = attributes.encoders if color == "sh" else attributes.encoders[:-1]
    bases = gaussians.rest_bases if color == "sh" else 0
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        gaussians.count,
        math.isqrt(bases + 1) - 1,
        attributes.fraction,
        _ANTIALIASED if gaussians.config.rasterize_mode == "antialiased" else 0,
        0,
    )
    # Attribute by attribute; within each, Gaussian by Gaussian.
    tasks = [(encode, piece) for encode in encoders for piece in gaussians.pieces]
    for done, _ in enumerate(_gzip(file, header, tasks), start=1):
        yield done / len(tasks)


class Attributes:
    """How a piece of each attribute is written, in the order of the file.

    Args:
        gaussians: what to write.
    """

    def __init__(self, gaussians: Gaussians) -> None:
        self._gaussians = gaussians
        reach = max((self._reach(piece) for piece in gaussians.pieces), default=0.0)
        bits = math.floor(math.log2(_LARGEST / max(reach, 1e-9)))
        self.fraction = min(max(bits, _FRACTION.start), _FRACTION.stop - 1)
        self.encoders: list[Encoder] = [
            self.positions,
            self.alphas,
            self.colors,
            self.scales,
            self.rotations,
            self.sh,
        ]

    def positions(self, where: slice) -> np.ndarray:
        """[k, 9] uint8: coordinates, fixed-point numbers of 24 bits."""
        means = self._numpy(where, "means") * self._nearer(where)
        fixed = np.rint(means * np.float32(1 << self.fraction)).astype("<i4")
        return fixed.view(np.uint8).reshape(-1, 3, 4)[..., :3].reshape(-1, 9)

    def alphas(self, where: slice) -> np.ndarray:
        """[k, 1] uint8: opacity from 0 to 1."""
        return _byte(self._gaussians.values(where, "opacities").sigmoid().numpy() * 255)

    def colors(self, where: slice) -> np.ndarray:
        """[k, 3] uint8: SH degree 0, from -3.33 to 3.33."""
        return _byte((self._gaussians.first_band(where).numpy() * 0.15 + 0.5) * 255)

    def scales(self, where: slice) -> np.ndarray:
        """[k, 3] uint8: logarithms from -10 to 5.94."""
        return _byte((self._numpy(where, "scales") + np.log(self._nearer(where)) + 10) * 16)

    def rotations(self, where: slice) -> np.ndarray:
        """[k, 4] uint8: where the largest component is (2 bits), sign and size of the others."""
        xyzw = self._numpy(where, "quats")[:, [1, 2, 3, 0]]
        largest = np.abs(xyzw).argmax(axis=1)[:, None]
        # q and -q are the same rotation: the largest component counts as positive.
        length = np.linalg.norm(xyzw, axis=1, keepdims=True).clip(1e-12)
        xyzw = xyzw / np.copysign(length, np.take_along_axis(xyzw, largest, axis=1))
        size = np.rint(np.abs(xyzw) * (511 * math.sqrt(2))).astype(np.uint32).clip(max=511)
        fields = size | np.signbit(xyzw).astype(np.uint32) << 9
        others = np.nonzero(np.arange(4) != largest)[1].reshape(-1, 3)
        a, b, c = np.take_along_axis(fields, others, axis=1).T
        packed = largest[:, 0].astype("<u4") << 30 | a << 20 | b << 10 | c
        return packed.astype("<u4").view(np.uint8).reshape(-1, 4)

    def sh(self, where: slice) -> np.ndarray:
        """[k, 3 bases] uint8: coefficients above degree 0, from -1 to 1, colours side by side."""
        rest = self._gaussians.values(where, "features_rest").flatten(1).numpy()
        return _byte(np.rint(rest * (128 / _SH_BUCKET)) * _SH_BUCKET + 128)

    def _numpy(self, where: slice, group: str) -> np.ndarray:
        return self._gaussians.values(where, group).numpy()

    def _reach(self, piece: Piece) -> float:
        return float(np.abs(self._numpy(piece.where, "means")[piece.kept]).max(initial=0))

    def _nearer(self, where: slice) -> np.ndarray:
        """[k, 1]: by what factor the ones beyond the largest coordinate are drawn in, and shrunk.

        That is 2048 where cameras are within 1 of the origin: what they see stays where it is.
        """
        farthest = np.abs(self._numpy(where, "means")).max(axis=1, keepdims=True)
        limit = np.float32(_LARGEST / (1 << self.fraction))
        return limit / np.maximum(farthest, limit)


def _byte(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _gzip(file: BinaryIO, header: bytes, tasks: list[tuple[Encoder, Piece]]) -> Iterator[None]:
    """Write header and what the tasks encode as one gzip stream; yields after each task.

    Blocks that end at whole bytes may be compressed apart and joined: all cores work.
    """

    def compress(task: tuple[Encoder, Piece]) -> tuple[bytes, bytes]:
        encode, piece = task
        plain = encode(piece.where)[piece.kept].tobytes()
        return plain, _deflated(plain)

    file.write(b"\x1f\x8b\x08" + bytes(6) + b"\xff")  # deflated, no name, no time, any system
    file.write(_deflated(header))
    crc, size = zlib.crc32(header), len(header)
    for plain, packed in in_order(compress, tasks):
        file.write(packed)
        crc, size = zlib.crc32(plain, crc), size + len(plain)
        yield
    file.write(zlib.compressobj(wbits=-zlib.MAX_WBITS).flush())  # the empty block that is the last
    file.write(struct.pack("<II", crc, size & 0xFFFFFFFF))


def _deflated(plain: bytes) -> bytes:
    deflate = zlib.compressobj(_LEVEL, wbits=-zlib.MAX_WBITS)
    return deflate.compress(plain) + deflate.flush(zlib.Z_FULL_FLUSH)
