"""A picture that was given to be enlarged, at the size of every phase."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib_demofusion.areas import Areas
from lib_demofusion.views import Size


class Original:
    """A picture that was given to be enlarged, at every phase's size, and what of it is to stay as it is.

    encoded: a phase's (H, W) -> the picture resized to it, as latents [B, C, H, W].
    areas: those of the picture, at a size of their own (`areas_of`); none unless given.
    mask: (H, W) -> [1, 1, H, W], 1 where the picture is to change and 0 where it stays; it changes everywhere unless given.
    fill: what is put under the mask at first, latents -> latents; the picture itself unless given.
    """

    def __init__(
        self,
        encoded: Callable[[Size], Tensor],
        *,
        areas: Areas | None = None,
        mask: Callable[[Size], Tensor] | None = None,
        fill: Callable[[Tensor], Tensor] | None = None,
    ):
        self.encoded = encoded
        self.areas = areas or Areas()
        self.mask = mask
        self.fill = fill
        self._at: tuple[Size, Tensor, Tensor] | None = None  # the last size, with the picture and the mask there

    def begin(self, size: Size) -> tuple[Tensor, Areas]:
        """The reference of the first phase, of `size`, and its areas, as `enlarge` gives them."""
        if self.mask is None:
            return self.around(self.encoded(size), Areas())
        picture, _ = self._of(size)
        return self.around(picture if self.fill is None else self.fill(picture), Areas())

    def around(self, reference: Tensor, areas: Areas) -> tuple[Tensor, Areas]:
        """A phase's reference [B, C, H, W] with the picture around the mask, where it is held altogether.

        What is flat in the picture counts in every phase: copies of an object that a phase has put there are not flat.
        """
        size = tuple(reference.shape[-2:])
        areas = self.areas.at(size) | areas
        if self.mask is None:
            return reference, areas
        picture, mask = self._of(size)
        return torch.lerp(picture, reference, mask), areas | Areas(held=1 - mask)

    def keep(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] with the picture around the mask."""
        if self.mask is None:
            return latents
        picture, mask = self._of(tuple(latents.shape[-2:]))
        return torch.lerp(picture, latents, mask)

    def _of(self, size: Size) -> tuple[Tensor, Tensor]:
        if self._at is None or self._at[0] != size:
            picture = self.encoded(size)
            self._at = size, picture, self.mask(size).to(picture)
        return self._at[1:]
