"""DemoFusion on Hugging Face diffusers: Stable Diffusion 1.x, 2.x and XL pipelines.

    pipe = load_pipeline("folder, .safetensors file or hub name")
    result = generate(pipe, "three red striped rings on grass", seed=1)
    result.images()[0].save("out.png")

diffusers is imported only when something here is called.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.fusion import Cancelled
from lib_demofusion.memory import Needs, OutOfMemory, ViewBatch, call_bytes, check_fits, latents_bytes, picture_bytes
from lib_demofusion.phases import Phase, Plan, enlarge, fusion_for, make_plan, upscale
from lib_demofusion.saved import SavedPhase
from lib_demofusion.views import Size, View

EMBEDDED_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoint"


@dataclass(frozen=True)
class Sampler:
    """A diffusers scheduler and what the method must know of it.

    variance_preserving: its x is sqrt(alphas_cumprod) * z + sqrt(1 - alphas_cumprod) * n, instead of z + sigma * n.
    fresh_noise: it adds noise of its own. calls: model predictions for steps, some of them skipped. phase_settings: what the
    scheduler needs besides in the phases after the base.
    """

    scheduler: str
    variance_preserving: bool = False
    fresh_noise: bool = False
    calls: Callable[[int, int], int] = lambda steps, skipped: steps - skipped
    phase_settings: Mapping[str, Any] = field(default_factory=dict)


SAMPLERS = {
    "Euler": Sampler("EulerDiscreteScheduler"),
    "Euler a": Sampler("EulerAncestralDiscreteScheduler", fresh_noise=True),
    "DDIM": Sampler("DDIMScheduler", variance_preserving=True),
    "DPM++ 2M": Sampler("DPMSolverMultistepScheduler", variance_preserving=True),
    "Heun": Sampler("HeunDiscreteScheduler", calls=lambda steps, skipped: 2 * (steps - skipped) - 1),
    "LCM": Sampler("LCMScheduler", variance_preserving=True, fresh_noise=True),
    # UniPC's corrector takes its step again from the state before the skip residual, which would undo it.
    "UniPC": Sampler(
        "UniPCMultistepScheduler", variance_preserving=True, phase_settings={"disable_corrector": list(range(1000))}
    ),
}


def sampler_named(name: str) -> str:
    """The key in SAMPLERS of a sampler by the WebUI's name or the diffusers class. Raises ValueError if there is none."""
    for label, sampler in SAMPLERS.items():
        if name in (label, sampler.scheduler):
            return label
    raise ValueError(f"no sampler called {name!r}; there are: {', '.join(SAMPLERS)}")


class Incomplete(Exception):
    """Stopped before the last phase: `result` holds what was finished, `cancelled` says whether the user asked for it."""

    def __init__(self, message: str, result: Result, cancelled: bool = False):
        super().__init__(message)
        self.result = result
        self.cancelled = cancelled


@dataclass
class Result:
    """Finished phases, the base first, each with its latents [B, C, H, W] on the CPU.

    evaluations: views that the model saw, per image, as counted at the model. view_batch: how many went into a call.
    """

    plan: Plan
    pipe: Any
    phases: list[tuple[Phase, Tensor]]
    view_batch: ViewBatch
    evaluations: int = 0

    def images(self, index: int = -1) -> list:
        """The PIL images of one phase: -1 the last one finished, 0 the base."""
        return decode_latents(self.pipe, self.phases[index][1], self.plan.window)


