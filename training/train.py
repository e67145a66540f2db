"""Makes the embedded checkpoint: scenes -> autoencoder -> latents -> UNet and text encoder -> export.

    python -m training.train [--recipe NAME] [--build DIR] [--out DIR] [STAGE ...]

The recipe "embedded" makes the checkpoint that is part of the repository; "second" another one, from other seeds and
scenes that are laid out otherwise, to see whether what was found with the first holds for it; "tile" a ControlNet for
the embedded one, whose stages are in tile.py; "lcm" an LCM-LoRA for it, whose stages are in lcm.py. Every stage reads
what the one before left in the build folder and is skipped when its own file is there, so that a run that was cut short
goes on; the stages of the UNet, the ControlNet and the LoRA also go on from their last checkpoint. Everything is seeded.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT
from training.scenes import Scene, crops, render, vocabulary

VAE_STEPS, VAE_FINE_STEPS = 3_400, 2_000
CONTEXT = 77  # tokens, as CLIP's
WIDTH = 64  # of the text encoder
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint is made from.

    layout: of the scenes (`scenes.render`). channels: of the UNet's three levels. stages: of the UNet's training: steps,
    peak learning rate, warm-up, whether close-ups reach high noise (`draw_views`); of the ControlNet's and the LoRA's,
    whether some of the hints or pictures are worn (`tile.make_worn`). scenes: how many.
    """

    seed: int
    layout: str
    channels: tuple[int, int, int]
    batch: int
    stages: tuple[tuple[int, float, int, bool], ...]
    scenes: int = 12_000

    def scene_at(self, index: int) -> tuple[Scene, np.random.Generator]:
        rng = np.random.default_rng([self.seed, index])
        return Scene.draw(rng), rng

    def scene_crops(self, index: int) -> np.ndarray:
        scene, rng = self.scene_at(index)
        return crops(render(scene, rng, self.layout), rng)


RECIPES = {
    "embedded": Recipe(
        0, "anywhere", (64, 96, 88), 48, ((5_200, 1e-3, 300, False), (600, 4e-4, 30, True), (6_600, 8e-4, 100, True))
    ),
    "second": Recipe(1, "row", (48, 72, 64), 40, ((1_500, 1e-3, 300, False), (4_000, 1e-3, 100, True))),
    "tile": Recipe(2, "anywhere", (64, 96, 88), 48, ((1_800, 1e-3, 100, False), (600, 5e-4, 50, True)), scenes=4_000),
    "lcm": Recipe(2, "anywhere", (64, 96, 88), 32, ((1_000, 2e-3, 50, False), (400, 1e-3, 30, True)), scenes=4_000),
}
# Recipes with stages of their own: the module, which is made of what is here, and its name of where the result lies.
MODULES = {"tile": ("training.tile", "CONTROLNET"), "lcm": ("training.lcm", "LORA")}


def make_scenes(build: Path, recipe: Recipe) -> None:
    """scenes.npy: uint8 [scenes, 4 views, 128, 128, 3]; the captions follow from the seeds."""
    views = np.lib.format.open_memmap(build / "scenes.tmp", "w+", np.uint8, (recipe.scenes, 4, 128, 128, 3))
    with ProcessPoolExecutor() as pool:
        for index, view in enumerate(pool.map(recipe.scene_crops, range(recipe.scenes), chunksize=64)):
            views[index] = view
    views.flush()
    (build / "scenes.tmp").rename(build / "scenes.npy")


