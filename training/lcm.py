"""Makes an LCM-LoRA for the embedded checkpoint, which stays as it is: scenes -> latents, worn latents -> LoRA -> export.

    python -m training.train --recipe lcm

With it 2 to 8 steps of the LCM sampler, without guidance, draw what 50 guided steps draw without it. It is latent
consistency distillation (arXiv 2310.04378) of a LoRA alone (arXiv 2311.05556): the network is to say the same clean picture
for two points of one path of the guided model, and at the path's end the point itself is the picture. Paths start from
noisy pictures; in the second stage half of these are worn, as a phase has them: with the detail that is to be added missing.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, load_pipeline
from training.tile import make_latents, make_worn
from training.train import (
    CONTEXT,
    Log,
    Recipe,
    captions,
    descend,
    draw_views,
    encoded,
    follow,
    keep,
    make_scenes,
    unet_stage,
)

LORA = EMBEDDED_CHECKPOINT / "lcm_lora.safetensors"
RANK = 14
GUIDANCE = 7.5  # of the model that is distilled; what guidance 1 is with the LoRA
STRIDE = 20  # timesteps between the two points of a path: one of 50 steps
SCALING, SIGMA_DATA = 10, 0.5  # of the boundary condition, as LCM samplers have it
HUBER = 0.001  # below this an error counts by its square


class Delta(torch.nn.Module):
    """What is added to a layer's weight, a linear one's or a convolution's: up [out, rank] @ down [rank, into]."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        into = weight[0].numel()
        self.down = torch.nn.Parameter((torch.rand(rank, into, generator=generator) * 2 - 1) / into**0.5)
        self.up = torch.nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def adapted(unet: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy of the UNet with a `Delta` for every linear layer and convolution, which alone are to be trained."""
    unet = copy.deepcopy(unet).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in [x for x in unet.modules() if isinstance(x, (torch.nn.Linear, torch.nn.Conv2d))]:
        parametrize.register_parametrization(layer, "weight", Delta(layer.weight, RANK, generator))
    return unet


def lora_weights(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA of an `adapted` UNet in diffusers' names: lora_A is down, with the layer's kernel, and lora_B up; scale 1."""
    out = {}
    for name, layer in unet.named_modules():
        if parametrize.is_parametrized(layer):
            delta, kernel = layer.parametrizations.weight[0], layer.weight.shape[1:]
            out[f"unet.{name}.lora_A.weight"] = delta.down.detach().reshape(RANK, *kernel)
            out[f"unet.{name}.lora_B.weight"] = delta.up.detach().reshape(-1, RANK, *[1] * (len(kernel) - 1))
    return out


def as_picture(predicted: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    """The clean latents that a prediction of the noise [N, 4, H, W] means. signal: cumulated alphas of all timesteps."""
    share = signal[t].view(-1, 1, 1, 1)
    return (noisy - (1 - share).sqrt() * predicted) / share.sqrt()


def consistency(
    unet: torch.nn.Module, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor, signal: torch.Tensor
) -> torch.Tensor:
    """The consistency function (Eq. 9 of arXiv 2310.04378): clean latents [N, 4, H, W], at timestep 0 the given ones."""
    picture = as_picture(unet(noisy, t, text).sample, noisy, t, signal)
    scaled = (SCALING * t).view(-1, 1, 1, 1)
    skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    return skip * noisy + scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5 * picture


@torch.no_grad()
def guided_step(
    unet: torch.nn.Module,
    noisy: torch.Tensor,
    t: torch.Tensor,
    before: torch.Tensor,
    text: torch.Tensor,
    empty: torch.Tensor,
    signal: torch.Tensor,
) -> torch.Tensor:
    """DDIM's step of the guided model from timesteps t to those before; text and empty: [N, tokens, width]."""
    without, given = unet(torch.cat([noisy] * 2), torch.cat([t] * 2), torch.cat([empty, text])).sample.chunk(2)
    predicted = without + GUIDANCE * (given - without)
    share = signal[before].view(-1, 1, 1, 1)
    return share.sqrt() * as_picture(predicted, noisy, t, signal) + (1 - share).sqrt() * predicted


def make_worn_latents(build: Path, recipe: Recipe) -> None:
    """worn.pt: as latents.pt, of the worn views."""
    vae = load_pipeline().vae
    latents = encoded(vae, np.load(build / "worn.npy", mmap_mode="r"))
    torch.save((latents * vae.config.scaling_factor).half(), build / "worn.pt")


def make_lora(build: Path, recipe: Recipe) -> None:
    """Pseudo-Huber loss against what the LoRA's mean over its steps says one step further on the path."""
    torch.manual_seed(recipe.seed)
    pipe = load_pipeline()
    unet, text_encoder = pipe.unet.eval().requires_grad_(False), pipe.text_encoder.requires_grad_(False)
    signal = pipe.scheduler.alphas_cumprod
    snr = signal / (1 - signal)
    model = adapted(unet, recipe.seed)
    rng = np.random.default_rng(recipe.seed + 1)
    latents, old = (torch.load(build / name) for name in ("latents.pt", "worn.pt"))
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], betas=(0.9, 0.99), weight_decay=0.0)
    first, saved = 0, build / "lora_checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, rng = state["step"], state["rng"]
        torch.set_rng_state(state["torch_rng"])

    def encode(texts: list[str]) -> torch.Tensor:
        ids = pipe.tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        return text_encoder(ids).last_hidden_state

    empty = encode([""]).expand(recipe.batch, -1, -1)
    steps = sum(stage[0] for stage in recipe.stages)
    log = Log("lora", steps, first)
    for step in range(first, steps):
        lr, some_worn = unet_stage(recipe, step)
        index, t = rng.integers(0, recipe.scenes, recipe.batch), rng.integers(1, 1000, recipe.batch)
        view = draw_views(rng, t, True)
        z = latents[index, view].float()
        if some_worn:
            half = rng.random(recipe.batch) < 0.5
            z[half] = old[index[half], view[half]].float()
        text, t = encode(captions(recipe, rng, index)), torch.from_numpy(t)
        before = (t - STRIDE).clamp(min=0)
        share = signal[t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * z + (1 - share).sqrt() * torch.randn_like(z)
        with torch.no_grad():
            further = guided_step(unet, noisy, t, before, text, empty, signal)
            target = consistency(ema, further, before, text, signal)
        error = consistency(model, noisy, t, text, signal) - target
        huber = ((error.square() + HUBER**2).sqrt() - HUBER).mean((1, 2, 3))
        # The picture's error is the noise's, divided by SNR's root; without a weight the highest noise would drown the rest.
        loss = (huber * snr[t] ** 0.25).mean()
        descend(loss, model, optimizer, lr)
        follow(ema, model, step, 0.95)
        log(step, loss.detach())
        if step % 200 == 199 or step == steps - 1:
            parts = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            keep(saved, **parts, step=step + 1, rng=rng, torch_rng=torch.get_rng_state())
            save_file(lora_weights(ema), build / "lora.tmp")
    (build / "lora.tmp").rename(build / "lora.safetensors")


def export(build: Path, out: Path) -> None:
    """The LoRA as fp16 safetensors in diffusers' format."""
    path = build / "lora.safetensors" if (build / "lora.safetensors").exists() else build / "lora.tmp"
    save_file({name: value.half() for name, value in load_file(path).items()}, out, {"format": "pt"})


STAGES = {
    "scenes": ("scenes.npy", make_scenes),
    "latents": ("latents.pt", make_latents),
    "worn": ("worn.npy", make_worn),
    "worn_latents": ("worn.pt", make_worn_latents),
    "lora": ("lora.safetensors", make_lora),
}
