"""Autoencoding in tiles that fit together as if the image had been one: memory follows the tile, the look does not.

An autoencoder ties far pixels together in two ways. Its attention stands at the latents' resolution; that part is small
(64 times fewer pixels than the image has) and runs once, on the whole image. What runs at higher resolutions are
convolutions, which see a few latent pixels around, and group norms, which see everything: these run tile by tile, all
with the same statistics, in passes that make these the statistics of the whole image (`_WholeStatistics`). So no tile
differs from its neighbours in colour or contrast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_demofusion.memory import OutOfMemory, call_bytes, free_memory, taken_before, unless_out_of_memory
from lib_demofusion.views import window_starts

OVERLAP = 12  # latent pixels; at 8 the convolutions' tiles differ at 80 dB, at 12 at 110 dB and more
ATTENTION_PIECE = 8192  # pixels that attend at a time to all
PATCH = 8  # latent pixels; a sample of the image consists of such squares
TOLERANCE = 5e-3  # in standard deviations; images were then 60 dB and more from the untiled ones
MOST_PASSES = 8  # three or four are usual
SMALLEST_TILE = 64  # latent pixels
# Numbers alive at the peak of decoding with Stable Diffusion's decoder: per image pixel and channel at full resolution, and
# per latent pixel and channel before the first upsampling, which is whole where the rest is in tiles.
LIVE, LIVE_FEATURES = 6, 5.5
ROOM = 4 / 3  # what convolutions take besides


@dataclass(frozen=True)
class Span:
    """A tile along one axis, latent pixels: computed from start to stop, of which it alone owns own[0] to own[1]."""

    start: int
    stop: int
    own: tuple[int, int]


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """As few spans as cover an axis, none longer than tile, neighbours sharing at least `overlap`; all in latent pixels.

    They are equally long, since the work grows with their length. Each latent pixel is owned once: neighbours part in
    the middle of what they share.
    """
    if not 0 < overlap < tile:
        raise ValueError(f"the overlap must be in 1..{tile - 1} (the tile is {tile}), got {overlap}")
    if length <= tile:
        return [Span(0, length, (0, length))]
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count)
    starts = window_starts(length, size, size - overlap)
    parts = [0, *((start + size + after) // 2 for start, after in zip(starts, starts[1:])), length]
    return [Span(start, start + size, own) for start, own in zip(starts, zip(parts, parts[1:]))]


def shares(axis: list[Span], overlap: int, pixels: int) -> list[Tensor]:
    """Each span's share in the finished axis, [(stop - start) * pixels]: at every pixel they add up to 1.

    pixels: per latent pixel. The outer three eighths of an overlap have no share, since convolutions saw the tile's
    border there; shares rise linearly over the middle quarter.
    """
    margin = overlap * 3 // 8
    length = axis[-1].stop * pixels
    table = torch.zeros(len(axis), length)
    position = torch.arange(length) + 0.5
    for share, span in zip(table, axis):
        begin = position - span.start * pixels if span.start else torch.full_like(position, length)
        end = span.stop * pixels - position if span.stop * pixels < length else torch.full_like(position, length)
        share.copy_(((torch.minimum(begin, end) - margin * pixels) / ((overlap - 2 * margin) * pixels)).clamp(0, 1))
    table /= table.sum(0)
    return [share[span.start * pixels : span.stop * pixels] for share, span in zip(table, axis)]


@dataclass(frozen=True)
class Tile:
    """A rectangle of the image, as a span of its rows and one of its columns."""

    rows: Span
    columns: Span

    def crop(self, x: Tensor, pixels: int = 1) -> Tensor:
        """The tile's part of a whole image x [..., h * pixels, w * pixels]; shares x's memory."""
        (top, bottom), (left, right) = ((s.start * pixels, s.stop * pixels) for s in (self.rows, self.columns))
        return x[..., top:bottom, left:right]

    def own(self, x: Tensor) -> Tensor:
        """What the tile alone owns of its features x [..., H, W], at whatever resolution; shares x's memory."""
        for axis, span in ((-2, self.rows), (-1, self.columns)):
            scale = x.shape[axis] / (span.stop - span.start)
            first, last = (round((edge - span.start) * scale) for edge in span.own)
            x = x.narrow(axis, first, last - first)
        return x


