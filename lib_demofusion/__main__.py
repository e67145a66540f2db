"""The command: DemoFusion on diffusers, without the WebUI. `python -m lib_demofusion --help`.

Wrong input is one line and exit code 2, before anything is computed. Whatever fails later is one line and exit code 1, and
what was finished is written: to the output, or elsewhere where the output can no longer be written. The environment
variable DEMOFUSION_TRACEBACK=1 shows where an error came from.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from lib_demofusion.arguments import (
    CONTROL_NUMBERS,
    LORAS,
    METHOD,
    Refused,
    blamed_on,
    channels_of,
    check_arguments,
    check_channels,
    check_output,
    check_phase,
    of_each,
    parse,
    resumed,
)
from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.files import free_space, suffixed
from lib_demofusion.job import Console, Ended, Job, told, trace
from lib_demofusion.pictures import Given, open_image


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed on the way, 2 wrong input, 130 stopped by Ctrl-C. What was finished is written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # one that is no console, or closed
            stream.reconfigure(errors="backslashreplace")  # a name that the console cannot show
    try:
        args = parse(argv)
        with joined(args) as (ranks, device):
            return run(*(args, None) if args.resume is None else resumed(args, argv), ranks, device)
    except (Refused, ValueError) as error:
        complain(error, str(error))
        return 2
    except Ended as error:
        complain(error, str(error))
        return error.code
    except KeyboardInterrupt as error:
        complain(error, "stopped")
        return 130
    except Exception as error:
        complain(error, f"failed: {told(error)}")
        return 1


def complain(error: BaseException, line: str) -> None:
    """One line for the user, after where the error came from if that is asked for."""
    trace(error)
    if sys.stderr and not rank_here():
        with suppress(OSError, ValueError):  # nobody is there to read it
            print(f"demofusion: {' '.join(line.split())}", file=sys.stderr)


def rank_here() -> int:
    """This process's place among those that torchrun started, of which only the first one, 0, says something."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and count.isdecimal() and int(rank) < int(count) else 0


@contextmanager
def joined(args: argparse.Namespace):
    """Yields the ranks that torchrun started, for the time of the job, and this one's device if it is a card; else None."""
    if not {"RANK", "WORLD_SIZE"} & set(os.environ):
        yield None, None
        return
    if args.device:
        raise Refused("--device is not for torchrun, which gives each process a card of its own; leave it out")
    from lib_demofusion import distributed

    ranks, device = distributed.join()
    try:
        with distributed.sharing(ranks):
            yield ranks, device
    finally:
        distributed.leave(ranks)


