"""The evaluation's methods do what their names say, on a tiny random model."""

import numpy as np
import pytest
from tiny import tiny_pipeline

from evaluation.methods import ABLATION, METHODS, make, make_job, only
from lib_demofusion import fusion, phases
from lib_demofusion.config import DemoFusionConfig

STEPS, SCALE = 4, 2


@pytest.fixture(scope="module")
def job():
    return make_job(tiny_pipeline("sd15", 16), "one red ring", 3, SCALE, STEPS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_picture_of_the_size(job, name):
    picture = make(METHODS[name], job)
    assert picture.image.shape == (256, 256, 3)
    assert picture.image.dtype == np.uint8
    assert np.array_equal(make(METHODS[name], job).image, picture.image), "the same seed, another picture"


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("Lanczos", 0),
        ("direct", 2 * 4 * 4),
        ("MultiDiffusion", 2 * 4 * 9),
        ("Hires. fix, latent 0.7", 2 * 2 * 4),  # 70 % of four steps, rounded down, at four times the area
        ("Hires. fix, Lanczos 0.5", 2 * 2 * 4),
        ("tiles 0.35", 2 * 1 * 9),
        ("DemoFusion", 2 * 4 * 13),
    ],
)
def test_costs_are_counted_at_the_bases_size(job, name, evaluations):
    seen = []
    handle = job.pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    picture = make(METHODS[name], job)
    handle.remove()
    counted = sum(shape[0] * shape[2] * shape[3] / 256 for shape in seen) - (
        2 * STEPS if "Fusion" in name or "Diff" in name else 0
    )
    assert picture.evaluations == counted == evaluations


def test_the_parts_of_demofusion():
    config, (names) = DemoFusionConfig(scale=3.0), [*ABLATION]
    assert names == ["none", "DS", "SR", "SR + DS", "PU", "PU + DS", "PU + SR", "PU + SR + DS"]
    with only(progressive=False, skip_residual=False, dilated=False):
        assert [phase.views for phase in phases.make_plan((8, 8), 4, config).phases] == [1, 25]
        weights = fusion.weights_at(600, config, 1000)
        assert (weights.c1, weights.c2) == (0, 0)
    with only(progressive=True, skip_residual=True, dilated=False):
        assert [phase.views for phase in phases.make_plan((8, 8), 4, config).phases] == [1, 9, 25]
        assert fusion.weights_at(600, config, 1000).c1 > 0
    whole = phases.make_plan((8, 8), 4, config)
    with only(True, True, True):
        assert phases.make_plan((8, 8), 4, config) == whole


def test_the_base_is_the_first_phase_of_demofusion(job):
    """What the methods enlarge is what DemoFusion starts from."""
    from lib_demofusion.hosts.diffusers import generate

    result = generate(job.pipe, job.caption, config=DemoFusionConfig(scale=2.0), seed=3, steps=STEPS)
    assert np.array_equal(np.asarray(result.images(0)[0]), np.asarray(job.base))