def load_pipeline(model: str | Path = EMBEDDED_CHECKPOINT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from a diffusers folder, a single .safetensors or .ckpt file, or a hub name; loading is diffusers' own.

    Raises ValueError, one line, if there is nothing to load or the device is not there.
    """
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    _check_device(device)
    path = Path(model)
    single = path.suffix in (".safetensors", ".ckpt")
    far = not path.is_absolute() and not str(model).startswith(".") and len(path.parts) == 2  # may be a hub name
    if single and not path.is_file() or not path.exists() and not far:
        raise ValueError(f"no such checkpoint: {model}")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{model} is not a diffusers folder: it has no model_index.json")
    try:
        if single:
            kind = StableDiffusionXLPipeline if _is_sdxl(path) else StableDiffusionPipeline
            pipe = kind.from_single_file(str(path), torch_dtype=dtype)
        else:
            pipe = DiffusionPipeline.from_pretrained(str(model), torch_dtype=dtype)
    except Exception as error:  # a broken file surfaces as nearly any type
        raise ValueError(f"{model} cannot be loaded: {first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    if device == "cpu" and getattr(pipe, "unet", None) is not None:
        pipe.unet.to(memory_format=torch.channels_last)  # 1.2 to 1.4 times as fast there
    return pipe.to(device)


def _is_sdxl(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return any(key.startswith("conditioner.embedders.") for key in file.keys())  # noqa: SIM118, it is no dict


def default_device() -> str:
    """The fastest device that is here."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device} is not available here; {default_device()} is") from error


