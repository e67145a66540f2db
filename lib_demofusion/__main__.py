"""The command: DemoFusion on diffusers, without the WebUI. `python -m lib_demofusion --help`."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from lib_demofusion import __version__
from lib_demofusion.config import PRESETS, DemoFusionConfig, first_line

DESCRIPTION = "Make a high-resolution image with DemoFusion, from a prompt or from an image, with any checkpoint."


class Refused(Exception):
    """Wrong input; its text is the one line that the user gets."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Refused(message)


def build_parser() -> Parser:
    parser = Parser(prog="demofusion", description=DESCRIPTION)
    add = parser.add_argument
    add("prompt", nargs="?", default="", help="what the image shows")
    add("-o", "--output", type=Path, default=Path("out.png"), help="PNG to write (default: %(default)s)")
    add("--negative-prompt", default="", help="what the image does not show")
    add("--model", help="diffusers folder, .safetensors file or hub name (default: the small embedded checkpoint)")
    add("--image", type=Path, help="start from this image instead of a base made from the prompt")
    add("--size", type=parse_size, help="of the result, as WIDTHxHEIGHT in pixels, instead of --scale")
    add("--width", type=int, help="of the base, in pixels (default: the model's own, or the image's)")
    add("--height", type=int, help="of the base, in pixels (default: the model's own, or the image's)")
    add("--steps", type=int, default=50, help="sampling steps of the base and of each phase (default: %(default)s)")
    add("--cfg-scale", type=float, default=7.5, help="guidance; 1 is none, at half the time (default: %(default)s)")
    add(
        "--sampler",
        default="Euler",
        help="Euler, Euler a, DDIM, DPM++ 2M, Heun, LCM, UniPC, or its diffusers class (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of the first image; the next ones count up (default: %(default)s)")
    add("--batch-count", type=int, default=1, help="how many images (default: %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is here)")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float16 on cuda, else float32")
    add("--plan", action="store_true", help="print what would be done, and stop")
    add("--save-phases", action="store_true", help="write each phase when it is finished: its image, and a file to resume from")
    add("--resume", type=Path, metavar="FILE", help="go on after the phase in this file, with the settings it was made with")
    add("--compare", action="store_true", help="also write base and result side by side, with one crop of both enlarged")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    method = parser.add_argument_group("DemoFusion", "the method's settings; the defaults are the paper's, or the preset's")
    presets = ", ".join(PRESETS)
    text = f"what the settings start from: {presets}, each faster than the one before (default: %(default)s)"
    method.add_argument("--preset", default="Paper", help=text)
    for f in fields(DemoFusionConfig):
        flag, text = f"--{f.name.replace('_', '-')}", f"{f.metadata['help']} (default: {f.default})"
        if isinstance(f.default, bool):
            method.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        else:
            method.add_argument(flag, type=type(f.default), default=f.default, help=text)
    return parser


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT -> (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be like 1024x768, got {text}")
    return int(match[2]), int(match[1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the preset's settings where none are given. Raises Refused, ValueError."""
    parser = build_parser()
    preset = DemoFusionConfig.preset(parser.parse_args(argv).preset)
    parser.set_defaults(**{f.name: getattr(preset, f.name) for f in fields(preset)})
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed on the way, 2 wrong input, 130 stopped by Ctrl-C. What was finished is written."""
    try:
        args = parse(argv)
        return run(*(args, None) if args.resume is None else resumed(args, argv))
    except (Refused, ValueError) as error:
        print(f"demofusion: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, FloatingPointError) as error:
        print(f"demofusion: failed: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demofusion: stopped; nothing was written", file=sys.stderr)
        return 130


# What may differ between a job and its resumption; all else is what the file says.
FREE_TO_CHANGE = ("output", "resume", "device", "view_batch_size", "save_phases", "compare", "plan")


def resumed(args: argparse.Namespace, argv: list[str] | None):
    """The settings of the job that a saved phase belongs to, with those of `argv` that may differ; and the phase."""
    from lib_demofusion.saved import read_saved

    parser, absent = build_parser(), object()
    parser.set_defaults(**dict.fromkeys(vars(args), absent))  # what is not absent was given
    given = [name for name, value in vars(parser.parse_args(argv)).items() if value is not absent]
    fixed = [name.replace("_", " ") for name in given if name not in FREE_TO_CHANGE]
    if fixed:
        raise Refused(f"--resume takes {', '.join(fixed)} from the file; leave that out")
    saved = read_saved(args.resume, "command")
    settings = {**vars(args), **json.loads(saved.settings)}
    for name in given:
        settings[name] = getattr(args, name)
    return argparse.Namespace(**settings), saved


def settings_to_resume(args: argparse.Namespace, config: DemoFusionConfig, pipe, plan, seed: int) -> str:
    """What `resumed` reads: every setting that the picture depends on, with the defaults and files resolved."""
    h, w = (side * pipe.vae_scale_factor for side in plan.window)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings.update(scale=config.scale, size=None, height=h, width=w, image=None, seed=seed, batch_count=1)
    settings["dtype"] = str(pipe.unet.dtype).removeprefix("torch.")
    if args.model and Path(args.model).exists():
        settings["model"] = str(Path(args.model).resolve())
    return json.dumps(settings)


def run(args: argparse.Namespace, resume) -> int:
    from lib_demofusion.phases import Pace

    config = DemoFusionConfig(**{f.name: getattr(args, f.name) for f in fields(DemoFusionConfig)})
    check_arguments(args)
    image = open_image(args.image) if args.image else None
    host = import_host()
    args.sampler = host.sampler_named(args.sampler)
    if args.model is None:
        check_vocabulary(host.EMBEDDED_CHECKPOINT / "vocabulary.txt", args.prompt, args.negative_prompt)
    pipe = load(host, args)
    host.check_prompt(pipe, args.prompt, "prompt")
    host.check_prompt(pipe, args.negative_prompt, "negative prompt")
    shape = dict(height=args.height, width=args.width, steps=args.steps, cfg_scale=args.cfg_scale, sampler=args.sampler)
    plan = host.plan_for(pipe, config, image=image, **shape)
    if args.size:
        config = replace(config, scale=scale_for(args.size, plan.window, pipe.vae_scale_factor))
        plan = host.plan_for(pipe, config, image=image, **shape)
    if args.plan:
        print(plan.table(pipe.vae_scale_factor))
        print(memory_line(host, pipe, plan, config))
        return 0

    done = plan.evaluations_to(resume.number) if resume else 0
    with interruptible() as stopped, progress_bar(plan.evaluations * args.batch_count, done) as bar:
        for number in range(args.batch_count):
            path = args.output if args.batch_count == 1 else suffixed(args.output, f"{number + 1}")
            seed, stop, pace = args.seed + number, None, Pace(plan)

            def advance(phase, views, pace=pace):
                pace.count(phase.number, views)
                bar.set_description(f"phase {phase.number} of {len(plan.phases)}")
                bar.update(views * plan.branches)

            def keep(result, saved, path=path, seed=seed, pace=pace):
                phase = result.phases[-1][0]
                if phase.number == len(plan.phases):
                    return
                if line := pace.to_come(phase.number):
                    bar.write(line, sys.stderr)
                if not args.save_phases:
                    return
                file = suffixed(path, f"phase{phase.number}")
                settings = settings_to_resume(args, config, pipe, plan, seed)
                try:
                    replace(saved, settings=settings).write(file.with_suffix(".safetensors"))
                    save(result.images()[0], file, infotext(args, config, result, -1, seed))
                except (OSError, RuntimeError) as error:  # a full disk must not end what can still be finished
                    bar.write(f"{file}: not written: {first_line(error)}", sys.stderr)

            try:
                result = host.generate(
                    pipe,
                    args.prompt,
                    negative_prompt=args.negative_prompt,
                    config=config,
                    seed=seed,
                    image=image,
                    progress=advance,
                    cancelled=stopped,
                    finished=keep,
                    resume=resume,
                    **shape,
                )
            except host.Incomplete as error:
                stop, result = error, error.result
            if result.view_batch.size < config.view_batch_size:
                bar.write(
                    f"a view batch size of {config.view_batch_size} did not fit; {result.view_batch.size} did", sys.stderr
                )
            if result.phases and (lost := write(args, config, result, path, seed)):
                stop = stop or host.Incomplete(lost, result)
            if stop:
                break
            bar.write(f"{path}: {result.evaluations:,} model calls")
    if not stop:
        return 0
    left = "nothing was finished yet"
    if result.phases:
        left = f"the last finished phase, {result.phases[-1][0].number} of {len(plan.phases)}, is in {path}"
    print(f"demofusion: {stop}; {left}", file=sys.stderr)
    return 130 if stop.cancelled else 1


def memory_line(host, pipe, plan, config: DemoFusionConfig) -> str:
    """What the plan takes, and what its base image alone does; with automatic view batches, what it starts with."""
    from lib_demofusion.memory import ViewBatch, in_words

    base = replace(plan, phases=plan.phases[:1])
    views = ViewBatch(config.view_batch_size, pipe.device).size
    try:
        job, alone = (host.needs(pipe, p, batch).peak(pipe.device) for p, batch in ((plan, views), (base, 1)))
    except (RuntimeError, NotImplementedError) as error:  # an attention that does not run on shapes alone
        return f"memory: not foreseen for this model ({first_line(error)})"
    return f"memory: about {in_words(job)} with {views} views a call, {in_words(alone)} for the base image alone"


def write(args: argparse.Namespace, config: DemoFusionConfig, result, path: Path, seed: int) -> str | None:
    """Write the last finished phase to path, and the comparison beside it if it was asked for.

    Phases that cannot be decoded are taken off the result; returns why, in one line.
    """
    lost = None
    while True:
        try:
            image = result.images()[0]
            break
        except (RuntimeError, FloatingPointError) as error:  # out of memory, or NaN
            if len(result.phases) == 1:
                raise
            phase, _ = result.phases.pop()
            lost = lost or f"phase {phase.number} cannot be decoded: {first_line(error)}"
    save(image, path, infotext(args, config, result, -1, seed))
    if args.compare and len(result.phases) > 1:
        save(comparison(result.images(0)[0], image), suffixed(path, "compare"))
    return lost


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


def check_arguments(args: argparse.Namespace) -> None:
    if args.size and args.scale != DemoFusionConfig().scale:
        raise Refused("give --size or --scale, not both")
    if not args.prompt and not args.image and not args.resume:
        raise Refused("say what the image shows, or give --image")
    if args.output.suffix.lower() != ".png":
        raise Refused(f"the output must be a .png file, got {args.output}")
    if not args.output.parent.is_dir():
        raise Refused(f"output folder {args.output.parent} does not exist; make it first")
    if args.output.is_dir():
        raise Refused(f"{args.output} is a folder; name a .png file in it")
    for name, low in (("width", 8), ("height", 8), ("steps", 1), ("batch_count", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise Refused(f"{name.replace('_', ' ')} must be at least {low}, got {value}")
    if args.seed + args.batch_count > 2**63:
        raise Refused("seed is too large; use one below 2**63")


def open_image(path: Path):
    """The image to start from, as RGB. Raises Refused for what is no plain RGB or grey image."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise Refused(f"no such image: {path}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise Refused(f"{path} cannot be read as an image: {error}") from error
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        kind = "has transparency" if "A" in image.mode or "transparency" in image.info else f"is {image.mode}"
        raise Refused(f"{path} {kind}; save it as plain RGB first")
    return image.convert("RGB")


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


def load(host, args: argparse.Namespace):
    """The pipeline, on the device and in the dtype asked for."""
    import torch

    device = args.device or host.default_device()
    dtype = args.dtype or ("float16" if device.startswith("cuda") else "float32")
    return host.load_pipeline(args.model or host.EMBEDDED_CHECKPOINT, device, getattr(torch, dtype))


def check_vocabulary(vocabulary: Path, *prompts: str) -> None:
    """The embedded checkpoint knows a few dozen words and would draw nothing sensible for another."""
    known = vocabulary.read_text().split()
    unknown = [word for prompt in prompts for word in prompt.split() if word.lower() not in known]
    if unknown:
        raise Refused(f"the embedded checkpoint does not know {', '.join(unknown)}; it knows: {' '.join(known)}")


@contextmanager
def interruptible():
    """Yields a callable that says whether Ctrl-C was pressed. A second Ctrl-C stops at once."""
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(total: int, done: int):
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="call", file=sys.stderr, dynamic_ncols=True)


def suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}-{suffix}{path.suffix}")


def save(image, path: Path, parameters: str = "") -> None:
    """Write a PNG, whole or not at all; parameters is what PNG Info shows."""
    from PIL.PngImagePlugin import PngInfo

    from lib_demofusion.saved import whole_file

    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters) if parameters.isascii() else info.add_itxt("parameters", parameters)
    with whole_file(path) as part:
        image.save(part, "PNG", pnginfo=info)


