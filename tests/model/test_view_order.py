"""--pipeline.datamanager.view-lookahead: consecutive views share rows, and every one comes."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

from gsscale_nerfstudio.cull import View
from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from gsscale_nerfstudio.errors import GSScaleError
from gsscale_nerfstudio.view_order import SAMPLES, reorder, seen_by
from tests.model.test_bad_input import ends_with_a_sentence
from tests.runs import make_config, tiny_scene, train


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scene(tmp_path_factory.mktemp("order") / "scene", images=12)


def manager(scene: Path, tmp_path: Path, lookahead: int, points: np.ndarray | None):
    config = make_config(scene, tmp_path).pipeline.datamanager
    assert isinstance(config, GSScaleDatamanagerConfig)
    config.view_lookahead = lookahead
    made = config.setup(device="cpu")
    if points is not None:
        made.row_centres = lambda: points
    return made


def strip(count: int = 60) -> tuple[list[View], np.ndarray]:
    """Cameras along x, a unit above a plane of points, which look down; each sees 1 of 13 units."""
    K = np.array([[60.0, 0, 30], [0, 60.0, 30], [0, 0, 1]])
    views = []
    for x in np.linspace(0, 12, count):
        viewmat = np.diag([1.0, -1.0, -1.0, 1.0])
        viewmat[:3, 3] = -viewmat[:3, :3] @ [x, 0, 1]
        views.append(View(viewmat, K, 60, 60))
    points = np.random.default_rng(0).uniform([-0.5, -0.5, 0], [12.5, 0.5, 0], (3001, 3))
    return views, points.astype(np.float32)


def hit_share(order: list[int], sees: np.ndarray) -> float:
    """Mean share of a view's points that the one before it sees, too."""
    seen = np.unpackbits(sees, axis=1).astype(bool)
    pairs = itertools.pairwise(order)
    return float(np.mean([(seen[a] & seen[b]).sum() / seen[b].sum() for a, b in pairs]))


def test_what_a_view_sees():
    views, points = strip(5)
    seen = np.unpackbits(seen_by(views, points), axis=1)[:, : len(points)]
    for view, row in zip(views, seen, strict=True):
        x = view.camera_position[0]
        # The planes are wider than the image by what gsplat's blur may add, a few pixels of 60.
        assert row[np.abs(points[:, 0] - x) < 0.5].all()
        assert not row[np.abs(points[:, 0] - x) > 0.6].any()
    assert seen_by(views, points[:0]).shape == (5, 0)
    assert reorder([3, 1], 0, seen_by(views, points[:0]), 4) == [3, 1]


def test_consecutive_views_overlap_more_with_a_longer_look_ahead():
    views, points = strip()
    sees = seen_by(views, points)
    shuffled = list(range(len(views)))
    random.Random(1).shuffle(shuffled)
    shares = [hit_share(reorder(shuffled, None, sees, n), sees) for n in (1, 4, 16, 60)]
    assert shares[0] < 0.15 and shares[1] > 2 * shares[0]
    assert all(b > a + 0.1 for a, b in itertools.pairwise(shares))
    assert shares[-1] > 0.7


def test_the_view_before_decides_how_it_begins():
    views, points = strip()
    sees = seen_by(views, points)
    assert reorder([50, 3, 20, 33], 21, sees, 4)[0] == 20
    assert reorder([50, 3, 20, 33], 21, sees, 2)[0] != 20, "not among the next two"
    assert reorder([50, 3, 20, 33], None, sees, 4)[0] == 50


@settings(deadline=None)
@given(
    views=st.integers(1, 20),
    window=st.integers(1, 30),
    first=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_view_comes_once_and_none_before_its_turn(views, window, first, seed):
    chance = np.random.default_rng(seed)
    sees = chance.integers(0, 256, (views, 3), dtype=np.uint8)
    indices = chance.permutation(views).tolist()
    order = reorder(indices, int(chance.integers(views)) if first else None, sees, window)
    assert sorted(order) == list(range(views))
    for place, index in enumerate(order):
        assert indices.index(index) < place + window
    if window == 1:
        assert order == indices


@settings(deadline=None, max_examples=25)  # each reads the scene's images
@given(lookahead=st.integers(1, 15), asked=st.lists(st.integers(0, 30), min_size=28, max_size=28))
def test_what_is_announced_is_what_comes(scene, tmp_path_factory, lookahead, asked):
    """Over several epochs, however far ahead somebody asks."""
    points = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    ours = manager(scene, tmp_path_factory.getbasetemp(), lookahead, points)
    announced: list[int] = []
    seen = []
    for step, n in enumerate(asked):
        ahead = ours.upcoming(n)
        assert len(ahead) == n and ahead[: len(announced)] == announced[:n]
        announced = max(ahead, announced, key=len)
        camera, _ = ours.next_train(step)
        seen.append(camera.metadata["cam_idx"])
        assert seen[-1] == (announced or seen[-1:])[0]
        announced = announced[1:]
    epoch = len(ours.train_dataset)
    for start in range(0, len(seen) - epoch + 1, epoch):
        assert sorted(seen[start : start + epoch]) == list(range(epoch))


def test_one_leaves_nerfstudios_order_and_more_does_not(scene, tmp_path):
    plain, ones, eights, blind = (
        manager(scene, tmp_path, lookahead, points)
        for lookahead, points in ((1, None), (1, strip()[1]), (8, None), (8, None))
    )
    eights.row_centres = lambda: np.random.default_rng(0).uniform(-1, 1, (500, 3))
    expected = plain.upcoming(40)
    assert ones.upcoming(40) == expected
    assert blind.upcoming(40) == expected, "nobody has said where the rows are"
    assert eights.upcoming(40) != expected


def test_a_training_has_its_rows_order_the_views(scene, tmp_path, monkeypatch):
    monkeypatch.setattr("gsscale_nerfstudio.pipeline.SAMPLES", 70)
    config = make_config(scene, tmp_path, steps=20)
    config.pipeline.datamanager.view_lookahead = 4
    trainer = train(config)
    centres = trainer.pipeline.datamanager.row_centres()
    means = trainer.pipeline.model.means
    step = -(-len(means) // 70)
    assert step > 1 and 35 <= len(centres) <= 70
    assert np.array_equal(centres, means[::step].numpy())
    plain = manager(scene, tmp_path, 1, None)
    assert trainer.pipeline.datamanager.upcoming(30) != plain.upcoming(50)[20:]


def test_few_rows_and_none():
    views, points = strip(3)
    for n in (0, 1, 9):
        assert sorted(reorder(range(3), 1, seen_by(views, points[:n]), 3)) == [0, 1, 2]
    assert seen_by(views, points).shape == (3, 376) and SAMPLES % 8 == 0


def test_the_flag_on_the_command_line():
    words = ["gsscale", "--pipeline.datamanager.view-lookahead", "8"]
    config = tyro.cli(AnnotatedBaseConfigUnion, args=words)
    assert config.pipeline.datamanager.view_lookahead == 8
    config = tyro.cli(AnnotatedBaseConfigUnion, args=["gsscale-big"])
    assert config.pipeline.datamanager.view_lookahead == 1


@pytest.mark.parametrize("lookahead", [0, -3])
def test_no_image_to_choose_from_is_refused(scene, tmp_path, capsys, lookahead):
    config = make_config(scene, tmp_path)
    config.pipeline.datamanager.view_lookahead = lookahead
    ends_with_a_sentence(config, capsys, "view-lookahead", f"or more, not {lookahead}")
    with pytest.raises(GSScaleError, match="1 \\(Nerfstudio's order\\)"):
        manager(scene, tmp_path, lookahead, None)
