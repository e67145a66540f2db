"""DemoFusion on Hugging Face diffusers: Stable Diffusion 1.x, 2.x and XL pipelines.

    pipe = load_pipeline("folder, .safetensors file or hub name")
    result = generate(pipe, "three red striped rings on grass", seed=1)
    result.images()[0].save("out.png")

diffusers is imported only when something here is called.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.fusion import Cancelled
from lib_demofusion.hosts.diffusers_arguments import (
    base_size,
    final_size,
    given_picture,
    own_side,
    plain_image,
    seeds_of,
    short,
    whole_number,
)
from lib_demofusion.hosts.diffusers_checkpoints import (
    EMBEDDED_CHECKPOINT,
    check_parts,
    default_device,
    device_of,
    load_pipeline,
    offloaded,
)
from lib_demofusion.hosts.diffusers_controlnet import (
    UNION_TYPES,
    Control,
    Controls,
    check_controls,
    control_bytes,
    controlled_call_bytes,
)
from lib_demofusion.hosts.diffusers_controlnet_files import check_controlnet, load_controlnet
from lib_demofusion.hosts.diffusers_schedules import (
    SAMPLERS,
    Sampler,
    check_scheduler,
    check_steps,
    draws_noise,
    make_schedule,
    prediction_type,
    sampler_named,
    sigma_at,
    take_steps,
)
from lib_demofusion.hosts.prompts import as_webui_prompt, check_syntax
from lib_demofusion.memory import Needs, OutOfMemory, ViewBatch, check_fits, latents_bytes, picture_bytes
from lib_demofusion.original import Original
from lib_demofusion.phases import (
    Phase,
    Plan,
    enlarge,
    enlarged_size,
    flat_areas,
    fusion_for,
    make_plan,
    plan_from_picture,
    upscale,
)
from lib_demofusion.pictures import MASK_BLUR, Given
from lib_demofusion.saved import SavedPhase
from lib_demofusion.views import Size, View

__all__ = [
    "EMBEDDED_CHECKPOINT",
    "SAMPLERS",
    "UNION_TYPES",
    "Control",
    "Incomplete",
    "Result",
    "Sampler",
    "as_webui_prompt",
    "check_controlnet",
    "check_prompt",
    "check_resume",
    "check_syntax",
    "decode_latents",
    "default_device",
    "generate",
    "load_controlnet",
    "load_pipeline",
    "needs",
    "plan_for",
    "sampler_named",
    "unet_inputs",
]

# One lock for each network that is in use, so that pipelines which share one wait for each other too.
_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


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
    given: the picture that the job began with, if it did; its latents, shrunken to the window, take the base's place.
    """

    plan: Plan
    pipe: Any
    phases: list[tuple[Phase, Tensor]]
    view_batch: ViewBatch
    evaluations: int = 0
    given: Given | None = None

    def images(self, index: int = -1) -> list:
        """The PIL images of one phase: -1 the last one finished, 0 the base, or the picture that was given, at its own size.

        Outside of a mask they are that picture, enlarged by Lanczos.
        """
        phase, latents = self.phases[index]
        if self.given is None:
            return decode_latents(self.pipe, latents, self.plan.window)
        if phase.number == 1:
            return [self.given.picture.copy() for _ in latents]
        return [self.given.over(image) for image in decode_latents(self.pipe, latents, self.plan.window)]


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
    size: Sequence[int] | None = None,
    mask: Any = None,
    mask_blur: int = MASK_BLUR,
    controls: Sequence[Control] = (),
    progress: Callable[[Phase, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    finished: Callable[[Result, SavedPhase], None] | None = None,
    resume: SavedPhase | None = None,
) -> Result:
    """Images of config.scale times height x width (pixels; the model's own size unless given), or of that times `image`.

    prompt: plain text; what only the WebUI understands in one, weights for instance, is refused. negative_prompt: none
    if it is empty or None; SDXL checkpoints then have zeros for it where their config says so, as in diffusers.
    seed: one for one image, several for a batch; each image depends on its own seed alone. cfg_scale 1: no guidance,
    half the model calls. image: a PIL image to enlarge, of any size, instead of the model's own base, which height and width
    are of. size: (height, width) in pixels of what becomes of it, instead of the scale. mask: a PIL image of the same size;
    where it is white the image is drawn anew, and where it is black it stays, enlarged. mask_blur: of the mask, in pixels of
    the image. controls: ControlNets, each with the image that it holds the picture to; what they add is summed.
    progress: called after every model call with the phase and the views just done. cancelled: asked before
    every model call. finished: called after each phase that is sampled, with the result so far and what it takes to go on
    from there. resume: such a phase, to go on after it; the other settings must be those it was made with.

    A pipeline serves one job at a time: from several threads, a job waits until the one before it is done.

    Raises ValueError, one line, before anything is computed, if a setting cannot work; Incomplete, with what was
    finished, if it was cancelled or failed later, whatever the reason, which is its __cause__.
    """
    given = given_picture(image, mask, mask_blur)
    sampled = dict(steps=steps, cfg_scale=cfg_scale, sampler=sampler)
    plan = _plan(pipe, config, given, height=height, width=width, size=size, **sampled)
    controls = check_controls(pipe, controls, plan, given)
    negative_prompt = "" if negative_prompt is None else negative_prompt
    for text, name in ((prompt, "prompt"), (negative_prompt, "negative prompt")):
        check_prompt(pipe, text, name)
        check_syntax(text, name)
    seeds = seeds_of(seed)
    for name, callback in (("progress", progress), ("cancelled", cancelled), ("finished", finished)):
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be a function, got a {type(callback).__name__}")
    if resume is not None:
        check_resume(pipe, resume, plan, len(seeds), image)
    last, factor = plan.phases[-1], pipe.vae_scale_factor
    scale = given.times([side * factor for side in last.size]) if given else last.scale
    with _one_at_a_time(pipe, *(control.model for control in controls)):
        device, start = device_of(pipe, pipe.unet), "picture" if given else "base"
        check_fits(last.size, scale, device, pipe.unet.config.in_channels, len(seeds), factor, start=start)
        steps, sampler = int(steps), SAMPLERS[sampler_named(sampler)]
        made = (seeds, progress, cancelled, finished, given, controls)
        run = _Run(pipe, plan, config, sampler, steps, float(cfg_scale), *made)
        try:
            with torch.inference_mode():
                run.encode_prompts(prompt, negative_prompt)
                if resume is not None:
                    base, done = run.take_up(resume)
                else:
                    base, done = run.encode(plan.window) if given else run.base(), None
                    run.finish(plan.phases[0], base)
                for phase, latents in upscale(plan, base, run.noise, run.denoise, done, run.enlarge, run.original()):
                    run.finish(phase, latents)
        except (Cancelled, KeyboardInterrupt, SystemExit) as error:
            raise Incomplete("stopped", run.result, cancelled=True) from error
        except OutOfMemory as error:
            raise Incomplete(str(error), run.result) from error
        except Exception as error:  # the model's, or of one of the caller's own functions
            kind = "" if isinstance(error, (RuntimeError, FloatingPointError)) else f"{type(error).__name__}: "
            raise Incomplete(f"failed: {kind}{first_line(error)}", run.result) from error
        finally:
            pipe.maybe_free_model_hooks()  # where it is offloaded, all of it is again
    return run.result


@contextmanager
def _one_at_a_time(pipe: Any, *controlnets: Any) -> Iterator[None]:
    """Waits until no other thread uses the pipeline's networks, or one of these."""
    with ExitStack() as stack:
        for network in sorted((pipe.unet, pipe.vae, *controlnets), key=id):  # all wait in one order
            with _LOCKS_LOCK:
                lock = _LOCKS.setdefault(network, threading.RLock())
            stack.enter_context(lock)
        yield


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
    size: Sequence[int] | None = None,
    mask: Any = None,
    mask_blur: int = MASK_BLUR,
    controls: Sequence[Control] = (),
) -> Plan:
    """The plan that `generate` follows with the same settings. Raises ValueError, one line, if one cannot work."""
    given = given_picture(image, mask, mask_blur)
    sampled = dict(steps=steps, cfg_scale=cfg_scale, sampler=sampler)
    plan = _plan(pipe, config, given, height=height, width=width, size=size, **sampled)
    check_controls(pipe, controls, plan, given)
    return plan


