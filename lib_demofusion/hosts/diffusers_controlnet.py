"""ControlNets on diffusers: how they are loaded, whether they fit, and what each view of a picture gets from them.

    net = load_controlnet("folder, .safetensors file or hub name", pipe)
    generate(pipe, "two blue stars", controls=[Control(net, Image.open("depth.png"))])

diffusers is imported only when something here is called.
"""

from __future__ import annotations

import inspect
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_demofusion.config import first_line
from lib_demofusion.control import FEW_COLOURS, Hint, coarse_size
from lib_demofusion.hosts.diffusers_arguments import ASPECT, plain_image, short
from lib_demofusion.hosts.diffusers_checkpoints import (
    WEIGHTS,
    check_parts,
    check_place,
    check_weights_file,
    device_of,
    offline,
    shapes_in,
    small_suffix,
    variant_of_all,
)
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

# What a single file is, by the beginnings of names in it, where it is no ControlNet that can be used.
OTHER_FILES = {
    "lora_controlnet": "it is a Control-LoRA; use the whole ControlNet",
    "lllite_": "it is a ControlNet-LLLite; use a whole ControlNet",
    "first_stage_model.": "it is a checkpoint; give the ControlNet alone",
    "adapter.": "it is a T2I-Adapter; use a ControlNet",
    "body.": "it is a T2I-Adapter; use a ControlNet",
    "image_proj.": "it is an IP-Adapter; use a ControlNet",
}
OWN = ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")  # names that a ControlNet has


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet, and the image that it holds a picture to.

    model: diffusers' ControlNetModel or ControlNetUnionModel where the pipeline computes and in its dtype, as
    `load_controlnet` gives it. image: a PIL image of the picture's aspect, of any size. The base sees all of it, and
    in the phases each view its own part, of the image's full resolution. None: each phase after the base is held to the
    phase before, or to the picture that was given. scale: of what the ControlNet adds. start, end: it is on at step i of the
    n that a phase runs if i / n >= start and (i + 1) / n <= end, as in diffusers. type: for a union model what the image
    is, one of UNION_TYPES or the type's number.
    """

    model: Any
    image: Any = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    type: str | int | None = None


def check_controlnet(model: Any) -> None:
    """Raises ValueError, one line, if there is nothing to load a ControlNet from."""
    path = check_place(model, "ControlNet")
    if path.is_dir() and not (path / "config.json").is_file():
        what = "it is a whole pipeline's; give the folder controlnet in it" if (path / "model_index.json").is_file() else ""
        raise ValueError(f"{model} is no ControlNet's folder: {what or 'it has no config.json'}")


def load_controlnet(model: str | Path, pipe: Any) -> Any:
    """A ControlNet for `pipe` from a diffusers folder, a single .safetensors file, or a hub name; where and as it computes.

    Loading is diffusers' own. Raises ValueError, one line, if there is nothing to load or if it is no ControlNet; whether it
    fits the checkpoint is said by `generate` and `plan_for`.
    """
    check_parts(pipe)
    check_controlnet(model)
    path, device, dtype = Path(model), device_of(pipe, pipe.unet), pipe.unet.dtype
    try:
        if path.is_file():
            net = _load_file(path, pipe.unet, dtype)
        else:
            net = _load_folder(path if path.is_dir() else str(model), dtype)
    except Exception as error:  # a broken file surfaces as nearly any type
        why = None if path.is_dir() else offline(error, path.is_file())
        raise ValueError(f"{model} cannot be loaded: {why or first_line(error)}") from error
    if device.type == "cpu":
        net.to(memory_format=torch.channels_last)  # as the UNet there
    return net.to(device)


def _load_folder(model: Path | str, dtype: torch.dtype) -> Any:
    """The ControlNet in a diffusers folder (a Path), or of a hub name (a str)."""
    import diffusers

    variants: list[str | None] = [None, "fp16"]  # it may be there in half precision alone
    if isinstance(model, Path):
        files = sorted(p.name for p in model.glob("*") if WEIGHTS.fullmatch(p.name))
        if not files:
            raise ValueError("it has no weights, such as diffusion_pytorch_model.safetensors")
        for file in files:
            check_weights_file(model / file, f"{file}: ")
        variants = [variant_of_all({"ControlNet": files})]
    config = diffusers.ControlNetModel.load_config(str(model))
    union = "num_control_type" in config
    if not union and config.get("_class_name", "ControlNetModel") != "ControlNetModel":
        raise ValueError(f"it is a {config['_class_name']}; use a ControlNetModel or a ControlNetUnionModel")
    _check_union(union)
    kind = diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel
    settings = dict(torch_dtype=dtype, output_loading_info=True)
    try:
        net, info = kind.from_pretrained(str(model), variant=variants[0], **settings)
    except (OSError, ValueError):
        for variant in variants[1:]:
            with suppress(Exception):
                return kind.from_pretrained(str(model), variant=variant, torch_dtype=dtype)
        raise
    if missing := info["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(missing)[:3])}")
    return net


def _load_file(path: Path, unet: Any, dtype: torch.dtype) -> Any:
    """The ControlNet in a single file, which does not say how it is built: as the UNet is, as far as its names agree."""
    import diffusers

    if path.suffix.lower() != ".safetensors":
        raise ValueError("a ControlNet in one file is a .safetensors file")
    check_weights_file(path)
    shapes = shapes_in(path)
    for beginning, why in OTHER_FILES.items():
        if any(key.startswith(beginning) for key in shapes):
            raise ValueError(why)
    if not any(key.startswith(OWN) for key in shapes):
        raise ValueError("it is no ControlNet: none of its tensors has the name of one")
    takes = _each(unet.config.cross_attention_dim, 1)[0]
    width = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), takes)
    if width != takes:
        raise ValueError(f"it takes {width} numbers a token, and this checkpoint gives {takes}; use one made for its kind")
    # No tensor says whether it is pooled; the WebUI goes by its name, too.
    pooled = "shuffle" in path.stem.lower()
    if any(key.startswith("controlnet_cond_embedding.") for key in shapes):
        return _load_own_names(path, unet, shapes, pooled, dtype)
    with torch.device("meta"):
        like = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    like.register_to_config(global_pool_conditions=pooled)
    with tempfile.TemporaryDirectory() as folder, small_suffix(path) as named:
        like.save_config(folder)
        net = diffusers.ControlNetModel.from_single_file(str(named), torch_dtype=dtype, config=folder)
    if missing := [name for name, x in net.named_parameters() if x.is_meta]:
        raise ValueError(f"it lacks {', '.join(missing[:3])}")
    return net


def _load_own_names(path: Path, unet: Any, shapes: Mapping[str, tuple[int, ...]], pooled: bool, dtype: torch.dtype) -> Any:
    """The ControlNet in a file with diffusers' names, as those made for it are; also one with less attention than the UNet."""
    import diffusers
    from safetensors.torch import load_file

    def depth(block: str) -> int:
        found = [re.match(rf"{block}\.attentions\.\d+\.transformer_blocks\.(\d+)\.", key) for key in shapes]
        return max((int(match[1]) + 1 for match in found if match), default=0)

    union = "task_embedding" in shapes
    _check_union(union)
    kind = diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel
    own = inspect.signature(kind.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in own}
    depths, middle = [depth(f"down_blocks.{n}") for n in range(len(unet.config.block_out_channels))], depth("mid_block")
    embedding = "controlnet_cond_embedding"
    steps = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith(f"{embedding}.blocks."))
    layers = [f"{embedding}.conv_in.weight", *(f"{embedding}.blocks.{n}.weight" for n in range(1, steps, 2))]
    config.update(
        down_block_types=["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths],
        transformer_layers_per_block=[*(n or 1 for n in depths[:-1]), middle or depths[-1] or 1],
        conditioning_embedding_out_channels=[shapes[name][0] for name in layers],
        global_pool_conditions=pooled,
    )
    if union:
        types, channels = shapes["task_embedding"]
        config.update(num_control_type=types, num_trans_channel=channels)
        config.update(num_proj_channel=shapes["spatial_ch_projs.weight"][0])
    else:
        config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    with torch.device("meta"):
        net = kind(**config)
    expected = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    if wrong := [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]:
        raise ValueError(f"it is no ControlNet for this kind of checkpoint, or broken: {wrong[0]} is of another shape")
    net.load_state_dict({name: x.to(dtype) for name, x in load_file(str(path)).items()}, assign=True)
    return net.eval()


def _check_union(union: bool) -> None:
    import diffusers

    if union and not hasattr(diffusers, "ControlNetUnionModel"):
        raise ValueError(f"diffusers {diffusers.__version__} knows no union ControlNets; 0.32 and newer do")


def check_controls(pipe: Any, controls: Any, plan: Plan, given: Given | None) -> tuple[Control, ...]:
    """The controls of a job as they are used: images as RGB, types as numbers. Raises ValueError, one line, for others."""
    if not isinstance(controls, (list, tuple)) or not all(isinstance(control, Control) for control in controls):
        raise ValueError(f"controls must be a list of Control, got {short(controls)}")
    checked = []
    for number, control in enumerate(controls, 1):
        name = "the ControlNet" if len(controls) == 1 else f"ControlNet {number}"
        _check_model(pipe, control.model, name)
        _check_numbers(control, name)
        image = control.image
        if image is not None:
            image = plain_image(image, name.replace("ControlNet", "control image").removeprefix("the "))
            _check_aspect(image.size, _sizes(pipe, plan, given), f"{name}'s image")
        checked.append(replace(control, image=image, type=_type_number(control, name)))
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
        self._hints: list[Hint | None] = []
        self._calls = self._call = 0

    @property
    def follow(self) -> bool:
        """Whether a phase has to be shown the one before."""
        return any(control.image is None for control in self.controls)

    def begin(self, phase: Phase, before: Sequence[Any] | None = None) -> None:
        """To be called before each phase. before: PIL images of what the phase is made from; none in the base."""
        self._hints = [self._hint(control, phase, before) for control in self.controls]
        self._calls, self._call = phase.calls, -1

    def step(self) -> None:
        """To be called before each of the phase's predictions, of which there are phase.calls."""
        self._call += 1

    def _hint(self, control: Control, phase: Phase, before: Sequence[Any] | None) -> Hint | None:
        images = before if control.image is None else [control.image]
        if not images:
            return None
        nearest = control.image is not None and control.image.getcolors(FEW_COLOURS - 1) is not None
        size = self.window if _pooled(control.model) else phase.size
        fine = coarse = _pixels(images, [side * self.factor for side in size], nearest)
        if phase.dilated and not _pooled(control.model):
            coarse = _pixels(images, coarse_size(size, phase.dilation, self.factor), nearest)
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
            if hint is None or not self._on(control):
                continue
            whole = [View("local", 0, 0, *self.window)] * len(views)
            crops = hint.crops(whole if _pooled(control.model) else views)
            crops = crops.repeat_interleave(len(x) // branches // len(crops), 0)  # one image for a whole batch
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


def control_bytes(controls: Sequence[Control], plan: Plan, factor: int, images: int = 1) -> int:
    """What the control images of a job take in main memory: as they were given, and for the last phase's views."""
    last = plan.phases[-1]
    pixels = factor**2 * math.prod(last.size)
    pixels += math.prod(coarse_size(last.size, last.dilation, factor))
    follows = sum(control.image is None for control in controls)
    given = sum(math.prod(control.image.size) for control in controls if control.image is not None)
    return 3 * (given + pixels * (len(controls) - follows + follows * images))


def _last_rows(value: Any, rows: int) -> Any:
    """The last rows of each tensor in nested mappings."""
    return {key: _last_rows(item, rows) for key, item in value.items()} if isinstance(value, Mapping) else value[-rows:]


def _pixels(images: Sequence[Any], size: Sequence[int], nearest: bool) -> Tensor:
    """PIL images resized to (height, width), [len(images), 3, height, width], uint8."""
    import numpy as np
    from PIL import Image

    how = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    arrays = [np.asarray(image.resize((size[1], size[0]), how)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
