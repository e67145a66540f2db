"""ControlNets on diffusers: whether they fit, and what each view of a picture gets from them.

    net = load_controlnet("folder, .safetensors file or hub name", pipe)
    generate(pipe, "two blue stars", controls=[Control(net, Image.open("depth.png"))])

diffusers is imported only when something here is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lib_demofusion.control import FEW_COLOURS, Hint, coarse_size
from lib_demofusion.hosts.diffusers_arguments import ASPECT, plain_image, short
from lib_demofusion.hosts.diffusers_checkpoints import device_of
from lib_demofusion.memory import call_bytes
from lib_demofusion.phases import Phase, Plan
from lib_demofusion.pictures import Given
from lib_demofusion.views import Size, View

# What a union ControlNet's image can be: names for xinsir's numbers, the order that union models of 6 and 8 types have.
UNION_TYPES = {
    "openpose": 0,
    "depth": 1,
    "softedge": 2,
    "scribble": 2,
    "canny": 3,
    "lineart": 3,
    "mlsd": 3,
    "normal": 4,
    "segmentation": 5,
    "tile": 6,
    "inpaint": 7,
}
UNION_TITLES = ("OpenPose", "Depth", "Soft Edge", "Hard Edge", "Normal Map", "Segmentation", "Tile", "Inpaint")  # WebUI's
NAMED = (6, 8)  # how many types a union model has for which these names hold


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet, and the image that it holds a picture to.

    model: diffusers' ControlNetModel or ControlNetUnionModel where the pipeline computes and in its dtype, as
    `load_controlnet` gives it. image: a PIL image of the picture's aspect, of any size; the picture that the job begins
    with unless given. The base sees all of it, and in the phases each view its own part, of the image's full resolution.
    scale: of what the ControlNet adds. start, end: it is on at step i of the n that a phase runs if i / n >= start and
    (i + 1) / n <= end, as in diffusers. type: for a union model what the image is, one of UNION_TYPES or the type's number.
    """

    model: Any
    image: Any = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    type: str | int | None = None


def check_controls(pipe: Any, controls: Any, plan: Plan, given: Given | None) -> tuple[Control, ...]:
    """The controls of a job as they are used: images as RGB, types as numbers. Raises ValueError, one line, for others."""
    if not isinstance(controls, (list, tuple)) or not all(isinstance(control, Control) for control in controls):
        raise ValueError(f"controls must be a list of Control, got {short(controls)}")
    checked = []
    for number, control in enumerate(controls, 1):
        name = "the ControlNet" if len(controls) == 1 else f"ControlNet {number}"
        _check_model(pipe, control.model, name)
        _check_numbers(control, name)
        kind = _type_number(control, name)
        if control.image is None and given is None:
            raise ValueError(f"{name} has no image; give it one, or the job a picture to begin with, which it then takes")
        if control.image is None:
            image = given.picture
        else:
            image = plain_image(control.image, name.replace("ControlNet", "control image").removeprefix("the "))
            _check_aspect(image.size, _sizes(pipe, plan, given), f"{name}'s image")
        checked.append(replace(control, image=image, type=kind))
    return tuple(checked)


def _kinds() -> tuple[type, ...]:
    import diffusers

    return tuple(getattr(diffusers, name) for name in ("ControlNetModel", "ControlNetUnionModel") if hasattr(diffusers, name))


def _is_union(model: Any) -> bool:
    return hasattr(model.config, "num_control_type")