def run(args: argparse.Namespace, resume, ranks=None, device: str | None = None) -> int:
    """ranks: the processes that make the pictures together, if there are several; device: this one's."""
    writes = not ranks or ranks.rank == 0
    with blamed_on(args.resume):
        config = DemoFusionConfig(**{f.name: getattr(args, f.name) for f in METHOD})
        check_arguments(args)
        if resume:
            check_phase(args, resume)
    if writes:
        check_output(args, bool(ranks))
    with blamed_on(args.resume):
        image, mask = (path and open_image(path, what) for path, what in ((args.image, "image"), (args.mask, "mask")))
        if image:
            Given.of(image, mask)
        shown = [open_image(path, "control image") for path in args.control_image]
    host = import_host()
    with blamed_on(args.resume):
        config = name_as_the_host(host, args, config)
        check_prompts(host, args)
        loras = {name: host.check_loras([host.Lora(*lora) for lora in getattr(args, name)]) for name in LORAS}
        host.load_upscaler(args.upscaler)  # which the job does itself; here to see whether it can be
        model = (args.image and args.phase_checkpoint) or args.model or host.EMBEDDED_CHECKPOINT
        if resume:
            check_channels(resume, channels_of(model))
        for net in args.controlnet:
            host.check_controlnet(net)
    pipe = load(host, args, model, device)
    phase_pipe = load(host, args, args.phase_checkpoint, device) if args.phase_checkpoint and not args.image else None
    pipes = (pipe, phase_pipe or pipe)
    shape = {
        name: getattr(args, name) for name in ("height", "width", "steps", "cfg_scale", "sampler", "schedule", "mask_blur")
    }
    shape.update(image=image, mask=mask, size=args.size if image else None)
    shape["phase_pipe"] = pipes[1] if args.phase_checkpoint else None
    with blamed_on(args.resume):
        if resume:
            check_channels(resume, pipe.unet.config.in_channels)
        shape["controls"] = load_controls(host, pipe, args, shown)
        host.check_prompts(pipes, config, args.prompt, args.negative_prompt)
        plan = host.plan_for(pipe, config, **shape)
        if resume:
            host.check_resume(pipe, resume, plan, image=image)
        host.check_loras_fit(pipes, loras["lora"], loras["phase_lora"])
    factor = pipe.vae_scale_factor
    if args.size and not image:
        config = replace(config, scale=scale_for(args.size, plan.window, factor))
        plan = host.plan_for(pipe, config, **shape)
    if args.plan and not writes:
        return 0
    if args.plan:
        if image:
            print(f"window: {plan.window[1] * factor}x{plan.window[0] * factor}")
        print(plan.table(factor))
        held = dict(controls=shape["controls"], phase_pipe=phase_pipe, loras=[*loras["lora"], *loras["phase_lora"]])
        print(memory_line(host, pipe, plan, shared(config, pipe.device) if ranks else config, held))
        return 0
    if writes:
        check_space(args.output, plan, factor)

    done = plan.evaluations_to(resume.number) if resume else 0
    settings = {**shape, **{f"{name}s": loras[name] for name in LORAS}}
    with interruptible(bool(ranks)) as stopped, Console(plan.evaluations * args.batch_count, done, not writes) as console:
        job = Job(args, config, host, pipe, plan, resume, settings, console, ranks)
        for number in range(args.batch_count):
            path = args.output if args.batch_count == 1 else suffixed(args.output, f"{number + 1}")
            job.make(path, args.seed + number, stopped)
    if job.misplaced:
        raise Ended(f"{job.misplaced} files of intermediate phases are not where they should be; the lines above say why", 1)
    return 0


def name_as_the_host(host, args: argparse.Namespace, config: DemoFusionConfig) -> DemoFusionConfig:
    """Gives samplers, schedules and the upscaler the names that the host has for them, in args and in what is returned."""
    args.sampler, args.schedule = host.sampler_named(args.sampler), host.schedule_named(args.schedule)
    if args.phase_sampler:
        args.phase_sampler = host.sampler_named(args.phase_sampler)
    if args.phase_schedule:
        args.phase_schedule = host.schedule_named(args.phase_schedule) or host.AUTOMATIC  # "" is as the base
    args.upscaler = host.upscaler_named(args.upscaler)
    return replace(config, **{name: getattr(args, name) for name in ("phase_sampler", "phase_schedule", "upscaler")})


def check_prompts(host, args: argparse.Namespace) -> None:
    """Raises Refused or ValueError, one line, for prompts that cannot be, as far as that can be told without the model."""
    own = {name: getattr(args, name) for name in ("prompt", "negative_prompt")}
    phases = {f"phase_{name}": getattr(args, f"phase_{name}") for name in own}
    for name, text in {**own, **phases}.items():
        host.check_syntax(text, name.replace("_", " "))
    if args.model is None:
        texts = [*own.values(), *(() if args.phase_checkpoint else phases.values())]
        check_vocabulary(host.EMBEDDED_CHECKPOINT / "vocabulary.txt", *texts)


def shared(config: DemoFusionConfig, device) -> DemoFusionConfig:
    """The settings as several processes have them, of which each calls the model for its part of the views."""
    from lib_demofusion.distributed import views_a_call

    return replace(config, view_batch_size=views_a_call(config.view_batch_size, device))


def memory_line(host, pipe, plan, config: DemoFusionConfig, held: dict) -> str:
    """What the plan takes, and what its base image alone does; with automatic view batches, what it starts with.

    held: what the job holds besides the pipeline, as the host's `needs` takes it.
    """
    from lib_demofusion.memory import ViewBatch, in_words

    base = replace(plan, phases=plan.phases[:1])
    views = ViewBatch(config.view_batch_size, pipe.device).size
    try:
        needs = (host.needs(pipe, p, batch, upscaler=config.upscaler, **held) for p, batch in ((plan, views), (base, 1)))
        job, alone = (in_words(need.peak(pipe.device)) for need in needs)
    except (RuntimeError, NotImplementedError) as error:  # an attention that does not run on shapes alone
        return f"memory: not foreseen for this model ({first_line(error)})"
    one = "one window" if plan.from_picture else "the base image"
    both = "; both models are held all the time" if held["phase_pipe"] else ""
    calls = f"{views} view{'s' * (views != 1)} a call"
    return f"memory: about {job} with {calls}, {alone} for {one} alone{both}"