def infotext(args: argparse.Namespace, config: DemoFusionConfig, result, index: int, seed: int) -> str:
    """The settings as the WebUI writes them; size is the base's, and the scale is the one that was reached."""
    phase, factor = result.phases[index][0], result.pipe.vae_scale_factor
    h, w = result.plan.window
    values = {
        "Steps": args.steps,
        "Sampler": args.sampler,
        "CFG scale": f"{args.cfg_scale:g}",
        "Seed": seed,
        "Size": f"{w * factor}x{h * factor}",
        "Model": Path(args.model).stem if args.model else "embedded",
    }
    if phase.number > 1:
        values.update(replace(config, scale=phase.scale).to_infotext())
    values["Version"] = f"demofusion {__version__}"
    lines = [args.prompt, f"Negative prompt: {args.negative_prompt}" if args.negative_prompt else ""]
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(filter(None, lines))


def comparison(base, result):
    """Base enlarged by Lanczos beside the result, and below each the same crop of it, enlarged.

    The crop is where the result has most fine detail.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    enlarged = base.resize(result.size, Image.Resampling.LANCZOS)
    side = max(min(result.size) // 4, 8)
    grey = result.convert("L")
    detail = np.abs(np.asarray(grey, np.float32) - np.asarray(grey.filter(ImageFilter.GaussianBlur(4)), np.float32))
    sums = np.pad(detail, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(boxes.argmax(), boxes.shape)
    box = (int(left), int(top), int(left) + side, int(top) + side)
    gap, width = max(result.width // 64, 2), result.width
    sheet = Image.new("RGB", (2 * width + gap, result.height + gap + width), "white")
    for column, image in enumerate((enlarged, result)):
        x = column * (width + gap)
        sheet.paste(image, (x, 0))
        sheet.paste(image.crop(box).resize((width, width), Image.Resampling.NEAREST), (x, result.height + gap))
    return sheet


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