def _check_model(pipe: Any, model: Any, name: str) -> None:
    """Raises ValueError, one line, unless what a ControlNet takes is there and what it gives fits into the UNet."""
    if not isinstance(model, _kinds()):
        kinds = " or ".join(kind.__name__ for kind in _kinds())
        raise ValueError(f"{name} must be diffusers' {kinds}, got a {type(model).__name__}; load_controlnet loads one")
    own, unet, factor = model.config, pipe.unet.config, pipe.vae_scale_factor
    blocks = len(own.block_out_channels)
    attends = any("CrossAttn" in kind for kind in (*own.down_block_types, own.get("mid_block_type") or ""))
    shapes = {
        "in_channels": "latent channels",
        **({"cross_attention_dim": "numbers a token"} if attends or _is_union(model) else {}),
        "block_out_channels": "channels of its blocks",
        "layers_per_block": "layers of its blocks",
    }
    for key, what in shapes.items():
        values = [_each(config[key], blocks) for config in (own, unet)]
        if values[0] != values[1]:
            numbers = ["/".join(map(str, value if len(set(value)) > 1 else value[:1])) for value in values]
            raise ValueError(
                f"{name} does not fit the checkpoint: {what} {numbers[0]} instead of {numbers[1]}; "
                "use one that was made for this kind of checkpoint (SD 1.x, 2.x or XL)"
            )
    added = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    more = own.addition_embed_type not in (None, "text") and any(own[key] != unet[key] for key in added)
    if more or own.class_embed_type is not None or own.num_class_embeds is not None:
        raise ValueError(f"{name} asks for more than a prompt and the UNet's own conditions; use another one")
    if own.get("conditioning_channels", 3) != 3:
        raise ValueError(f"{name} takes images of {own.conditioning_channels} channels; use one that takes RGB")
    pixels = 2 ** (len(own.conditioning_embedding_out_channels) - 1)
    if pixels != factor:
        raise ValueError(f"{name} takes {pixels} pixels for a latent pixel, and the checkpoint has {factor}; use another one")
    where, lies = device_of(pipe, pipe.unet), device_of(pipe, model)
    if (where.type, where.index or 0) != (lies.type, lies.index or 0):
        raise ValueError(f"{name} lies on {lies}, and the pipeline computes on {where}; move it there with its to()")
    if model.dtype != pipe.unet.dtype:
        types = [str(dtype).removeprefix("torch.") for dtype in (model.dtype, pipe.unet.dtype)]
        raise ValueError(f"{name} is in {types[0]}, and the pipeline in {types[1]}; bring it there with its to()")


def _each(value: Any, blocks: int) -> tuple:
    """A setting of a UNet's or ControlNet's blocks, for each of them."""
    return (value,) * blocks if isinstance(value, int) else tuple(value)


def _check_numbers(control: Control, name: str) -> None:
    numbers = {"scale": control.scale, "start": control.start, "end": control.end}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name}'s {key} must be a number, got {short(value)}")
        if value < 0 or key != "scale" and value > 1:
            raise ValueError(f"{name}'s {key} must be {'at least 0' if key == 'scale' else 'from 0 to 1'}, got {value:g}")
    if control.start > control.end:
        raise ValueError(f"{name}'s start must not be after its end, got {control.start:g} and {control.end:g}")


def _type_number(control: Control, name: str) -> int | None:
    kind = control.type
    if not _is_union(control.model):
        if kind is not None:
            raise ValueError(f"{name} is no union model and has no types; leave the type out")
        return None
    most = control.model.config.num_control_type
    known = {text: number for text, number in UNION_TYPES.items() if most in NAMED and number < most}
    if kind is None:
        raise ValueError(f"{name} is a union model; give the type of its image: {', '.join(known) or f'0 to {most - 1}'}")
    number = known.get(kind.lower()) if isinstance(kind, str) else kind
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < most:
        there = f"{', '.join(known)}, or a number from 0 to {most - 1}" if known else f"numbers from 0 to {most - 1}"
        raise ValueError(f"{name} has no type {short(kind)}; there are: {there}")
    return number


def _sizes(pipe: Any, plan: Plan, given: Given | None) -> list[tuple[int, int]]:
    """(width, height) of what a control image lies under: the base, or the picture that was given and what becomes of it."""
    of = plan.window if given is None else plan.phases[-1].size
    made = tuple(side * pipe.vae_scale_factor for side in reversed(of))
    return [made] if given is None else [given.picture.size, made]


def _check_aspect(size: tuple[int, int], under: Sequence[tuple[int, int]], name: str) -> None:
    for width, height in under:
        if 1 - ASPECT <= size[1] * width / (size[0] * height) <= 1 / (1 - ASPECT):
            return
    (w, h), (width, height) = size, under[0]
    raise ValueError(f"{name} is {w}x{h}, which has not the aspect of the picture, {width}x{height}; crop it to that")


def _pooled(model: Any) -> bool:
    """Whether what the ControlNet sees has no place in the picture (shuffle, for one)."""
    return bool(model.config.get("global_pool_conditions"))


