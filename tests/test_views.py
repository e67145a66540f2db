"""Properties of the views, with drawn shapes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    assert len({tuple(draw(phase, t)) for phase in (2, 3, 4) for t in (1.0, 1.5, 500.0, 901.0)}) == 12


@given(geometries())
def test_the_number_of_windows_is_the_papers_formula_where_the_stride_divides(geometry):
    size, window, stride = geometry
    expected = math.prod(math.ceil((n - w) / s) + 1 for n, w, s in zip(size, window, stride))
    assert len(local_views(size, window, stride)) == expected
