"""Makes an LCM-LoRA for the embedded checkpoint, which stays as it is: scenes -> latents -> LoRA -> views -> LoRA -> export.

    python -m training.train --recipe lcm

With it 2 to 8 steps of the LCM sampler, without guidance, draw what 50 guided steps draw without it. It is latent
consistency distillation (arXiv 2310.04378) of a LoRA alone (arXiv 2311.05556): the network is to say the same clean picture
for two points of one path of the guided model, and at the path's end the point itself is the picture. Paths start from
noisy pictures; in the second stage half of these are worn, as a phase has them: with the detail that is to be added missing.

What such a LoRA still leaves out in phases it then learns from them, as DAgger has it (arXiv 1011.0686): pictures are
enlarged with the LoRA, the views that the UNet is shown there are kept, and from each the guided model goes to the end of
its path. That end is what the LoRA is to say at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from tqdm import tqdm

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, generate, load_pipeline
from training.tile import make_latents, make_worn
from training.train import (
    CONTEXT,
    Log,
    Recipe,
    captions,
    cosine_lr,
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
PICTURES, VIEWS = 520, 16  # that are enlarged with the LoRA, and how many of the views at each timestep are kept
SHAPES = ((16, 16), (8, 16), (16, 16), (16, 8))  # of their bases' latents, in turn
BASE_STEPS = 25
PATH_STRIDE = 50  # timesteps of a step of the guided model from there to the end, at most
VIEWS_STAGE = 1_000, 5e-4, 30  # steps, peak learning rate and warm-up


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


def load_lora(unet: torch.nn.Module, file: Path) -> None:
    """The LoRA of a file, as `lora_weights` has it, into an `adapted` UNet."""
    weights = load_file(file)
    for name, layer in unet.named_modules():
        if parametrize.is_parametrized(layer):
            delta = layer.parametrizations.weight[0]
            for own, part in ((delta.down, "A"), (delta.up, "B")):
                own.data.copy_(weights[f"unet.{name}.lora_{part}.weight"].reshape(own.shape))


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


class Teacher:
    """The embedded checkpoint, guided: unet, and of its schedule signal, cumulated alphas, and snr, both of all timesteps."""

    def __init__(self) -> None:
        pipe = load_pipeline()
        self.pipe, self.unet = pipe, pipe.unet.eval().requires_grad_(False)
        self.text_encoder = pipe.text_encoder.requires_grad_(False)
        self.signal = pipe.scheduler.alphas_cumprod
        self.snr = self.signal / (1 - self.signal)
        [self.empty] = self.encode([""])

    def encode(self, texts: list[str]) -> torch.Tensor:
        """[N, tokens, width]."""
        ids = self.pipe.tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state

    def step(self, noisy: torch.Tensor, t: torch.Tensor, before: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return guided_step(self.unet, noisy, t, before, text, self.empty.expand_as(text), self.signal)

    def end(self, noisy: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        """The clean latents [N, 4, H, W] at the end of the guided model's path from timestep t."""
        steps = torch.linspace(t, 0, math.ceil(t / PATH_STRIDE) + 1).round().long()
        for here, before in pairwise(steps):
            noisy = self.step(noisy, here.expand(len(noisy)), before.expand(len(noisy)), text)
        return noisy


