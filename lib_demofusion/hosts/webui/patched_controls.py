"""Control images in hosts whose ControlNet is their own (`forge`): its nets hang on the UNet's patcher, each with an image.

The host asks them once a step, for the whole latent. Here they are asked with each call for views, and each view sees its
own part of every image. What nets are is told by what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib_demofusion.control import Hint, few_colours, seen_by
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.phases import Phase
from lib_demofusion.views import Size, View


class Controls:
    """The nets of one phase. last: the last of them, each of which knows the one before it; None: there is none.

    window: (h, w) of a view. Raises ValueError, one line, for an adapter that takes no image of a window's size.
    """

    def __init__(self, last: Any, phase: Phase, window: Size):
        self.last = last
        self.phase = phase
        self.nets: list[tuple[Any, Hint]] = []
        while last is not None:
            multiple = getattr(getattr(last, "t2i_model", None), "unshuffle_amount", 1)
            if any(side * FACTOR % multiple for side in window):
                raise ValueError(f"ControlNet's T2I adapter wants sides that are multiples of {multiple}; choose such a size")
            image = last.cond_hint_original
            nearest = few_colours(image[0, :3].mul(255).round().to(torch.uint8))
            self.nets.append((last, Hint(image, image, phase.size, FACTOR, nearest)))
            last = last.previous_controlnet

    def show(self, crops: Tensor, sigmas: Tensor, c: dict, views: Sequence[View], roll: Sequence[int], kinds: int) -> None:
        """Ask the nets for their part in a call, as the host does, with the views' parts of their images; it comes into c.

        crops: [len(views) * kinds * B, C, h, w]; kinds: of rows, prompts and negative ones, in each view's.
        """
        if self.last is None:
            return
        rows = len(crops) // len(views)

        def repeated(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part.repeat(rows // len(part), 1, 1, 1) for part in parts])

        masks = [(net, getattr(net, "advanced_mask_weighting", None)) for net, _ in self.nets]
        try:
            for net, hint in self.nets:
                self._show(net, repeated(hint.crops(views, roll).chunk(len(views))), c)
            for net, mask in masks:
                if mask is not None:
                    net.advanced_mask_weighting = repeated(
                        [seen_by(mask, view, self.phase.size, FACTOR, roll) for view in views]
                    )
            c["control"] = self.last.get_control(crops, sigmas, dict(c), kinds * len(views))
            c["control_model"] = self.last
        finally:
            for net, mask in masks:
                net.advanced_mask_weighting = mask

    def _show(self, net: Any, images: Tensor, c: dict) -> None:
        """images: [rows, C, 8 * h, 8 * w], where the net keeps what it has made of its own for the size it was asked for."""
        net.transformer_options = c["transformer_options"]
        if hasattr(net, "t2i_model"):
            net.cond_hint = images.mean(1, keepdim=True) if net.channels_in == 1 else images
            net.control_input = None  # what it has made of the images before
        else:
            net.cond_hint = images.to(getattr(net, "manual_cast_dtype", None) or net.control_model.dtype)
