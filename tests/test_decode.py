import pytest
import torch
import torch.nn.functional as F

from lib_demofusion.decode import decode, encode


def enlarge(z):
    return F.interpolate(z[:, :3], scale_factor=8, mode="nearest")


def shrink(x):
    return F.avg_pool2d(torch.cat([x, x[:, :1]], 1), 8)


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (17, 40), (40, 9), (33, 57)])
def test_tiles_give_what_the_whole_gives(size):
    z = torch.randn(2, 4, *size)
    torch.testing.assert_close(decode(enlarge, z, tile=16, overlap=4), enlarge(z))
    x = enlarge(z)
    torch.testing.assert_close(encode(shrink, x, tile=16, overlap=4), shrink(x))


def test_no_tile_is_larger_than_asked_and_small_pictures_are_one_tile():
    seen = []

    def spy(z):
        seen.append(tuple(z.shape[-2:]))
        return enlarge(z)

    decode(spy, torch.randn(1, 4, 16, 12), tile=16, overlap=4)
    assert seen == [(16, 12)]
    seen.clear()
    decode(spy, torch.randn(1, 4, 30, 12), tile=16, overlap=4)
    assert seen == [(16, 12)] * 3


def test_seams_are_blended_linearly():
    """Tiles that disagree, as an autoencoder's may, meet in a ramp and not in a step."""
    tiles = iter([0.0, 1.0])
    row = decode(lambda z: torch.full((1, 3, 8 * 16, 8 * 16), next(tiles)), torch.randn(1, 4, 16, 28), tile=16, overlap=4)[
        0, 0, 0
    ]
    assert row[0] == 0
    assert row[-1] == 1
    assert float(row.diff().max()) < 1.5 / (4 * 8)
    assert float(row.diff().min()) >= 0
