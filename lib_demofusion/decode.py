"""Autoencoding in tiles, so that its memory does not grow with the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib_demofusion.views import window_starts


def _ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    """Weights of one tile along an axis: rising over the overlap at both ends, never zero."""
    steps = torch.arange(length, device=device)
    distance = torch.minimum(steps, length - 1 - steps) + 1.0
    return (distance / (overlap + 1)).clamp(max=1.0)


def _tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, up: int, down: int) -> Tensor:
    """function over overlapping tiles of x, blended linearly; a side of n becomes n * up // down."""
    size = tuple(x.shape[-2:])
    if max(size) <= tile:
        return function(x)
    spans = [[(start, min(n, tile)) for start in window_starts(n, min(n, tile), tile - overlap)] for n in size]
    total = weight = None
    for top, h in spans[0]:
        for left, w in spans[1]:
            part = function(x[..., top : top + h, left : left + w])
            if total is None:
                shape = [n * up // down for n in size]
                total = torch.zeros(*part.shape[:2], *shape, device=part.device, dtype=part.dtype)
                weight = torch.zeros(shape, device=part.device, dtype=part.dtype)
            ramp = overlap * up // down
            mask = torch.outer(_ramp(part.shape[-2], ramp, part.device), _ramp(part.shape[-1], ramp, part.device))
            y, x0 = top * up // down, left * up // down
            total[..., y : y + part.shape[-2], x0 : x0 + part.shape[-1]] += part * mask
            weight[y : y + part.shape[-2], x0 : x0 + part.shape[-1]] += mask
    return total / weight


def decode(
    function: Callable[[Tensor], Tensor], latents: Tensor, *, factor: int = 8, tile: int = 128, overlap: int = 16
) -> Tensor:
    """Latents [B, C, h, w] to images [B, 3, factor * h, factor * w] through function, tile by tile.

    tile, overlap: latent pixels, overlap < tile. Latents that fit into one tile are decoded at once.
    """
    return _tiled(function, latents, tile, overlap, factor, 1)


def encode(
    function: Callable[[Tensor], Tensor], images: Tensor, *, factor: int = 8, tile: int = 128, overlap: int = 16
) -> Tensor:
    """Images [B, 3, H, W] to latents [B, C, H / factor, W / factor] through function, tile by tile.

    H and W divisible by factor. tile, overlap: latent pixels, as in decode.
    """
    return _tiled(function, images, tile * factor, overlap * factor, 1, factor)
