"""Writes the embedded checkpoint as the WebUI reads one: a single .safetensors in LDM's names and a .yaml beside it.

    python -m training.export_webui FOLDER [--controlnet FOLDER] [--lora FOLDER]

FOLDER is the WebUI's models/Stable-diffusion. Its extension must be installed there, since the .yaml names classes of
it (lib_demofusion/hosts.webui.embedded.py). The tokenizer lies in a folder beside it. --controlnet writes the tile
ControlNet, too, under the names of sd-webui-controlnet; that builds networks of Stable Diffusion's widths alone, so that
who loads the file has to give it those of the embedded UNet. --lora writes the LCM-LoRA as the WebUI's own Lora extension
reads one; that is for its models/Lora.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT as CHECKPOINT

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Channels after each convolution of sd-webui-controlnet's embedding of the hint but the last; they are fixed there.
HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)
LORA_ABOUT = {
    "format": "pt",
    "modelspec.title": "LCM-LoRA of DemoFusion's embedded checkpoint",
    "modelspec.description": "Few-step sampling. For the embedded checkpoint alone.",
    "modelspec.usage_hint": "Strength 1, sampler LCM, 2 to 8 steps, CFG scale 1 to 2.",
}


def unet_name(name: str, layers: int) -> str:
    """A diffusers UNet parameter's name in LDM; layers: residual blocks per level on the way down."""
    for ours, theirs in UNET_TOP.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    part, rest = re.match(r"(\w+?_block(?:s\.\d+)?)\.(.*)", name).groups()
    level = int(part.split(".")[1]) if "." in part else 0
    kind, index, rest = re.match(r"(\w+)\.(\d+)\.(.*)", rest).groups()
    index = int(index)
    if kind == "resnets":
        head, _, tail = rest.partition(".")
        rest = f"{RESNET[head]}.{tail}"
    if part == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if part.startswith("down"):
        first = 1 + level * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"
    first = level * (layers + 1)
    if kind == "upsamplers":  # the last module of the level's last block, after its attention
        return f"output_blocks.{first + layers}.2.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def controlnet_name(name: str, layers: int) -> str:
    """A diffusers ControlNet parameter's name in LDM; layers: as for `unet_name`."""
    if name.startswith("controlnet_mid_block."):
        return name.replace("controlnet_mid_block", "middle_block_out.0")
    if name.startswith("controlnet_down_blocks."):
        return re.sub(r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)
    if name.startswith("controlnet_cond_embedding."):
        part, kind = re.match(r"controlnet_cond_embedding\.(.*)\.(\w+)", name).groups()
        # A SiLU stands between two convolutions.
        number = {"conv_in": 0, "conv_out": len(HINT_CHANNELS)}.get(part)
        return f"input_hint_block.{2 * (int(part.split('.')[1]) + 1 if number is None else number)}.{kind}"
    return unet_name(name, layers)


