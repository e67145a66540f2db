"""Tiles against the whole: on the embedded autoencoder, and on both layouts of Stable Diffusion's, small and random."""

import functools
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from lib_demofusion import decode as tiles
from lib_demofusion.decode import Sample, Span, Tile, decode, encode, resamplers, shares, spans, tile_for
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT


def diffusers_autoencoder():
    """Stable Diffusion's layout, with attention in the middle, at a sixteenth of its width."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


class Residual(nn.Module):
    def __init__(self, given, made):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, given), nn.Conv2d(given, made, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, made), nn.Conv2d(made, made, 3, padding=1)
        self.shortcut = nn.Conv2d(given, made, 1)

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, channels), nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class WebuiNetwork(nn.Module):
    """Decoder or encoder as the WebUI's checkpoints have them: `mid` is called part by part, `up` is stored reversed."""

    def __init__(self, given, made, decoder):
        super().__init__()
        self.conv_in = nn.Conv2d(given, 16, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Residual(16, 16), Attention(16), Residual(16, 16)
        levels = nn.ModuleList(nn.Module() for _ in range(4))
        for i, level in enumerate(levels):
            level.block = nn.ModuleList([Residual(16, 16)])
            if decoder and i > 0:
                level.upsample = Upsample(16)
            if not decoder and i < 3:
                level.downsample = Downsample(16)
        setattr(self, "up" if decoder else "down", levels)
        self.norm_out, self.conv_out = nn.GroupNorm(4, 16), nn.Conv2d(16, made, 3, padding=1)

    def middle(self, h):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)

    def forward(self, x):
        h = self.conv_in(x)
        if hasattr(self, "up"):
            h = self.middle(h)
            for level in reversed(self.up):
                h = level.block[0](h, None)
                h = level.upsample(h) if hasattr(level, "upsample") else h
        else:
            for level in self.down:
                h = level.block[0](h, None)
                h = level.downsample(h) if hasattr(level, "downsample") else h
            h = self.middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@functools.cache
def networks(kind):
    """((decodes, decoder), (encodes, encoder)) of one autoencoder."""
    if kind == "webui":
        torch.manual_seed(0)
        decoder, encoder = WebuiNetwork(4, 3, decoder=True), WebuiNetwork(3, 4, decoder=False)
        return (lambda z: decoder(z / 0.18), decoder), (lambda x: encoder(x) * 0.18, encoder)
    if kind == "diffusers":
        vae = diffusers_autoencoder()
    else:
        vae = AutoencoderKL.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="vae").eval()
    return (lambda z: vae.decode(z).sample, vae.decoder), (lambda x: vae.encode(x).latent_dist.mode(), vae.encoder)


LAYOUTS = ("diffusers", "webui")


@pytest.fixture(params=LAYOUTS)
def autoencoder(request):
    return networks(request.param)


def smooth(channels, h, w):
    """A random field whose halves differ, as an image's sky and ground do: tiles' own statistics are far off."""
    torch.manual_seed(1)
    coarse = F.interpolate(torch.randn(1, channels, 5, 5), (h, w), mode="bicubic")
    return coarse + 0.4 * torch.randn(1, channels, h, w) * torch.linspace(0, 2, w)


def decibels(x, whole):
    return 20 * math.log10(float(whole.max() - whole.min()) / float((x - whole).pow(2).mean().sqrt()))


@contextmanager
def watched(modules):
    """(module, size of its input, size of its output) of every call of the modules."""
    calls = []

    def watch(module, args, output):
        calls.append((module, tuple(args[0].shape[-2:]), tuple(output.shape[-2:])))

    handles = [module.register_forward_hook(watch) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "expected"),
    [
        (16, 16, 4, [(0, 16, (0, 16))]),  # fits
        (5, 16, 4, [(0, 5, (0, 5))]),
        (28, 16, 4, [(0, 16, (0, 14)), (12, 28, (14, 28))]),  # divides
        (40, 16, 4, [(0, 16, (0, 14)), (12, 28, (14, 26)), (24, 40, (26, 40))]),
        (17, 16, 4, [(0, 11, (0, 8)), (6, 17, (8, 17))]),  # does not: equally long, shorter tiles
        (33, 16, 4, [(0, 14, (0, 12)), (10, 24, (12, 21)), (19, 33, (21, 33))]),
        (33, 16, 10, [(0, 16, (0, 11)), (6, 22, (11, 17)), (12, 28, (17, 22)), (17, 33, (22, 33))]),
    ],
)
def test_spans(length, tile, overlap, expected):
    assert spans(length, tile, overlap) == [Span(*span) for span in expected]


