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

from lib_demofusion.control import Hint, coarse_size, few_colours, seen_by
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
def at_size(p: Any, phase: Phase, window: Size, pictures: Sequence[Any]) -> Iterator[list[Tensor]]:
    """While it lasts the units' images are of the phase's size, as the host's own preprocessing makes them of what it was
    given. Yields what dilated views see of them, [B, C, ., .], the last unit's first.

    window: (h, w) of a view. pictures: what the phases start from where no base is sampled; units without an image have these.
    """
    script, args = units.script_of(p)
    before, model = getattr(script, "current_params", None), p.sd_model
    if not before:
        yield []
        return
    own = [copy.copy(unit) for unit in script.get_enabled_units(args)]
    for unit in own:
        script.bound_check_params(unit)  # the API's are made anew each time
    objects, numbers = model.forge_objects, np.random.get_state()  # the host seeds all programs' own

    def made(size: Size) -> dict[int, Any]:
        job = copy.copy(p)
        (job.height, job.width), job.extra_result_images = (side * FACTOR for side in size), []
        if pictures:
            job.init_images, job.resize_mode = list(pictures), 0  # stretched to that size, and not cut
        params = {number: type(before[number])() for number in range(len(own))}
        for number, unit in enumerate(own):
            script.process_unit_after_click_generate(job, unit, params[number], *args)
            unit.pixel_perfect = False  # for which the preprocessor's resolution has been set by that size
        return params

    try:
        if pictures or any(isinstance(unit, dict) for unit in args):
            script.current_params = made(window)
        else:  # what the host has made for the base
            for unit in own:
                unit.pixel_perfect = False
        model.forge_objects = objects.shallow_copy()
        script.process_before_every_sampling(p, *args)
        nets = model.forge_objects.unet.list_controlnets()
        model.forge_objects = objects
        script.current_params = made(phase.size)
        size = coarse_size(phase.size, phase.dilation, FACTOR)
        yield [_resized(script, net.cond_hint_original, size) for net in nets]
    finally:
        script.current_params, model.forge_objects = before, objects
        np.random.set_state(numbers)


def _resized(script: Any, image: Tensor, size: Size) -> Tensor:
    """An image [B, C, h, w] at (height, width) in pixels, by the host's own resizing, which keeps lines thin.

    One with marks for what is masked, below 0, stays as it is.
    """
    if image.shape[-2:] == size or image.min() < 0:
        return image
    module = units.module_of(script, "get_enabled_units")
    resize, mode = module["crop_and_resize_image"], module["external_code"].ResizeMode.RESIZE
    pixels = image.mul(255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    made = np.stack([resize(part, mode, *size) for part in pixels])
    return torch.from_numpy(made).movedim(-1, 1).to(image).div(255)


class Controls:
    """The nets of one phase. last: the last of them, each of which knows the one before it; None: there is none.

    window: (h, w) of a view. coarse: the nets' images as dilated views see them, if there are such; what is seen of the
    whole is seen of these. Raises ValueError, one line, for an adapter that takes no image of a window's size.
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