def generate(
    pipe: Any,
    prompt: str,
    *,
    negative_prompt: str = "",
    config: DemoFusionConfig = DemoFusionConfig(),
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    cfg_scale: float = 7.5,
    sampler: str = "Euler",
    seed: int | Sequence[int] = 0,
    image: Any = None,
    progress: Callable[[Phase, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    finished: Callable[[Result, SavedPhase], None] | None = None,
    resume: SavedPhase | None = None,
) -> Result:
    """Images of config.scale times height x width (pixels; the model's own size unless given).

    seed: one for one image, several for a batch; each image depends on its own seed alone. cfg_scale 1: no guidance,
    half the model calls. image: a PIL image to start from instead of the model's own base; height and width then
    are the image's unless given. progress: called after every model call with the phase and the views just done.
    cancelled: asked before every model call. finished: called after each phase, with the result so far and what it
    takes to go on from there. resume: such a phase, to go on after it; the other settings must be those it was made with.

    Raises ValueError, one line, before anything is computed, if a setting cannot work; Incomplete, with what was
    finished, if it was cancelled or failed later.
    """
    _check_pipeline(pipe)
    check_prompt(pipe, prompt, "prompt")
    check_prompt(pipe, negative_prompt, "negative prompt")
    seeds = [seed] if isinstance(seed, int) else list(seed)
    plan = plan_for(pipe, config, height=height, width=width, steps=steps, cfg_scale=cfg_scale, sampler=sampler, image=image)
    if resume is not None:
        _check_resume(resume, plan, len(seeds))
    last = plan.phases[-1]
    check_fits(last.size, last.scale, pipe.device, pipe.unet.config.in_channels, len(seeds), pipe.vae_scale_factor)
    run = _Run(pipe, plan, config, SAMPLERS[sampler_named(sampler)], steps, cfg_scale, seeds, progress, cancelled, finished)
    try:
        with torch.inference_mode():
            run.encode_prompts(prompt, negative_prompt)
            if resume is not None:
                base, done = run.take_up(resume)
            else:
                base, done = run.base() if image is None else run.encode_image(image), None
                run.finish(plan.phases[0], base)
            for phase, latents in upscale(plan, base, run.noise, run.denoise, done, run.enlarge):
                run.finish(phase, latents)
    except (Cancelled, KeyboardInterrupt) as error:
        raise Incomplete("stopped", run.result, cancelled=True) from error
    except OutOfMemory as error:
        raise Incomplete(str(error), run.result) from error
    except (RuntimeError, FloatingPointError) as error:
        raise Incomplete(f"failed: {first_line(error)}", run.result) from error
    return run.result


def plan_for(
    pipe: Any,
    config: DemoFusionConfig,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    cfg_scale: float = 7.5,
    sampler: str = "Euler",
    image: Any = None,
) -> Plan:
    """The plan that `generate` follows with the same settings. Raises ValueError, one line, if one cannot work."""
    sampler = sampler_named(sampler)
    if not math.isfinite(cfg_scale) or cfg_scale < 1:
        raise ValueError(f"CFG scale must be at least 1, got {cfg_scale:g}")
    factor = pipe.vae_scale_factor
    native = pipe.unet.config.sample_size
    native = (native, native) if isinstance(native, int) else native
    own = (image.height, image.width) if image is not None else (native[0] * factor, native[1] * factor)
    size = (height or own[0], width or own[1])
    multiple = factor * 2 ** (len(pipe.unet.config.down_block_types) - 1)
    for name, value in zip(("height", "width"), size):
        if value % factor:
            near = max(round(value / multiple), 1) * multiple
            raise ValueError(f"{name} must be divisible by {factor}, got {value}; {near} is near")
    return make_plan(
        (size[0] // factor, size[1] // factor),
        steps,
        config,
        branches=2 if cfg_scale > 1 else 1,
        calls=SAMPLERS[sampler].calls,
        from_image=image is not None,
    )


def unet_inputs(unet: Any, rows: int, size: Size, device: str) -> tuple[Tensor, dict[str, Any]]:
    """Random inputs as a UNet takes them: latents [rows, C, h, w], and its conditions by name."""
    config, kind = unet.config, {"dtype": unet.dtype, "device": device}
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else max(config.cross_attention_dim)
    conditions: dict[str, Any] = {"encoder_hidden_states": torch.randn(rows, 77, width, **kind)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(rows, pooled, **kind), "time_ids": torch.zeros(rows, 6, **kind)}
        conditions["added_cond_kwargs"] = added
    return torch.randn(rows, config.in_channels, *size, **kind), conditions


def needs(pipe: Any, plan: Plan, view_batch: int = 1, images: int = 1) -> Needs:
    """The memory that a job takes with so many views a call, as foreseen from the shapes of what is computed."""
    unet, vae, size = pipe.unet, pipe.vae, plan.phases[-1].size
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(x.nbytes for module in modules for x in (*module.parameters(), *module.buffers()))
    latents = images * latents_bytes(size, unet.config.in_channels)
    x, conditions = unet_inputs(unet, images * plan.branches * view_batch, plan.window, "meta")
    call = call_bytes(unet, unet, x, 0, return_dict=False, **conditions)
    tile = tiles.tile_for(vae.decoder, pipe.device, plan.window, pipe.vae_scale_factor)
    z = torch.empty(1, vae.config.latent_channels, *size, dtype=torch.float32 if _overflows(vae) else vae.dtype, device="meta")
    decoding = tiles.decoding_bytes(lambda z: vae.decode(z, return_dict=False)[0], z, vae.decoder, vae, tile)
    return Needs(weights, call + latents, decoding, picture_bytes(size, pipe.vae_scale_factor))


def _check_pipeline(pipe: Any) -> None:
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise ValueError(f"{type(pipe).__name__} has no UNet; use a Stable Diffusion 1.x, 2.x or XL checkpoint")
    if unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError("this checkpoint's UNet takes more than latents (inpainting, for one); use a text-to-image one")
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError("this checkpoint has its guidance distilled into it; use it as a LoRA, or another checkpoint")
    if pipe.scheduler.config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction type {pipe.scheduler.config.prediction_type} is not known; epsilon and v_prediction are")


def _check_resume(saved: SavedPhase, plan: Plan, images: int) -> None:
    if saved.number >= len(plan.phases):
        raise ValueError(f"phase {saved.number} is saved, and there is none after it")
    sizes = [(images, *plan.phases[number - 1].size) for number in (1, saved.number)]
    if [(len(x), *x.shape[-2:]) for x in (saved.base, saved.latents)] != sizes:
        raise ValueError("the saved phase is of other sizes than these settings make")


def check_prompt(pipe: Any, prompt: str, name: str) -> None:
    """Raises ValueError, one line, if one of the pipeline's tokenizers would cut the prompt off."""
    for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
        tokens, most = len(tokenizer(prompt, truncation=False).input_ids), tokenizer.model_max_length
        if tokens > most:
            raise ValueError(f"the {name} is too long: {tokens - 2} tokens, {most - 2} at most; shorten it")


def decode_latents(pipe: Any, latents: Tensor, base: Size) -> list:
    """Latents [B, C, h, w] as PIL images, through the pipeline's autoencoder; in tiles, if they are larger than the base."""
    from PIL import Image

    images = []
    with torch.inference_mode():
        for z in latents.split(1):
            # As the pipeline's own postprocess, in place: it would make several copies of what may be a huge image.
            pixels = _decode(pipe, z, base).div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
            images.append(Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy()))
    return images


def _decode(pipe: Any, latents: Tensor, base: Size) -> Tensor:
    """Latents [1, C, h, w] as an image [1, 3, H, W] in about -1..1, float32 on the CPU."""
    vae = pipe.vae
    with _enough_precision(vae):
        z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
        pixels = _in_tiles(tiles.decode, pipe, vae.decoder, lambda z: vae.decode(z).sample, z, base)
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("the autoencoder gave NaN; use --dtype float32")
    return pixels.cpu().float()


def _encode(pipe: Any, image: Tensor, base: Size) -> Tensor:
    """An image [1, 3, H, W] in -1..1 as latents [1, C, h, w], float32, on the autoencoder's device."""
    vae = pipe.vae
    with _enough_precision(vae):
        pixels = image.to(vae.device, vae.dtype)
        latents = _in_tiles(tiles.encode, pipe, vae.encoder, lambda x: vae.encode(x).latent_dist.mode(), pixels, base)
    return (latents * vae.config.scaling_factor).float()


def _in_tiles(tiled: Callable, pipe: Any, network: Any, function: Callable[[Tensor], Tensor], x: Tensor, base: Size) -> Tensor:
    """function(x), through tiles.decode or tiles.encode, unless the user has set up diffusers' own tiling."""
    if getattr(pipe.vae, "use_tiling", False):
        return function(x)
    factor = pipe.vae_scale_factor
    tile = tiles.tile_for(network, x.device, base, factor)
    return tiled(function, x, network, factor=factor, tile=tile)


def _overflows(vae: Any) -> bool:
    """Whether the autoencoder says in its config that it overflows in half precision, as SDXL's does, and is in it."""
    return vae.dtype == torch.float16 and vae.config.get("force_upcast", False)


@contextmanager
def _enough_precision(vae: Any) -> Iterator[None]:
    """Run an autoencoder that overflows in half precision in single precision."""
    if not _overflows(vae):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


class _Run:
    """One call of `generate`: the settings, the prompts' embeddings, the seeded generators and what is finished."""

    def __init__(self, pipe, plan, config, sampler, steps, cfg_scale, seeds, progress, cancelled, finished):
        self.pipe = pipe
        self.plan = plan
        self.config = config
        self.sampler = sampler
        self.cfg_scale = cfg_scale
        self.progress = progress
        self.cancelled = cancelled or (lambda: False)
        self.finished = finished
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype  # asked once: diffusers looks at every module for it
        self.factor = pipe.vae_scale_factor
        self.schedule = self._schedule(steps)
        self.phase_schedule = self._schedule(config.phase_steps or steps, sampler.phase_settings)
        # On the CPU whatever the device, so that a seed gives one picture everywhere.
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.result = Result(plan, pipe, [], ViewBatch(config.view_batch_size, self.device))

    def _schedule(self, steps: int, settings: Mapping[str, Any] = MappingProxyType({})) -> Any:
        import diffusers

        kind = getattr(diffusers, self.sampler.scheduler)
        # The fused prediction is noise whatever the model predicts, since the dilated views see another x.
        schedule = kind.from_config(self.pipe.scheduler.config, prediction_type="epsilon", **settings)
        schedule.set_timesteps(steps, device=self.device)
        if self._sigma(schedule, 0) > 1e4:  # zero terminal SNR; schedulers that can take it stop at 4096
            raise ValueError("this checkpoint starts at infinite noise, which this sampler divides by; use Euler")
        return schedule

    def finish(self, phase: Phase, latents: Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise FloatingPointError(f"phase {phase.number} gave NaN; use --dtype float32")
        self.result.phases.append((phase, latents.cpu()))
        if self.finished is not None:
            states = torch.stack([generator.get_state() for generator in self.generators])
            saved = SavedPhase(phase.number, latents.cpu(), self.result.phases[0][1], "command", states)
            self.finished(self.result, saved)

    def take_up(self, saved: SavedPhase) -> tuple[Tensor, tuple[int, Tensor]]:
        """Everything as it was when the phase was saved: the base, and the phase's number and latents."""
        for generator, state in zip(self.generators, saved.generators):
            generator.set_state(state.clone())  # torch takes no row of a tensor
        numbers = dict.fromkeys((1, saved.number))
        self.result.phases = [(self.plan.phases[n - 1], saved.base if n == 1 else saved.latents) for n in numbers]
        self.result.evaluations = self.plan.evaluations_to(saved.number)
        return saved.base.to(self.device), (saved.number, saved.latents.to(self.device))

    def encode_prompts(self, prompt: str, negative_prompt: str) -> None:
        """Embeddings by branch of guidance, the negative prompt's first: [branches, tokens, channels]."""
        guided = self.plan.branches == 2
        encoded = self.pipe.encode_prompt(
            prompt=prompt,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt if guided else None,
        )
        # (embeds, negative embeds), and for SDXL (..., pooled, negative pooled)
        pairs = [torch.cat([negative, own]) if guided else own for own, negative in zip(encoded[::2], encoded[1::2])]
        self.embeds, self.pooled = (*pairs, None)[:2]

    def encode_image(self, image: Any) -> Tensor:
        """A PIL image, resized to the plan's base, as latents, one copy for each seed."""
        from PIL import Image

        h, w = self.plan.window
        image = image.resize((w * self.factor, h * self.factor), resample=Image.Resampling.LANCZOS)
        latents = _encode(self.pipe, self.pipe.image_processor.preprocess(image), (h, w))
        return latents.repeat(len(self.generators), 1, 1, 1)

    def enlarge(self, latents: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
        decode, encode = (partial(code, self.pipe, base=self.plan.window) for code in (_decode, _encode))
        return enlarge(latents, size, self.config, decode, encode, self.factor)

    def noise(self, phase: Phase) -> Tensor:
        shape = (1, self.pipe.unet.config.in_channels, *phase.size)
        return torch.cat([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def base(self) -> Tensor:
        """Phase 1: ordinary sampling from noise."""
        phase, (h, w) = self.plan.phases[0], self.plan.window
        x = self.noise(phase) * self.schedule.init_noise_sigma
        everything = [View("local", 0, 0, h, w)]

        def predict(x: Tensor, t: Tensor, sigma: float) -> Tensor:
            if self.cancelled():
                raise Cancelled
            return self._model(phase, x, everything, t, sigma)

        return self._sample(self.schedule, x, predict)

    def denoise(self, phase: Phase, reference: Tensor, noise: Tensor, held: Tensor | None) -> Tensor:
        """Phases after the base: the same sampling, of the fused prediction, with the skip residual."""
        fusion = fusion_for(
            self.plan,
            phase,
            self.config,
            reference,
            noise,
            fresh_noise=self.sampler.fresh_noise,
            cancelled=self.cancelled,
            held=held,
            view_batch=self.result.view_batch,
            t_max=self.phase_schedule.config.num_train_timesteps,
        )

        def predict(x: Tensor, t: Tensor, sigma: float) -> Tensor:
            levels = self._levels(sigma)
            fusion.skip_residual_(x, float(t), *levels)
            return fusion.predict(x, float(t), lambda crops, views: self._model(phase, crops, views, t, sigma), levels[0])

        first = phase.skipped * self.phase_schedule.order
        x = fusion.noised_reference(*self._levels(self._sigma(self.phase_schedule, first)))
        return self._sample(self.phase_schedule, x, predict, first)

    def _levels(self, sigma: float) -> tuple[float, float]:
        """How much noise and how much signal the sampler's x holds at noise level sigma."""
        signal = 1 / math.sqrt(1 + sigma * sigma) if self.sampler.variance_preserving else 1.0
        return sigma * signal, signal

    @staticmethod
    def _sigma(schedule: Any, index: int) -> float:
        """The noise level, over the signal, at a step."""
        if hasattr(schedule, "sigmas"):
            return float(schedule.sigmas[index])
        kept = float(schedule.alphas_cumprod[int(schedule.timesteps[index])])
        return math.sqrt((1 - kept) / kept) if kept else math.inf

    def _sample(self, template: Any, x: Tensor, predict: Callable[[Tensor, Tensor, float], Tensor], first: int = 0) -> Tensor:
        """x from the first of the schedule's timesteps that is not skipped to the end."""
        schedule = copy.deepcopy(template)  # multistep ones keep a history; it ends with the phase
        if first and hasattr(schedule, "set_begin_index"):  # DDIM's goes by the timesteps alone
            schedule.set_begin_index(first)
        extra = {"generator": self.generators} if "generator" in inspect.signature(schedule.step).parameters else {}
        for index, t in enumerate(schedule.timesteps[first:], start=first):
            schedule.scale_model_input(x, t)  # some warn if they are not asked; _model scales each crop itself
            eps = predict(x, t, self._sigma(schedule, index))
            x = schedule.step(eps, t, x, return_dict=False, **extra)[0]
        return x

    def _model(self, phase: Phase, crops: Tensor, views: Sequence[View], t: Tensor, sigma: float) -> Tensor:
        """The guided noise in crops [len(views) * B, C, h, w] at noise level sigma."""
        branches, unet = self.plan.branches, self.pipe.unet
        scale = 1.0 if self.sampler.variance_preserving else 1 / math.sqrt(1 + sigma * sigma)
        x = crops * scale
        rows = len(crops)
        extra = {}
        if self.pooled is not None:
            ids = self._size_ids(phase, views).repeat_interleave(rows // len(views), 0).repeat(branches, 1)
            pooled = self.pooled.repeat_interleave(rows, 0)
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.to(self.device, pooled.dtype)}
        output = unet(
            x.repeat(branches, 1, 1, 1).to(self.dtype),
            t,
            encoder_hidden_states=self.embeds.repeat_interleave(rows, 0),
            return_dict=False,
            **extra,
        )[0].float()
        self.result.evaluations += len(output) // len(self.generators)
        if self.progress is not None:
            self.progress(phase, len(views))
        if self.pipe.scheduler.config.get("prediction_type", "epsilon") == "v_prediction":
            output = (output + sigma * x.repeat(branches, 1, 1, 1)) / math.sqrt(1 + sigma * sigma)
        if branches == 1:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self.cfg_scale * (cond - uncond)

    def _size_ids(self, phase: Phase, views: Sequence[View]) -> Tensor:
        """SDXL's size conditions, a row a view: original (height, width), crop (top, left), target (height, width).

        The base is asked for at its own size; the phases after it at the final one, each window where it lies.
        """
        of = self.plan.phases[0] if phase.number == 1 else self.plan.phases[-1]
        size = [side * self.factor for side in of.size]
        return torch.tensor([[*size, *view.crop_pixels(self.factor), *size] for view in views])
