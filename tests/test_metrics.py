"""The evaluation's metrics: true renders score as they should, and known defects are caught."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import linalg

from evaluation.metrics import (
    Estimate,
    Normal,
    detail,
    difference_from_base,
    frechet_distance,
    inception_score,
    mean_of,
    objects_and_strays,
    seams,
)
from training.scenes import COLOURS, Scene, render, shrink

SEEDS = range(40)
GRID = (range(64, 512, 64),) * 2


def true_image(seed, texture=None):
    rng = np.random.default_rng([7, seed])
    scene = Scene.draw(rng)
    if texture:
        scene = Scene(scene.count, scene.colour, texture, scene.shape, scene.background)
    return scene, render(scene, rng).round().astype(np.uint8)


def test_true_renders_are_right():
    scenes = [true_image(seed) for seed in SEEDS]
    assert [objects_and_strays(image, scene) for scene, image in scenes] == [(scene.count, 0) for scene, _ in scenes]
    for _, image in scenes:
        base = shrink(image.astype(np.float32), 4).round()
        assert difference_from_base(image, base) < 0.5  # rounding
    assert np.mean([seams(image, GRID) for _, image in scenes]) == pytest.approx(1, abs=0.2)


def paste_copies(scene, image, size, places):
    """The image with small squares of the objects' colour on it."""
    image = image.copy()
    for y, x in places:
        image[y : y + size, x : x + size] = COLOURS[scene.colour]
    return image


@pytest.mark.parametrize("size", [12, 28])  # 0.05 % and 0.3 % of the image
def test_a_repeated_small_object_is_a_stray(size):
    for seed in SEEDS:
        scene, image = true_image(seed)
        corners = [(y, x) for y in (4, 500 - size) for x in (4, 500 - size)]
        background = [
            (y, x)
            for y, x in corners
            if np.ptp(image[max(y - 8, 0) : y + size + 8, max(x - 8, 0) : x + size + 8], (0, 1)).max() < 30
        ]
        copies = paste_copies(scene, image, size, background)
        assert objects_and_strays(copies, scene) == (scene.count, len(background))


def test_a_lost_and_an_added_object_are_counted():
    scene = Scene(1, "red", "plain", "square", "snow")
    image = np.full((512, 512, 3), 252, np.uint8)
    for count in range(4):
        places = [(40 + 150 * i, 60 + 100 * i) for i in range(count)]
        assert objects_and_strays(paste_copies(scene, image, 90, places), scene) == (count, 0)


def test_a_seam_is_caught():
    for seed in SEEDS:
        _, image = true_image(seed, "plain")
        broken = image.astype(np.int16)
        broken[:, 64:128] += 3  # a window three tones brighter
        broken = np.clip(broken, 0, 255).astype(np.uint8)
        assert seams(broken, GRID) > 1.1 * seams(image, GRID)
        elsewhere = ([96], [96])  # where another method's windows would end
        assert seams(broken, elsewhere) <= seams(image, elsewhere)


def test_blur_is_missing_detail():
    for seed in SEEDS:
        _, image = true_image(seed, "striped")
        blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
        enlarged = Image.fromarray(shrink(image.astype(np.float32), 4).round().astype(np.uint8)).resize(
            (512, 512), Image.LANCZOS
        )
        assert detail(blurred) < 0.5 * detail(image)
        assert detail(np.asarray(enlarged)) < 0.5 * detail(image)


def test_a_copy_of_an_object_adds_detail_to_the_image_and_none_to_the_object():
    scene = Scene(1, "red", "striped", "disc", "snow")
    for seed in range(10):
        image = render(scene, np.random.default_rng([7, seed])).round().astype(np.uint8)
        background = image[:, :1].repeat(512, 1)
        once, twice = (np.concatenate([left, image], 1) for left in (background, image))
        assert detail(twice) == pytest.approx(2 * detail(once), rel=0.01)
        assert detail(twice, scene) == pytest.approx(detail(once, scene))
        assert detail(once, scene) > 5 * detail(once)
        assert detail(background, scene) == 0


def test_copies_away_from_the_bases_objects_do_not_count():
    """A finer object beside the base's own, and one on its edge, that is still its place."""
    scene, rng = Scene(1, "red", "plain", "square", "snow"), np.random.default_rng(0)
    image = paste_copies(scene, np.full((512, 512, 3), 252, np.uint8), 160, [(180, 180)])
    image[180:340, 180:340] -= rng.integers(0, 20, (160, 160, 1), np.uint8)
    base = shrink(image.astype(np.float32), 4).round().astype(np.uint8)
    copied = image.copy()
    copied[20:100, 20:100] = COLOURS["red"] - rng.integers(0, 40, (80, 80, 1))
    assert detail(copied, scene) > 1.2 * detail(image, scene)
    assert detail(copied, scene, base) == detail(image, scene, base) == pytest.approx(detail(image, scene))
    for pixels, counts in ((4, True), (5, False)):  # of the base, from its object to a strip, one wide
        strip = image.copy()
        begin = 340 + 4 * (pixels - 1)
        strip[180:340, begin : begin + 4] = COLOURS["red"] - rng.integers(0, 40, (160, 4, 1))
        assert (detail(strip, scene, base) > 1.02 * detail(image, scene, base)) == counts
    assert detail(image, scene, np.full((128, 128, 3), 252, np.uint8)) == 0, "the base has none"


def test_another_picture_differs_from_the_base():
    (_, one), (_, other) = true_image(0), true_image(1)
    assert difference_from_base(other, shrink(one.astype(np.float32), 4)) > 20


def test_frechet_distance_is_that_of_the_normal_distributions():
    """Means 3 apart; diagonal covariances: (sqrt(4) - sqrt(1))² + (sqrt(9) - sqrt(1))² = 1 + 4 besides the means' 9."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 2)) * (2, 3) + (3, 0)
    b = rng.normal(size=(200_000, 2))
    assert frechet_distance(a, Normal.of(b)) == pytest.approx(14, abs=0.1)
    assert frechet_distance(b, Normal.of(b)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_the_covariances_have_other_axes():
    """By the root of their product, as it is written."""
    rng = np.random.default_rng(0)
    own, real = (rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)) + shift for shift in (0, 1))
    product = linalg.sqrtm(np.cov(own, rowvar=False) @ np.cov(real, rowvar=False)).real
    traces = np.trace(np.cov(own, rowvar=False) + np.cov(real, rowvar=False) - 2 * product)
    expected = np.square(own.mean(0) - real.mean(0)).sum() + traces
    assert frechet_distance(own, Normal.of(real)) == pytest.approx(expected, rel=1e-9)


def test_inception_score_counts_the_classes():
    assert inception_score(np.eye(5)) == pytest.approx(5)
    assert inception_score(np.full((8, 5), 0.2)) == pytest.approx(1)


def test_the_interval_covers_the_mean_of_what_it_was_drawn_from():
    rng = np.random.default_rng(0)
    means = (Estimate.of(mean_of(rng.normal(5, 2, 50)), 50, 300, seed) for seed in range(200))
    hits = [low < 5 < high for low, high in (mean.interval for mean in means)]
    assert 0.9 < np.mean(hits) < 0.99


def test_the_interval_of_a_distance_holds_its_value():
    """Pictures drawn twice make every sample's distance larger than that of the pictures themselves."""
    rng = np.random.default_rng(0)
    own, real = rng.normal(size=(24, 12)), rng.normal(size=(500, 12))

    def distance(index):
        return frechet_distance(own[index], Normal.of(real))

    estimate = Estimate.of(distance, 24, 200)
    low, high = estimate.interval
    assert low < estimate.value == distance(np.arange(24)) < high