def vae_name(name: str, levels: int) -> str:
    """A diffusers autoencoder parameter's name in LDM; levels: how many resolutions it has."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)


def state_dict() -> dict:
    """All parameters of the embedded checkpoint under LDM's names, float16."""
    config = {part: json.loads((CHECKPOINT / part / "config.json").read_text()) for part in ("unet", "vae")}
    out = {}
    for name, value in load_file(CHECKPOINT / "unet" / "diffusion_pytorch_model.safetensors").items():
        out["model.diffusion_model." + unet_name(name, config["unet"]["layers_per_block"])] = value
    for name, value in load_file(CHECKPOINT / "vae" / "diffusion_pytorch_model.safetensors").items():
        out["first_stage_model." + vae_name(name, len(config["vae"]["block_out_channels"]))] = value
    for name, value in load_file(CHECKPOINT / "text_encoder" / "model.safetensors").items():
        out["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    return out


def controlnet_state_dict() -> dict:
    """All parameters of the embedded ControlNet as those of sd-webui-controlnet's class ControlNet, float16.

    That is for num_res_blocks=1, attention_resolutions=[] and transformer_depth_middle=0, with the embedded UNet's widths,
    norm groups and context_dim. What the class has and ours lacks does nothing: further channels of the hint's embedding are
    zero, and the middle's second residual block and its empty attention add nothing to what they are given.
    """
    folder = CHECKPOINT / "controlnet"
    layers = json.loads((folder / "config.json").read_text())["layers_per_block"]
    out = {}
    for name, value in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        name = controlnet_name(name, layers)
        if name.startswith("input_hint_block."):
            position, into = int(name.split(".")[1]) // 2, len(value)
            more = [HINT_CHANNELS[position] - into if position < len(HINT_CHANNELS) else 0]
            if value.ndim == 4:
                more.append(HINT_CHANNELS[position - 1] - value.shape[1] if position else 0)
            value = F.pad(value, [0, 0] * (value.ndim - len(more)) + [n for last in reversed(more) for n in (0, last)])
        out[f"control_model.{name}"] = value
    for name, value in {k: v for k, v in out.items() if k.startswith("control_model.middle_block.0.")}.items():
        norm = name.endswith(("in_layers.0.weight", "out_layers.0.weight"))
        out[name.replace("middle_block.0.", "middle_block.2.")] = torch.ones_like(value) if norm else torch.zeros_like(value)
    width = len(out["control_model.middle_block_out.0.bias"])
    for part, shape in {"norm": [width], "proj_in": [width, width, 1, 1], "proj_out": [width, width, 1, 1]}.items():
        weight = torch.ones if part == "norm" else torch.zeros
        out[f"control_model.middle_block.1.{part}.weight"] = weight(shape, dtype=torch.float16)
        out[f"control_model.middle_block.1.{part}.bias"] = torch.zeros(width, dtype=torch.float16)
    return out


def lora_state_dict() -> dict:
    """The embedded LoRA in LDM's names, as kohya-ss writes them and the WebUI reads them, float16.

    The names are those of the layers, with underscores. The WebUI would translate diffusers' names for two residual blocks a
    level; the embedded UNet has one.
    """
    layers = json.loads((CHECKPOINT / "unet" / "config.json").read_text())["layers_per_block"]
    out = {}
    for name, value in load_file(CHECKPOINT / "lcm_lora.safetensors").items():
        layer, part = re.match(r"unet\.(.*)\.lora_([AB])\.weight", name).groups()
        layer = "lora_unet_" + unet_name(f"{layer}.weight", layers).removesuffix(".weight").replace(".", "_")
        out[f"{layer}.lora_{'down' if part == 'A' else 'up'}.weight"] = value
        if part == "A":
            out[f"{layer}.alpha"] = torch.tensor(len(value), dtype=torch.float16)  # the rank, for a scale of 1
    return out


def model_config(tokenizer: Path) -> dict:
    """The .yaml's content: the networks and the noise schedule."""
    unet, vae, schedule = (
        json.loads((CHECKPOINT / name).read_text())
        for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    widths = vae["block_out_channels"]
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": schedule["beta_start"],
            "linear_end": schedule["beta_end"],
            "timesteps": schedule["num_train_timesteps"],
            "num_timesteps_cond": 1,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "image_size": unet["sample_size"],
            "channels": unet["in_channels"],
            "scale_factor": vae["scaling_factor"],
            "use_ema": False,
            "unet_config": {
                "target": "lib_demofusion.hosts.webui.embedded.UNet",
                "params": {
                    "widths": unet["block_out_channels"],
                    "groups": unet["norm_num_groups"],
                    "image_size": unet["sample_size"],
                    "in_channels": unet["in_channels"],
                    "out_channels": unet["out_channels"],
                    "attention_resolutions": [
                        2**i for i, kind in enumerate(unet["down_block_types"]) if kind.startswith("CrossAttn")
                    ],
                    "num_res_blocks": unet["layers_per_block"],
                    "num_heads": unet["attention_head_dim"],  # diffusers' name for the number of heads
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": unet["cross_attention_dim"],
                    "legacy": False,
                },
            },
            "first_stage_config": {
                "target": "lib_demofusion.hosts.webui.embedded.VAE",
                "params": {
                    "groups": vae["norm_num_groups"],
                    "embed_dim": vae["latent_channels"],
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": vae["latent_channels"],
                        "resolution": vae["sample_size"],
                        "in_channels": vae["in_channels"],
                        "out_ch": vae["out_channels"],
                        "ch": widths[0],
                        "ch_mult": [width // widths[0] for width in widths],
                        "num_res_blocks": vae["layers_per_block"],
                        "attn_resolutions": [],
                        "attn_type": "none",
                        "dropout": 0.0,
                    },
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": {"version": str(tokenizer)},
            },
        },
    }


def export(folder: Path) -> Path:
    """Write demofusion-embedded.safetensors, .yaml and the text encoder's folder; returns the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "demofusion-embedded-clip"
    text.mkdir(exist_ok=True)
    for path in [*(CHECKPOINT / "tokenizer").iterdir(), CHECKPOINT / "text_encoder" / "config.json"]:
        if path.name != "tokenizer.json":  # newer than the host's transformers; the other files say the same
            (text / path.name).write_bytes(path.read_bytes())
    out = folder / "demofusion-embedded.safetensors"
    save_file(state_dict(), out)
    # JSON is YAML.
    out.with_suffix(".yaml").write_text(json.dumps({"model": model_config(text.resolve())}, indent=2) + "\n")
    return out


def export_controlnet(folder: Path) -> Path:
    """Write demofusion-embedded-tile.safetensors; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "demofusion-embedded-tile.safetensors"
    save_file(controlnet_state_dict(), out)
    return out


def export_lora(folder: Path) -> Path:
    """Write demofusion-embedded-lcm.safetensors; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "demofusion-embedded-lcm.safetensors"
    save_file(lora_state_dict(), out, LORA_ABOUT)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--controlnet", type=Path, metavar="FOLDER", help="write the tile ControlNet there")
    parser.add_argument("--lora", type=Path, metavar="FOLDER", help="write the LCM-LoRA there")
    args = parser.parse_args()
    print(export(args.folder))
    if args.controlnet:
        print(export_controlnet(args.controlnet))
    if args.lora:
        print(export_lora(args.lora))


if __name__ == "__main__":
    main()