class Controls:
    """The controls of one job: what they show in the phase that runs, and which of them are on at the step that runs.

    controls: checked ones. window: (h, w) of the views. factor: pixels of a latent pixel.
    """

    def __init__(self, controls: Sequence[Control], window: Size, factor: int):
        self.controls = controls
        self.window = window
        self.factor = factor
        self._hints: list[Hint] = []
        self._calls = self._call = 0

    def begin(self, phase: Phase) -> None:
        """To be called before each phase."""
        self._hints = [self._hint(control, phase) for control in self.controls]
        self._calls, self._call = phase.calls, -1

    def step(self) -> None:
        """To be called before each of the phase's predictions, of which there are phase.calls."""
        self._call += 1

    def _hint(self, control: Control, phase: Phase) -> Hint:
        pooled, nearest = _pooled(control.model), control.image.getcolors(FEW_COLOURS - 1) is not None
        size = self.window if pooled else phase.size
        fine = coarse = _pixels(control.image, [side * self.factor for side in size], nearest)
        if phase.dilated and not pooled:
            coarse = _pixels(control.image, coarse_size(size, phase.dilation, self.factor), nearest)
        return Hint(fine, coarse, size, self.factor, nearest)

    def _on(self, control: Control) -> bool:
        after, until = self._call / self._calls, (self._call + 1) / self._calls
        return control.scale > 0 and after >= control.start and until <= control.end

    def residuals(
        self, views: Sequence[View], x: Tensor, t: Any, branches: int, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the controls that are on add to the UNet's call, as its arguments: none where none is on.

        x: the UNet's input, [branches * len(views) * B, C, h, w]. conditions: its other arguments, by name.
        """
        seen = []
        for control, hint in zip(self.controls, self._hints):
            if not self._on(control):
                continue
            whole = [View("local", 0, 0, *self.window)] * len(views)
            crops = hint.crops(whole if _pooled(control.model) else views)
            crops = crops.repeat_interleave(len(x) // branches // len(views), 0)  # one image for a whole batch
            seen.append((control, crops.to(x.device).to(x.dtype).div_(255)))
        return residuals(seen, x, t, branches, conditions)


def residuals(
    seen: Sequence[tuple[Control, Tensor]], x: Tensor, t: Any, branches: int, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """What ControlNets add to a UNet's call, as its arguments.

    seen: each with its hint, [len(x) / branches, 3, H, W] in 0..1. Both branches of guidance get it, unless it is pooled:
    then the prompt's alone, as in diffusers' pipelines.
    """
    down, mid = None, None
    for control, hint in seen:
        rows = len(x) // 2 if branches == 2 and _pooled(control.model) else len(x)
        own = _last_rows(dict(sample=x, **conditions), rows)
        hint = hint.repeat(rows // len(hint), 1, 1, 1)
        if _is_union(control.model):
            chosen = torch.zeros(rows, control.model.config.num_control_type, dtype=x.dtype, device=x.device)
            chosen[:, control.type] = 1
            own.update(controlnet_cond=[hint], control_type=chosen, control_type_idx=[control.type])
        else:
            own["controlnet_cond"] = hint
        more, deepest = control.model(timestep=t, conditioning_scale=float(control.scale), return_dict=False, **own)
        if rows < len(x):
            *more, deepest = (torch.cat([torch.zeros_like(r), r]) for r in (*more, deepest))
        down = more if down is None else [a + b for a, b in zip(down, more)]
        mid = deepest if mid is None else mid + deepest
    return {} if down is None else dict(down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid)


def controlled_call_bytes(
    unet: Any, controls: Sequence[Control], x: Tensor, branches: int, conditions: Mapping[str, Any], factor: int
) -> int:
    """The most bytes alive during a UNet's call with what all these controls add to it; see call_bytes.

    x, conditions: the UNet's input and its other arguments, of which the shapes count.
    """
    if not controls:
        return call_bytes(unet, unet, x, 0, return_dict=False, **conditions)
    networks = torch.nn.ModuleList(dict.fromkeys([unet, *(control.model for control in controls)]))
    controls = [replace(control, type=0) for control in controls]  # whichever it is
    height, width = (factor * side for side in x.shape[-2:])
    hint = torch.empty(len(x) // branches, 3, height, width, dtype=x.dtype, device="meta")

    def call(x: Tensor, hints: list[Tensor], conditions: Mapping[str, Any]) -> Any:
        added = residuals(list(zip(controls, hints)), x, 0, branches, conditions)
        return unet(x, 0, return_dict=False, **conditions, **added)

    return call_bytes(networks, call, x, [hint.clone() for _ in controls], dict(conditions))


def control_bytes(controls: Sequence[Control], plan: Plan, factor: int) -> int:
    """What the control images of a job take in main memory: as they were given, and for the last phase's views."""
    last = plan.phases[-1]
    seen = factor**2 * math.prod(last.size) + math.prod(coarse_size(last.size, last.dilation, factor))
    return 3 * sum(seen + (0 if control.image is None else math.prod(control.image.size)) for control in controls)


def _last_rows(value: Any, rows: int) -> Any:
    """The last rows of each tensor in nested mappings."""
    return {key: _last_rows(item, rows) for key, item in value.items()} if isinstance(value, Mapping) else value[-rows:]


def _pixels(image: Any, size: Sequence[int], nearest: bool) -> Tensor:
    """A PIL image resized to (height, width), [1, 3, height, width], uint8."""
    import numpy as np
    from PIL import Image

    how = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    return torch.from_numpy(np.array(image.resize((size[1], size[0]), how))).permute(2, 0, 1)[None].contiguous()
