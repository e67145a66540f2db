"""Control images in hosts whose ControlNet is their own (`forge`): its nets hang on the UNet's patcher, each with an image.

The host asks them once a step, for the whole latent. Here they are asked with each call for views, and each view sees its
own part of every image. What nets are is told by what they have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_demofusion.control import Hint, few_colours, seen_by
from lib_demofusion.hosts.webui import units
from lib_demofusion.hosts.webui.neighbours import WINDOWS, said
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.phases import Phase
from lib_demofusion.views import Size, View

KINDS = ("ControlNetPatcher", "IPAdapterPatcher", "ControlModelPatcher")  # what is known to follow windows


def check(p: Any, pictures: int = 0) -> None:
    """Every script has had its turn. Raises ValueError, one line, for units whose images the views cannot follow.

    pictures: how many are given to start from.
    """
    script, args = units.script_of(p)
    made, asked = getattr(script, "current_params", None) or {}, units.asked(args)
    if len(made) < len(asked):
        raise ValueError(units.NOT_BEGUN)
    for params in made.values():
        kind = type(params.model).__name__
        if kind not in KINDS:
            raise ValueError(f"ControlNet's {kind} goes by the whole image, and {WINDOWS}; {units.INSTEAD}")
    if pictures > 1 and any(said(unit, "image") is None for unit in asked):
        raise ValueError(units.NO_IMAGE)


@contextmanager
def at_size(p: Any, size: Size) -> Iterator[list[Tensor]]:
    """While it lasts the units' images are of (H, W) latent pixels, as the host's own preprocessing makes them of what it was
    given. Yields those of the base's size, [B, C, ., .], the last unit's first.
    """
    script, args = units.script_of(p)
    before, model = getattr(script, "current_params", None), p.sd_model
    if not before:
        yield []
        return
    job = copy.copy(p)
    (job.height, job.width), job.extra_result_images = (side * FACTOR for side in size), []
    objects, numbers = model.forge_objects, np.random.get_state()  # the host seeds all programs' own
    try:
        model.forge_objects = objects.shallow_copy()
        script.process_before_every_sampling(p, *args)
        nets = model.forge_objects.unet.list_controlnets()
        model.forge_objects = objects
        script.current_params = {}
        for number, unit in enumerate(script.get_enabled_units(args)):
            unit, params = copy.copy(unit), type(before[number])()
            unit.pixel_perfect = False  # for which the host has set the preprocessor's resolution by the base's size
            script.process_unit_after_click_generate(job, unit, params, *args)
            script.current_params[number] = params
        yield [net.cond_hint_original for net in nets]
    finally:
        script.current_params, model.forge_objects = before, objects
        np.random.set_state(numbers)


class Controls:
    """The nets of one phase. last: the last of them, each of which knows the one before it; None: there is none.

    window: (h, w) of a view. coarse: the nets' images at the base's size, if there are such; what is seen of the whole is
    seen of these. Raises ValueError, one line, for an adapter that takes no image of a window's size.
    """

    def __init__(self, last: Any, phase: Phase, window: Size, coarse: Sequence[Tensor] = ()):
        self.last = last
        self.phase = phase
        self.nets: list[tuple[Any, Hint]] = []
        while last is not None:
            multiple = getattr(getattr(last, "t2i_model", None), "unshuffle_amount", 1)
            if any(side * FACTOR % multiple for side in window):
                raise ValueError(f"ControlNet's T2I adapter wants sides that are multiples of {multiple}; choose such a size")
            fine, number = last.cond_hint_original, len(self.nets)
            nearest = few_colours(fine[0, :3].mul(255).round().to(torch.uint8))
            hint = Hint(fine, coarse[number] if number < len(coarse) else fine, phase.size, FACTOR, nearest)
            self.nets.append((last, hint))
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
