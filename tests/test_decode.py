"""Tiles against the whole: on the embedded autoencoder, and on both layouts of Stable Diffusion's, small and random."""

import copy
import functools
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from webui_autoencoder import WebuiNetwork

from lib_demofusion import decode as tiles
from lib_demofusion.decode import Sample, Span, Tile, decode, encode, resamplers, shares, spans, tile_for
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT
from lib_demofusion.memory import OutOfMemory


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


def test_no_version_of_torch_refuses_the_norm(autoencoder, monkeypatch):
    normalise = F.batch_norm

    def strict(*args, eps, **kwargs):
        if eps <= 0:  # as torch 2.11 has it
            raise ValueError(f"batch_norm eps must be positive, but got {eps}")
        return normalise(*args, eps=eps, **kwargs)

    monkeypatch.setattr(F, "batch_norm", strict)
    (decodes, decoder), _ = autoencoder
    z = smooth(4, 40, 20)
    with torch.no_grad():
        whole = decodes(z)
    assert decibels(decode(decodes, z, decoder, tile=24), whole) > 55


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


@contextmanager
def small_card(module, most):
    """Inputs of the module of more than `most` pixels run out of memory."""

    def look(module, args):
        if math.prod(args[0].shape[-2:]) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with module.register_forward_pre_hook(look):
        yield


def last(network):
    return next(module for module in reversed(list(network.modules())) if isinstance(module, nn.Conv2d))


def first(network):
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize(("tile", "half"), [(49, 24), (200, 25)])  # in tiles, and at once
def test_tiles_that_do_not_fit_are_halved(autoencoder, tile, half):
    """Of the 200 there are 50."""
    (decodes, decoder), (encodes, encoder) = autoencoder
    z, x = smooth(4, 49, 50), smooth(3, 8 * 49, 8 * 50)
    expected = decode(decodes, z, decoder, tile=half), encode(encodes, x, encoder, tile=half)
    with small_card(last(decoder), (25 * 8) ** 2):
        assert torch.equal(decode(decodes, z, decoder, tile=tile), expected[0])
    with small_card(first(encoder), (25 * 8) ** 2):
        assert torch.equal(encode(encodes, x, encoder, tile=tile), expected[1])


def test_a_card_too_small_for_any_tile_is_told(autoencoder):
    (decodes, decoder), _ = autoencoder
    with (
        small_card(last(decoder), 100),
        pytest.raises(OutOfMemory, match="out of memory in the autoencoder with tiles of 24 "),
    ):
        decode(decodes, smooth(4, 49, 50), decoder, tile=48)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_in_pieces_is_the_attention(autoencoder, monkeypatch, layout):
    decoder = copy.deepcopy(autoencoder[0][1])
    decoder.to(memory_format=layout)
    z, monitored = smooth(4, 20, 26).contiguous(memory_format=layout), tiles.resamplers(decoder)[-1]
    monkeypatch.setattr(tiles, "ATTENTION_PIECE", 100)
    pieces = []
    attend = F.scaled_dot_product_attention
    with torch.no_grad():
        expected = tiles._until(monitored.register_forward_pre_hook, decoder, z)
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: pieces.append(q.shape[-2]) or attend(q, k, v))
        torch.testing.assert_close(tiles._features(decoder, z, decoder), expected)
    assert pieces == [100, 100, 100, 100, 100, 20]
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_where_the_whole_images_attention_does_not_fit_tiles_attend_to_themselves(autoencoder):
    (decodes, decoder), _ = autoencoder
    z = smooth(4, 26, 40)
    with torch.no_grad():
        whole = decodes(z)
    with small_card(first(decoder), 24 * 24), watched([first(decoder)]) as calls:
        tiled = decode(decodes, z, decoder, tile=24)
    assert max(max(size) for _, size, _ in calls) == 24
    assert decibels(tiled, whole) > 40


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


@pytest.mark.parametrize(
    ("base", "taken", "free", "half", "side"),
    [
        ((80, 125), 0, 10**6, False, 100),  # the base image's area
        ((104, 152), 0, 10**6, False, 126),  # the base is never in tiles
        ((80, 125), 150**2, 10**6, False, 150),  # the job has taken more before
        ((80, 125), 150**2, 2 * 90**2, False, 90),  # half of what is free
        ((80, 125), 150**2, 90**2, True, 90),
        ((16, 16), 0, 10**6, False, tiles.SMALLEST_TILE),
        ((80, 125), 0, 10, False, tiles.SMALLEST_TILE),
    ],
)
def test_the_tile_follows_from_memory(monkeypatch, base, taken, free, half, side):
    """taken and free in latent pixels' worth of single precision."""
    decoder = diffusers_autoencoder().decoder
    worth = int(tiles.ROOM * tiles.LIVE * 8 * 64 * 4)  # 8 channels, 64 image pixels, 4 bytes
    monkeypatch.setattr(tiles, "taken_before", lambda device: taken * worth)
    monkeypatch.setattr(tiles, "free_memory", lambda device: free * worth)
    assert tile_for(decoder.half() if half else decoder, torch.device("cpu"), base) == side