@pytest.mark.parametrize(
    ("size", "tile", "starts"),
    [
        ((32, 32), 24, [(0, 0), (0, 10), (10, 0), (10, 10)]),
        ((24, 48), 24, [(0, 0), (0, 12), (0, 24)]),
        ((48, 20), 24, [(0, 0), (12, 0), (24, 0)]),
        ((29, 50), 24, [(0, 0), (0, 10), (0, 20), (0, 28), (8, 0), (8, 10), (8, 20), (8, 28)]),
    ],
)
def test_tiles_cover_an_image_row_by_row(size, tile, starts):
    seen = []

    def run(part):
        seen.append((part.rows.start, part.columns.start))
        return part.crop(x)

    x = torch.randn(1, 2, *size)
    torch.testing.assert_close(tiles._assemble(run, size, tile, 12, 1), x)
    assert seen == starts


@pytest.mark.parametrize("overlap", [0, 16, 20])
def test_an_overlap_that_leaves_no_tile_is_refused(overlap):
    with pytest.raises(ValueError, match="overlap must be in 1..15"):
        spans(40, 16, overlap)


def test_shares_add_up_and_leave_tile_borders_out():
    axis = spans(28, 16, 8)  # 0 to 16, 8 to 24, 12 to 28
    assert [(span.start, span.stop) for span in axis] == [(0, 15), (7, 22), (13, 28)]
    first, second, third = shares(axis, 8, 2)
    whole = torch.zeros(56)
    for span, share in zip(axis, (first, second, third)):
        whole[2 * span.start : 2 * span.stop] += share
    torch.testing.assert_close(whole, torch.ones(56))
    assert first.tolist() == [1.0] * 20 + [0.875, 0.625, 0.375, 0.125] + [0.0] * 6
    assert second[:10].tolist() == [0.0] * 6 + [0.125, 0.375, 0.625, 0.875]


def test_each_pixel_is_owned_once_at_every_resolution():
    whole = torch.zeros(1, 1, 29 * 4, 50 * 4)
    for rows in spans(29, 16, 6):
        for columns in spans(50, 16, 6):
            tile = Tile(rows, columns)
            tile.own(tile.crop(whole, 4)).add_(1)
    assert whole.min() == whole.max() == 1


def test_a_sample_comes_from_all_over_and_is_no_larger_than_a_tile():
    x = torch.arange(50.0).expand(1, 1, 10, 50)
    part = Sample((10, 50), tile=16, patch=5).crop(x)
    assert part.shape == (1, 1, 10, 15)
    assert part[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 22, 23, 24, 25, 26, 45, 46, 47, 48, 49]
    pixels = Sample((10, 50), tile=16, patch=5).crop(x.repeat_interleave(2, -1).repeat_interleave(2, -2), 2)
    torch.testing.assert_close(pixels[..., ::2, ::2], part)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("embedded", (25, 37)), *((kind, size) for kind in LAYOUTS for size in [(26, 26), (40, 20), (25, 37)])],
)
def test_a_tiled_image_is_the_whole_image(kind, size):
    (decodes, decoder), _ = networks(kind)
    z = smooth(4, *size)
    with torch.no_grad():
        whole = decodes(z)
    assert decibels(decode(decodes, z, decoder, tile=24), whole) > 55


def test_without_shared_statistics_it_would_not_be(autoencoder):
    (decodes, _), _ = autoencoder
    z = smooth(4, 32, 48)
    with torch.no_grad():
        whole = decodes(z)
    assert decibels(decode(decodes, z, nn.Identity(), tile=24), whole) < 40


@pytest.mark.parametrize(
    ("kind", "size"), [("embedded", (25, 37)), *((kind, size) for kind in LAYOUTS for size in [(26, 26), (25, 37)])]
)
def test_encoding_in_tiles_is_encoding_the_whole(kind, size):
    _, (encodes, encoder) = networks(kind)
    x = smooth(3, 8 * size[0], 8 * size[1])
    with torch.no_grad():
        whole = encodes(x)
    latents = encode(encodes, x, encoder, tile=24)
    assert latents.shape == whole.shape
    assert decibels(latents, whole) > 55


