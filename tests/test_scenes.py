"""The scenes that the embedded checkpoint is trained on, and the counter that its pictures are judged by."""

import numpy as np
import pytest

from training.scenes import CROP, LAYOUTS, TEXTURES, Scene, count_objects, crops, render, shrink, vocabulary


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(40))
def test_the_counter_finds_what_was_drawn_at_every_size(seed, layout):
    rng = np.random.default_rng(seed)
    scene = Scene.draw(rng)
    image = render(scene, rng, layout)
    assert count_objects(image.astype(np.uint8), scene) == scene.count
    assert count_objects(shrink(image, 4).astype(np.uint8), scene) == scene.count


def test_the_counter_counts_what_is_there_and_not_what_was_asked_for():
    asked, drawn = Scene(1, "red", "plain", "star", "sand"), Scene(3, "red", "plain", "disc", "sand")
    assert count_objects(render(drawn, np.random.default_rng(0)).astype(np.uint8), asked) == 3


def test_a_scene_is_the_same_for_the_same_seed_and_its_caption_says_what_it_is():
    scene = Scene(2, "blue", "dotted", "star", "sand")
    assert scene.caption == "two blue dotted stars on sand"
    assert set(scene.caption.split()) <= set(vocabulary())
    assert np.array_equal(*(render(scene, np.random.default_rng(3)) for _ in range(2)))


def test_a_scene_is_the_same_with_more_pixels():
    scene = Scene(2, "blue", "striped", "disc", "sand")
    plain, finer = (render(scene, np.random.default_rng(3), times=times) for times in (1, 2))
    assert finer.shape == (1024, 1024, 3)
    assert np.abs(shrink(finer, 2) - plain).mean() < 0.2
    assert np.abs(finer - plain.repeat(2, 0).repeat(2, 1)).mean() > 0.2, "and finer"


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_textures_are_coarse_at_4x_and_finer_than_a_latent_pixel_at_1x(texture):
    """How often a row through one large square changes its tone: well over once in 8 pixels of 128, less in 512."""
    image = render(Scene(1, "red", texture, "square", "snow"), np.random.default_rng(5))[..., 0]
    ys, xs = np.where(_objects(image))
    row = image[int(ys.mean()) + 3, xs.min() + 20 : xs.max() - 20]
    changes = np.count_nonzero(np.diff(row > row.mean()))
    assert changes / len(row) < 1 / 8
    assert changes / (len(row) / 4) > 1 / 8 * 1.5


def _objects(red):
    """Pixels that are not the snow, which is bright in red."""
    return red < 213


def test_objects_in_a_row_stand_on_one_line():
    for seed in range(10):
        red = render(Scene(3, "red", "plain", "disc", "snow"), np.random.default_rng(seed), "row")[..., 1] < 150
        edges = np.flatnonzero(np.diff(red.any(0)))
        assert len(edges) == 6, "three discs side by side"
        grounds = [np.nonzero(red[:, left : right + 1])[0].max() for left, right in edges.reshape(3, 2)]
        assert np.ptp(grounds) < 4


def test_crops_are_the_whole_and_close_ups():
    scene, rng = Scene(1, "red", "plain", "disc", "sky"), np.random.default_rng(0)
    image = render(scene, rng)
    views = crops(image, rng)
    assert views.shape == (4, CROP, CROP, 3)
    assert np.array_equal(views[0], shrink(image, 4).round().astype(np.uint8))
