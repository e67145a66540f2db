"""Where a phase is held and where it is not guided: from the contrast of the picture before."""

import pytest
import torch
from tiny import checkered

from lib_demofusion.areas import Areas, areas_of, guidance_scale
from lib_demofusion.config import DemoFusionConfig


@pytest.mark.parametrize("name", ["hold_flat", "unguided_flat"])
def test_flat_is_what_differs_little_from_its_blur(name):
    """The one setting leaves the other's area alone."""
    config = DemoFusionConfig(**{name: 12.0})

    def of(image):
        own, other = areas_of(image, config)[:: 1 if name == "hold_flat" else -1]
        assert other is None
        return own[0, 0]

    flat = of(checkered(6))
    assert flat.shape == (12, 12)
    around = torch.ones(12, 12, dtype=torch.bool)
    around[3:9, 3:9] = False  # the square's latent pixels and their neighbours
    assert flat[around].min() > 0.95, "a gradual change is flat, up to the image's edge"
    assert flat[4:8, 4:8] == pytest.approx(torch.full((4, 4), 0.5), abs=0.05), "half of the contrast that is let go"
    assert of(checkered(24))[3:9, 3:9].max() == 0


def test_each_area_has_a_limit_of_its_own():
    held, unguided = areas_of(checkered(6), DemoFusionConfig(hold_flat=12.0, unguided_flat=24.0))
    assert held[0, 0, 5, 5] == pytest.approx(0.5, abs=0.05)
    assert unguided[0, 0, 5, 5] == pytest.approx(0.75, abs=0.05)
    assert areas_of(checkered(6), DemoFusionConfig()) == (None, None)


def test_areas_of_several_are_put_together():
    some, more = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)
    assert Areas.cat([]) == Areas.cat([Areas(), Areas()]) == Areas()
    both = Areas.cat([Areas(some), Areas(more)])
    assert both.unguided is None
    assert torch.equal(both.held, torch.cat([some, more]))
    assert Areas(some) | Areas() == Areas() | Areas(some) == Areas(some)
    assert torch.equal((Areas(some) | Areas(more)).held, some.maximum(more))
    part = Areas(unguided=some).cropped(1, 2, (3, 2))
    assert part.held is None
    assert torch.equal(part.unguided, some[..., 1:4, 2:4])


def test_guidance_is_off_where_it_is_said_to_be():
    areas = torch.tensor([0.0, 0.5, 1.0])
    assert guidance_scale(7.0, None) == 7
    assert guidance_scale(7.0, areas).tolist() == [7, 4, 1]
    assert guidance_scale(1.0, areas).tolist() == [1, 1, 1]