def test_the_statistics_are_those_of_the_whole(monkeypatch):
    """Each norm after the first upsampler, once the passes have settled, against what it sees in the untiled run."""
    (decodes, decoder), _ = networks("diffusers")
    monkeypatch.setattr(tiles, "TOLERANCE", 1e-5)
    states, settled = [], tiles._WholeStatistics.settled
    monkeypatch.setattr(tiles._WholeStatistics, "settled", lambda self: states.append(self) or settled(self))
    z = smooth(4, 26, 30)
    decode(decodes, z, decoder, tile=24)
    seen = {}
    handles = [
        norm.register_forward_pre_hook(lambda norm, args: seen.update({norm: args[0].reshape(norm.num_groups, -1)}))
        for norm in states[-1].used
    ]
    with torch.no_grad():
        decodes(z)
    for handle in handles:
        handle.remove()
    assert len(states[-1].used) == 13  # 3 levels of 2 residual blocks with 2 each, and the last
    for norm, (mean, std) in states[-1].used.items():
        torch.testing.assert_close(mean.float(), seen[norm].mean(1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(std.float(), (seen[norm].var(1, correction=0) + norm.eps).sqrt(), atol=1e-4, rtol=1e-3)


def test_an_image_that_fits_is_computed_at_once(autoencoder):
    for (function, network), tiled, x in zip(autoencoder, (decode, encode), (smooth(4, 12, 20), smooth(3, 96, 160))):
        calls = []
        tiled(lambda x, calls=calls, function=function: calls.append(x) or function(x), x, network, tile=16)
        assert len(calls) == 1  # 12 x 20 is less than 16 x 16


def test_nothing_at_high_resolution_is_larger_than_a_tile(autoencoder):
    """The whole image passes at the latents' resolution only."""
    h, w, tile = 25, 37, 24
    for (function, network), tiled, x in zip(autoencoder, (decode, encode), (smooth(4, h, w), smooth(3, 8 * h, 8 * w))):
        with watched(module for module in network.modules() if isinstance(module, nn.Conv2d)) as calls:
            tiled(function, x, network, tile=tile)
        areas = {math.prod(made) for _, _, made in calls}
        assert h * w in areas
        assert max(areas) <= 64 * tile**2 < 64 * h * w
        assert not areas & {h * w * 4**level for level in (1, 2, 3)}


def test_the_networks_are_left_as_they_were(autoencoder):
    (decodes, decoder), (encodes, encoder) = autoencoder

    def state():
        return [
            (module, dict(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks))
            for network in (decoder, encoder)
            for module in network.modules()
        ]

    def failing(function):
        calls = iter([function, function])  # the third fails

        def run(x):
            if (call := next(calls, None)) is None:
                raise RuntimeError("out of memory")
            return call(x)

        return run

    before = state()
    decode(decodes, smooth(4, 25, 30), decoder, tile=24)
    encode(encodes, smooth(3, 8 * 25, 8 * 30), encoder, tile=24)
    assert state() == before
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(failing(decodes), smooth(4, 25, 30), decoder, tile=24)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(failing(encodes), smooth(3, 8 * 25, 8 * 30), encoder, tile=24)
    assert state() == before


def test_a_forward_that_someone_else_put_on_a_norm_stays(monkeypatch):
    (decodes, decoder), _ = networks("webui")
    own = decoder.norm_out.forward
    replaced = lambda x: own(x)  # noqa: E731
    monkeypatch.setattr(decoder.norm_out, "forward", replaced)
    decode(decodes, smooth(4, 24, 40), decoder, tile=24)
    assert vars(decoder.norm_out)["forward"] is replaced


def test_a_network_without_group_norms_has_nothing_to_share():
    network = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Upsample(scale_factor=8))
    z = torch.randn(1, 4, 33, 57)
    torch.testing.assert_close(decode(network, z, network, tile=24), network(z).detach())


def test_what_cannot_work_is_refused():
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
    with pytest.raises(ValueError, match="a Sequential cannot be run in tiles"):
        decode(network, torch.randn(1, 4, 33, 57), network, tile=24)
    (_, decoder), (_, encoder) = networks("webui")
    with pytest.raises(ValueError, match="does not run the network"):
        decode(lambda z: z, torch.randn(1, 4, 33, 57), decoder, tile=24)
    with pytest.raises(ValueError, match="one image at a time, got 2"):
        encode(encoder, torch.randn(2, 3, 256, 256), encoder)


def test_resamplers_go_from_the_image_to_the_latents(autoencoder):
    (decodes, decoder), (encodes, encoder) = autoencoder
    for network, function, x, expected in (
        (decoder, decodes, smooth(4, 8, 8), [(32, 64), (16, 32), (8, 16)]),
        (encoder, encodes, smooth(3, 64, 64), [(64, 32), (32, 16), (16, 8)]),
    ):
        with watched(resamplers(network)) as calls:
            function(x)
        sizes = {module: (given[0], made[0]) for module, given, made in calls}
        assert [sizes[module] for module in resamplers(network)] == expected


def test_the_tile_follows_from_memory():
    decoder = diffusers_autoencoder().decoder
    per_latent_pixel = tiles.LIVE * 8 * 64 * 4  # 8 channels, 64 image pixels, 4 bytes
    assert tile_for(100 * 100 * per_latent_pixel, decoder) == 100
    assert tile_for(100 * 100 * per_latent_pixel // 2, decoder.half()) == 100
    assert tile_for(0, decoder) == tiles.SMALLEST_TILE