@dataclass(frozen=True)
class Sample:
    """Squares of `patch` latent pixels from all over an image, put together to no more than tile by tile."""

    size: tuple[int, int]
    tile: int
    patch: int = PATCH

    def crop(self, x: Tensor, pixels: int = 1) -> Tensor:
        """The sample of a whole image x [..., h * pixels, w * pixels], whose size is (h, w)."""
        for axis, length in zip((-2, -1), self.size):
            count = self.tile // self.patch
            if length > self.tile:
                starts = torch.linspace(0, length - self.patch, count).round().long() * pixels
                index = (starts[:, None] + torch.arange(self.patch * pixels)).flatten()
                x = x.index_select(axis, index.to(x.device))
        return x


class _WholeStatistics:
    """The group norms of a network, which see one image tile by tile and normalise with the whole image's statistics.

    A norm's statistics depend on every norm before it. Repeating passes, each with the statistics that the one before
    measured, gets them right norm by norm: one pass for each, and until then errors may grow. So every pass begins with
    a sample of the image: each norm takes the sample's statistics, corrected by how sample and image differed in the
    pass before, and hands its output on to the next norm. What is left to the tiles is how differently sample and image
    answer to the correction, which is small, and smaller after every pass.

    Lifetime: one image. used, sampled, measured: mean and standard deviation of each norm's groups, [2, groups]
    float64 on the CPU, with which this pass normalises, that its sample had before, and that the pass before found in the
    image. sums: count, sum and sum of squares over the tiles so far, [3, groups]. part: what runs now; None while the
    norms see something else.
    """

    def __init__(self, network: nn.Module):
        self.norms = group_norms(network)
        self.part: Tile | Sample | None = None
        self.passes = 0
        self.used: dict[nn.GroupNorm, Tensor] = {}
        self.sampled: dict[nn.GroupNorm, Tensor] = {}
        self.measured: dict[nn.GroupNorm, Tensor] = {}
        self.sums: dict[nn.GroupNorm, Tensor] = {}

    def shared(self) -> AbstractContextManager[None]:
        """While it lasts the norms are ours."""
        return _replaced({norm: partial(self._forward, norm, norm.forward) for norm in self.norms})

    def _forward(self, norm: nn.GroupNorm, unshared: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.part is None or x.ndim != 4:
            return unshared(x)
        if isinstance(self.part, Sample):
            self.used[norm] = self._foresee(norm, _sums(norm, x))
        else:
            self.sums[norm] = self.sums.get(norm, 0) + _sums(norm, self.part.own(x))
        mean, std = self.used[norm].repeat_interleave(norm.num_channels // norm.num_groups, 1).to(x.device, torch.float32)
        weight, bias = (value.to(mean) for value in (norm.weight, norm.bias))  # which a host may keep in main memory
        # batch_norm is torch's norm that takes statistics, and computes in single precision whatever x is. Its eps, which the
        # statistics have in them already, is lost in any of them; some versions of torch refuse 0.
        return F.batch_norm(x, mean, std**2, weight, bias, eps=1e-30)

    def _foresee(self, norm: nn.GroupNorm, sums: Tensor) -> Tensor:
        """The whole image's statistics, from the sums over its sample."""
        mean, std = now = _statistics(norm, sums)
        if norm in self.measured:
            (mean_before, std_before), (mean_whole, std_whole) = self.sampled[norm], self.measured[norm]
            mean = mean + (mean_whole - mean_before) / std_before * std
            std = std * std_whole / std_before
        self.sampled[norm] = now
        return torch.stack([mean, std])

    def settled(self) -> bool:
        """Ends a pass. Were the statistics that it used those that it found in the image?"""
        self.measured = {norm: _statistics(norm, sums) for norm, sums in self.sums.items()}
        self.sums = {}
        self.passes += 1
        change = max(_distance(self.used[norm], found) for norm, found in self.measured.items())
        return change < TOLERANCE or self.passes == MOST_PASSES


def _sums(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Count, sum and sum of squares of each group of x [1, C, H, W], as [3, groups]."""
    groups = x.reshape(norm.num_groups, -1).float()
    var, mean = torch.var_mean(groups, dim=1, correction=0)  # its sums stay small, squares of half precision do not
    mean, var = torch.stack([mean, var]).cpu().double()
    return torch.stack([torch.ones_like(mean), mean, var + mean**2]) * groups.shape[1]


def _statistics(norm: nn.GroupNorm, sums: Tensor) -> Tensor:
    """Mean and standard deviation, [2, groups], of what adds up to sums; never zero, as the norm's eps provides."""
    count, total, squares = sums
    mean = total / count
    return torch.stack([mean, ((squares / count - mean**2).clamp(min=0) + norm.eps).sqrt()])


def _distance(used: Tensor, found: Tensor) -> float:
    """Between statistics [2, groups], in standard deviations; RMS over the groups."""
    (mean_used, std_used), (mean, std) = used, found
    return float((((mean_used - mean) / std) ** 2 + (std_used / std - 1) ** 2).mean().sqrt())


def group_norms(network: nn.Module) -> list[nn.GroupNorm]:
    """The group norms of a network; one without any has nothing that tiles must share."""
    return [module for module in network.modules() if isinstance(module, nn.GroupNorm)]


def resamplers(network: nn.Module) -> list[nn.Module]:
    """The modules that change the resolution, from the image's end to the latents', of a decoder or an encoder.

    Two layouts are known, each as decoder and as encoder: diffusers' (`up_blocks`, `down_blocks`) and the original one
    of latent diffusion (`up`, `down`), which the WebUI has. Raises ValueError for another one.
    """
    found = []
    for block in [*getattr(network, "down_blocks", []), *reversed(getattr(network, "up_blocks", []))]:
        found += getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or []
    for level in [*getattr(network, "down", []), *getattr(network, "up", [])]:  # `up` has the image's end first
        found += [getattr(level, name) for name in ("downsample", "upsample") if hasattr(level, name)]
    if not found:
        raise ValueError(f"a {type(network).__name__} cannot be run in tiles: it has neither diffusers' layout nor the WebUI's")
    return found


@dataclass(frozen=True)
class _Attention:
    """An autoencoder's attention over all pixels, one head of all channels, in diffusers' layout or in the WebUI's."""

    module: nn.Module
    norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module

    @classmethod
    def of(cls, module: nn.Module) -> _Attention | None:
        """The attention that a module is; None if it is none, or of some other kind."""
        if all(hasattr(module, name) for name in ("norm", "q", "k", "v", "proj_out")):
            return cls(module, module.norm, module.q, module.k, module.v, module.proj_out)
        plain = getattr(module, "heads", 0) == 1 and getattr(module, "residual_connection", False)
        if plain and module.rescale_output_factor == 1 and module.group_norm is not None and module.spatial_norm is None:
            return cls(module, module.group_norm, module.to_q, module.to_k, module.to_v, module.to_out[0])
        return None

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        """The module's answer to x [1, C, H, W], put in x's place, in pieces: what it takes beside x is three more copies."""
        x = x.contiguous()  # it may be channels-last
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # or each linear layer would make a copy of its own
        k, v = _project(self.k, normed)[:, None], _project(self.v, normed)[:, None]
        for piece in range(0, tokens.shape[1], ATTENTION_PIECE):
            here = slice(piece, piece + ATTENTION_PIECE)
            q = _project(self.q, normed[:, here])[:, None]
            tokens[:, here] += _project(self.out, F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x


def _project(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer, or a convolution of one pixel, over tokens [1, N, C]."""
    return F.linear(tokens, layer.weight.flatten(1).to(tokens), None if layer.bias is None else layer.bias.to(tokens))


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """While it lasts these modules' forward is another function."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # shadows the class's method
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _features(function: Callable[[Tensor], Tensor], latents: Tensor, decoder: nn.Module) -> Tensor:
    """What decoder enlarges first while function(latents) runs: the whole image, at the latents' resolution."""
    attentions = filter(None, map(_Attention.of, decoder.modules()))
    with _replaced({attention.module: attention.forward for attention in attentions}):
        return _until(resamplers(decoder)[-1].register_forward_pre_hook, function, latents)


class _Reached(Exception):
    """Ends a run of the network early; its argument is what was wanted from it."""


def _until(register: Callable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a module takes or gives while function(x) runs, which ends there.

    register: the module's register_forward_pre_hook (takes) or register_forward_hook (gives).
    """

    def stop(module, args, *output):
        raise _Reached((*output, *args)[0])

    with register(stop):
        try:
            function(x)
        except _Reached as reached:
            return reached.args[0]
    raise ValueError("the callable does not run the network that it was given with")


Run = Callable[["Tile | Sample"], Tensor]  # computes one part of the image


def _assemble(run: Run, size: tuple[int, int], tile: int, overlap: int, pixels: int) -> Tensor:
    """What run gives for every tile, blended linearly: [1, C, h * pixels, w * pixels], float32 on the CPU.

    size: (h, w), latent pixels. Memory: one copy of the image, and a tile's.
    """
    rows, columns = (spans(n, tile, overlap) for n in size)
    whole = None
    for row, row_share in zip(rows, shares(rows, overlap, pixels)):
        for column, column_share in zip(columns, shares(columns, overlap, pixels)):
            part = run(Tile(row, column)).cpu().float()
            if whole is None:
                whole = part.new_zeros(*part.shape[:2], *(n * pixels for n in size))
            Tile(row, column).crop(whole, pixels).add_(part * torch.outer(row_share, column_share))
    return whole


def _in_passes(statistics: _WholeStatistics, run: Run, size: tuple[int, int], tile: int, overlap: int, pixels: int) -> Tensor:
    """_assemble, repeated until all tiles have the statistics of the whole image."""
    with statistics.shared():
        while True:
            run(Sample(size, tile))
            whole = _assemble(run, size, tile, overlap, pixels)
            if statistics.settled():
                return whole
            del whole  # before there is the next one


@torch.no_grad()
def decode(
    function: Callable[[Tensor], Tensor],
    latents: Tensor,
    decoder: nn.Module,
    *,
    factor: int = 8,
    tile: int = 128,
    overlap: int = OVERLAP,
) -> Tensor:
    """Latents [1, C, h, w] to an image [1, 3, factor * h, factor * w], float32 on the CPU.

    function: decodes; it runs `decoder`, a network of a layout that `resamplers` knows. Latents of no more than tile²
    pixels are decoded at once; larger ones in tiles. tile, overlap: latent pixels; where memory runs out, half of tile is
    tried, down to twice the overlap. Raises OutOfMemory below that.
    Memory: one copy of the image, the whole image's features at the latents' resolution (512 channels in Stable
    Diffusion, 2.7 copies; five times that while they are made), and what decoding one tile takes. Where these features
    do not fit either, each tile attends to itself alone.
    """
    size = _one_image(latents)
    return _in_tiles_that_fit(partial(_decode, function, latents, decoder, size, factor, overlap), size, tile, overlap, latents)


def _in_tiles_that_fit(code: Callable[[int], Tensor], size: tuple[int, int], tile: int, overlap: int, x: Tensor) -> Tensor:
    """code(tile) with the largest tile that fits; x: what is to be coded."""
    tile = min(tile, _side(size[0] * size[1]))  # halved from what is really there
    while True:
        result = unless_out_of_memory(partial(code, tile), x.device)
        if result is not None:
            return result
        if tile // 2 < 2 * overlap:
            raise OutOfMemory(f"out of memory in the autoencoder with tiles of {tile} latent pixels; half precision needs less")
        tile //= 2


def _decode(
    function: Callable[[Tensor], Tensor],
    latents: Tensor,
    decoder: nn.Module,
    size: tuple[int, int],
    factor: int,
    overlap: int,
    tile: int,
) -> Tensor:
    if size[0] * size[1] <= tile**2:
        return function(latents).cpu().float()
    statistics = _WholeStatistics(decoder)
    if not statistics.norms:
        return _assemble(lambda part: function(part.crop(latents)), size, tile, overlap, factor)
    first = resamplers(decoder)[-1]
    features = None
    if LIVE_FEATURES * widths(decoder)[0] * size[0] * size[1] * latents.element_size() < free_memory(latents.device):
        features = unless_out_of_memory(partial(_features, function, latents, decoder), latents.device)

    def run_alone(part: Tile | Sample) -> Tensor:
        statistics.part = part
        return function(part.crop(latents))

    def run(part: Tile | Sample) -> Tensor:
        def give(module, args):
            statistics.part = part
            return (part.crop(features), *args[1:])

        statistics.part = None  # what comes before the features runs on a stand-in, in no time
        with first.register_forward_pre_hook(give):
            return function(latents[..., :2, :2])

    return _in_passes(statistics, run_alone if features is None else run, size, tile, overlap, factor)


@torch.no_grad()
def encode(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    encoder: nn.Module,
    *,
    factor: int = 8,
    tile: int = 128,
    overlap: int = OVERLAP,
) -> Tensor:
    """An image [1, 3, H, W], H and W divisible by factor, to latents [1, C, H / factor, W / factor].

    function: encodes; it runs `encoder`. The rest is as in decode. Tiles end at the latents' resolution and function
    goes on from there once, with the whole image, so that it draws the noise of sampled latents once.
    """
    size = tuple(n // factor for n in _one_image(image))
    return _in_tiles_that_fit(partial(_encode, function, image, encoder, size, factor, overlap), size, tile, overlap, image)


def _encode(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    encoder: nn.Module,
    size: tuple[int, int],
    factor: int,
    overlap: int,
    tile: int,
) -> Tensor:
    if size[0] * size[1] <= tile**2:
        return function(image)
    statistics = _WholeStatistics(encoder)
    if not statistics.norms:
        return _assemble(lambda part: function(part.crop(image, factor)), size, tile, overlap, 1).to(image)
    last = resamplers(encoder)[-1]

    def run(part: Tile | Sample) -> Tensor:
        statistics.part = part
        return _until(last.register_forward_hook, function, part.crop(image, factor))

    features = _in_passes(statistics, run, size, tile, overlap, 1)
    with last.register_forward_hook(lambda module, args, output: features.to(output)):
        return function(image[..., : 2 * factor, : 2 * factor])  # a stand-in, as in decode


def _one_image(x: Tensor) -> tuple[int, int]:
    if len(x) != 1:
        raise ValueError(f"tiles take one image at a time, got {len(x)}")
    return x.shape[-2], x.shape[-1]


def tile_for(network: nn.Module, device: torch.device, base: tuple[int, int], factor: int = 8) -> int:
    """The side of a tile, latent pixels, for a decoder or an encoder on a device, so that it is not what takes most memory.

    base: (h, w), latent pixels: the base image, which is decoded anyway. A tile is as large as that, or larger where
    the job has taken more than that before; it takes half of what is free at most, since image and features need some too.
    Never less than SMALLEST_TILE: below it the overlaps cost more than they save.
    """
    _, channels = widths(network)
    pixel = round(ROOM * LIVE) * channels * factor**2 * next(network.parameters()).element_size()
    budget = min(max(base[0] * base[1] * pixel, taken_before(device)), free_memory(device) // 2)
    return max(_side(budget // pixel), SMALLEST_TILE)


def _side(area: int) -> int:
    """Of the smallest square of at least this area."""
    return math.isqrt(max(area - 1, 0)) + 1


def widths(network: nn.Module) -> tuple[int, int]:
    """The channels of a decoder or an encoder at the latents' resolution and at the image's."""
    channels = [norm.num_channels for norm in group_norms(network)] or [64]
    return max(channels), min(channels)


def decoding_bytes(
    function: Callable[[Tensor], Tensor], latents: Tensor, decoder: nn.Module, module: nn.Module, tile: int
) -> int:
    """The most bytes that `decode` with tiles of this side takes at once, beside the finished image; nothing is computed.

    module: holds all weights that function computes with. latents: of any device, only their shape counts.
    """
    h, w = _one_image(latents)
    if h * w <= tile**2:
        return call_bytes(module, function, latents)
    made = []
    features = call_bytes(module, lambda z: made.append(_features(function, z, decoder)), latents)
    return max(features, made[0].nbytes + call_bytes(module, function, latents[..., :1, :1].expand(-1, -1, tile, tile)))
