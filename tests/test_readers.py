"""The network that reads pictures: true renders score as they should, and what they are not is caught."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from evaluation.judges import Made, SceneJudge
from evaluation.readers import CLASSES, CLOSE, WHOLE, Reader, close_up, labels, small, train, true_render
from training.scenes import COUNTS, LAYOUTS, SHAPES, Scene, object_mask
from training.train import to_unit

COUNT = 40


@pytest.fixture(scope="module")
def judge():
    return SceneJudge()


@pytest.fixture(scope="module")
def real(judge):
    return judge.of_true(COUNT, (512, 512))


@pytest.fixture(scope="module")
def renders():
    return [true_render(11, index)[1] for index in range(COUNT)]


@pytest.fixture(scope="module")
def true(judge, real, renders):
    return scores(judge, real, renders)


def scores(judge, real, images):
    made, bases, scenes = [], [], [true_render(11, index)[0] for index in range(COUNT)]
    for index, (scene, image) in enumerate(zip(scenes, map(np.asarray, images))):
        base = small(image)
        made.append(judge.of_picture(Made(scene, index, image, base, stride=0.5, window=(128, 128))))
        bases.append(judge.of_base(scene, base, (512, 512)))
    made, bases = ({name: np.stack([own[name] for own in records]) for name in records[0]} for records in (made, bases))
    return {name: statistic(np.arange(COUNT)) for name, statistic in judge.statistics(scenes, made, bases, real).items()}


def test_what_it_reads():
    assert set(WHOLE) | set(CLOSE) == set(CLASSES)
    assert labels(Scene(2, "green", "dotted", "disc", "sky")) == [1, 3, 2, 2, 2]
    features = Reader()(torch.zeros(3, 3, 128, 128))
    assert features.shape == (3, 32)
    assert all(torch.allclose(chances.sum(-1), torch.ones(3)) for chances in Reader().chances(features).values())


def test_it_learns():
    """A few steps on few scenes: better than chance at what is easiest to see."""
    threads = torch.get_num_threads()
    reader = train(scenes=64, steps=40)
    torch.set_num_threads(threads)
    images = [true_render(13, index) for index in range(COUNT)]
    with torch.no_grad():
        chances = reader.chances(reader(to_unit(np.stack([small(image) for _, image in images]))))
    right = chances["background"].argmax(-1) == torch.tensor([labels(scene)[4] for scene, _ in images])
    assert right.float().mean() > 0.5  # chance is 0.2


def test_a_close_up_is_of_an_object():
    for index in range(COUNT):
        scene, image = true_render(12, index)
        crop = close_up(image, scene, np.random.default_rng(index))
        assert crop.shape == (128, 128, 3)
        assert object_mask(crop, scene).mean() > 0.15


def test_a_close_up_of_a_larger_image_is_as_of_one_of_512():
    scene, image = true_render(12, 0)
    crops = [close_up(x, scene, np.random.default_rng(0)) for x in (image, image.repeat(2, 0).repeat(2, 1))]
    assert np.array_equal(*crops)


def test_true_renders_score_as_they_should(true):
    assert true["count right"] == true["count kept"] == 1
    assert true["strays"] == 0
    assert true["off the base"] < 0.5
    assert true["detail"] == pytest.approx(1, abs=0.3)
    assert true["object detail"] == pytest.approx(1, abs=0.1)
    assert true["base object detail"] == pytest.approx(true["object detail"], abs=0.01)
    assert true["caption right"] > 0.98
    assert true["texture right"] > 0.95


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scene_has_detail_to_compare_with_also_where_pictures_are_wide(layout):
    judge = SceneJudge(layout)
    scenes = [Scene(count, "red", "plain", shape, "snow") for count in COUNTS for shape in SHAPES]
    assert all(judge.object_detail(scene, (256, 512)) > 0 for scene in scenes)


def test_pictures_of_other_captions_are_caught(judge, real, renders, true):
    others = scores(judge, real, [*renders[1:], renders[0]])
    assert others["CLIP"] < true["CLIP"] - 0.2
    assert others["caption right"] < true["caption right"] - 0.2
    assert others["count right"] < 0.7
    assert others["FID"] == pytest.approx(true["FID"], abs=1e-3), "they are the same pictures"


def test_blurred_pictures_are_caught(judge, real, renders, true):
    blurred = scores(judge, real, [Image.fromarray(x).filter(ImageFilter.GaussianBlur(6)) for x in renders])
    assert blurred["crop FID"] > 1.5 * true["crop FID"]
    assert blurred["detail"] < 0.2
    assert blurred["object detail"] < 0.2
    assert blurred["base object detail"] < 0.2
    assert blurred["count right"] > 0.8, "blur hides no object"


def test_one_picture_again_and_again_is_caught(judge, real, renders, true):
    same = scores(judge, real, [renders[0]] * COUNT)
    assert same["IS"] < 0.5 * true["IS"]
    assert same["FID"] > 2 * true["FID"]
