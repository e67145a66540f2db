"""Control images: each view sees what lies under it."""

import pytest
import torch
import torch.nn.functional as F

from lib_demofusion.control import FEW_COLOURS, Hint, coarse_size, few_colours, seen_by
from lib_demofusion.fusion import pad_edges
from lib_demofusion.views import View, dilated_views, jitter_generator, local_views


def ramp(height, width, size):
    """An image whose two channels are the place of each pixel's centre in the latent, (row, column)."""
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) * size[0] / height
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) * size[1] / width
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])[None].float()


def ramp_hint(size, dilation, nearest=False, factor=8):
    fine = ramp(factor * size[0], factor * size[1], size)
    return Hint(fine, ramp(*coarse_size(size, dilation, factor), size), size, factor, nearest)


SIZES = [((16, 16), 1.5), ((16, 16), 2), ((16, 16), 2.5), ((16, 24), 2.5), ((16, 24), 3), ((12, 16), 4)]


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(("window", "scale"), SIZES)
def test_a_view_sees_what_lies_under_its_pixels(window, scale, nearest):
    """The mean place of what a view sees, for each of its latent pixels, is that pixel's place."""
    size = tuple(round(side * scale) for side in window)
    d = -(-size[0] // window[0])
    hint = ramp_hint(size, d, nearest)
    places = ramp(*size, size)  # of the latent pixels themselves
    grown, _ = pad_edges(places, (window[0] * d, window[1] * d))
    views = local_views(size, window, (5, 7), jitter_generator(2, 500.0)) + dilated_views(window, d)
    seen = hint.crops(views)
    assert seen.shape == (len(views), 2, 8 * window[0], 8 * window[1])
    for view, crop in zip(views, seen):
        expected = view.crop(places if view.kind == "local" else grown)[0]
        means = F.avg_pool2d(crop, 8)
        inside = torch.ones_like(means, dtype=torch.bool)
        if view.kind == "dilated":  # where the latent's edges are repeated, the image's are
            for axis, side in enumerate(size):
                inside &= ((expected[axis] > d) & (expected[axis] < side - d))[None]
        tolerance = 0.5 * d / 8 + 1e-3 if nearest and view.kind == "dilated" else 1e-3
        assert (means - expected)[inside].abs().max() <= tolerance
        assert (means - expected).abs().max() <= d  # and beside them no farther than a pixel of the view


@pytest.mark.parametrize(("window", "scale"), SIZES)
def test_a_rolled_latent_is_seen_with_a_rolled_image(window, scale):
    size = tuple(round(side * scale) for side in window)
    d = -(-size[0] // window[0])
    image = torch.rand(1, 3, 8 * size[0], 8 * size[1], generator=torch.Generator().manual_seed(1))
    coarse = F.adaptive_avg_pool2d(image, coarse_size(size, d))
    roll = (5, size[1] - 3)
    views = local_views(size, window, (5, 7), jitter_generator(2, 500.0))
    rolled = Hint(torch.roll(image, [8 * shift for shift in roll], (2, 3)), coarse, size)
    assert torch.equal(Hint(image, coarse, size).crops(views, roll), rolled.crops(views))
    assert not torch.equal(Hint(image, coarse, size).crops(views), rolled.crops(views))


def test_dilated_views_of_a_rolled_latent_see_a_rolled_image():
    coarse = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    fine, size, roll = F.interpolate(coarse, scale_factor=2), (32, 32), (5, 29)
    shifted = torch.roll(coarse, [4 * shift for shift in roll], (2, 3))  # four of its pixels are a latent pixel
    views = dilated_views((16, 16), 2)
    assert torch.equal(Hint(fine, coarse, size).crops(views, roll), Hint(fine, shifted, size).crops(views))


def test_local_windows_and_dilated_views_of_a_whole_scale_take_pixels_as_they_are():
    image = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    coarse = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    hint = Hint(image, coarse, (32, 32))
    window = View("local", 3, 9, 16, 16)
    assert torch.equal(hint.crops([window]), image[..., 24:152, 72:200])
    # A dilated view begins half a latent pixel before or after the image, which is two of its own pixels.
    first, last = hint.crops([dilated_views((16, 16), 2)[0]]), hint.crops([dilated_views((16, 16), 2)[3]])
    assert first.dtype == torch.uint8
    assert torch.equal(first[..., 2:, 2:], coarse[..., :-2, :-2])
    assert torch.equal(last[..., :-2, :-2], coarse[..., 2:, 2:])
    assert torch.equal(first[..., :2, 2:], coarse[..., :1, :-2].expand(-1, -1, 2, -1))  # its edge is repeated


def test_drawings_are_never_mixed():
    image = (torch.rand(1, 3, 300, 200, generator=torch.Generator().manual_seed(1)) > 0.5).to(torch.uint8) * 255
    for view in dilated_views((16, 16), 3):
        seen = seen_by(image, view, (40, 40), nearest=True)
        assert seen.dtype == torch.uint8
        assert set(seen.unique().tolist()) == {0, 255}
    mixed = seen_by(image, dilated_views((16, 16), 3)[0], (40, 40))
    assert len(mixed.unique()) > 2


def test_few_colours_are_told_from_shades():
    shades = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    assert not few_colours(shades)
    assert few_colours(shades // 2)
    packed = torch.arange(FEW_COLOURS)
    assert not few_colours(torch.stack([packed // 16, packed % 16, packed * 0]).to(torch.uint8)[:, None])
    assert few_colours(torch.stack([packed // 16, packed % 16, packed * 0]).to(torch.uint8)[:, None, 1:])
