"""Properties of the views, with drawn shapes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaincinv

from lib_demofusion.views import View, dilated_views, jitter_generator, local_views, window_starts

sides = st.integers(1, 24)


@st.composite
def geometries(draw):
    """(size, window, stride) with window <= size <= 8 windows and stride <= window, each axis on its own."""
    window = draw(sides), draw(sides)
    size = tuple(draw(st.integers(w, min(8 * w, 96))) for w in window)
    stride = tuple(draw(st.integers(1, w)) for w in window)
    return size, window, stride


@given(geometries(), st.booleans(), st.integers(0, 2**32 - 1))
def test_windows_cover_every_latent_pixel_and_stay_inside(geometry, jitter, seed):
    size, window, stride = geometry
    count = torch.zeros(size)
    for view in local_views(size, window, stride, torch.Generator().manual_seed(seed) if jitter else None):
        assert 0 <= view.top <= size[0] - window[0]
        assert 0 <= view.left <= size[1] - window[1]
        view.crop(count).add_(1)
    assert count.min() >= 1


@given(geometries(), st.integers(0, 2**32 - 1))
def test_jitter_keeps_the_number_of_windows_and_the_borders(geometry, seed):
    size, window, stride = geometry
    still = local_views(size, window, stride)
    moved = local_views(size, window, stride, torch.Generator().manual_seed(seed))
    assert len(moved) == len(still)
    for a, b in zip(still, moved):
        assert abs(a.top - b.top) <= (window[0] - stride[0]) // 4
        assert abs(a.left - b.left) <= (window[1] - stride[1]) // 4
        assert a.top not in (0, size[0] - window[0]) or a.top == b.top
        assert a.left not in (0, size[1] - window[1]) or a.left == b.left


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(16, 16, 8, [0]), (32, 16, 8, [0, 8, 16]), (33, 16, 8, [0, 8, 16, 17]), (20, 16, 16, [0, 4]), (17, 16, 1, [0, 1])],
)
def test_the_last_window_is_clamped_to_the_edge(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts


@given(sides, sides, st.integers(1, 8))
def test_splitting_and_merging_dilated_views_is_exact(h, w, dilation):
    x = torch.randn(2, 3, dilation * h, dilation * w)
    merged = torch.full_like(x, torch.nan)
    views = dilated_views((h, w), dilation)
    for view in views:
        assert view.crop(x).shape == (2, 3, h, w)
        view.crop(merged).copy_(view.crop(x))
    assert torch.equal(merged, x)
    assert len(views) == dilation**2
    i, j = divmod(len(views) - 1, dilation)
    assert torch.equal(views[-1].crop(x), x[..., i::dilation, j::dilation])


def test_views_know_their_place_in_pixels():
    assert View("local", 3, 5, 16, 24).crop_pixels(8) == (24, 40)
    assert View("dilated", 1, 2, 16, 24, 3).crop_pixels(8) == (0, 0)


def test_jitter_is_keyed_by_phase_and_noise_level():
    def draw(phase, t):
        return torch.randint(0, 1000, (8,), generator=jitter_generator(phase, t)).tolist()

    assert draw(2, 901.0) == draw(2, 901.0)
    assert len({tuple(draw(phase, t)) for phase in (2, 3, 4) for t in (1.0, 2.0, 500.0, 901.0)}) == 12


# Stable Diffusion's noise levels, by training timestep.
KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SIGMAS = np.sqrt((1 - KEPT) / KEPT)


def timestep(sigma):
    return np.interp(np.log(sigma), np.log(SIGMAS), np.arange(1000))


def sigma_at(t):
    return np.exp(np.interp(t, np.arange(1000), np.log(SIGMAS)))


def between(low, high, n):
    return high + np.linspace(0, 1, n) * (low - high)


def align_your_steps(n, known):
    known = np.log(known)
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(known)), known))


LOW, HIGH = SIGMAS[[0, -1]]
# The noise levels of the WebUI's schedules of n steps, by its names (modules/sd_schedulers.py); Automatic, Uniform and Normal
# are one, and the timesteps of DDIM and of PLMS are whole, as those of Simple.
SCHEDULES = {
    "Automatic": lambda n: sigma_at(np.linspace(999, 0, n)),
    "Karras": lambda n: between(LOW ** (1 / 7), HIGH ** (1 / 7), n) ** 7,
    "Exponential": lambda n: np.exp(between(np.log(LOW), np.log(HIGH), n)),
    "SGM Uniform": lambda n: sigma_at(np.linspace(999, 0, n + 1)[:-1]),
    "KL Optimal": lambda n: np.tan(between(np.arctan(LOW), np.arctan(HIGH), n + 1)),
    "Align Your Steps": lambda n: align_your_steps(
        n, [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    ),
    "Align Your Steps XL": lambda n: align_your_steps(
        n, [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]
    ),
    "Simple": lambda n: SIGMAS[[-1 - int(step * 1000 / n) for step in range(n)]],
    "DDIM": lambda n: SIGMAS[1 :: 1000 // n][::-1],
    "Beta": lambda n: LOW + betaincinv(0.6, 0.6, np.linspace(1, 0, n)) * (HIGH - LOW),
}


def seeds(ts):
    return np.array([jitter_generator(2, t).initial_seed() for t in ts.tolist()])


@pytest.mark.parametrize("name", SCHEDULES)
def test_jitter_does_not_depend_on_the_rounding_of_noise_levels(name):
    """Not at any step of 2 to 150 steps. float32 holds sigma to 6e-8 of it; timesteps are found from it less precisely."""
    sigmas = np.unique(np.concatenate([SCHEDULES[name](n) for n in range(2, 151)]))
    assert (seeds(timestep(sigmas * (1 - 3e-7))) != seeds(timestep(sigmas * (1 + 3e-7)))).sum() == 0
    ts = np.unique(timestep(np.concatenate([SCHEDULES[name](n) for n in range(2, 51)])))
    assert (seeds(ts - 8e-4) != seeds(ts + 8e-4)).sum() == 0


@pytest.mark.parametrize("name", ["Karras", "Exponential", "Beta"])
def test_jitter_of_a_host_that_rounds_its_timesteps_is_mostly_the_same(name):
    ts = timestep(np.concatenate([SCHEDULES[name](n) for n in range(2, 51)]))
    assert (seeds(ts) != seeds(ts.round())).mean() < 0.05


def test_jitter_is_another_at_each_of_evenly_spaced_timesteps():
    for n in (2, 10, 50, 150, 500, 999, 1000):
        assert len(set(seeds(np.linspace(999, 0, n)))) == n


@pytest.mark.parametrize("name", SCHEDULES)
def test_jitter_is_shared_by_close_steps_at_the_ends_alone(name):
    for n in range(2, 151):
        ts = timestep(SCHEDULES[name](n))
        drawn = seeds(ts[(ts > 11) & (ts < 988)])
        assert (drawn[1:] != drawn[:-1]).all()


@given(geometries())
def test_the_number_of_windows_is_the_papers_formula_where_the_stride_divides(geometry):
    size, window, stride = geometry
    expected = math.prod(math.ceil((n - w) / s) + 1 for n, w, s in zip(size, window, stride))
    assert len(local_views(size, window, stride)) == expected
