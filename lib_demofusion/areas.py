"""Parts of a phase that are treated otherwise than the rest: where it is held, and where it is not guided."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import gaussian_blur
from lib_demofusion.views import Size

FLAT_SIGMA = 4  # pixels; half a latent pixel's side


class Areas(NamedTuple):
    """Weights [B, 1, H, W] in 0..1, or None: nowhere.

    held: where the phase keeps its reference (Fusion's held). unguided: where guidance is off, as at CFG scale 1.
    """

    held: Tensor | None = None
    unguided: Tensor | None = None

    def at(self, size: Size) -> Areas:
        """The same at (H, W)."""
        return Areas(*(None if x is None else F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in self))

    def cropped(self, top: int, left: int, size: Size) -> Areas:
        """Those of the part of (h, w) that begins there."""
        return Areas(*(None if x is None else x[..., top : top + size[0], left : left + size[1]] for x in self))

    def to(self, like: Tensor) -> Areas:
        """On the device and of the type of `like`."""
        return Areas(*(None if x is None else x.to(like) for x in self))

    def __or__(self, other: Areas) -> Areas:
        """Where it is so by the one or the other."""
        return Areas(*(b if a is None else a if b is None else torch.maximum(a, b) for a, b in zip(self, other)))

    @classmethod
    def cat(cls, parts: list[Areas]) -> Areas:
        """Those of a batch, of its images' own; there is no area of a batch of none."""
        return cls(*(torch.cat(own) if own and own[0] is not None else None for own in zip(*parts))) if parts else cls()


def asks_for_areas(config: DemoFusionConfig) -> bool:
    """Whether `areas_of` has to see the images."""
    return bool(config.hold_flat or config.unguided_flat)


def areas_of(images: Tensor, config: DemoFusionConfig, factor: int = 8) -> Areas:
    """What the settings ask for where images [B, 3, factor * h, factor * w] in -1..1 are flat, at (h, w)."""
    if not asks_for_areas(config):
        return Areas()
    contrast = contrast_of(images, factor)
    return Areas(*(flat_areas(contrast, limit) if limit else None for limit in (config.hold_flat, config.unguided_flat)))


def contrast_of(images: Tensor, factor: int = 8) -> Tensor:
    """The contrast of images [B, 3, factor * h, factor * w] in -1..1, of 255: [B, 1, h, w].

    It is the most that a channel of a pixel differs from its blur over FLAT_SIGMA pixels, so that a gradual change has none; a
    latent pixel counts with its neighbours.
    """
    margin = math.ceil(3 * FLAT_SIGMA)
    padded = F.pad(images, [margin] * 4, mode="replicate")
    blurred = gaussian_blur(padded, 2 * margin + 1, FLAT_SIGMA)[..., margin:-margin, margin:-margin]
    most = F.max_pool2d((images - blurred).abs().amax(1, keepdim=True), factor)
    return F.max_pool2d(most * 127.5, 3, stride=1, padding=1)


def flat_areas(contrast: Tensor, limit: float) -> Tensor:
    """Where a contrast is low: from 0 at the limit to 1 at none."""
    return 1 - (contrast / limit).clamp(max=1)


def guidance_scale(cfg_scale: float, unguided: Tensor | None) -> float | Tensor:
    """The CFG scale, by pixel where there are some that are not guided: 1 there."""
    return cfg_scale if unguided is None else 1 + (cfg_scale - 1) * (1 - unguided)
