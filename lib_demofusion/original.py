"""A picture that was given to be enlarged, at the size of every phase."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_demofusion.views import Size


class Original:
    """A picture that was given to be enlarged, at every phase's size, and what of it is to stay as it is.

    encoded: a phase's (H, W) -> the picture resized to it, as latents [B, C, H, W].
    flat: [B, 1, ., .] in 0..1 at a size of its own, where the picture is to be held (`flat_areas`); nowhere unless given.
    mask: (H, W) -> [1, 1, H, W], 1 where the picture is to change and 0 where it stays; it changes everywhere unless given.
    fill: what is put under the mask at first, latents -> latents; the picture itself unless given.
    """

    def __init__(
        self,
        encoded: Callable[[Size], Tensor],
        *,
        flat: Tensor | None = None,
        mask: Callable[[Size], Tensor] | None = None,
        fill: Callable[[Tensor], Tensor] | None = None,
    ):
        self.encoded = encoded
        self.flat = flat
        self.mask = mask
        self.fill = fill
        self._at: tuple[Size, Tensor, Tensor] | None = None  # the last size, with the picture and the mask there

    def begin(self, size: Size) -> tuple[Tensor, Tensor | None]:
        """The reference of the first phase, of `size`, and where it is held, as `enlarge` gives them."""
        if self.mask is None:
            return self.around(self.encoded(size), None)
        picture, _ = self._of(size)
        return self.around(picture if self.fill is None else self.fill(picture), None)

    def around(self, reference: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A phase's reference [B, C, H, W] with the picture around the mask, where it is held altogether.

        Where the picture is flat it is held in every phase: copies of an object that a phase has put there are not flat.
        """
        size = tuple(reference.shape[-2:])
        if self.flat is not None:
            flat = F.interpolate(self.flat, size=size, mode="bilinear", align_corners=False)
            held = flat if held is None else torch.maximum(flat, held)
        if self.mask is None:
            return reference, held
        picture, mask = self._of(size)
        return torch.lerp(picture, reference, mask), 1 - mask if held is None else torch.maximum(1 - mask, held)

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
