"""The ways to a large picture that are compared, each from a caption and a seed, with the checkpoint of a pipeline.

Costs are counted in evaluations of the UNet at the base's size: a pass at k times the area counts as k.
"""

from __future__ import annotations

import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from benchmarks.measure import base_alone
from evaluation import upscaler
from evaluation.scores import checksum
from lib_demofusion import schedule
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import (
    EMBEDDED_CHECKPOINT,
    Control,
    Incomplete,
    Result,
    generate,
    load_controlnet,
    load_pipeline,
)
from lib_demofusion.saved import SavedPhase
from lib_demofusion.views import local_views
from training.lcm import LORA
from training.tile import CONTROLNET, CONTROLNET_WEIGHTS

CFG_SCALE = 7.5


@dataclass(frozen=True)
class Job:
    """What every method is given. base and latents: the model's own image for caption and seed, made in `seconds`.

    window: (height, width) of the model's own image where the base is a given picture instead, without latents.
    """

    pipe: object
    caption: str
    seed: int
    scale: int
    steps: int
    base: Image.Image
    latents: torch.Tensor | None
    seconds: float
    window: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the result."""
        return self.base.width * self.scale, self.base.height * self.scale

    @property
    def own(self) -> tuple[int, int]:
        """(height, width) of what the model draws at once."""
        return self.window or (self.base.height, self.base.width)


@dataclass(frozen=True)
class Picture:
    """image: uint8 [H, W, 3]. evaluations, seconds: beside the base's."""

    image: np.ndarray
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class Method:
    """run: makes a job's image and says its evaluations. stride: between its windows, as a share of the base's side.

    tag: in the names of its kept pictures, so that those of other settings or weights are not taken for its own.
    """

    run: Callable[[Job], tuple[Image.Image, float]]
    stride: float = 0.5
    tag: str = ""

    def __call__(self, job: Job) -> Picture:
        begun = time.perf_counter()
        image, evaluations = self.run(job)
        return Picture(np.asarray(image), evaluations, time.perf_counter() - begun)


def make_job(pipe, caption: str, seed: int, scale: int, steps: int, size: tuple[int, int] | None = None) -> Job:
    """size: (height, width) of the base in pixels; the model's own unless given."""
    begun, shape = time.perf_counter(), dict(zip(("height", "width"), size or ()))
    result = base_alone(pipe, caption, seed=seed, steps=steps, cfg_scale=CFG_SCALE, **shape)
    image = result.images(0)[0]
    return Job(pipe, caption, seed, scale, steps, image, result.phases[0][1], time.perf_counter() - begun)


@contextmanager
def only(progressive: bool, skip_residual: bool, dilated: bool) -> Iterator[None]:
    """DemoFusion with some of its three parts. None of them is MultiDiffusion: local windows from noise, merged every step."""

    with ExitStack() as stack:
        if not skip_residual:
            stack.enter_context(patch("lib_demofusion.fusion.hold_at", lambda *args: 0.0))
        if not dilated:
            weights_at = schedule.weights_at
            stack.enter_context(patch("lib_demofusion.fusion.weights_at", lambda *args: replace(weights_at(*args), c2=0.0)))
            stack.enter_context(patch("lib_demofusion.fusion.dilated_views", lambda window, dilation: []))
            stack.enter_context(patch("lib_demofusion.phases.dilated_views", lambda window, dilation: []))
        if not progressive:
            stack.enter_context(patch("lib_demofusion.phases.phase_scales", lambda scale, doubling: [float(scale)]))
        yield


@functools.cache
def tile_controlnet(pipe):
    """The embedded checkpoint's ControlNet for a pipeline, loaded once."""
    return load_controlnet(CONTROLNET, pipe)