class Paths:
    """What is learnt from noisy pictures: to say the same of two points of one path."""

    def __init__(self, build: Path, recipe: Recipe, teacher: Teacher, batch: int):
        self.recipe, self.teacher, self.batch = recipe, teacher, batch
        self.latents, self.worn = (torch.load(build / name) for name in ("latents.pt", "worn.pt"))

    def loss(self, model: torch.nn.Module, ema: torch.nn.Module, rng: np.random.Generator, some_worn: bool) -> torch.Tensor:
        """Pseudo-Huber, against what the LoRA's mean over its steps says one step further on the path."""
        recipe, teacher, batch = self.recipe, self.teacher, self.batch
        index, t = rng.integers(0, recipe.scenes, batch), rng.integers(1, 1000, batch)
        view = draw_views(rng, t, True)
        z = self.latents[index, view].float()
        if some_worn:
            half = rng.random(batch) < 0.5
            z[half] = self.worn[index[half], view[half]].float()
        text, t = teacher.encode(captions(recipe, rng, index)), torch.from_numpy(t)
        before = (t - STRIDE).clamp(min=0)
        share = teacher.signal[t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * z + (1 - share).sqrt() * torch.randn_like(z)
        with torch.no_grad():
            target = consistency(ema, teacher.step(noisy, t, before, text), before, text, teacher.signal)
        error = consistency(model, noisy, t, text, teacher.signal) - target
        huber = ((error.square() + HUBER**2).sqrt() - HUBER).mean((1, 2, 3))
        # The picture's error is the noise's, divided by SNR's root; without a weight the highest noise would drown the rest.
        return (huber * teacher.snr[t] ** 0.25).mean()


class Views:
    """What is learnt from phases with the LoRA: where the guided model would have gone from what the UNet saw there."""

    def __init__(self, build: Path, recipe: Recipe, teacher: Teacher):
        self.recipe, self.teacher = recipe, teacher
        self.views, self.texts = torch.load(build / "views.pt"), {}

    def text(self, index: int) -> torch.Tensor:
        if index not in self.texts:
            [self.texts[index]] = self.teacher.encode([self.recipe.scene_at(index)[0].caption])
        return self.texts[index]

    def loss(self, model: torch.nn.Module, rng: np.random.Generator, shape: tuple[int, int]) -> torch.Tensor:
        """Squared, so that a texture that is missing counts for more than one that is a little off."""
        own, teacher = self.views[shape], self.teacher
        rows = torch.from_numpy(rng.integers(0, len(own["t"]), self.recipe.batch))
        t, noisy, end = (own[name][rows] for name in ("t", "noisy", "end"))
        text = torch.stack([self.text(index) for index in own["scene"][rows].tolist()])
        error = consistency(model, noisy.float(), t, text, teacher.signal) - end.float()
        return (error.square().mean((1, 2, 3)) * teacher.snr[t] ** 0.25).mean()


def make_worn_latents(build: Path, recipe: Recipe) -> None:
    """worn.pt: as latents.pt, of the worn views."""
    vae = load_pipeline().vae
    latents = encoded(vae, np.load(build / "worn.npy", mmap_mode="r"))
    torch.save((latents * vae.config.scaling_factor).half(), build / "worn.pt")


def train(
    build: Path,
    name: str,
    model: torch.nn.Module,
    seed: int,
    steps: int,
    most: float,
    loss_at: Callable[[int, torch.nn.Module, np.random.Generator], tuple[float, torch.Tensor]],
) -> None:
    """NAME.safetensors: the mean of an `adapted` UNet's LoRA over its steps. loss_at: step, mean, rng -> rate, loss."""
    torch.manual_seed(seed)
    rng, ema = np.random.default_rng(seed + 1), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], betas=(0.9, 0.99), weight_decay=0.0)
    first, saved = 0, build / f"{name}_checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, rng = state["step"], state["rng"]
        torch.set_rng_state(state["torch_rng"])
    log = Log(name, steps, first)
    for step in range(first, steps):
        lr, loss = loss_at(step, ema, rng)
        descend(loss, model, optimizer, lr)
        follow(ema, model, step, most)
        log(step, loss.detach())
        if step % 200 == 199 or step == steps - 1:
            parts = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            keep(saved, **parts, step=step + 1, rng=rng, torch_rng=torch.get_rng_state())
            save_file(lora_weights(ema), build / f"{name}.tmp")
    (build / f"{name}.tmp").rename(build / f"{name}.safetensors")


