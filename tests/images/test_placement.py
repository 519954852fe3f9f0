"""Whether images stay in memory, from the heads of their files."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from PIL import Image

from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.images import DiskImages, decoded_bytes, place, placement
from tests import runs
from tests.images.test_same_as_nerfstudio import CASES, manager

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PIXELS = 64 * 48


@pytest.fixture
def scene(tmp_path):
    return runs.tiny_scene(tmp_path / "scene", points=50)


def ours(scene, **config):
    return manager(GSScaleDatamanagerConfig, scene, **{"cache_images": "auto", **config})


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("painted_over", [False, True])
@pytest.mark.parametrize(
    "case, image_type",
    [
        ("straight lines", "float32"),
        ("masks", "uint8"),
        ("transparent", "uint8"),
        ("grey", "uint8"),
    ],
)
def test_decoded_bytes_are_those_of_the_tensors(case, image_type, painted_over, scene):
    runs.edit_json(scene, lambda content: CASES[case](scene, content))
    runs.edit_json(scene, lambda content: content.update(k1=0, k2=0, p1=0, p2=0))
    data = ours(scene, cache_images="cpu", cache_images_type=image_type)
    if painted_over:
        data.train_dataset._dataparser_outputs.alpha_color = torch.ones(3)
    expected = [
        sum(value.nbytes for value in image.values() if isinstance(value, torch.Tensor))
        for image in data.cached_train
    ]
    assert decoded_bytes(data.train_dataset, image_type, threads=2) == expected


def test_a_quarter_of_the_available_memory_decides(scene, monkeypatch, capsys):
    data = ours(scene)
    datasets = data.train_dataset, data.eval_dataset
    needed = 8 * PIXELS * 3
    for available, where in ((4 * needed, "gpu"), (4 * needed - 4, "disk")):
        monkeypatch.setattr(placement, "available_memory", lambda available=available: available)
        assert place("auto", datasets, CPU, "uint8").where == where
        assert ("read from the disk" in said(capsys)) == (where == "disk")
    # With CUDA page-locked, each in the next power of two: 16 KiB for 9 KiB.
    assert place("auto", datasets, CUDA, "uint8", 8 * 16384 / 1e9).where == "cpu"
    assert place("auto", datasets, CUDA, "uint8", (8 * 16384 - 1) / 1e9).where == "disk"
    for device in (CPU, CUDA):
        assert place("gpu", datasets, device, "uint8").where == "gpu"
    assert place("cpu", datasets, CUDA, "uint8").where == "cpu"


def test_memory_that_images_will_take(scene, monkeypatch):
    data = ours(scene)
    datasets = data.train_dataset, data.eval_dataset
    train, held_out = (len(dataset) for dataset in datasets)
    size, locked = PIXELS * 3, 16384

    def takes(wanted, device, **options):
        found = place(wanted, datasets, device, "uint8", threads=2, **options)
        return found.in_host, found.on_gpu

    for wanted in ("cpu", "gpu"):
        assert takes(wanted, CPU) == ((train * size, held_out * size), 0)
    assert takes("cpu", CUDA) == ((train * locked, held_out * locked), 2 * size)
    assert takes("gpu", CUDA) == ((0, 0), (train + held_out) * size)
    # Four images for each of two threads; page-locked, the present one and two more.
    budget = 2.5 * size
    from_disk = int(budget) + 8 * size
    assert takes("disk", CPU, memory_gb=budget / 1e9) == ((from_disk, 2 * size), 0)
    assert takes("disk", CUDA, memory_gb=budget / 1e9) == (
        (from_disk + 3 * locked, 2 * size),
        2 * size,
    )


LENSES = [
    ("uint8", CameraType.PERSPECTIVE, 4 * 3),
    ("uint8", CameraType.FISHEYE, 6 * 3),
    ("uint8", CameraType.FISHEYE624, 24 * 4),  # it makes a mask
    ("float32", CameraType.PERSPECTIVE, 4 * 12),
    ("float32", CameraType.FISHEYE624, 9 * 13),
]


@pytest.mark.parametrize("image_type, lens, pixel", LENSES)
def test_memory_that_decoding_takes_depends_on_the_lens(
    image_type, lens, pixel, scene, monkeypatch
):
    data = ours(scene)
    datasets = data.train_dataset, data.eval_dataset
    data.train_dataset.cameras.camera_type[-1] = lens.value  # the one that takes most counts
    monkeypatch.setattr(placement.os, "sched_getaffinity", lambda _: range(8))
    decoding = max(pixel, 4 * (12 if image_type == "float32" else 3)) * PIXELS

    def placed(budget, threads=None):
        return place("disk", datasets, CPU, image_type, budget / 1e9, threads)

    # As many threads as take no more than the budget, if no flag says how many, but one at least.
    for budget, threads in ((9 * decoding, 8), (3.5 * decoding, 3), (decoding // 2, 1)):
        found = placed(budget)
        assert found.threads == threads
        kept = min(found.budget, sum(found.sizes[0]))
        assert found.in_host[0] == kept + min(threads, len(found.sizes[0])) * decoding
    assert placed(decoding // 2, threads=5).threads == 5


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_images_in_memory_are_not_to_come_any_more(where, scene):
    budget = {"image_memory_gb": 1.0} if where == "disk" else {}
    data = ours(scene, cache_images=where, **budget)
    train, held_out = data.image_placement.in_host
    assert data.image_bytes_to_come() == train + held_out
    for index in range(len(data.train_dataset)):
        data.cached_train[index]
    kept = len(data.train_dataset) * PIXELS * 3
    assert data.image_bytes_to_come() == train + held_out - kept


def test_the_sentence_names_sizes_and_flags(scene, capsys):
    data = ours(scene, image_memory_gb=5e-5, max_thread_workers=3)
    data.next_train(0)
    assert isinstance(data.cached_train, DiskImages)
    assert isinstance(data.cached_eval, DiskImages)
    text = said(capsys)
    assert text.count("from the disk") == 1
    for words in ("the 8 images", "3 threads", "image-memory-gb", "cache-images cpu keeps all"):
        assert words in text


def test_what_fits_is_kept_as_before(scene, capsys):
    data = ours(scene)
    data.next_train(0)
    assert isinstance(data.cached_train, list)
    assert "from the disk" not in said(capsys)


def test_evaluation_reads_one_image_after_the_other(tmp_path, monkeypatch):
    data = ours(runs.tiny_scene(tmp_path / "scene", images=20, points=50), cache_images="disk")
    data.next_train(0)
    asked = []
    get_data = data.eval_dataset.get_data
    monkeypatch.setattr(
        data.eval_dataset, "get_data", lambda index, **_: asked.append(index) or get_data(index)
    )
    loader = data.fixed_indices_eval_dataloader
    assert len(loader) == 5
    assert asked == []
    for _ in range(2):
        asked.clear()
        for index, (camera, image) in enumerate(loader):
            assert image["image_idx"] == index
            assert max(asked) <= index + 1
            assert camera.shape == (1,)
        assert len(asked) >= 4  # the last one may be there from the evaluation before
    asked.clear()
    for step in range(10):
        data.next_eval_image(step)
    assert len(asked) >= 6


def test_a_step_does_not_wait_for_the_image_after_it(scene, monkeypatch):
    data = ours(scene, cache_images="disk", max_thread_workers=2)
    now, then = data.upcoming(2)
    may_go_on = threading.Event()
    get_data = data.train_dataset.get_data

    def late(index, **options):
        assert index != then or may_go_on.wait(timeout=60)
        return get_data(index, **options)

    monkeypatch.setattr(data.train_dataset, "get_data", late)
    assert data.next_train(0)[1]["image_idx"] == now
    may_go_on.set()
    assert data.next_train(1)[1]["image_idx"] == then
    assert data.cached_train.waits >= 1


def test_an_image_of_another_size(scene):
    data = ours(scene, cache_images="disk")
    file = data.train_dataset.image_filenames[2]
    Image.fromarray(np.zeros((48, 60, 3), np.uint8)).save(file)
    with pytest.raises(GSScaleError, match=rf"{file}.*60 x 48.*64 x 48"):
        data.next_train(0)


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_truncated_image_is_named_when_it_is_needed(ending, scene):
    if ending == ".jpg":
        runs.edit_json(scene, lambda content: CASES["JPEG"](scene, content))
    data = ours(scene, cache_images="disk")
    file = data.train_dataset.image_filenames[2]
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(GSScaleError, match=rf"the image {file} or its mask could not be read"):
        for step in range(len(data.train_dataset)):
            data.next_train(step)


@pytest.mark.parametrize("flag, value", [("image_memory_gb", 1.0), ("max_thread_workers", 4)])
def test_settings_of_reading_from_the_disk_need_a_mode_that_heeds_them(scene, flag, value):
    for mode in ("cpu", "gpu"):
        with pytest.raises(GSScaleError, match=f"{flag.replace('_', '-')}.*leave it out.* {mode}"):
            ours(scene, cache_images=mode, **{flag: value})


def test_at_least_one_thread_reads(scene):
    with pytest.raises(GSScaleError, match="max-thread-workers"):
        ours(scene, max_thread_workers=0)


def test_training_ends_with_the_sentence(scene, tmp_path, capsys):
    config = runs.make_config(scene, tmp_path / "output", steps=20)
    config.pipeline.datamanager.cache_images = "disk"
    for file in sorted((scene / "images").iterdir())[1:]:
        file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(SystemExit) as stopped:
        runs.train(config)
    assert stopped.value.code == 1
    assert "could not be read" in said(capsys)


def test_training_from_the_disk(scene, tmp_path):
    losses = []
    for mode in ("cpu", "disk"):
        config = runs.make_config(scene, tmp_path / mode, steps=8)
        config.pipeline.datamanager.cache_images = mode
        config.steps_per_eval_all_images = 4
        torch.manual_seed(0)
        trainer = runs.train(config)
        losses.append(trainer.pipeline.model.means.detach().clone())
    assert torch.equal(*losses)


def test_a_training_reads_each_image_once_in_an_epoch(scene, tmp_path):
    """And no other one besides: Nerfstudio's loop has an eye on the first."""
    config = runs.make_config(scene, tmp_path / "output", steps=16)
    config.pipeline.datamanager.cache_images = "disk"
    config.pipeline.datamanager.image_memory_gb = 2.5 * 3 * PIXELS / 1e9
    images = runs.train(config).pipeline.datamanager.cached_train
    assert images.ahead == 2 and len(images) > 4
    assert 16 <= images.reads <= 16 + images.ahead


@pytest.mark.parametrize("case", ["straight lines", "perspective"])  # the latter is cut
def test_the_log_counts_nerfstudios_rays(case, scene):
    runs.edit_json(scene, lambda content: CASES[case](scene, content))
    data = ours(scene, cache_images="cpu")
    height, width = data.cached_train[0]["image"].shape[:2]
    assert data.get_train_rays_per_batch() == height * width
