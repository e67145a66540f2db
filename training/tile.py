"""Makes a tile ControlNet for the embedded checkpoint, which stays as it is: scenes -> latents, hints -> ControlNet -> export.

    python -m training.train --recipe tile

Its hint is a picture, blurred; the model draws what that shows, and the detail that it lacks. As tile models for large
checkpoints it has learnt so on whole pictures and on close-ups. It is small: the UNet's way down without attention, since
a hint says what is where, and a narrow embedding of the hint.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler
from PIL import Image

from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, load_pipeline
from training.train import (
    CONTEXT,
    SCHEDULE,
    Log,
    Recipe,
    captions,
    descend,
    encoded,
    follow,
    forget_origin,
    keep,
    loss_weight,
    make_scenes,
    to_unit,
    unet_stage,
)

CONTROLNET, CONTROLNET_WEIGHTS = EMBEDDED_CHECKPOINT / "controlnet", "diffusion_pytorch_model.safetensors"
HINT_CHANNELS = (8, 16, 32, 64)  # of the hint's embedding, at 1, 1/2, 1/4 and 1/8 of its size
BLUR = 8  # pixels of a picture that are one in its strongest blur, each way
WEAR = 0.4  # most noise on the latents of worn hints, whose own spread is 1


def blurred(pixels: np.ndarray, factors: np.ndarray) -> torch.Tensor:
    """Pictures as hints: shrunken by a factor each, and enlarged again, both bicubically.

    pixels: uint8 [N, H, W, 3]. factors: [N], at least 1, which leaves a picture as it is. Returns float [N, 3, H, W] in 0..1.
    """
    out = []
    for image, factor in zip(map(Image.fromarray, pixels), factors):
        small = image.resize([max(round(side / factor), 1) for side in image.size], Image.Resampling.BICUBIC)
        out.append(np.asarray(small.resize(image.size, Image.Resampling.BICUBIC)))
    return torch.tensor(np.stack(out)).permute(0, 3, 1, 2).float().div_(255)


@torch.no_grad()
def worn(vae: torch.nn.Module, pixels: np.ndarray, wear: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Pictures as a model might have drawn them at half the size: shrunken, and decoded from latents with some noise.

    pixels: uint8 [N, H, W, 3]. wear: [N], the noise's spread. Returns uint8 [N, H, W, 3], enlarged again.
    """
    h, w = pixels.shape[1:3]
    small = torch.nn.functional.avg_pool2d(to_unit(pixels), 2)
    latents = vae.encode(small).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    latents = latents + torch.as_tensor(wear, dtype=torch.float32).view(-1, 1, 1, 1) * noise
    decoded = vae.decode(latents / vae.config.scaling_factor).sample.add(1).mul(127.5).clamp(0, 255).round().byte()
    images = map(Image.fromarray, decoded.permute(0, 2, 3, 1).contiguous().numpy())
    return np.stack([np.asarray(image.resize((w, h), Image.Resampling.BICUBIC)) for image in images])


def new_controlnet(unet: torch.nn.Module, seed: int) -> ControlNetModel:
    """One that changes nothing yet, with the UNet's weights wherever it has the same layers."""
    torch.manual_seed(seed)
    config = unet.config
    controlnet = ControlNetModel(
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        conditioning_embedding_out_channels=HINT_CHANNELS,
    )
    own, theirs = controlnet.state_dict(), unet.state_dict()
    controlnet.load_state_dict({name: theirs.get(name, value) for name, value in own.items()})
    return controlnet


def make_latents(build: Path, recipe: Recipe) -> None:
    """latents.pt: float16 [scenes, 4 views, 4, 16, 16], as the embedded UNet sees them."""
    vae = load_pipeline().vae
    latents = encoded(vae, np.load(build / "scenes.npy", mmap_mode="r"))
    torch.save((latents * vae.config.scaling_factor).half(), build / "latents.pt")