def make_lora(build: Path, recipe: Recipe) -> None:
    """Of paths alone."""
    teacher = Teacher()
    model, paths = adapted(teacher.unet, recipe.seed), Paths(build, recipe, teacher, recipe.batch)

    def loss_at(step: int, ema: torch.nn.Module, rng: np.random.Generator) -> tuple[float, torch.Tensor]:
        lr, some_worn = unet_stage(recipe, step)
        return lr, paths.loss(model, ema, rng, some_worn)

    train(build, "lora", model, recipe.seed, sum(stage[0] for stage in recipe.stages), 0.95, loss_at)


@torch.no_grad()
def make_views(build: Path, recipe: Recipe) -> None:
    """views.pt: what the UNet sees in phases with the LoRA, and where the guided model goes from there.

    A dictionary by the shape of the views' latents: scene and t [N], noisy and end, float16 [N, 4, H, W].
    """
    teacher, pipe = Teacher(), load_pipeline()
    pipe.unet = adapted(pipe.unet, recipe.seed)
    load_lora(pipe.unet, build / "lora.safetensors")
    seen: list[tuple[int, torch.Tensor]] = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: seen.extend((round(float(args[1])), x.clone()) for x in args[0]))
    config = DemoFusionConfig.preset("Few-step", scale=4.0, view_batch_size=16)
    rng, found = np.random.default_rng(recipe.seed + 2), {}
    for index in tqdm(range(PICTURES), "views", dynamic_ncols=True):
        caption, shape = recipe.scene_at(index)[0].caption, SHAPES[index % len(SHAPES)]
        height, width = (side * teacher.pipe.vae_scale_factor for side in shape)
        seen.clear()
        made = dict(config=config, height=height, width=width, seed=index, steps=BASE_STEPS)
        generate(teacher.pipe, caption, phase_pipe=pipe, **made)
        rows = found.setdefault(shape, [])
        for t in sorted({t for t, _ in seen}):
            own = [x for at, x in seen if at == t]
            noisy = torch.stack([own[i] for i in rng.choice(len(own), VIEWS, replace=False)])
            end = teacher.end(noisy, t, teacher.encode([caption]).expand(VIEWS, -1, -1))
            rows.append((torch.full([VIEWS], index), torch.full([VIEWS], t), noisy.half(), end.half()))
    views = {shape: dict(zip(("scene", "t", "noisy", "end"), map(torch.cat, zip(*rows)))) for shape, rows in found.items()}
    torch.save(views, build / "views.tmp")
    (build / "views.tmp").rename(build / "views.pt")


def make_phase_lora(build: Path, recipe: Recipe) -> None:
    """Of views, going on from that of paths, and still of paths, whose timesteps are all that there are."""
    teacher = Teacher()
    model = adapted(teacher.unet, recipe.seed)
    load_lora(model, build / "lora.safetensors")
    paths, views = Paths(build, recipe, teacher, max(recipe.batch * 3 // 8, 1)), Views(build, recipe, teacher)
    steps, peak, warmup = VIEWS_STAGE

    def loss_at(step: int, ema: torch.nn.Module, rng: np.random.Generator) -> tuple[float, torch.Tensor]:
        loss = views.loss(model, rng, SHAPES[step % len(SHAPES)]) + paths.loss(model, ema, rng, True)
        return cosine_lr(step, steps, peak, warmup), loss

    train(build, "phase_lora", model, recipe.seed + 3, steps, 0.99, loss_at)


def export(build: Path, out: Path) -> None:
    """The LoRA, of the last stage that there is something of, as fp16 safetensors in diffusers' format."""
    names = ("phase_lora.safetensors", "phase_lora.tmp", "lora.safetensors", "lora.tmp")
    path = next(build / name for name in names if (build / name).exists())
    save_file({name: value.half() for name, value in load_file(path).items()}, out, {"format": "pt"})


STAGES = {
    "scenes": ("scenes.npy", make_scenes),
    "latents": ("latents.pt", make_latents),
    "worn": ("worn.npy", make_worn),
    "worn_latents": ("worn.pt", make_worn_latents),
    "lora": ("lora.safetensors", make_lora),
    "views": ("views.pt", make_views),
    "phase_lora": ("phase_lora.safetensors", make_phase_lora),
}
