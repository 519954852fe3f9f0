"""flight.py: what a data manager hands out once its cameras are those over every tile."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fixed_rows, flight
from benchmarks.plan import PlanError
from gsscale_nerfstudio.datamanager import GSScaleDatamanager
from tests.runs import make_config, tiny_scene


def manager(folder, **settings) -> GSScaleDatamanager:
    config = make_config(tiny_scene(folder / "scene", images=12), folder).pipeline.datamanager
    for name, value in settings.items():
        setattr(config, name, value)
    return config.setup(device="cpu")


@pytest.mark.parametrize("sampling", ["random", "fps"])
def test_each_view_comes_once_in_an_epoch_with_its_cameras_image(tmp_path, sampling):
    data = manager(tmp_path, train_cameras_sampling_strategy=sampling, fps_reset_every=27)
    images = [one["image"] for one in data.cached_train]
    split = flight.images_in_memory(data)
    scene = fixed_rows.fit(split, 2000, 0.3, seed=1)
    # More tiles than are needed, so that there are many whatever the scene.
    rows = fixed_rows.FixedRows(**{**vars(scene.rows), "tiles": 3})
    flight.fly_over(data, split, rows.cameras(split.cameras))
    upcoming = data.upcoming(27)
    epoch = []
    for step in range(27):
        camera, batch = data.next_train(step)
        view = camera.metadata["cam_idx"]
        assert torch.equal(batch["image"], images[view % 9])
        moved = camera.camera_to_worlds[0] - split.cameras.camera_to_worlds[view % 9]
        offset = rows._offsets(torch.tensor([view // 9]))[0]
        assert torch.allclose(moved[:, 3], offset, atol=1e-5) and not moved[:, :3].any()
        epoch.append(view)
    assert epoch == upcoming and sorted(epoch) == list(range(27))
    assert data.image_bytes_to_come() == sum(one["image"].nbytes for one in data.cached_eval)


def test_images_that_stay_on_the_disk_are_refused(tmp_path):
    with pytest.raises(PlanError, match="cache-images=cpu"):
        flight.images_in_memory(manager(tmp_path, cache_images="disk"))
