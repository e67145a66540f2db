"""Views: what the model looks at in one call. Local windows, and dilated views of the whole latent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Size = tuple[int, int]  # always (height, width)


@dataclass(frozen=True)
class View:
    """A window of h x w latent pixels, every `dilation`-th one from (top, left).

    kind: "local" (dilation 1, of the latent) or "dilated" (of the blurred and padded latent).
    """

    kind: Literal["local", "dilated"]
    top: int
    left: int
    h: int
    w: int
    dilation: int = 1

    def crop(self, x: Tensor) -> Tensor:
        """The view's pixels of x [..., H, W] as [..., h, w]; shares x's memory, so writing to it writes to x."""
        d = self.dilation
        return x[..., self.top : self.top + self.h * d : d, self.left : self.left + self.w * d : d]

    def crop_pixels(self, factor: int) -> Size:
        """(top, left) in image pixels of what the view shows; a dilated view shows the whole image.

        factor: image pixels per latent pixel, 8 for Stable Diffusion.
        """
        return (self.top * factor, self.left * factor) if self.kind == "local" else (0, 0)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along one axis: 0, stride, 2 * stride, ...; the last one is clamped to the end."""
    last = length - window
    return [*range(0, last, stride), last]


def local_views(size: Size, window: Size, stride: Size, generator: torch.Generator | None = None) -> list[View]:
    """Overlapping windows that cover every pixel of a latent (MultiDiffusion's shifted crops), row by row.

    size, window, stride: latent pixels, (height, width). With a generator each window is shifted by up to a quarter
    of (window - stride) on each axis; windows at a border stay at it, and every pixel stays covered.
    Source: arXiv 2302.08113; jitter as in the authors' DemoFusion, but seeded and without padding.
    """
    tops, lefts = (window_starts(*axis) for axis in zip(size, window, stride))
    reach = [(w - s) // 4 for w, s in zip(window, stride)]
    shifts = torch.zeros(len(tops), len(lefts), 2, dtype=torch.int64)
    if generator is not None:
        for axis in (0, 1):
            shifts[..., axis] = torch.randint(-reach[axis], reach[axis] + 1, shifts.shape[:2], generator=generator)
        shifts[[0, -1], :, 0] = 0
        shifts[:, [0, -1], 1] = 0
    return [
        View("local", min(max(top + dy, 0), tops[-1]), min(max(left + dx, 0), lefts[-1]), *window)
        for top, row in zip(tops, shifts.tolist())
        for left, (dy, dx) in zip(lefts, row)
    ]


def dilated_views(window: Size, dilation: int) -> list[View]:
    """The dilation² interleaved sub-latents x[i::dilation, j::dilation], row-major.

    They split a latent of (dilation * h, dilation * w) exactly: writing each view's pixels back restores it.
    Paper: arXiv 2311.16973, Dilated Sampling.
    """
    return [View("dilated", i, j, *window, dilation) for i in range(dilation) for j in range(dilation)]


# What is added to a timestep before it is rounded down. About a half, so that a host that rounds its timesteps seldom gets
# other windows than one that does not; not a half, which schedules hit. Found by search: the timesteps of the WebUI's
# schedules stay away from where the windows change, by 8e-4 with up to 50 steps, and by 3e-7 of sigma with up to 150.
ROUNDING = 0.48476


def jitter_generator(phase: int, t: float) -> torch.Generator:
    """The generator that shifts the windows of one phase at one noise level.

    It depends on nothing else: the same picture comes out alone, in a batch, and when a host asks for one step's
    noise in several calls.
    t: training timestep. It counts to about the nearest whole one only: hosts and cards that find it from a noise level in
    float32 are up to 5e-4 apart. Steps less than 1 apart may share their windows: with up to 150 steps these are below 11 or
    above 988, and there are none among evenly spaced ones with up to 1000.
    """
    level = math.floor(t + ROUNDING)
    generator = torch.Generator()
    generator.manual_seed((phase * 1_000_003 + level) * 2_654_435_761 % 2**32)  # Knuth's multiplicative hash
    return generator
