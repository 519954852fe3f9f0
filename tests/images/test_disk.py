"""Reading ahead: what is read how often, what is in memory, and how it ends."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from gsscale_nerfstudio.engines.streams import Stress
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images import DiskImages


class Shelf:
    """Images of some bytes each, which count how many of them there are."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.lock = threading.Lock()
        self.bytes = self.most = self.reads = 0

    def read(self, index):
        time.sleep(random.uniform(0, 2e-3))
        size = self.sizes[index]
        image = torch.full((size,), index % 251, dtype=torch.uint8)
        with self.lock:
            self.reads += 1
            self.bytes += size
            self.most = max(self.most, self.bytes)
        weakref.finalize(image, self.gone, size)
        return {"image": image, "image_idx": index}

    def gone(self, size):
        with self.lock:
            self.bytes -= size


def epochs(images, count, each_step=None):
    """Go through ``count`` random epochs. Returns the number of reads that each began."""
    n, order, reads = len(images), [], []
    for _ in range(count + 1):
        order += random.sample(range(n), n)
    for step in range(count * n):
        images.announce(order[step : step + images.ahead])
        data = images[order[step]]
        assert data["image_idx"] == order[step]
        assert bool((data["image"] == order[step] % 251).all())
        del data
        if each_step is not None:
            each_step(order[step + 1 : step + images.ahead])
        if step % n == n - 1:
            reads.append(images.reads)
    return [after - before for before, after in zip([0, *reads], reads, strict=False)]


@pytest.fixture(autouse=True)
def _shuffles():
    random.seed(1)


@pytest.fixture(params=["ordinary", "page-locked"])
def page_lock(request, monkeypatch):
    """Without CUDA nothing can be page-locked, but all the rest of it can be done."""
    if request.param == "page-locked" and not torch.cuda.is_available():
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **kw: empty(*args, **kw))
    return request.param == "page-locked"


def test_what_fits_is_read_once(page_lock):
    shelf = Shelf([100] * 40)
    images = DiskImages(shelf.read, shelf.sizes, budget=4000, threads=3, page_lock=page_lock)
    assert epochs(images, 4) == [40, 0, 0, 0]
    assert shelf.reads == 40


def test_what_does_not_fit_is_read_in_every_epoch_within_the_budget(page_lock):
    sizes = [random.randrange(50, 151) for _ in range(60)]
    shelf = Shelf(sizes)
    budget = sum(sizes) * 6 // 10
    images = DiskImages(shelf.read, sizes, budget, threads=2, page_lock=page_lock)
    reads = epochs(images, 6)
    assert images.ahead == 8
    # 60 % of the bytes, less those for 8 large images on their way, stay. An epoch's first ones
    # are read in the one before.
    staying = (budget - 8 * max(sizes)) / sum(sizes)
    for count in reads[1:]:
        assert 60 * (1 - staying) - 9 < count < 60 * (1 - staying) + 9
    assert shelf.most <= budget
    assert shelf.most > budget // 2


def test_two_images_are_enough():
    shelf = Shelf([100] * 10)
    images = DiskImages(shelf.read, shelf.sizes, budget=200, threads=8)
    epochs(images, 3)
    assert images.ahead == 2
    assert shelf.most <= 200
    with pytest.raises(GSScaleError, match=r"do not hold two.*image-memory-gb"):
        DiskImages(shelf.read, shelf.sizes, budget=199, threads=8)


def test_images_are_there_before_they_are_asked_for():
    shelf = Shelf([100] * 50)
    images = DiskImages(shelf.read, shelf.sizes, budget=2000, threads=2)

    def slow_step(upcoming):
        end = time.monotonic() + 60
        while not all(images.ready(index) for index in upcoming) and time.monotonic() < end:
            time.sleep(1e-3)

    epochs(images, 3, each_step=slow_step)
    assert images.waits <= 1  # of 150; the first is seldom there
    slow = DiskImages(shelf.read, shelf.sizes, budget=2000, threads=1)
    epochs(slow, 1)
    assert slow.waits > 10
    assert slow.waited > 0


def test_page_locked_images_are_copies_and_only_those_wanted_next(page_lock):
    shelf = Shelf([100] * 10)
    images = DiskImages(shelf.read, shelf.sizes, budget=1000, threads=1, page_lock=page_lock)
    images.announce([0, 1, 2, 3])
    handed_out = [images[index]["image"] for index in range(4)]
    images.announce([5, 6, 7, 8])
    kept = [images[index]["image"] for index in range(4)]
    for index, (one, other) in enumerate(zip(handed_out, kept, strict=True)):
        assert torch.equal(one, other)
        assert (one is not other) == (page_lock and index < 3)
    assert images.reads == 8