def to_unit(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in -1...1."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def cosine_lr(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Up in a line, down in half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def unet_stage(recipe: Recipe, step: int) -> tuple[float, bool]:
    """The learning rate at a step of the UNet's training, the ControlNet's or the LoRA's, and its stage's last setting."""
    for steps, peak, warmup, reach in recipe.stages:
        if step < steps:
            return cosine_lr(step, steps, peak, warmup), reach
        step -= steps
    raise IndexError(step)


def descend(loss: torch.Tensor, model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step of the optimizer, gradients clipped to a norm of 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def follow(ema: torch.nn.Module, model: torch.nn.Module, step: int, most: float) -> None:
    """ema's weights go on as the mean of the model's; most: how much of itself it keeps, once there have been many steps."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(most, (1 + step) / (10 + step)))


def keep(path: Path, **state: object) -> None:
    """Write what training goes on from, whole or not at all."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


class Log:
    """One line per hundred steps: what was reached, and how long the rest will take."""

    def __init__(self, name: str, steps: int, first: int = 0):
        self.name, self.steps, self.first, self.start, self.losses = name, steps, first, time.time(), []

    def __call__(self, step: int, loss: torch.Tensor) -> None:
        self.losses.append(float(loss))
        if step % 100 == 99:
            rest = (time.time() - self.start) / (step + 1 - self.first) * (self.steps - step - 1)
            print(f"{self.name} {step + 1}/{self.steps} loss {np.mean(self.losses):.5f} left {rest / 60:.1f} min", flush=True)
            self.losses.clear()


def new_vae(seed: int) -> AutoencoderKL:
    """An f = 8, 4-channel KL autoencoder; no attention, so that a tile decodes as the whole does."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def train_vae(
    vae: AutoencoderKL, build: Path, seed: int, steps: int, batch_size: int, side: int, shares: list[float], peak: float
) -> None:
    """Train on crops of side x side pixels; shares: how often from the whole scene, 2x, 4x and 4x."""
    rng = np.random.default_rng([seed, side])
    views = np.load(build / "scenes.npy", mmap_mode="r")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    log = Log(f"vae {side}", steps)
    for step in range(steps):
        index, view = rng.integers(0, len(views), batch_size), rng.choice(4, batch_size, p=shares)
        y, x = rng.integers(0, 128 - side + 1, (2, batch_size))
        batch = to_unit(np.stack([views[i, v, a : a + side, b : b + side] for i, v, a, b in zip(index, view, y, x)]))
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(decoded, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = mse + 0.1 * F.l1_loss(decoded, batch) + 5e-5 * kl
        descend(loss, vae, optimizer, cosine_lr(step, steps, peak))
        log(step, mse.detach())


def make_vae_64(build: Path, recipe: Recipe) -> None:
    """Most of the autoencoder's training, on small crops."""
    vae = new_vae(recipe.seed)
    train_vae(vae, build, recipe.seed, VAE_STEPS, 16, 64, [0.25] * 4, 1.5e-3)
    vae.save_pretrained(build / "vae_64")


def make_vae(build: Path, recipe: Recipe) -> None:
    """The rest of it, at the size that the UNet sees, with more of the close-ups, whose textures it must hold."""
    vae = AutoencoderKL.from_pretrained(build / "vae_64")
    train_vae(vae, build, recipe.seed, VAE_FINE_STEPS, 5, 128, [0.22, 0.22, 0.28, 0.28], 1e-3)
    vae.save_pretrained(build / "vae")


@torch.no_grad()
def encoded(vae: AutoencoderKL, views: np.ndarray) -> torch.Tensor:
    """The latents [scenes, 4 views, 4, 16, 16] of views as `make_scenes` leaves them, not scaled."""
    latents = torch.empty(len(views), 4, 4, 16, 16)
    for start in range(0, len(views), 8):
        pixels = views[start : start + 8].reshape(-1, 128, 128, 3)
        latents[start : start + 8] = vae.encode(to_unit(pixels)).latent_dist.mean.unflatten(0, (-1, 4))
    return latents


def make_latents(build: Path, recipe: Recipe) -> None:
    """latents.pt: float16 [scenes, 4 views, 4, 16, 16] of unit standard deviation, and the factor that made it so."""
    vae = AutoencoderKL.from_pretrained(build / "vae")
    latents = encoded(vae, np.load(build / "scenes.npy", mmap_mode="r"))
    factor = 1 / float(latents.std())
    torch.save({"latents": (latents * factor).half(), "scaling_factor": factor}, build / "latents.pt")


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own kind of tokenizer with one token for each word of the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokens = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens += [f"{c}</w>" for c in letters if f"{c}</w>" not in learned["vocab"]] + special
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=CONTEXT,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        unk_token=special[1],
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in vocabulary():
        ids = tokenizer(word).input_ids
        if len(ids) != 3:
            raise RuntimeError(f"'{word}' became {tokenizer.convert_ids_to_tokens(ids)} instead of one token")
    return tokenizer


def captions(recipe: Recipe, rng: np.random.Generator, index: np.ndarray) -> list[str]:
    """The scenes' captions; now and then without the texture, without the place, or empty (for guidance)."""
    out = []
    for i in index:
        words = recipe.scene_at(int(i))[0].caption.split()
        chance = rng.random(3)
        if chance[0] < 0.1:
            out.append("")
            continue
        if chance[1] < 0.1:
            words = words[:-2]
        if chance[2] < 0.1:
            del words[2]
        out.append(" ".join(words))
    return out


def draw_views(rng: np.random.Generator, t: np.ndarray, reach: bool) -> np.ndarray:
    """Which view to train on at timestep t: 0 the whole scene, 1 a crop of 2x, 2 and 3 crops of 4x.

    Close-ups are learnt where noise is low enough for the picture to say that it is one; where only the caption
    speaks, the model knows whole scenes alone, so that a picture at 1x is no close-up. In the later stages they reach
    further up, so that a window of plain background does not sprout objects.
    """
    closeup = 0.65 * np.clip((950 - t) / 350, 0, 1) if reach else 0.6 * np.clip((800 - t) / 400, 0, 1)
    return np.where(rng.random(len(t)) < closeup, rng.integers(1, 4, len(t)), 0)


def loss_weight(snr: torch.Tensor, reach: bool) -> torch.Tensor:
    """What the error of the noise counts at a signal-to-noise ratio: min-SNR (arXiv 2303.09556), and more on high noise if
    close-ups reach it, since the layout is decided there, where errors of the noise are small."""
    weight = snr.clamp(max=5) / snr
    return weight * (1 + 1 / (snr + 0.1)) if reach else weight


def make_unet(build: Path, recipe: Recipe) -> None:
    """The UNet with cross-attention and the text encoder, trained together to predict the noise."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed + 1)
    data = torch.load(build / "latents.pt")
    tokenizer = make_tokenizer(build / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.channels,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )
    model = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    first, saved = 0, build / "unet_checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, rng = state["step"], state["rng"]
    schedule = DDPMScheduler(**SCHEDULE)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    steps = sum(stage[0] for stage in recipe.stages)
    log = Log("unet", steps, first)
    for step in range(first, steps):
        lr, reach = unet_stage(recipe, step)
        index, t = rng.integers(0, recipe.scenes, recipe.batch), rng.integers(0, 1000, recipe.batch)
        z = data["latents"][index, draw_views(rng, t, reach)].float()
        ids = tokenizer(captions(recipe, rng, index), padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        t = torch.from_numpy(t)
        noise = torch.randn_like(z) + 0.05 * torch.randn(recipe.batch, 4, 1, 1)
        predicted = unet(schedule.add_noise(z, noise, t), t, text_encoder(ids).last_hidden_state).sample
        loss = ((predicted - noise).square().mean((1, 2, 3)) * loss_weight(snr[t], reach)).mean()
        descend(loss, model, optimizer, lr)
        follow(ema, model, step, 0.9985)
        log(step, loss.detach())
        if step % 400 == 399 or step == steps - 1:
            parts = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            keep(saved, **parts, step=step + 1, rng=rng)
            ema["unet"].save_pretrained(build / "unet.tmp")
            ema["text_encoder"].save_pretrained(build / "text_encoder")
    (build / "unet.tmp").rename(build / "unet")


def name_as_published(path: Path) -> None:
    """Text encoder weights under the names that all versions of transformers read; 5 writes others, which 4 takes for none."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def forget_origin(folder: Path) -> None:
    """Networks' configurations without the path that they were loaded from."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def export(build: Path, out: Path) -> None:
    """The checkpoint as fp16 safetensors in diffusers' format."""
    unet_folder = build / "unet" if (build / "unet").exists() else build / "unet.tmp"
    vae = AutoencoderKL.from_pretrained(build / "vae")
    vae.register_to_config(scaling_factor=torch.load(build / "latents.pt")["scaling_factor"])
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(build / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(build / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(unet_folder),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
    name_as_published(out / "text_encoder" / "model.safetensors")
    forget_origin(out)
    path = out / "scheduler" / "scheduler_config.json"  # what other schedulers need, without what older diffusers do not know
    config = {**json.loads(path.read_text()), "clip_sample": False}
    config = {key: value for key, value in config.items() if key not in ("use_beta_sigmas", "use_exponential_sigmas")}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "vocabulary.txt").write_text("\n".join(vocabulary()) + "\n")


STAGES = {
    "scenes": ("scenes.npy", make_scenes),
    "vae_64": ("vae_64", make_vae_64),
    "vae": ("vae", make_vae),
    "latents": ("latents.pt", make_latents),
    "unet": ("unet", make_unet),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="default: all, in order")
    parser.add_argument("--recipe", choices=RECIPES, default="embedded")
    parser.add_argument("--build", type=Path, help="default: training/build/NAME, since recipes must not share one")
    parser.add_argument("--out", type=Path, help="default: where the embedded one lies; recipe second: BUILD/second")
    args = parser.parse_args()
    build = args.build or ROOT / "build" / args.recipe
    out, stages, finish = EMBEDDED_CHECKPOINT, STAGES, export
    if args.recipe in MODULES:
        module, place = MODULES[args.recipe]
        module = importlib.import_module(module)
        out, stages, finish = getattr(module, place), module.STAGES, module.export
    elif args.recipe != "embedded":
        out = build / args.recipe
    unknown = set(args.stages) - {*stages, "export"}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; the recipe has {', '.join([*stages, 'export'])}")
    build.mkdir(parents=True, exist_ok=True)
    for name in args.stages or [*stages, "export"]:
        if name == "export":
            finish(build, args.out or out)
        elif not (build / stages[name][0]).exists():
            stages[name][1](build, RECIPES[args.recipe])


if __name__ == "__main__":
    main()
