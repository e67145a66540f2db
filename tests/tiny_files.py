"""Tiny files of random weights for tests: LoRAs of a pipeline, under several names, and networks that enlarge pictures."""

import math

import torch
from safetensors.torch import save_file

LAYERS = ("to_q", "to_v", "q_proj", "v_proj", "out_proj")


def lora_layers(pipe, parts=("unet", "text_encoder")):
    """(part, name, layer) of what a tiny LoRA changes."""
    return [
        (part, name, layer)
        for part in parts
        for name, layer in getattr(pipe, part).named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(LAYERS)
    ]


def lora_halves(pipe, parts=("unet", "text_encoder"), rank=2, seed=0):
    """Random first and second halves by (part, name); what they add to a weight is a good share of it."""
    draw = torch.Generator().manual_seed(seed)
    halves = {}
    for part, name, layer in lora_layers(pipe, parts):
        down = torch.randn(rank, layer.in_features, generator=draw)
        up = torch.randn(layer.out_features, rank, generator=draw)
        share = 0.5 * layer.weight.std() * math.sqrt(rank * layer.in_features) / layer.in_features**0.5
        halves[part, name] = down / math.sqrt(rank), up * share.detach()
    return halves


def tiny_lora(path, pipe, parts=("unet", "text_encoder"), kohya=False, alpha=None, seed=0):
    """Writes one, with peft's names or those of kohya's scripts; alpha: the rank unless given. Returns its path."""
    weights = {}
    for (part, name), (down, up) in lora_halves(pipe, parts, seed=seed).items():
        if kohya:
            root = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
            name = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            key = f"{root}_{name.replace('.', '_')}"
            weights.update({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
            weights[f"{key}.alpha"] = torch.tensor(float(alpha or len(down)))
        else:
            weights.update({f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up})
    save_file({name: x.contiguous() for name, x in weights.items()}, path)
    return path


def compact_network(scale=2, features=8, convolutions=2, channels=3, seed=0):
    """The weights of a small SRVGGNetCompact (of Real-ESRGAN), by name."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [(features, channels)] + [(features, features)] * convolutions + [(channels * scale**2, features)]
    weights = {}
    for number, (out, into) in enumerate(sizes):
        weights[f"body.{2 * number}.weight"] = torch.randn(out, into, 3, 3, generator=draw) / (3 * math.sqrt(into))
        weights[f"body.{2 * number}.bias"] = 0.1 * torch.randn(out, generator=draw)
        if number < len(sizes) - 1:
            weights[f"body.{2 * number + 1}.weight"] = torch.full([out], 0.2)
    return weights
