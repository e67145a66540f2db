"""DemoFusion on Hugging Face diffusers: Stable Diffusion 1.x, 2.x and XL pipelines.

    pipe = load_pipeline("folder, .safetensors file or hub name")
    result = generate(pipe, "three red striped rings on grass", seed=1)
    result.images()[0].save("out.png")

diffusers is imported only when something here is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.distributed import sharing
from lib_demofusion.fusion import Cancelled
from lib_demofusion.hosts.diffusers_arguments import base_size, final_size, given_picture, own_side, plain_image, seeds_of
from lib_demofusion.hosts.diffusers_autoencoder import decode_latents, encode_picture, one_at_a_time, overflows, tileable
from lib_demofusion.hosts.diffusers_checkpoints import (
    EMBEDDED_CHECKPOINT,
    check_pair,
    check_parts,
    default_device,
    device_of,
    load_pipeline,
    offloaded,
)
from lib_demofusion.hosts.diffusers_controlnet import (
    UNION_TYPES,
    Control,
    check_controls,
    control_bytes,
    controlled_call_bytes,
)
from lib_demofusion.hosts.diffusers_controlnet_files import check_controlnet, load_controlnet
from lib_demofusion.hosts.diffusers_lora import Adapters, Lora, check_different, check_loras, check_loras_fit, lora_bytes
from lib_demofusion.hosts.diffusers_run import Incomplete, Part, Result, Run
from lib_demofusion.hosts.diffusers_schedules import (
    AUTOMATIC,
    SAMPLERS,
    SCHEDULES,
    Sampler,
    Sampling,
    check_scheduler,
    check_steps,
    sampler_named,
    samplings,
    schedule_named,
)
from lib_demofusion.hosts.diffusers_upscaler import UPSCALERS, load_upscaler, upscaler_bytes, upscaler_named
from lib_demofusion.hosts.prompts import as_webui_prompt, check_syntax
from lib_demofusion.memory import Needs, OutOfMemory, check_fits, latents_bytes, picture_bytes
from lib_demofusion.phases import Phase, Plan, make_plan, plan_from_picture, resize_target, upscale
from lib_demofusion.pictures import MASK_BLUR, Given
from lib_demofusion.saved import SavedPhase
from lib_demofusion.views import Size

__all__ = [
    "AUTOMATIC",
    "EMBEDDED_CHECKPOINT",
    "SAMPLERS",
    "SCHEDULES",
    "UNION_TYPES",
    "UPSCALERS",
    "Control",
    "Incomplete",
    "Lora",
    "Result",
    "Sampler",
    "as_webui_prompt",
    "check_controlnet",
    "check_loras",
    "check_loras_fit",
    "check_prompts",
    "check_prompt",
    "check_resume",
    "check_syntax",
    "decode_latents",
    "default_device",
    "generate",
    "load_controlnet",
    "load_pipeline",
    "load_upscaler",
    "needs",
    "plan_for",
    "sampler_named",
    "schedule_named",
    "unet_inputs",
    "upscaler_named",
]


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
    schedule: str = "",
    seed: int | Sequence[int] = 0,
    image: Any = None,
    size: Sequence[int] | None = None,
    mask: Any = None,
    mask_blur: int = MASK_BLUR,
    controls: Sequence[Control] = (),
    loras: Sequence[Lora] = (),
    phase_loras: Sequence[Lora] = (),
    phase_pipe: Any = None,
    progress: Callable[[Phase, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    finished: Callable[[Result, SavedPhase], None] | None = None,
    resume: SavedPhase | None = None,
    group: Any = None,
) -> Result:
    """Images of config.scale times height x width (pixels; the model's own size unless given), or of that times `image`.

    prompt: plain text; what only the WebUI understands in one, weights for instance, is refused. negative_prompt: none
    if it is empty or None; SDXL checkpoints then have zeros for it where their config says so, as in diffusers.
    seed: one for one image, several for a batch; each image depends on its own seed alone. cfg_scale 1: no guidance,
    half the model calls. schedule: one of SCHEDULES, the WebUI's names; "" as the checkpoint says. image: a PIL image to
    enlarge, of any size, instead of the model's own base, which height and width are of. size: (height, width) in pixels of
    what becomes of it, instead of the scale. mask: a PIL image of the same size; where it is white the image is drawn anew,
    and where it is black it stays, enlarged. mask_blur: of the mask, in pixels of the image. controls: ControlNets, each with
    the image that it holds the picture to; what they add is summed. loras: LoRAs, by the package peft; phase_loras: more of
    them, in the phases after the base alone. The pipelines have them for this job, on top of their own. phase_pipe: another
    checkpoint of the same kind, for the phases after the base, or of a given image. What config says of the phases'
    prompts, sampler, schedule, guidance and upscaler holds for these; config.phase_checkpoint is a name for phase_pipe.
    progress: called after every model call with the phase and the views just done. cancelled: asked before
    every model call. finished: called after each phase that is sampled, with the result so far and what it takes to go on
    from there. resume: such a phase, to go on after it; the other settings must be those it was made with.

    group: a process group of torch.distributed whose ranks make the picture together; torch's default one if there is one,
    unless it is False. Each calls this with the same settings, and gets the same pictures; how many views go into a call is
    a matter of each, and then the picture hangs on it in its last bits. progress and finished are called on each.

    A pipeline serves one job at a time: from several threads, a job waits until the one before it is done.

    Raises ValueError, one line, before anything is computed, if a setting cannot work; Incomplete, with what was
    finished, if it was cancelled or failed later, whatever the reason, which is its __cause__.
    """
    given = given_picture(image, mask, mask_blur)
    pipes = _pipes(pipe, phase_pipe, config, given)
    sampled = samplings(config, steps, cfg_scale, sampler, schedule)
    plan = _plan(pipes, config, given, sampled, height=height, width=width, size=size)
    controls = _controls(pipes, controls, plan, given)
    loras, phase_loras = check_loras(loras), check_loras(phase_loras, "phase_loras")
    check_different((*loras, *phase_loras))
    prompts = check_prompts(pipes, config, prompt, negative_prompt)
    seeds = seeds_of(seed)
    for name, callback in (("progress", progress), ("cancelled", cancelled), ("finished", finished)):
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be a function, got a {type(callback).__name__}")
    if resume is not None:
        check_resume(pipes[0], resume, plan, len(seeds), image)
    last, factor = plan.phases[-1], pipes[0].vae_scale_factor
    scale = given.times([side * factor for side in last.size]) if given else last.scale
    with one_at_a_time(*pipes, networks=[control.model for control in controls]), ExitStack() as stack:
        unet, start = pipes[0].unet, "picture" if given else "base"
        device, ranks = device_of(pipes[0], unet), stack.enter_context(sharing(group))
        check_fits(last.size, scale, device, unet.config.in_channels, len(seeds), factor, start=start)
        upscaler = load_upscaler(config.upscaler, device, unet.dtype, *filter(None, [cancelled]))
        adapters = [stack.enter_context(Adapters(each, (*loras, *phase_loras))) for each in dict.fromkeys(pipes)]
        numbers = (len(loras), len(loras) + len(phase_loras))
        parts = map(Part, pipes, sampled, prompts, (adapters[0], adapters[-1]), numbers)
        calls = dict(progress=progress, cancelled=cancelled, finished=finished, ranks=ranks)
        run = Run(plan, config, tuple(parts), seeds, given=given, controls=controls, upscaler=upscaler, **calls)
        if ranks:
            ranks.start(plan, config, prompts, seeds, sampled, resume and resume.number)
        try:
            with torch.inference_mode():
                run.encode_prompts(base=given is None and resume is None)
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
            for each in pipes:
                each.maybe_free_model_hooks()  # where it is offloaded, all of it is again
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
    schedule: str = "",
    image: Any = None,
    size: Sequence[int] | None = None,
    mask: Any = None,
    mask_blur: int = MASK_BLUR,
    controls: Sequence[Control] = (),
    phase_pipe: Any = None,
) -> Plan:
    """The plan that `generate` follows with the same settings. Raises ValueError, one line, if one cannot work."""
    given = given_picture(image, mask, mask_blur)
    pipes = _pipes(pipe, phase_pipe, config, given)
    sampled = samplings(config, steps, cfg_scale, sampler, schedule)
    plan = _plan(pipes, config, given, sampled, height=height, width=width, size=size)
    _controls(pipes, controls, plan, given)
    return plan


def _pipes(pipe: Any, phase_pipe: Any, config: Any, given: Given | None) -> tuple[Any, Any]:
    """The pipelines of the base and of the phases after it; of these alone where a picture is given, as no base is made."""
    check_parts(pipe)
    check_scheduler(pipe.scheduler)
    if not isinstance(config, DemoFusionConfig):
        raise ValueError(f"config must be a DemoFusionConfig, got a {type(config).__name__}")
    upscaler_named(config.upscaler)
    if phase_pipe is None:
        if config.phase_checkpoint:
            raise ValueError("the phase checkpoint is a name alone; give what load_pipeline makes of it as phase_pipe")
        return pipe, pipe
    with _in_the_phases():
        check_parts(phase_pipe)
        check_scheduler(phase_pipe.scheduler)
    check_pair(pipe, phase_pipe)
    return phase_pipe if given else pipe, phase_pipe


@contextmanager
def _in_the_phases() -> Iterator[None]:
    """What is wrong in here is so with the phases' checkpoint."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the phases' checkpoint: {error}") from error


def _controls(pipes: tuple[Any, Any], controls: Any, plan: Plan, given: Given | None) -> tuple[Control, ...]:
    checked = check_controls(pipes[0], controls, plan, given)
    if pipes[0] is not pipes[1]:
        with _in_the_phases():
            check_controls(pipes[1], controls, plan, given)
    return checked


def _plan(pipes, config, given: Given | None, sampled: tuple[Sampling, Sampling], *, height, width, size) -> Plan:
    (pipe, phase_pipe), (base, phases), factor = pipes, sampled, pipes[0].vae_scale_factor
    steps, calls, branches = base.steps, phases.kind.calls, (base.branches, phases.branches)
    if given is None:
        if size is not None:
            raise ValueError("a size is of what becomes of an image that is given; without one config.scale says it")
        if config.window:
            raise ValueError("a window is for a picture that is given; without one it is the base's size")
        own = base_size(pipe, height, width)
        more = dict(calls=calls, base_calls=base.kind.calls, final=resize_target(own, config, factor))
        plan = make_plan(tuple(side // factor for side in own), steps, config, branches=branches, **more)
        check_steps(pipe.scheduler, base.sampler, steps, schedule=base.schedule)
    else:
        if height is not None or width is not None:
            raise ValueError(
                "height and width are of a base made from the prompt; with an image use size or config.scale, and "
                "config.window for the window"
            )
        picture, side = given.picture.size[::-1], own_side(pipe, config)
        final = resize_target(picture, config, factor)
        if size is not None and final is not None:
            raise ValueError("give size, or resize width and height in config, not both")
        final = final if size is None else final_size(size, given, factor)
        more = dict(branches=branches, calls=calls, final=final, factor=factor)
        plan = plan_from_picture(picture, side, steps, config, **more)
        if given.mask is not None and not given.mask_at(plan.phases[-1].size).any():
            raise ValueError("the mask's white areas are too small to be drawn in; make them larger, or blur them less")
    phase, name = plan.phases[-1], "phase steps" if config.phase_steps else "steps"
    more = dict(more=phases.kind.phase_settings, skipped=phase.skipped, schedule=phases.schedule)
    check_steps(phase_pipe.scheduler, phases.sampler, phase.steps, name, **more)
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


def needs(
    pipe: Any,
    plan: Plan,
    view_batch: int = 1,
    images: int = 1,
    controls: Sequence[Control] = (),
    loras: Sequence[Lora] = (),
    phase_pipe: Any = None,
    upscaler: str = "",
) -> Needs:
    """The memory that a job takes with so many views a call, as foreseen from the shapes of what is computed.

    loras: all of them. upscaler: as in DemoFusionConfig. Both pipelines are held all the time.
    Raises RuntimeError, one line, for an offloaded pipeline: which networks it holds at a time is not known here.
    """
    networks = [control.model for control in controls]
    pipes = tuple(dict.fromkeys((pipe, phase_pipe or pipe)))
    if any(offloaded(network) for network in (*networks, *(part for each in pipes for part in (each.unet, each.vae)))):
        raise RuntimeError("the pipeline is offloaded")
    vae, factor, size = pipes[-1].vae, pipe.vae_scale_factor, plan.phases[-1].size
    parts = (*networks, *(part for each in pipes for part in each.components.values()))
    modules = {part for part in parts if isinstance(part, torch.nn.Module)}
    weights = sum(x.nbytes for module in modules for x in (*module.parameters(), *module.buffers()))
    weights += len(pipes) * lora_bytes(loras) + upscaler_bytes(upscaler)
    latents = images * latents_bytes(size, pipe.unet.config.in_channels)
    ends = [(pipes[0], plan.phases[0]), (pipes[-1], plan.phases[-1])]
    used = {(each, phase.branches) for each, phase in ends if phase is not plan.phases[0] or not plan.from_picture}
    used = used or {(pipes[-1], plan.phases[-1].branches)}
    call = max(_call_bytes(each.unet, branches, plan, view_batch * images, controls, factor) for each, branches in used)
    tile = tiles.tile_for(vae.decoder, device_of(pipes[-1], vae), plan.window, factor)
    if not tiles.group_norms(vae.decoder):  # its tiles share nothing
        size = tuple(min(side, tile) for side in size)
    elif not tileable(vae.decoder):
        tile = max(size)
    z = torch.empty(1, vae.config.latent_channels, *size, dtype=torch.float32 if overflows(vae) else vae.dtype, device="meta")
    decoding = tiles.decoding_bytes(lambda z: vae.decode(z, return_dict=False)[0], z, vae.decoder, vae, tile)
    size = plan.phases[-1].size
    shown = control_bytes(controls, plan, factor)
    return Needs(weights, call + latents, decoding, picture_bytes(size, factor), shown)


def _call_bytes(unet: Any, branches: int, plan: Plan, views: int, controls: Sequence[Control], factor: int) -> int:
    """What a model call with so many views takes."""
    x, conditions = unet_inputs(unet, branches * views, plan.window, "meta")
    return controlled_call_bytes(unet, controls, x, branches, conditions, factor)


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
    with torch.inference_mode(), one_at_a_time(pipe):
        try:
            base = encode_picture(pipe, plain_image(image), plan.window, plan.window).cpu()
        finally:
            pipe.maybe_free_model_hooks()
    if (saved.base.float() - base).square().mean().sqrt() > 0.1 * base.std():  # another device moves the last bits alone
        raise ValueError("the saved phase is of another picture; give the one that it was made from, as it was")


def check_prompts(
    pipes: tuple[Any, Any], config: DemoFusionConfig, prompt: Any, negative_prompt: Any
) -> tuple[tuple[str, str], tuple[str, str]]:
    """The prompt and the negative prompt of the base, and those of the phases after it. pipes: what makes the two.

    Raises ValueError, one line, for one that is no text, or that one of the pipelines cannot take.
    """
    first = (prompt, "" if negative_prompt is None else negative_prompt)
    own = (config.phase_prompt, config.phase_negative_prompt)
    for pipe, phases in zip(pipes, (False, True)):
        for text, other, name in zip(first, own, ("prompt", "negative prompt")):
            text, name = (other, f"phase {name}") if phases and other else (text, name)
            check_prompt(pipe, text, name)
            check_syntax(text, name)
    return first, tuple(theirs or text for theirs, text in zip(own, first))


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