def _plan(pipe, config, given: Given | None, *, height, width, size, steps, cfg_scale, sampler) -> Plan:
    _check_pipeline(pipe)
    if not isinstance(config, DemoFusionConfig):
        raise ValueError(f"config must be a DemoFusionConfig, got a {type(config).__name__}")
    sampler = sampler_named(sampler)
    steps = whole_number(steps, "steps", 1)
    if isinstance(cfg_scale, bool) or not isinstance(cfg_scale, Real) or not math.isfinite(cfg_scale):
        raise ValueError(f"CFG scale must be a number, got {short(cfg_scale)}")
    if cfg_scale < 1:
        raise ValueError(f"CFG scale must be at least 1, got {cfg_scale:g}")
    factor, calls = pipe.vae_scale_factor, SAMPLERS[sampler].calls
    branches = tuple(2 if scale > 1 else 1 for scale in (cfg_scale, config.phase_cfg_scale or cfg_scale))
    if given is None:
        if size is not None:
            raise ValueError("a size is of what becomes of an image that is given; without one config.scale says it")
        if config.window:
            raise ValueError("a window is for a picture that is given; without one it is the base's size")
        window = tuple(side // factor for side in base_size(pipe, height, width))
        plan = make_plan(window, steps, config, branches=branches, calls=calls)
        check_steps(pipe.scheduler, sampler, steps)
    else:
        if height is not None or width is not None:
            raise ValueError(
                "height and width are of a base made from the prompt; with an image use size or config.scale, and "
                "config.window for the window"
            )
        picture, side = given.picture.size[::-1], own_side(pipe, config)
        final = None if size is None else final_size(size, given, factor)
        more = dict(branches=branches, calls=calls, final=final, factor=factor)
        plan = plan_from_picture(picture, side, steps, config, **more)
        if given.mask is not None and not given.mask_at(plan.phases[-1].size).any():
            raise ValueError("the mask's white areas are too small to be drawn in; make them larger, or blur them less")
    phase, name = plan.phases[-1], "phase steps" if config.phase_steps else "steps"
    check_steps(pipe.scheduler, sampler, phase.steps, name, SAMPLERS[sampler].phase_settings, phase.skipped)
    return plan


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


def needs(pipe: Any, plan: Plan, view_batch: int = 1, images: int = 1, controls: Sequence[Control] = ()) -> Needs:
    """The memory that a job takes with so many views a call, as foreseen from the shapes of what is computed.

    Raises RuntimeError, one line, for an offloaded pipeline: which networks it holds at a time is not known here.
    """
    networks = [control.model for control in controls]
    if any(map(offloaded, (pipe.unet, pipe.vae, *networks))):
        raise RuntimeError("the pipeline is offloaded")
    unet, vae, size = pipe.unet, pipe.vae, plan.phases[-1].size
    modules = {part for part in (*pipe.components.values(), *networks) if isinstance(part, torch.nn.Module)}
    weights = sum(x.nbytes for module in modules for x in (*module.parameters(), *module.buffers()))
    latents = images * latents_bytes(size, unet.config.in_channels)
    x, conditions = unet_inputs(unet, images * max(phase.branches for phase in plan.phases) * view_batch, plan.window, "meta")
    call = controlled_call_bytes(unet, controls, x, plan.phases[-1].branches, conditions, pipe.vae_scale_factor)
    tile = tiles.tile_for(vae.decoder, device_of(pipe, vae), plan.window, pipe.vae_scale_factor)
    if not tiles.group_norms(vae.decoder):  # its tiles share nothing
        size = tuple(min(side, tile) for side in size)
    elif not _tileable(vae.decoder):
        tile = max(size)
    z = torch.empty(1, vae.config.latent_channels, *size, dtype=torch.float32 if _overflows(vae) else vae.dtype, device="meta")
    decoding = tiles.decoding_bytes(lambda z: vae.decode(z, return_dict=False)[0], z, vae.decoder, vae, tile)
    size = plan.phases[-1].size
    shown = control_bytes(controls, plan, pipe.vae_scale_factor)
    return Needs(weights, call + latents, decoding, picture_bytes(size, pipe.vae_scale_factor), shown)


def _check_pipeline(pipe: Any) -> None:
    check_parts(pipe)
    check_scheduler(pipe.scheduler)


def check_resume(pipe: Any, saved: Any, plan: Plan, images: int = 1, image: Any = None) -> None:
    """Raises ValueError, one line, if a saved phase, which is one by itself, is not of the plan, or not of the image."""
    if not isinstance(saved, SavedPhase):
        raise ValueError(f"resume must be a SavedPhase, got a {type(saved).__name__}")
    if saved.made_by != "command":
        raise ValueError(f"the phase was saved by {saved.made_by}, whose noise cannot be repeated here")
    if saved.from_picture != plan.from_picture:
        raise ValueError(f"the saved phase is of a job with{'' if saved.from_picture else 'out'} an image to begin with")
    if saved.number >= len(plan.phases):
        raise ValueError(f"phase {saved.number} is saved, and there is none after it")
    sizes = [(images, pipe.unet.config.in_channels, *plan.phases[number - 1].size) for number in (1, saved.number)]
    if [saved.base.shape, saved.latents.shape] != sizes:
        raise ValueError("the saved phase is of other sizes than these settings make")
    if not plan.from_picture:
        return
    with torch.inference_mode(), _one_at_a_time(pipe):
        try:
            base = _encode_picture(pipe, plain_image(image), plan.window, plan.window).cpu()
        finally:
            pipe.maybe_free_model_hooks()
    if (saved.base.float() - base).square().mean().sqrt() > 0.1 * base.std():  # another device moves the last bits alone
        raise ValueError("the saved phase is of another picture; give the one that it was made from, as it was")


def check_prompt(pipe: Any, prompt: str, name: str) -> None:
    """Raises ValueError, one line, if one of the pipeline's tokenizers cannot take the prompt, or would cut it off.

    A textual inversion counts as many tokens as it has vectors.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"the {name} must be a text, got a {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is no valid Unicode: {prompt[error.start : error.end]!a}") from error
    for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
        whole = pipe.maybe_convert_prompt(prompt, tokenizer)
        tokens, most = len(tokenizer(whole, truncation=False).input_ids), tokenizer.model_max_length
        if tokens > most:
            raise ValueError(f"the {name} is too long: {tokens - 2} tokens, {most - 2} at most; shorten it")


def decode_latents(pipe: Any, latents: Tensor, base: Size) -> list:
    """Latents [B, C, h, w] as PIL images, through the pipeline's autoencoder; in tiles, if they are larger than the base.

    The pipeline's watermark and safety checker see them as in its own call; a warning says if the latter took one.
    """
    from PIL import Image

    images = []
    with torch.inference_mode(), _one_at_a_time(pipe):
        try:
            for z in latents.split(1):
                # As the pipeline's own postprocess, in place: it would make several copies of what may be a huge image.
                pixels = _marked(pipe, _decode(pipe, z, base))
                pixels = pixels.div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
                images.append(_screened(pipe, Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())))
        finally:
            pipe.maybe_free_model_hooks()
    return images


def _marked(pipe: Any, image: Tensor) -> Tensor:
    """An image [1, 3, H, W] in -1..1 with the pipeline's watermark, if it has one."""
    watermark = getattr(pipe, "watermark", None)
    return image if watermark is None else watermark.apply_watermark(image)


def _screened(pipe: Any, image: Any) -> Any:
    """A PIL image as the pipeline's safety checker lets it pass, if it has one."""
    if getattr(pipe, "safety_checker", None) is None:
        return image
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image, dtype=np.float32)[None] / 255
    passed, flagged = pipe.run_safety_checker(pixels, device_of(pipe, pipe.unet), pipe.unet.dtype)
    if not np.any(flagged):
        return image
    line = "the checkpoint's safety checker did not let a picture pass; pipe.safety_checker = None takes it off"
    warnings.warn(line, stacklevel=2)
    return Image.fromarray((np.asarray(passed[0]) * 255).round().astype(np.uint8))