def test_an_image_that_was_not_announced():
    shelf = Shelf([100] * 9)
    images = DiskImages(shelf.read, shelf.sizes, budget=250, threads=2)
    images.announce([1, 2])
    for index in range(9):
        assert images[index]["image_idx"] == index
    assert shelf.bytes <= 300  # those announced, and one
    for index in (-1, 9):
        with pytest.raises(IndexError):
            images[index]


def test_two_at_a_time_do_not_disturb_each_other():
    sizes = [100] * 30
    one, other = (DiskImages(Shelf(sizes).read, sizes, 1200, threads=2) for _ in range(2))
    epochs(one, 2, each_step=lambda _: other[random.randrange(30)])
    assert other.reads > 0


def test_threads_end_with_the_images():
    others = set(threading.enumerate())  # of earlier tests, which may end at any time
    shelf = Shelf([100] * 30)
    images = DiskImages(shelf.read, shelf.sizes, budget=1000, threads=4)
    epochs(images, 1)
    readers = set(threading.enumerate()) - others
    assert len(readers) == 4
    del images
    for reader in readers:
        reader.join(timeout=10)
    assert not any(reader.is_alive() for reader in readers)
    assert shelf.bytes == 0


@pytest.mark.parametrize("budget", [1000, 8])  # it stays in memory, or does not
def test_an_unreadable_image_raises_when_it_is_asked_for(page_lock, budget):
    """And is read anew each time: once the file is mended, it is there."""
    broken, reads = {3}, []

    def read(index):
        reads.append(index)
        if index in broken:
            raise GSScaleError("the image three.jpg could not be read")
        return {"image": torch.full((4,), index)}

    images = DiskImages(read, [4] * 6, budget, threads=2, page_lock=page_lock)
    images.announce([0, 3])
    images[0]
    for times in (1, 2):
        with pytest.raises(GSScaleError, match=r"three\.jpg"):
            images[3]
        assert not images.ready(3)
        assert reads.count(3) >= times
    broken.clear()
    end = time.monotonic() + 60
    while not images.ready(3) and time.monotonic() < end:
        images.announce([3, 1])
    assert bool((images[3]["image"] == 3).all())
    count = len(reads)
    assert images.ready(3)
    assert len(reads) == count
    images.announce([3, 1])
    images[1]
    if budget == 1000:
        assert images._room == budget - 4 * len({*reads})  # each has its room once


SCRIPT = """
import time
import torch
from gsscale_nerfstudio.images import DiskImages

def read(index):
    print("reading", flush=True)
    time.sleep(0.5)
    return {"image": torch.zeros(4)}

images = DiskImages(read, [4] * 40, budget=40, threads=2)
images.announce(range(5))
"""


def script(text, before=""):
    return [sys.executable, "-c", before + SCRIPT + text]


def test_the_interpreter_ends_while_images_are_read(tmp_path):
    # Not from the source tree: `python -c` would import the package there, which is not compiled.
    done = subprocess.run(script("raise SystemExit(7)"), timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 7


def test_an_interrupt_ends_the_wait_for_an_image(tmp_path):
    # A shell that starts the tests in the background has told them to ignore interrupts.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    pipe, code = subprocess.PIPE, script("[images[i] for i in range(40)]", heard)
    child = subprocess.Popen(code, stdout=pipe, stderr=pipe, cwd=tmp_path)
    assert child.stdout is not None
    # Both threads are there: Python forgets one, and waits for it for ever, if it is interrupted
    # while it starts it.
    child.stdout.readline()
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    reads, said = child.communicate(timeout=20)
    assert b"KeyboardInterrupt" in said
    assert child.returncode != 0
    assert reads.count(b"reading") <= 8


@pytest.mark.gpu
def test_page_locked_images_are_whole_when_they_arrive(monkeypatch):
    """Buffers are used again and again, while the device is late."""
    monkeypatch.setattr(Stress, "longest", 5e-3)
    sizes = [1 << 20] * 20
    images = DiskImages(Shelf(sizes).read, sizes, 8 << 20, threads=4, page_lock=True)
    stream = torch.cuda.Stream()
    order = [step * 7 % 20 for step in range(200)]
    arrived = []
    for step, index in enumerate(order[:190]):
        images.announce(order[step : step + images.ahead])
        image = images[index]["image"]
        assert image.is_pinned()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            arrived.append(image.to("cuda", non_blocking=True))
    torch.cuda.synchronize()
    for index, image in zip(order, arrived, strict=False):
        assert bool((image == index).all())
