"""The ways to a large picture that are compared, each from a caption and a seed, with the checkpoint of a pipeline.

Costs are counted in evaluations of the UNet at the base's size: a pass at k times the area counts as k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from benchmarks.measure import base_alone
from lib_demofusion import schedule
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import generate
from lib_demofusion.views import local_views

CFG_SCALE = 7.5


@dataclass(frozen=True)
class Job:
    """What every method is given. base and latents: the model's own image for caption and seed, made in `seconds`."""

    pipe: object
    caption: str
    seed: int
    scale: int
    steps: int
    base: Image.Image
    latents: torch.Tensor
    seconds: float

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the result."""
        return self.base.width * self.scale, self.base.height * self.scale


@dataclass(frozen=True)
class Picture:
    """image: uint8 [H, W, 3]. evaluations, seconds: beside the base's."""

    image: np.ndarray
    evaluations: float
    seconds: float


Method = Callable[[Job], "tuple[Image.Image, float]"]


def make_job(pipe, caption: str, seed: int, scale: int, steps: int) -> Job:
    begun = time.perf_counter()
    result = base_alone(pipe, caption, seed=seed, steps=steps, cfg_scale=CFG_SCALE)
    image = result.images(0)[0]
    return Job(pipe, caption, seed, scale, steps, image, result.phases[0][1], time.perf_counter() - begun)


def make(method: Method, job: Job) -> Picture:
    begun = time.perf_counter()
    image, evaluations = method(job)
    return Picture(np.asarray(image), evaluations, time.perf_counter() - begun)


@contextmanager
def only(progressive: bool, skip_residual: bool, dilated: bool) -> Iterator[None]:
    """DemoFusion with some of its three parts. None of them is MultiDiffusion: local windows from noise, merged every step."""

    def weights_at(t, config, t_max):
        weights = schedule.weights_at(t, config, t_max)
        return replace(weights, c1=weights.c1 * skip_residual, c2=weights.c2 * dilated)

    with ExitStack() as stack:
        stack.enter_context(patch("lib_demofusion.fusion.weights_at", weights_at))
        if not dilated:
            stack.enter_context(patch("lib_demofusion.fusion.dilated_views", lambda window, dilation: []))
            stack.enter_context(patch("lib_demofusion.phases.dilated_views", lambda window, dilation: []))
        if not progressive:
            stack.enter_context(patch("lib_demofusion.phases.phase_scales", lambda scale: [float(scale)]))
        yield


def demofusion(progressive: bool = True, skip_residual: bool = True, dilated: bool = True, **settings) -> Method:
    def run(job: Job) -> tuple[Image.Image, float]:
        config = DemoFusionConfig(scale=float(job.scale), **settings)
        with only(progressive, skip_residual, dilated):
            result = generate(job.pipe, job.caption, config=config, seed=job.seed, steps=job.steps, cfg_scale=CFG_SCALE)
        return result.images()[0], result.evaluations - 2 * job.steps

    return run


def lanczos(job: Job) -> tuple[Image.Image, float]:
    """The base image, enlarged."""
    return job.base.resize(job.size, Image.Resampling.LANCZOS), 0


def direct(job: Job) -> tuple[Image.Image, float]:
    """The model asked for the large image at once."""
    width, height = job.size
    return _drawn(job, job.pipe, height=height, width=width), 2 * job.steps * job.scale**2


def hires_fix(upscaler: str, denoise: float) -> Method:
    """The WebUI's Hires. fix: the base enlarged, as latents or as an image by Lanczos, and denoised whole at full size."""

    def run(job: Job) -> tuple[Image.Image, float]:
        if upscaler == "latent":
            start = F.interpolate(job.latents, scale_factor=job.scale, mode="bilinear")
        else:
            start = job.base.resize(job.size, Image.Resampling.LANCZOS)
        return _redrawn(job, start, denoise), 2 * int(job.steps * denoise) * job.scale**2

    return run


def tiles(denoise: float = 0.35, overlap: int = 32) -> Method:
    """As the SD upscale script and its kin: the base enlarged by Lanczos, redrawn tile by tile, the tiles pasted together."""

    def run(job: Job) -> tuple[Image.Image, float]:
        start, side = np.asarray(job.base.resize(job.size, Image.Resampling.LANCZOS)), job.base.width
        height, width = start.shape[:2]
        views = local_views((height, width), (side, side), (side - overlap, side - overlap))
        ramp = np.minimum(np.arange(side) + 0.5, overlap) / overlap
        weight = np.outer(*[np.minimum(ramp, ramp[::-1])] * 2)[..., None]
        total, shares = np.zeros((height, width, 3)), np.zeros((height, width, 1))
        for view in views:
            box = np.s_[view.top : view.top + side, view.left : view.left + side]
            total[box] += weight * np.asarray(_redrawn(job, Image.fromarray(start[box]), denoise))
            shares[box] += weight
        image = Image.fromarray((total / shares).round().astype(np.uint8))
        return image, 2 * int(job.steps * denoise) * len(views)

    return run


def _redrawn(job: Job, start, denoise: float) -> Image.Image:
    pipe = StableDiffusionImg2ImgPipeline(**job.pipe.components, requires_safety_checker=False)
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


# The paper's table 1, without ScaleCrafter, and what users of the WebUI do today.
METHODS: dict[str, Method] = {
    "Lanczos": lanczos,
    "direct": direct,
    "MultiDiffusion": demofusion(False, False, False),
    "Hires. fix, latent 0.7": hires_fix("latent", 0.7),
    "Hires. fix, Lanczos 0.5": hires_fix("Lanczos", 0.5),
    "tiles 0.35": tiles(),
    "DemoFusion": demofusion(),
}
# Figure 5: progressive upscaling, skip residual, dilated sampling.
ABLATION: dict[str, Method] = {
    " + ".join(name for name, on in zip(("PU", "SR", "DS"), parts) if on) or "none": demofusion(*parts)
    for parts in [(p, s, d) for p in (False, True) for s in (False, True) for d in (False, True)]
}
