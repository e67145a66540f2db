"""The extension ControlNet (sd-webui-controlnet) beside this one: each view sees its own part of every control image.

It hooks the UNet's forward and, at every call, adds what its control models make of one control image, the hint, which has
the base's size. So do our calls, for windows of that size; while one runs, each unit is shown the hints of the views in it
(`Hints.shown`), and afterwards everything of the unit is as it was. The base is the extension's own affair.

Hints are made at each phase's size, on the CPU, as the extension makes them for Hires. fix: by its own preprocessors, from
the image that the unit was given, and by its own resizing, which keeps lines thin and the colours of maps unmixed.

What can be followed, and what is refused, is in `units`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from modules import devices
from torch import Tensor

from lib_demofusion.control import Hint, coarse_size, few_colours, seen_by
from lib_demofusion.fusion import crops_of
from lib_demofusion.hosts.webui import sampling, units
from lib_demofusion.hosts.webui.decoding import encode
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.picture import Start
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.phases import Phase, Plan
from lib_demofusion.views import Size, View


def mark(p: Any) -> None:
    """Conditions that were set up anew get the marks by which the extension tells a prompt from a negative one."""
    network = units.hook_of(p)
    if network is not None:
        marked = units.module_of(network, "hook")["mark_prompt_context"]
        p.c, p.uc = marked(p.c, positive=True), marked(p.uc, positive=False)


def hints(p: Any, plan: Plan, phase: Phase, start: Start | None, found: dict[int, Preprocessed]) -> Hints | None:
    """What the units of p show to one phase; None where none is on. Raises ValueError, one line, as `check_hooked`.

    found: by the units' numbers, what their preprocessors have made in this job; empty at its beginning.
    """
    network = units.hook_of(p)
    if network is None or not network.control_params:
        return None
    units.check_hooked(p, 0 if start is None else len(start.pictures))
    script, _ = units.script_of(p)
    shown = []
    for index, (unit, param) in enumerate(zip(script.enabled_units, network.control_params)):
        if index not in found:
            known = units.module_of(script, "controlnet_main_entry")["Preprocessor"]
            found[index] = Preprocessed(known.get_preprocessor(unit.module))
        shown.append(_unit(_Making(p, script, index, unit, param, found[index], start), plan, phase))
    return Hints(phase.size, plan.window, shown)


class Preprocessed:
    """One of the extension's preprocessors, as its `get_control` takes it, which is asked no more than once.

    Some are networks, and what they find in an image does not go by the size that it is then brought to.
    """

    def __init__(self, preprocessor: Any):
        self.preprocessor = preprocessor
        self.returns_image = preprocessor.returns_image
        self.result: Any = None

    def cached_call(self, *args: Any, **kwargs: Any) -> Any:
        if self.result is None:
            self.result = self.preprocessor.cached_call(*args, **kwargs)
        return self.result


# What the extension notes at every step and call, on its hook, on the UNet and on its units.
NOTES = {
    "hook": ("current_uc_indices", "current_c_indices", "current_style_fidelity", "is_in_high_res_fix"),
    "model": ("cond_mark", "current_sampling_percent", "current_h_shape", "is_in_high_res_fix"),
    "unit": ("guidance_stopped", "used_hint_cond", "used_hint_cond_latent", "used_hint_inpaint_hijack", "vision_hint_count"),
}


@contextmanager
def kept(p: Any) -> Iterator[None]:
    """Afterwards the extension's notes are what they were, as far as it had any."""
    network = units.hook_of(p)
    things = [] if network is None else [(network, "hook"), (network.model, "model")]
    things += [(param, "unit") for param in getattr(network, "control_params", None) or []]
    before = [(thing, name, vars(thing)[name]) for thing, kind in things for name in NOTES[kind] if name in vars(thing)]
    try:
        yield
    finally:
        for thing, name, value in before:
            setattr(thing, name, value)


@dataclass(frozen=True)
class _Unit:
    """One unit in a phase. hint: what local types show. whole: what global pooling shows, [1, C, ., .] in 0..1.

    latents: of the hint, [1, C, H, W], where the unit wants the picture's colours (tile_colorfix).
    """

    param: Any
    kind: str
    hint: Hint | None = None
    whole: Tensor | None = None
    latents: Tensor | None = None


def _unit(making: _Making, plan: Plan, phase: Phase) -> _Unit:
    param, kind = making.param, making.param.control_model_type.name
    if kind in units.GLOBAL:
        return _Unit(param, kind)
    coarse = making.at(plan.window)
    if param.global_average_pooling:
        return _Unit(param, kind, whole=coarse.float().div(255))
    fine, size = making.at(phase.size), coarse_size(phase.size, phase.dilation, FACTOR)
    if coarse.shape[-2:] != size:
        coarse = making.resized(coarse, size)
    hint = Hint(fine, coarse, phase.size, FACTOR, few_colours(coarse[0, :3]))
    latents = None
    if "colorfix" in param.preprocessor["name"]:
        model = making.p.sd_model
        with host.autocast():
            latents = encode(model, fine[:, :3].float().div(127.5).sub(1), plan.window)
    return _Unit(param, kind, hint, latents=latents)


@contextmanager
def _on_the_cpu(module: dict[str, Any]) -> Iterator[None]:
    """Meanwhile the extension's hints are uint8 [1, C, H, W] on the CPU, instead of float32 on the device, three times."""
    before = module["get_pytorch_control"]
    module["get_pytorch_control"] = lambda pixels: torch.from_numpy(
        np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(2, 0, 1))
    )[None]
    try:
        yield
    finally:
        module["get_pytorch_control"] = before