def _decode(pipe: Any, latents: Tensor, base: Size) -> Tensor:
    """Latents [1, C, h, w] as an image [1, 3, H, W] in about -1..1, float32 on the CPU."""
    vae = pipe.vae
    with _enough_precision(vae):
        z = _unscaled(vae, latents.to(device_of(pipe, vae), vae.dtype))
        pixels = _in_tiles(tiles.decode, pipe, vae.decoder, lambda z: vae.decode(z).sample, z, base)
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("the autoencoder gave NaN; use --dtype float32")
    return pixels.cpu().float()


def _encode(pipe: Any, image: Tensor, base: Size) -> Tensor:
    """An image [1, 3, H, W] in -1..1 as latents [1, C, h, w], float32, on the autoencoder's device."""
    vae = pipe.vae

    def encode(x: Tensor) -> Tensor:
        encoded = vae.encode(x)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents

    with _enough_precision(vae):
        pixels = image.to(device_of(pipe, vae), vae.dtype)
        latents = _in_tiles(tiles.encode, pipe, vae.encoder, encode, pixels, base)
    return _scaled(vae, latents).float()


def _encode_picture(pipe: Any, picture: Any, size: Size, base: Size) -> Tensor:
    """A PIL image, resized to (h, w) latent pixels, as latents [1, C, h, w]."""
    from PIL import Image

    w, h = (side * pipe.vae_scale_factor for side in reversed(size))
    image = picture.resize((w, h), resample=Image.Resampling.LANCZOS)
    return _encode(pipe, pipe.image_processor.preprocess(image), base)


