"""Control images (a ControlNet's hints): what each view sees of one.

A control image lies under the picture that is made. At the base's size the model sees all of it; in a phase each view
must see its own part, at the size of a window: a local window what lies under it, a dilated view what lies under its
pixels, which is the whole, shrunken, and shifted by less than a latent pixel of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_demofusion.views import Size, View

FEW_COLOURS = 200  # an image of fewer is a drawing or a map, whose colours mean something and must not be mixed


def few_colours(image: Tensor) -> bool:
    """Whether a control image [C, H, W], uint8, is a drawing or a map: lines, segments or a pose, and no shades."""
    packed = torch.zeros(image.shape[-2:], dtype=torch.int64, device=image.device)
    for channel in image:
        packed = packed * 256 + channel
    return len(torch.unique(packed)) < FEW_COLOURS


def coarse_size(size: Size, dilation: int, factor: int = 8) -> Size:
    """(height, width) in pixels of an image of the whole latent (H, W) as dilated views see it, a pixel for each of theirs."""
    return tuple(max(round(factor * side / dilation), 1) for side in size)


def seen_by(
    image: Tensor, view: View, size: Size, factor: int = 8, roll: Sequence[int] = (0, 0), nearest: bool = False
) -> Tensor:
    """What a view sees of an image that lies under the whole latent: [B, C, factor * h, factor * w].

    image: [B, C, ., .], of any size. size: (H, W) of the latent, which dilated views see with its edges repeated to a whole
    number of windows (`fusion.pad_edges`). factor: pixels made for each latent pixel. roll: (rows, columns) by which the
    latent, which tiles, is rolled while it is viewed. nearest: pixels are taken as they are; else they are interpolated
    where the view lies between them, as float32.
    """
    places = [
        _places(pixels, side, start, length, view, factor, shift)
        for pixels, side, start, length, shift in zip(image.shape[-2:], size, (view.top, view.left), (view.h, view.w), roll)
    ]
    (h, w), wraps = image.shape[-2:], any(roll)
    rows, columns = ((place + 0.5).floor() if nearest else place for place in places)
    y, x = rows.floor(), columns.floor()

    def at(down: int, right: int) -> Tensor:
        # What lies beyond a border: the other side where the plane is rolled, else the border itself.
        row, column = ((i % n) if wraps else i.clamp(0, n - 1) for i, n in ((y.long() + down, h), (x.long() + right, w)))
        return _taken(_taken(image, -2, row), -1, column)

    seen = at(0, 0)
    below, beside = (rows - y).float()[:, None].to(image.device), (columns - x).float().to(image.device)
    if below.any():
        seen = torch.lerp(seen.float(), at(1, 0).float(), below.expand(seen.shape[-2:]))
    if beside.any():
        right = at(0, 1).float()
        if below.any():
            right = torch.lerp(right, at(1, 1).float(), below.expand(seen.shape[-2:]))
        seen = torch.lerp(seen.float(), right, beside.expand(seen.shape[-2:]))
    return seen


def _taken(image: Tensor, axis: int, index: Tensor) -> Tensor:
    """image's rows, or columns, of these numbers; where they follow one another, but for a border's repeated, by slices."""
    before, after = (int((index == index[end]).sum()) - 1 for end in (0, -1))
    inner = index[before : len(index) - after]
    if not bool((inner.diff() == 1).all()):
        return image.index_select(axis, index.to(image.device))
    part = image.narrow(axis, int(inner[0]), len(inner))
    if not before and not after:
        return part
    edges = [part.narrow(axis, end, 1) for end in (0, len(inner) - 1)]
    return torch.cat([edges[0]] * before + [part] + [edges[1]] * after, axis)


def _places(pixels: int, side: int, start: int, length: int, view: View, factor: int, shift: int) -> Tensor:
    """Along one axis, where in the image the centres of a view's pixels lie, in pixels from the first one's centre.

    A latent pixel of a dilated view stands for `dilation` of them, in whose middle it lies.
    """
    d = view.dilation
    padding = (length * d - side) // 2 if view.kind == "dilated" else 0
    first = start - padding - (d - 1) / 2
    centres = first + d * (torch.arange(length * factor, dtype=torch.float64) + 0.5) / factor
    places = (centres * pixels / side - 0.5).clamp(0, pixels - 1)
    return places - shift * pixels / side


@dataclass(frozen=True)
class Hint:
    """One control image for the views of one phase.

    fine: [B, C, factor * H, factor * W], for the local windows. coarse: [B, C, .., ..], of `coarse_size`, for the dilated
    views. size: (H, W) of the phase. nearest: it has few colours, which must not be mixed (`few_colours`).
    """

    fine: Tensor
    coarse: Tensor
    size: Size
    factor: int = 8
    nearest: bool = False

    def crops(self, views: Sequence[View], roll: Sequence[int] = (0, 0)) -> Tensor:
        """Each view's part, view by view: [len(views) * B, C, factor * h, factor * w], of the type of `fine`."""
        return torch.cat([self._crop(view, roll) for view in views])

    def _crop(self, view: View, roll: Sequence[int]) -> Tensor:
        image = self.fine if view.kind == "local" else self.coarse
        seen = seen_by(image, view, self.size, self.factor, roll, self.nearest)
        return seen if seen.dtype == image.dtype or image.is_floating_point() else seen.round().to(image.dtype)