@dataclass(frozen=True)
class _Making:
    """How the extension makes one unit's hint. index: the unit's number. found: what its preprocessor has made."""

    p: Any
    script: Any
    index: int
    unit: Any
    param: Any
    found: Preprocessed
    start: Start | None

    @property
    def _module(self) -> dict[str, Any]:
        return units.module_of(self.script, "controlnet_main_entry")

    def at(self, size: Size) -> Tensor:
        """The hint at (H, W) latent pixels: uint8, [1, C, 8 * H, 8 * W]."""
        job, unit = copy.copy(self.p), self.unit.copy()
        job.height, job.width = (side * FACTOR for side in size)
        if self.start is not None and self.start.from_picture:
            job.init_images, job.resize_mode = list(self.start.pictures), 0  # it is stretched to that size, and not cut
        unit.pixel_perfect = False  # for which the extension has set the preprocessor's resolution by the base's size
        numbers = np.random.get_state()  # the extension seeds all programs' own
        try:
            with _on_the_cpu(self._module):
                made, _, _ = self._module["get_control"](job, unit, self.index, self.param.control_model_type, self.found)
        finally:
            np.random.set_state(numbers)
        return made[0]

    def resized(self, hint: Tensor, size: Size) -> Tensor:
        """A hint at (height, width) in pixels, by the extension's own resizing."""
        pixels, name = hint[0].permute(1, 2, 0).numpy(), self.param.preprocessor["name"]
        with _on_the_cpu(self._module):
            return self.script.detectmap_proc(pixels, name, self._module["ResizeMode"].RESIZE, *size)[0]


class Hints:
    """What the units show to the views of one phase.

    size: (H, W) of the phase; window: (h, w) of its views; both in latent pixels.
    """

    def __init__(self, size: Size, window: Size, shown: Sequence[_Unit]):
        self.size = size
        self.window = window
        self.units = shown
        self.one_by_one = any(_takes_one_view(unit) for unit in shown)

    def around(
        self,
        call: Callable[[Tensor, Sequence[View]], Tensor],
        crops: Tensor,
        views: Sequence[View],
        roll: Sequence[int],
    ) -> Tensor:
        """call(crops [len(views) * rows, C, h, w], views), with the views' hints shown to the units."""
        if self.one_by_one and len(views) > 1:
            parts = zip(crops.chunk(len(views)), views)
            return torch.cat([self.around(call, part, [view], roll) for part, view in parts])
        with self.shown(views, len(crops) // len(views), roll):
            return call(crops, views)

    @contextmanager
    def shown(self, views: Sequence[View], rows: int, roll: Sequence[int]) -> Iterator[None]:
        """Meanwhile each unit has the views' parts of its hint, `rows` times each; then all that it had before.

        roll: (rows, columns) by which the phase's plane is rolled.
        """
        before: list[tuple[Any, str, Any]] = []

        def put(thing: Any, name: str, value: Any) -> None:
            before.append((thing, name, getattr(thing, name)))
            setattr(thing, name, value)

        try:
            for unit in self.units:
                self._show(unit, views, rows, roll, put)
            yield
        finally:
            for thing, name, value in reversed(before):
                setattr(thing, name, value)

    def _show(self, unit: _Unit, views: Sequence[View], rows: int, roll: Sequence[int], put: Callable) -> None:
        param, model = unit.param, unit.param.control_model
        device = devices.get_device_for("controlnet")
        if param.effective_region_mask is not None:
            mask = param.effective_region_mask
            crops = torch.cat([seen_by(mask, view, self.size, FACTOR, roll).to(mask) for view in views])
            put(param, "effective_region_mask", crops.repeat_interleave(rows, 0))
        if unit.kind == "IPAdapter":
            put(model, "cache", {})  # it holds keys and values of as many rows as it has seen first
            put(model, "latent_height", self.window[0])
            put(model, "latent_width", self.window[1])
            if model.effective_region_mask is not None:
                put(model, "effective_region_mask", param.effective_region_mask[:1])
        if unit.whole is not None:
            put(param, "used_hint_cond", unit.whole.to(device))
        if unit.hint is None:
            return
        shown = unit.hint.crops(views, roll).to(device).float().div(255)
        if not _repeats_by_itself(param, unit.kind):
            shown = shown.repeat_interleave(rows, 0)
        put(param, "used_hint_cond", shown)
        if unit.latents is not None:
            latents = crops_of(sampling.rolled(unit.latents, roll), views).repeat_interleave(rows, 0)
            put(param, "used_hint_cond_latent", latents.to(devices.dtype_unet))
        if unit.kind == "T2I_Adapter":
            put(model, "control", None)  # what it has made of the hint before
            put(model, "hint_cond", model.hint_cond)
        if unit.kind == "Controlllite":
            for module in model.modules.values():
                put(module, "cond_image", shown * 2 - 1)
                put(module, "cond_emb", None)


def _repeats_by_itself(param: Any, kind: str) -> bool:
    """Whether the extension makes as many rows of what the model answers as the call has."""
    return kind == "T2I_Adapter" and (param.cfg_injection or param.global_average_pooling)


def _takes_one_view(unit: _Unit) -> bool:
    """Whether one call can show the unit no more than one view."""
    masked = unit.kind == "IPAdapter" and unit.param.control_model.effective_region_mask is not None
    return masked or (unit.hint is not None and _repeats_by_itself(unit.param, unit.kind))
