"""A given picture at the size of every phase, and what of it stays."""

import pytest
import torch

from lib_demofusion.areas import Areas
from lib_demofusion.original import Original

SIZE = (6, 8)


class Picture:
    """Latents of a picture by their size, and how often they were asked for."""

    def __init__(self, images=1, dtype=torch.float32):
        self.images = images
        self.dtype = dtype
        self.asked = []

    def __call__(self, size):
        self.asked.append(size)
        generator = torch.Generator().manual_seed(size[0])
        return torch.randn(1, 4, *size, generator=generator).repeat(self.images, 1, 1, 1).to(self.dtype)


def middle(size):
    mask = torch.zeros(1, 1, *size)
    mask[..., 1:-1, 1:-1] = 1
    return mask


def test_without_a_mask_the_picture_is_all_there_is():
    picture = Picture()
    reference, areas = Original(picture).begin(SIZE)
    assert torch.equal(reference, picture(SIZE))
    assert areas == Areas(None, None)
    x = torch.randn(1, 4, *SIZE)
    assert Original(picture).around(x, Areas()) == (x, Areas())
    assert Original(picture).keep(x) is x


def test_the_pictures_areas_count_in_every_phase_at_its_size():
    flat = torch.zeros(1, 1, 3, 4)
    flat[..., :2] = 1
    original = Original(Picture(), areas=Areas(held=flat, unguided=flat / 2))
    own = torch.zeros(1, 1, *SIZE)
    own[..., -1] = 0.75
    for areas, last in ((original.begin(SIZE)[1], 0), (original.around(torch.zeros(1, 4, *SIZE), Areas(own, own))[1], 0.75)):
        for area, most in zip(areas, (1, 0.5)):
            assert area.shape == (1, 1, *SIZE)
            assert area[..., :3].min() == area[..., :3].max() == most
            assert area[..., 5:-1].max() == 0
            assert (area[..., -1] == last).all()


@pytest.mark.parametrize("images", [1, 2])
def test_what_lies_outside_the_mask_is_the_pictures_to_the_bit(images):
    picture = Picture(images)
    original = Original(picture, mask=middle)
    inside = middle(SIZE).bool().expand(images, 4, -1, -1)
    x = torch.randn(images, 4, *SIZE)
    reference, (held, unguided) = original.around(x, Areas())
    assert unguided is None
    assert torch.equal(reference[~inside], picture(SIZE)[~inside])
    assert torch.equal(reference[inside], x[inside])
    assert torch.equal(held, 1 - middle(SIZE))
    assert torch.equal(original.keep(x), reference)


def test_outside_the_mask_all_is_held_and_inside_what_is_flat():
    flat = torch.full((1, 1, 2, 2), 0.25)
    _, (held, _) = Original(Picture(), areas=Areas(held=flat), mask=middle).begin(SIZE)
    assert torch.equal(held, torch.where(middle(SIZE) == 1, 0.25, 1.0))
    half = Areas(held=torch.full((1, 1, *SIZE), 0.5))
    _, (held, _) = Original(Picture(), mask=middle).around(torch.zeros(1, 4, *SIZE), half)
    assert torch.equal(held, torch.where(middle(SIZE) == 1, 0.5, 1.0))


def test_the_first_phase_begins_with_what_is_filled_in_under_the_mask():
    picture, inside = Picture(), middle(SIZE).bool().expand(1, 4, -1, -1)
    assert torch.equal(Original(picture, mask=middle).begin(SIZE)[0], picture(SIZE))
    reference, _ = Original(picture, mask=middle, fill=lambda latents: latents * 0 + 7).begin(SIZE)
    assert torch.equal(reference[~inside], picture(SIZE)[~inside])
    assert (reference[inside] == 7).all()


def test_a_phase_asks_for_the_picture_once():
    picture = Picture()
    original = Original(picture, mask=middle)
    for size in (SIZE, (9, 12)):
        original.keep(original.around(*original.begin(size))[0])
    assert picture.asked == [SIZE, (9, 12)]


def test_the_mask_has_the_type_of_the_latents():
    original = Original(Picture(dtype=torch.float16), mask=middle)
    reference, (held, _) = original.around(torch.zeros(1, 4, *SIZE, dtype=torch.float16), Areas())
    assert reference.dtype == held.dtype == torch.float16