def make_worn(build: Path, recipe: Recipe) -> None:
    """worn.npy: the views as hints that are no better than what the model draws, uint8 as in scenes.npy.

    A hint of the true picture, however blurred, shows something of its textures. What a phase follows is the model's own
    picture at a smaller size: there are ripples in its plain areas, and the textures may be missing.
    """
    vae, rng, generator = load_pipeline().vae, np.random.default_rng(recipe.seed), torch.Generator().manual_seed(recipe.seed)
    views = np.load(build / "scenes.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(build / "worn.tmp", "w+", np.uint8, views.shape)
    for start in range(0, len(views), 8):
        pixels = views[start : start + 8].reshape(-1, *views.shape[2:])
        out[start : start + 8] = worn(vae, pixels, WEAR * rng.random(len(pixels)), generator).reshape(-1, *views.shape[1:])
    out.flush()
    (build / "worn.tmp").rename(build / "worn.npy")


def make_controlnet(build: Path, recipe: Recipe) -> None:
    """The ControlNet, trained so that the embedded UNet predicts the noise of what the hint shows.

    Close-ups are as many at every timestep: unlike a caption, the hint says at any noise that it is one.
    """
    pipe = load_pipeline()
    unet, text_encoder = pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False)
    model = new_controlnet(unet, recipe.seed)
    rng = np.random.default_rng(recipe.seed + 1)
    views, old = (np.load(build / name, mmap_mode="r") for name in ("scenes.npy", "worn.npy"))
    latents = torch.load(build / "latents.pt")
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    first, saved = 0, build / "controlnet_checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, rng = state["step"], state["rng"]
        torch.set_rng_state(state["torch_rng"])
    schedule = DDPMScheduler(**SCHEDULE)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    steps = sum(stage[0] for stage in recipe.stages)
    log = Log("controlnet", steps, first)
    for step in range(first, steps):
        lr, some_worn = unet_stage(recipe, step)
        index, view = rng.integers(0, recipe.scenes, recipe.batch), rng.integers(0, 4, recipe.batch)
        t = torch.from_numpy(rng.integers(0, 1000, recipe.batch))
        pixels = views[index, view]
        if some_worn:
            half = rng.random(recipe.batch) < 0.5
            pixels[half] = old[index[half], view[half]]
        hint = blurred(pixels, BLUR ** rng.random(recipe.batch))
        texts = captions(recipe, rng, index)
        ids = pipe.tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        z = latents[index, view].float()
        noise = torch.randn_like(z) + 0.05 * torch.randn(recipe.batch, 4, 1, 1)
        noisy, text = schedule.add_noise(z, noise, t), text_encoder(ids).last_hidden_state
        down, mid = model(noisy, t, text, hint, return_dict=False)
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        predicted = unet(noisy, t, text, **residuals).sample
        loss = ((predicted - noise).square().mean((1, 2, 3)) * loss_weight(snr[t], True)).mean()
        descend(loss, model, optimizer, lr)
        follow(ema, model, step, 0.997)
        log(step, loss.detach())
        if step % 200 == 199 or step == steps - 1:
            parts = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            keep(saved, **parts, step=step + 1, rng=rng, torch_rng=torch.get_rng_state())
            ema.save_pretrained(build / "controlnet.tmp")
    (build / "controlnet.tmp").rename(build / "controlnet")


def export(build: Path, out: Path) -> None:
    """The ControlNet as fp16 safetensors in diffusers' format."""
    folder = build / "controlnet" if (build / "controlnet").exists() else build / "controlnet.tmp"
    ControlNetModel.from_pretrained(folder).half().save_pretrained(out)
    forget_origin(out)


STAGES = {
    "scenes": ("scenes.npy", make_scenes),
    "latents": ("latents.pt", make_latents),
    "worn": ("worn.npy", make_worn),
    "controlnet": ("controlnet", make_controlnet),
}
