"""ControlNets for the diffusers host: which can be loaded, and why not the others."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lib_demofusion.config import first_line
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

# What a single file is, by the beginnings of names in it, where it is no ControlNet that can be used.
OTHER_FILES = {
    "lora_controlnet": "it is a Control-LoRA; use the whole ControlNet",
    "lllite_": "it is a ControlNet-LLLite; use a whole ControlNet",
    "first_stage_model.": "it is a checkpoint; give the ControlNet alone",
    "adapter.": "it is a T2I-Adapter; use a ControlNet",
    "body.": "it is a T2I-Adapter; use a ControlNet",
    "image_proj.": "it is an IP-Adapter; use a ControlNet",
    **dict.fromkeys(("control_model.label_emb.", "label_emb."), "its SDXL names are not diffusers', which cannot read it"),
}
OWN = ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")  # names that a ControlNet has


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
    takes = unet.config.cross_attention_dim
    takes = takes if isinstance(takes, int) else takes[0]
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
    steps = sum(key.startswith(f"{embedding}.blocks.") and key.endswith(".weight") for key in shapes)
    layers = [f"{embedding}.conv_in.weight", *(f"{embedding}.blocks.{n}.weight" for n in range(1, steps, 2))]
    config.update(
        down_block_types=["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in depths],
        transformer_layers_per_block=[*(n or 1 for n in depths[:-1]), middle or depths[-1] or 1],
        conditioning_embedding_out_channels=[shapes[name][0] for name in layers],
        global_pool_conditions=pooled,
    )
    if "add_embedding.linear_1.weight" not in shapes:  # it is not told about sizes
        config["addition_embed_type"] = None
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
        raise ValueError(f"it is no ControlNet for this kind of checkpoint, or broken: {wrong[0]} does not agree")
    net.load_state_dict({name: x.to(dtype) for name, x in load_file(str(path)).items()}, assign=True)
    return net.eval()


def _check_union(union: bool) -> None:
    import diffusers

    if union and not hasattr(diffusers, "ControlNetUnionModel"):
        raise ValueError(f"diffusers {diffusers.__version__} knows no union ControlNets; 0.32 and newer do")
