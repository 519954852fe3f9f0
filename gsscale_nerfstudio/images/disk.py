"""Images read ahead from the disk, within a memory budget.

The first images read stay in memory, as many as the budget holds; the others are read again in
every epoch and are dropped when they have been used. What stays is a random part of each epoch, so
reading goes on evenly between steps that need none. Dropping what is wanted last, the best rule for
a cache that does not work ahead, reads as often, but all of it at the end of an epoch, where
training then waits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images.dataset import naming
from gsscale_nerfstudio.images.lens import undistort_cameras, undistorted

Data = dict[str, Any]
"""One image: ``image``, perhaps ``mask``, and what else the data set has of it."""

_READS_PER_THREAD = 4
"""Images wanted ahead per thread: enough to be read while a few images in a row stay in memory."""
STAGED = 3
"""Images in page-locked memory: the present, the next, and the one after, which is copied there."""


class DiskImages:
    """Images by index, read by worker threads before they are asked for.

    For one thread at a time; only the reading is done by others. An image that was not announced is
    read when it is asked for.

    Args:
        read: gives an image by index; called by several threads.
        sizes: bytes of each image.
        budget: bytes that the images in memory may take, those being read included. What reading
            itself needs for an image comes on top, and a few page-locked buffers.
        threads: number of worker threads.
        page_lock: hand images out in page-locked memory.

    Attributes:
        ahead: images that are read ahead, the present one included.
        reads: images read so far.
        waits: images that were not there when they were asked for.
        waited: seconds spent waiting for them.

    Raises:
        GSScaleError: the budget does not hold two images.
    """

    def __init__(
        self,
        read: Callable[[int], Data],
        sizes: Sequence[int],
        budget: int,
        threads: int,
        page_lock: bool = False,
    ) -> None:
        largest = max(sizes, default=0)
        if budget < min(2 * largest, sum(sizes)):
            raise GSScaleError(
                f"the {budget / 1e9:.3g} GB for images do not hold two of {largest / 1e9:.3g} GB, "
                "the present one and the next; raise --pipeline.datamanager.image-memory-gb or "
                "use smaller images (downscale-factor of the dataparser)"
            )
        self._read, self._sizes = read, sizes
        self.ahead = _READS_PER_THREAD * threads
        self._room = budget
        if budget < sum(sizes):
            self.ahead = max(2, min(self.ahead, budget // 2 // largest))
            self._room -= self.ahead * largest
        self._kept: dict[int, Future[Data]] = {}
        self._passing: dict[int, Future[Data]] = {}
        self._staged: dict[int, Future[Data]] = {}
        self._announced: set[int] = set()
        # Both end with this object, or with the interpreter, which waits for what is being read.
        self._readers = ThreadPoolExecutor(threads, "images")
        self._stager = ThreadPoolExecutor(1, "image-staging") if page_lock else None
        self.reads = self.waits = 0
        self.waited = 0.0

    @classmethod
    def of(
        cls,
        dataset: InputDataset,
        image_type: Literal["uint8", "float32"],
        sizes: Sequence[int],
        budget: int,
        threads: int,
        page_lock: bool = False,
    ) -> DiskImages:
        """The images of ``dataset``, whose cameras become those of the undistorted images.

        See the class for the other arguments. Images of type float32 are from 0 to 1.
        """
        cameras = copy.deepcopy(dataset.cameras)
        undistort_cameras(dataset.cameras)

        def read(index: int) -> Data:
            with naming(dataset.image_filenames[index]):
                return undistorted(dataset, cameras, index, image_type)

        return cls(read, sizes, budget, threads, page_lock)

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def kept_bytes(self) -> int:
        """Of the images that have been read and stay in memory."""
        return sum(self._sizes[index] for index, image in self._kept.items() if image.done())

    def announce(self, order: Sequence[int]) -> None:
        """The next images that will be asked for, the present one first; others are let go.

        Args:
            order: indices; more than :attr:`ahead` are no use.
        """
        order = order[: self.ahead]
        self._announced = set(order)
        _keep_only(self._passing, order)
        _keep_only(self._staged, order[:STAGED])
        for index in order:
            self._reading(index)
        if self._stager is not None:
            for index in order[:STAGED]:
                if _is_lost(self._staged.get(index)):
                    self._staged[index] = self._stager.submit(_staged, self._reading(index))

    def ready(self, index: int) -> bool:
        """Whether image ``index``, announced, can be had without waiting."""
        future = self._wanted(index)
        return future.done() and not _is_lost(future)

    def __getitem__(self, index: int) -> Data:
        """Image ``index``, as soon as it has been read; not to be changed.

        One that could not be read ahead is read anew: the file may be there by now.

        Raises:
            IndexError: there is no such image.
            GSScaleError: it could not be read; names the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        future = self._wanted(index)
        if index not in self._announced:
            self._passing.pop(index, None)  # nothing would let go of it later
        if not future.done():
            start = time.perf_counter()
            future.result()
            self.waits += 1
            self.waited += time.perf_counter() - start
        return future.result()

    def _wanted(self, index: int) -> Future[Data]:
        """What gives the image: its page-locked copy, where one is made."""
        staged = self._staged.get(index)
        if staged is None or _is_lost(staged):
            return self._reading(index)
        return staged

    def _reading(self, index: int) -> Future[Data]:
        """The image, read or being read; it is begun where it was not, or has failed."""
        known = self._kept.get(index) or self._passing.get(index)
        if known is not None and not _is_lost(known):
            return known
        has_room = index in self._kept  # one that has failed keeps its place
        stays = has_room or self._sizes[index] <= self._room
        if stays and not has_room:
            self._room -= self._sizes[index]
        future = self._readers.submit(_delayed, self._read, index)
        (self._kept if stays else self._passing)[index] = future
        self.reads += 1
        return future


def _is_lost(future: Future[Data] | None) -> bool:
    """Whether there is nothing to wait for: it was not begun, or has failed."""
    return future is None or (future.done() and future.exception() is not None)


def _keep_only(images: dict[int, Future[Data]], wanted: Sequence[int]) -> None:
    for index in images.keys() - set(wanted):
        images.pop(index).cancel()


def _delayed(read: Callable[[int], Data], index: int) -> Data:
    Stress.delay()
    return read(index)


def _staged(image: Future[Data]) -> Data:
    """A copy of an image in page-locked memory.

    torch keeps freed page-locked memory, and hands it out again only when the copies to the device
    that were begun from it are done: it has the ring of buffers that this needs.
    """
    data = dict(image.result())
    Stress.delay()
    for name, value in data.items():
        if isinstance(value, Tensor):
            data[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            np.copyto(data[name].numpy(), value.numpy())  # torch would copy with all cores
    return data