def _moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean and spread of the autoencoder's latents, [1, C, 1, 1] each; None if its config does not have both."""
    moments = [vae.config.get(key) for key in ("latents_mean", "latents_std")]
    return None if None in moments else tuple(torch.tensor(m).view(1, -1, 1, 1).to(like) for m in moments)


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """What the autoencoder gives, as the UNet takes it."""
    moments = _moments(vae, latents)
    if moments is None:
        return latents * vae.config.scaling_factor
    return (latents - moments[0]) * vae.config.scaling_factor / moments[1]


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Inverse of _scaled."""
    moments = _moments(vae, latents)
    if moments is None:
        return latents / vae.config.scaling_factor
    return latents * moments[1] / vae.config.scaling_factor + moments[0]


def _in_tiles(tiled: Callable, pipe: Any, network: Any, function: Callable[[Tensor], Tensor], x: Tensor, base: Size) -> Tensor:
    """function(x), through tiles.decode or tiles.encode, unless the user has set up diffusers' own tiling."""
    if getattr(pipe.vae, "use_tiling", False) or not _tileable(network):
        return function(x)
    factor = pipe.vae_scale_factor
    tile = tiles.tile_for(network, x.device, base, factor)
    return tiled(function, x, network, factor=factor, tile=tile)