@functools.cache
def few_step_pipeline():
    """The embedded checkpoint with its LCM-LoRA in its weights, loaded once."""
    pipe = load_pipeline(EMBEDDED_CHECKPOINT)
    pipe.load_lora_weights(LORA.parent, weight_name=LORA.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def _following(job: Job, control: tuple[float, float], made: dict) -> Result:
    """Phase by phase, each with the tile ControlNet shown the one before; the base without."""
    net, (scale, end) = tile_controlnet(job.pipe), control
    result, saved = _one_more_phase(job, made, (), None)
    while saved is not None:
        controls = [Control(net, result.images()[0], scale=scale, end=end)]
        result, saved = _one_more_phase(job, made, controls, saved)
    return result


def _one_more_phase(job: Job, made: dict, controls: Sequence, saved: SavedPhase | None) -> tuple[Result, SavedPhase | None]:
    """What is finished with it, and from where to go on; None after the last."""
    phases: list[SavedPhase] = []
    told = dict(finished=lambda result, phase: phases.append(phase), cancelled=lambda: bool(phases))
    try:
        return generate(job.pipe, job.caption, controls=controls, resume=saved, **told, **made), None
    except Incomplete as stopped:
        if not phases:
            raise
        return stopped.result, phases[0]


def demofusion(
    progressive: bool = True,
    skip_residual: bool = True,
    dilated: bool = True,
    preset: str = "Paper",
    control: tuple[float, float] | None = None,
    few_step: bool = False,
    **settings,
) -> Method:
    """control: scale and end of the tile ControlNet, which is shown the phase before; none without. few_step: the phases
    have the LCM-LoRA."""
    config = DemoFusionConfig.preset(preset, view_batch_size=16, **settings)
    free = ("DemoFusion scale", "DemoFusion view batch size")  # of the job; and what no picture depends on
    changed = {key: value for key, value in config.to_infotext().items() if key not in free}
    if control:
        changed["control"] = *control, checksum(CONTROLNET / CONTROLNET_WEIGHTS)
    if few_step:
        changed["few_step"] = checksum(LORA)
    tag = f"-{zlib.crc32(str(changed).encode()):08x}" if changed else ""

    def run(job: Job) -> tuple[Image.Image, float]:
        own = replace(config, scale=float(job.scale))
        base = dict(image=job.base) if job.window else dict(height=job.base.height, width=job.base.width)
        if few_step:
            base["phase_pipe"] = few_step_pipeline()
        made = dict(config=own, seed=job.seed, steps=job.steps, cfg_scale=CFG_SCALE, **base)
        with only(progressive, skip_residual, dilated):
            result = _following(job, control, made) if control else generate(job.pipe, job.caption, **made)
        return result.images()[0], result.evaluations - result.plan.evaluations_to(1)

    return Method(run, config.stride, tag)


def lanczos(job: Job) -> tuple[Image.Image, float]:
    """The base image, enlarged."""
    return job.base.resize(job.size, Image.Resampling.LANCZOS), 0


def learned_upscaler(job: Job) -> tuple[Image.Image, float]:
    """The base image, enlarged by a network that was trained to."""
    return upscaler.enlarge(_upscaler(), job.base).resize(job.size, Image.Resampling.LANCZOS), 0


_upscaler = functools.cache(upscaler.load)


def direct(job: Job) -> tuple[Image.Image, float]:
    """The model asked for the large image at once."""
    width, height = job.size
    return _drawn(job, job.pipe, height=height, width=width), 2 * job.steps * job.scale**2


def scalecrafter(job: Job) -> tuple[Image.Image, float]:
    """ScaleCrafter (arXiv 2310.07702), its re-dilated convolutions: the model at the target size sees as far as at its own.

    The kernels of the deepest level are dilated by the scale, those of each level above by one less, for the first 60 %
    of the steps at twice the side and 70 % above that, as the authors set it for Stable Diffusion.
    """
    unet, last = job.pipe.unet, round((0.6 if job.scale <= 2 else 0.7) * job.steps)
    levels = len(unet.down_blocks)
    depths = [(unet.mid_block, levels - 1)]
    depths += [(block, depth) for depth, block in enumerate(unet.down_blocks)]
    depths += [(block, levels - 1 - depth) for depth, block in enumerate(unet.up_blocks)]
    convolutions = [
        (module, max(job.scale - (levels - 1 - depth), 1))
        for block, depth in depths
        for module in block.modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)
    ]

    def dilate(on: bool) -> None:
        for module, dilation in convolutions:
            module.dilation = module.padding = (dilation if on else 1,) * 2

    def after_step(pipe, step, t, tensors):
        if step + 1 == last:
            dilate(False)
        return tensors

    width, height = job.size
    dilate(True)
    try:
        image = _drawn(job, job.pipe, height=height, width=width, callback_on_step_end=after_step)
    finally:
        dilate(False)
    return image, 2 * job.steps * job.scale**2


def hires_fix(enlarged: str, denoise: float) -> Method:
    """The WebUI's Hires. fix: the base enlarged, as latents or as an image by Lanczos, and denoised whole at full size."""

    def run(job: Job) -> tuple[Image.Image, float]:
        latent = enlarged == "latent"
        start = F.interpolate(job.latents, scale_factor=job.scale, mode="bilinear") if latent else lanczos(job)[0]
        area = math.prod(job.size) / math.prod(job.own)
        return _redrawn(job, start, denoise), 2 * int(job.steps * denoise) * area

    return Method(run)


def tiles(denoise: float = 0.35, overlap: float = 0.25) -> Method:
    """As the SD upscale script and its kin: the base enlarged by Lanczos, redrawn tile by tile, the tiles pasted together."""

    def run(job: Job) -> tuple[Image.Image, float]:
        start, window = np.asarray(lanczos(job)[0]), job.own
        height, width = start.shape[:2]
        views = local_views((height, width), window, tuple(int(side * (1 - overlap)) for side in window))
        ramps = [np.minimum(np.arange(side) + 0.5, side * overlap) / (side * overlap) for side in window]
        weight = np.outer(*(np.minimum(ramp, ramp[::-1]) for ramp in ramps))[..., None]
        total, shares = np.zeros((height, width, 3)), np.zeros((height, width, 1))
        for view in views:
            box = np.s_[view.top : view.top + view.h, view.left : view.left + view.w]
            total[box] += weight * np.asarray(_redrawn(job, Image.fromarray(start[box]), denoise))
            shares[box] += weight
        image = Image.fromarray((total / shares).round().astype(np.uint8))
        return image, 2 * int(job.steps * denoise) * len(views)

    return Method(run, 1 - overlap)