def scale_for(size: tuple[int, int], window: tuple[int, int], factor: int) -> float:
    """The scale that makes `size` (height, width) in pixels of a base of `window` latent pixels."""
    scale = size[0] / (window[0] * factor)
    height, width = (round(side * scale) * factor for side in window)
    if (height, width) != size:
        base = f"{window[1] * factor}x{window[0] * factor}"
        raise Refused(
            f"a base of {base} cannot become {size[1]}x{size[0]}, but {width}x{height}; or change --width and --height"
        )
    return scale


def check_space(path: Path, plan, factor: int) -> None:
    """Raises Refused if the disk is too full for the picture as it is before it is compressed."""
    from lib_demofusion.memory import in_words

    height, width = (factor * side for side in plan.phases[-1].size)
    free = free_space(path)
    if free is not None and free < 3 * height * width:
        needed = in_words(3 * height * width)
        raise Refused(f"{path} may not fit: {in_words(free)} are free there, and the picture takes up to {needed}; make room")


def import_host():
    """The diffusers host, with its packages kept quiet. Raises Refused if one of them is missing."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # theirs, about their own next versions
    try:
        import diffusers
        import transformers

        from lib_demofusion.hosts import diffusers as host
    except ImportError as error:
        raise Refused(f"{error.name} is missing; pip install 'demofusion[command]'") from error
    for package in (diffusers, transformers):
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return host


def load(host, args: argparse.Namespace, model, device: str | None = None):
    """A pipeline, on the device and in the dtype asked for. device: that of this process, if it is one of several."""
    import torch

    device = device or args.device or host.default_device()
    dtype = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    return host.load_pipeline(model, device, getattr(torch, dtype))


def load_controls(host, pipe, args: argparse.Namespace, images: list) -> list:
    """The ControlNets with their images and settings. One that is given several times is loaded once."""
    nets = {model: host.load_controlnet(model, pipe) for model in dict.fromkeys(args.controlnet)}
    settings = zip(*(of_each(args, f"control_{name}") for name in ("type", *CONTROL_NUMBERS)))
    controls = []
    for model, image, (kind, *numbers) in zip(args.controlnet, images or [None] * len(args.controlnet), settings):
        kind = None if kind == "none" else int(kind) if kind and kind.isdecimal() else kind
        controls.append(host.Control(nets[model], image, **dict(zip(CONTROL_NUMBERS, numbers)), type=kind))
    return controls


def check_vocabulary(vocabulary: Path, *prompts: str) -> None:
    """The embedded checkpoint knows a few dozen words and would draw nothing sensible for another."""
    known = vocabulary.read_text().split()
    unknown = [word for prompt in prompts for word in prompt.split() if word.lower() not in known]
    if unknown:
        raise Refused(f"the embedded checkpoint does not know {', '.join(unknown)}; it knows: {' '.join(known)}")


@contextmanager
def interruptible(started: bool = False):
    """Yields a callable that says whether Ctrl-C was pressed. A second Ctrl-C stops at once.

    started: by torchrun, which stops its processes by SIGTERM, repeats a Ctrl-C that they have had already, and kills those
    that do not end. So there a second one is none, and SIGTERM stays unheard: what is left to do is the end.
    """
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        if not started:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signals = (signal.SIGINT, signal.SIGTERM) if started else (signal.SIGINT,)
    before = [signal.signal(number, handler) for number in signals]
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before[0])


def entry() -> None:
    code = main()
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # whoever read it is gone; Python would say so once more at its end, with an exit code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code and {"RANK", "WORLD_SIZE"} <= set(os.environ):
        if sys.stderr:
            sys.stderr.flush()
        os._exit(code)  # what talks to ranks that are gone might not end
    sys.exit(code)


if __name__ == "__main__":
    entry()