def _tileable(network: Any) -> bool:
    """Whether our tiles can run an encoder or a decoder: not one of unknown layout, nor one offloaded layer by layer."""
    if offloaded(network):
        return False
    try:
        return bool(tiles.resamplers(network))
    except ValueError:
        return not tiles.group_norms(network)  # nothing that tiles must share


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

    def __init__(self, pipe, plan, config, sampler, steps, cfg_scale, seeds, progress, cancelled, finished, given, controls=()):
        self.pipe = pipe
        self.plan = plan
        self.config = config
        self.sampler = sampler
        self.cfg_scale = cfg_scale
        self.progress = progress
        self.cancelled = cancelled or (lambda: False)
        self.finished = finished
        self.given = given
        self.device, self.dtype = device_of(pipe, pipe.unet), pipe.unet.dtype  # asked once: that looks at every module
        self.factor = pipe.vae_scale_factor
        self.schedule = self._schedule(steps)
        self.phase_schedule = self._schedule(config.phase_steps_of(steps), sampler.phase_settings)
        self.controls = Controls(controls, plan.window, self.factor)
        # On the CPU whatever the device, so that a seed gives one picture everywhere.
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        view_batch = ViewBatch(config.view_batch_size, self.device, "window" if given else "base image")
        self.result = Result(plan, pipe, [], view_batch, given=given)

    def _schedule(self, steps: int, settings: Mapping[str, Any] = MappingProxyType({})) -> Any:
        return make_schedule(self.pipe.scheduler, self.sampler, steps, settings, self.device)

    def finish(self, phase: Phase, latents: Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise FloatingPointError(f"phase {phase.number} gave NaN; use --dtype float32")
        self.result.phases.append((phase, latents.cpu()))
        begun = self.plan.from_picture
        if self.finished is not None and not (begun and phase.number == 1):
            states = torch.stack([generator.get_state() for generator in self.generators])
            base = self.result.phases[0][1]
            saved = SavedPhase(phase.number, latents.cpu(), base, "command", states, from_picture=begun)
            self.finished(self.result, saved)

    def take_up(self, saved: SavedPhase) -> tuple[Tensor, tuple[int, Tensor]]:
        """Everything as it was when the phase was saved: the base, and the phase's number and latents."""
        for generator, state in zip(self.generators, saved.generators):
            generator.set_state(state.clone())  # torch takes no row of a tensor
        numbers = dict.fromkeys((1, saved.number))
        self.result.phases = [(self.plan.phases[n - 1], saved.base if n == 1 else saved.latents) for n in numbers]
        self.result.evaluations = self.plan.evaluations_to(saved.number)
        return saved.base.to(self.device).float(), (saved.number, saved.latents.to(self.device).float())

    def encode_prompts(self, prompt: str, negative_prompt: str) -> None:
        """Embeddings by branch of guidance, the negative prompt's first: [branches, tokens, channels]."""
        guided = self.plan.phases[0].branches == 2
        encoded = self.pipe.encode_prompt(
            prompt=prompt,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=(negative_prompt or None) if guided else None,  # none, and the checkpoint says what that is
        )
        # (embeds, negative embeds), and for SDXL (..., pooled, negative pooled)
        pairs = [torch.cat([negative, own]) if guided else own for own, negative in zip(encoded[::2], encoded[1::2])]
        self.embeds, self.pooled = (*pairs, None)[:2]

    def encode(self, size: Size) -> Tensor:
        """The given picture, resized to (h, w) latent pixels, as latents, one copy for each seed."""
        latents = _encode_picture(self.pipe, self.given.picture, size, self.plan.window)
        return latents.to(self.device).repeat(len(self.generators), 1, 1, 1)

    def original(self) -> Original | None:
        """The given picture, as the phases take it."""
        if self.given is None:
            return None
        flat, picture = None, self.given.picture
        if self.config.hold_flat:
            h, w = (side * self.factor for side in enlarged_size(picture.size[::-1], 1, self.factor))
            pixels = self.pipe.image_processor.preprocess(picture.resize((w, h)))
            flat = flat_areas(pixels, self.config.hold_flat, self.factor).to(self.device)
        return Original(self.encode, flat=flat, mask=None if self.given.mask is None else self.given.mask_at)

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
        self.controls.begin(phase)

        def predict(x: Tensor, t: Tensor, sigma: float, since: float | None) -> Tensor:
            if self.cancelled():
                raise Cancelled
            self.controls.step()
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
            fresh_noise=draws_noise(self.sampler, self.phase_schedule),
            cancelled=self.cancelled,
            held=held,
            view_batch=self.result.view_batch,
            t_max=self.phase_schedule.config.num_train_timesteps,
        )

        self.controls.begin(phase)

        def predict(x: Tensor, t: Tensor, sigma: float, since: float | None) -> Tensor:
            self.controls.step()
            levels = self._levels(sigma)
            fusion.skip_residual_(x, float(t), *levels, since)
            return fusion.predict(x, float(t), lambda crops, views: self._model(phase, crops, views, t, sigma), levels[0])

        first = phase.skipped * self.phase_schedule.order
        x = fusion.noised_reference(*self._levels(sigma_at(self.phase_schedule, first)))
        return self._sample(self.phase_schedule, x, predict, first)

    def _levels(self, sigma: float) -> tuple[float, float]:
        """How much noise and how much signal the sampler's x holds at noise level sigma."""
        signal = 1 / math.sqrt(1 + sigma * sigma) if self.sampler.variance_preserving else 1.0
        return sigma * signal, signal

    def _sample(self, schedule: Any, x: Tensor, predict: Callable[..., Tensor], first: int = 0) -> Tensor:
        generators = self.generators if draws_noise(self.sampler, schedule) else None
        return take_steps(schedule, x, predict, first, generators)

    def _model(self, phase: Phase, crops: Tensor, views: Sequence[View], t: Tensor, sigma: float) -> Tensor:
        """The guided noise in crops [len(views) * B, C, h, w] at noise level sigma."""
        branches, unet = phase.branches, self.pipe.unet
        scale = 1.0 if self.sampler.variance_preserving else 1 / math.sqrt(1 + sigma * sigma)
        x = crops * scale
        rows = len(crops)
        conditions = {"encoder_hidden_states": self.embeds.repeat_interleave(rows, 0)}
        if self.pooled is not None:
            ids = self._size_ids(phase, views).repeat_interleave(rows // len(views), 0).repeat(branches, 1)
            pooled = self.pooled.repeat_interleave(rows, 0)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.to(self.device, pooled.dtype)}
        inputs = x.repeat(branches, 1, 1, 1).to(self.dtype)
        added = self.controls.residuals(views, inputs, t, branches, conditions)
        output = unet(inputs, t, return_dict=False, **conditions, **added)[0].float()
        self.result.evaluations += len(output) // len(self.generators)
        if self.progress is not None:
            self.progress(phase, len(views))
        if prediction_type(self.pipe.scheduler) == "v_prediction":
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