def _redrawn(job: Job, start, denoise: float) -> Image.Image:
    pipe = AutoPipelineForImage2Image.from_pipe(job.pipe)
    pipe.set_progress_bar_config(disable=True)
    return _drawn(job, pipe, image=start, strength=denoise)


def _drawn(job: Job, pipe, **settings) -> Image.Image:
    """What a pipeline of diffusers makes of the job's caption and seed."""
    return pipe(
        job.caption,
        num_inference_steps=job.steps,
        guidance_scale=CFG_SCALE,
        generator=torch.Generator().manual_seed(job.seed),
        **settings,
    ).images[0]


PRESETS: dict[str, Method] = {
    "DemoFusion": demofusion(),
    "Fast": demofusion(preset="Fast"),
    "Faithful": demofusion(preset="Faithful"),
    "Turbo": demofusion(preset="Turbo"),
}
# The presets that do not hold flat areas, with these held.
HELD: dict[str, Method] = {f"{name}, hold flat 6": demofusion(preset=name, hold_flat=6.0) for name in ("Fast", "Turbo")}
# The presets with the tile ControlNet, which is shown the phase before: in all steps of a phase, and in their first half.
CONTROL: dict[str, Method] = {
    name: method
    for preset in ("Fast", "Turbo")
    for name, method in {
        preset: PRESETS[preset],
        f"{preset}, tile 1": demofusion(preset=preset, control=(1.0, 1.0)),
        f"{preset}, tile 1 to 0.5": demofusion(preset=preset, control=(1.0, 0.5)),
    }.items()
}
# Phases of fewer steps, with the skip residual as a rate and as the paper has it, once a step.
STEPS: dict[str, Method] = {
    f"{preset}, {steps} steps{', once a step' * (hold == 0)}": demofusion(preset=preset, phase_steps=steps, hold_steps=hold)
    for preset, counts in {"Paper": (50, 30, 20, 12, 8), "Fast": (50, 18, 8, 4)}.items()
    for steps in counts
    for hold in (50, 0)
}
# Fewer steps of the phases.
FEW_STEPS: dict[str, Method] = {
    "Fast, 18 steps": demofusion(preset="Fast", phase_steps=18),
    "Faithful": PRESETS["Faithful"],
    "Turbo": PRESETS["Turbo"],
}
# Without guidance in the phases, by weights for that.
FEW_STEP_WEIGHTS: dict[str, Method] = {
    "Turbo": PRESETS["Turbo"],
    "Few-step": demofusion(preset="Few-step", few_step=True),
    "Few-step, hold flat 15": demofusion(preset="Few-step", few_step=True, hold_flat=15.0),
}
# The paper's table 1, what users of the WebUI do today, and the presets beside them.
METHODS: dict[str, Method] = {
    "Lanczos": Method(lanczos),
    "learned upscaler": Method(learned_upscaler, tag=f"-{checksum(upscaler.WEIGHTS)}"),
    "direct": Method(direct),
    "MultiDiffusion": demofusion(False, False, False),
    "ScaleCrafter": Method(scalecrafter),
    "Hires. fix, latent 0.5": hires_fix("latent", 0.5),
    "Hires. fix, latent 0.7": hires_fix("latent", 0.7),
    "Hires. fix, Lanczos 0.5": hires_fix("Lanczos", 0.5),
    "Hires. fix, Lanczos 0.7": hires_fix("Lanczos", 0.7),
    "tiles 0.35": tiles(),
    **PRESETS,
}
# What enlarges a picture that was not made by the model.
PICTURES: dict[str, Method] = {
    **{name: METHODS[name] for name in ("Lanczos", "Hires. fix, Lanczos 0.5", "tiles 0.35")},
    "Paper, 8 steps": STEPS["Paper, 8 steps"],
    "Fast, strength 0.3": demofusion(preset="Fast", denoising_strength=0.3),
    "Fast": PRESETS["Fast"],
    "Fast, hold flat 6": HELD["Fast, hold flat 6"],
}
# Figure 5: progressive upscaling, skip residual, dilated sampling.
ABLATION: dict[str, Method] = {
    " + ".join(name for name, on in zip(("PU", "SR", "DS"), parts) if on) or "none": demofusion(*parts)
    for parts in [(p, s, d) for p in (False, True) for s in (False, True) for d in (False, True)]
}
