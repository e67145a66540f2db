"""The command's arguments: what there is, what is refused, and those of a job that goes on from a saved phase."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from lib_demofusion import __version__
from lib_demofusion.config import PRESETS, DemoFusionConfig, first_line, unwritten_settings
from lib_demofusion.files import check_writable, suffixed
from lib_demofusion.pictures import MASK_BLUR, check_text

DESCRIPTION = "Make a high-resolution image with DemoFusion, from a prompt or from an image, with any checkpoint."
# Of a ControlNet, each with its default; given once it is for all of them, else for each in their order.
CONTROL_NUMBERS = {
    "scale": (1.0, "how much of what the ControlNet adds; one for all, or one for each --controlnet"),
    "start": (0.0, "from which share of each phase's steps on it is used; one for all, or one for each"),
    "end": (1.0, "up to which share of each phase's steps it is used; one for all, or one for each"),
}
CONTROL = ("controlnet", "control_image", "control_type", *(f"control_{name}" for name in CONTROL_NUMBERS))
LORAS = ("lora", "phase_lora")
DTYPES = ("float32", "float16", "bfloat16")
# The method's settings that the command has, all but the result's size, which is --size; and options with names of their own.
METHOD = tuple(f for f in fields(DemoFusionConfig) if f.name not in ("resize_width", "resize_height"))
OPTIONS = {"phase_checkpoint": "--phase-model"}
MODEL = "diffusers folder, .safetensors file or hub name"
SCHEDULES = "Uniform, Karras, Exponential, SGM Uniform, Simple, Normal, Beta, or Automatic, as the model says"
# What is said of those that are texts, beside what they are; and how their values are called.
TEXTS = {
    "phase_sampler": ("", "NAME"),
    "phase_schedule": ("", "NAME"),
    "phase_prompt": ("", "TEXT"),
    "phase_negative_prompt": ("", "TEXT"),
    "phase_checkpoint": (f" ({MODEL})", "MODEL"),
    "upscaler": (
        " (Latent, Latent (antialiased), Latent (bicubic), Latent (bicubic antialiased), Latent (nearest), "
        "Latent (nearest-exact), Lanczos, Bicubic, Nearest, or a network's .pth or .safetensors file)",
        "NAME|FILE",
    ),
}
EPILOG = (
    "Exit code: 0 done, 1 failed on the way, 2 wrong input, 130 stopped by Ctrl-C. What was finished is written in any case; "
    "if the output can no longer be written, to the home folder or the system's temporary one. "
    "DEMOFUSION_TRACEBACK=1 in the environment shows where an error came from."
)


class Refused(Exception):
    """Wrong input; its text is the one line that the user gets."""


class Append(argparse.Action):
    """Collects the values of an option that is given several times, whatever its default is."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), value])


class Parser(argparse.ArgumentParser):
    """Takes what follows an option as its value, also if it begins with a dash; raises Refused instead of exiting."""

    def __init__(self, **kwargs):
        self.takes_value = {"-h": False, "--help": False}  # by option
        super().__init__(**kwargs)

    def add(self, *names: str, group=None, **kwargs) -> None:
        action = (group or self).add_argument(*names, **kwargs)
        self.takes_value.update(dict.fromkeys(action.option_strings, action.nargs is None))

    def option(self, text: str) -> str | None:
        """The option that a text stands for, if it is one or the beginning of just one."""
        name = text.partition("=")[0]
        if name in self.takes_value:
            return name
        found = [known for known in self.takes_value if name.startswith("--") and name != "--" and known.startswith(name)]
        return found[0] if len(found) == 1 else None

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        args, joined = list(sys.argv[1:] if args is None else args), []
        while args:
            text = args.pop(0)
            if text == "--":
                joined += [text, *args]
                break
            option = self.option(text)
            wants = option is not None and "=" not in text and self.takes_value[option]
            if wants and args and args[0].startswith("-") and args[0] != "--" and self.option(args[0]) is None:
                text = f"{option}={args.pop(0)}"
            joined.append(text)
        return super().parse_args(joined, namespace)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: -"):
            message += " (a prompt that begins with a dash goes last, after --)"
        raise Refused(message)


def build_parser() -> Parser:
    parser = Parser(prog="demofusion", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add
    add("prompt", nargs="?", default="", help="what the image shows")
    add("-o", "--output", type=Path, default=Path("out.png"), help="PNG to write, or a link to it (default: %(default)s)")
    add("--negative-prompt", default="", help="what the image does not show")
    add("--model", help=f"{MODEL} (default: the small embedded checkpoint)")
    add("--image", type=Path, help="enlarge this image, of any size, instead of a base made from the prompt")
    add("--mask", type=Path, help="of the image, of the same size: what is white is drawn anew, what is black stays")
    add("--mask-blur", type=int, default=MASK_BLUR, help="of the mask, in pixels of the image (default: %(default)s)")
    add("--size", type=parse_size, help="of the result, as WIDTHxHEIGHT in pixels, instead of --scale")
    add(
        "--controlnet",
        action=Append,
        default=[],
        metavar="MODEL",
        help=f"ControlNet that fits the model: {MODEL}; may be given several times",
    )
    text = "what it holds the picture to, ready made (edges, depth, a pose, ...) and of the picture's aspect; one for each "
    text += "--controlnet, in their order. Without any they take the --image"
    add("--control-image", action=Append, default=[], type=Path, metavar="FILE", help=text)
    for name, (default, text) in CONTROL_NUMBERS.items():
        text = f"{text} (default: {default:g})"
        add(f"--control-{name}", action=Append, default=[], type=float, metavar="NUMBER", help=text)
    text = "what the image of a union ControlNet is: openpose, depth, softedge, canny, normal, segmentation, tile, inpaint, or "
    text += "the type's number; none for one that is no union"
    add("--control-type", action=Append, default=[], metavar="TYPE", help=text)
    add("--width", type=int, help="of the base, in pixels (default: the model's own)")
    add("--height", type=int, help="of the base, in pixels (default: the model's own)")
    add("--steps", type=int, default=50, help="sampling steps of the base and of each phase (default: %(default)s)")
    add("--cfg-scale", type=float, default=7.5, help="guidance; 1 is none, at half the time (default: %(default)s)")
    add(
        "--sampler",
        default="Euler",
        help="Euler, Euler a, DDIM, DPM++ 2M, Heun, LCM, UniPC, or its diffusers class (default: %(default)s)",
    )
    text = f"how the noise levels lie, as the WebUI calls it: {SCHEDULES} (default: Automatic)"
    add("--schedule", default="", metavar="NAME", help=text)
    lora = dict(action=Append, default=[], type=parse_lora, metavar="FILE[:WEIGHT]")
    add("--lora", help="LoRA, a .safetensors file, and how much it counts, 1 unless given; may be given several times", **lora)
    add("--phase-lora", help="the same, but in the phases after the base alone, on top of --lora", **lora)
    add("--seed", type=int, default=0, help="of the first image; the next ones count up (default: %(default)s)")
    add("--batch-count", type=int, default=1, help="how many images (default: %(default)s)")
    add("--device", help="cuda, mps or cpu (default: the first of these that is here)")
    add("--dtype", choices=DTYPES, help="default: float16 on cuda, else float32")
    add("--plan", action="store_true", help="print what would be done, and stop")
    add("--save-phases", action="store_true", help="write each phase when it is finished: its image, and a file to resume from")
    add("--resume", type=Path, metavar="FILE", help="go on after the phase in this file, with the settings it was made with")
    add("--compare", action="store_true", help="also write base or given image and result side by side, with one crop of both")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    method = parser.add_argument_group("DemoFusion", "the method's settings; the defaults are the paper's, or the preset's")
    presets = ", ".join(PRESETS)
    text = f"what the settings start from: {presets}, each faster than the one before (default: %(default)s)"
    add("--preset", group=method, default="Paper", help=text)
    for f in METHOD:
        text, kind = f.metadata["help"], dict(type=type(f.default))
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, str):
            more, kind["metavar"] = TEXTS[f.name]
            text = f"{text}{more}"
        else:
            text = f"{text} (default: {f.default})"
        add(option_of(f.name), group=method, dest=f.name, default=f.default, help=text, **kind)
    return parser


def option_of(name: str) -> str:
    """The option of one of the settings."""
    return OPTIONS.get(name) or f"--{name.replace('_', '-')}"


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT -> (height, width)."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be like 1024x768, got {text}")
    return int(match[2]), int(match[1])


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT. The colon of a Windows drive is none before a weight."""
    file, colon, weight = text.rpartition(":")
    if not text or colon and not file:
        raise argparse.ArgumentTypeError("the LoRA has no name")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        if not file.lower().endswith(".safetensors"):
            return Path(text), 1.0
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"the weight of {file} must be a number, got {weight or 'none'}")
    return Path(file), number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the preset's settings where none are given. Raises Refused, ValueError."""
    parser = build_parser()
    preset = DemoFusionConfig.preset(parser.parse_args(argv).preset)
    parser.set_defaults(**{f.name: getattr(preset, f.name) for f in METHOD})
    return parser.parse_args(argv)


# What may differ between a job and its resumption; all else is what the file says.
FREE_TO_CHANGE = ("output", "resume", "device", "view_batch_size", "save_phases", "compare", "plan")
# The settings in the file, beside the method's; those of a job that begins with an image; and those that not all files have.
SETTINGS = {
    **dict.fromkeys(("prompt", "negative_prompt", "sampler", "schedule", "dtype", "preset"), str),
    **dict.fromkeys(("width", "height", "steps", "seed", "batch_count", "mask_blur"), int),
    **dict.fromkeys(("size", "mask"), type(None)),
    **dict.fromkeys(("model", "image"), (str, type(None))),
    **dict.fromkeys((*CONTROL, *LORAS), list),
    "cfg_scale": (int, float),
}
SETTINGS_OF_AN_IMAGE = {
    **SETTINGS,
    **dict.fromkeys(("width", "height"), type(None)),
    "size": (list, type(None)),
    "mask": (str, type(None)),
}
YOUNG = {"preset", "doubling", "denoising_strength", "pixel_upsampling", "feather", "hold_flat", "hold_steps", "window"}
YOUNG |= {"mask", "mask_blur", *CONTROL, "schedule", *LORAS, *TEXTS, "phase_cfg_scale", "most_phase_steps", "unguided_flat"}


def resumed(args: argparse.Namespace, argv: list[str] | None):
    """The settings of the job that a saved phase belongs to, with those of `argv` that may differ; and the phase.

    Raises Refused or ValueError, one line that names the file, for one that cannot be read. What its settings say has the
    right types then; whether a job can have them is for check_arguments and check_phase.
    """
    from lib_demofusion.saved import read_saved

    parser, absent = build_parser(), object()
    parser.set_defaults(**dict.fromkeys(vars(args), absent))  # what is not absent was given
    given = [name for name, value in vars(parser.parse_args(argv)).items() if value is not absent]
    fixed = [option_of(name)[2:].replace("-", " ") for name in given if name not in FREE_TO_CHANGE]
    if fixed:
        raise Refused(f"--resume takes {', '.join(fixed)} from the file; leave that out")
    saved = read_saved(args.resume, "command")
    with blamed_on(args.resume):
        settings = {**vars(args), **read_settings(saved.settings)}
        for name in given:
            settings[name] = getattr(args, name)
        for name in ("image", "mask"):
            settings[name] = settings[name] and Path(settings[name])
        settings["control_image"] = [Path(file) for file in settings["control_image"]]
        for name in LORAS:
            settings[name] = [(Path(file), weight) for file, weight in settings[name]]
    return argparse.Namespace(**settings), saved


@contextmanager
def blamed_on(path: Path | None):
    """What is wrong in here is wrong in that file."""
    try:
        yield
    except (Refused, ValueError) as error:
        raise Refused(f"{path} cannot be resumed: {error}" if path else str(error)) from error


def read_settings(text: str) -> dict:
    """A saved phase's settings by name. Raises ValueError, one line, for what is missing, unknown or of the wrong type."""
    from lib_demofusion.saved import read_json

    try:
        settings = read_json(text)
    except ValueError as error:
        raise ValueError(f"its settings are no JSON: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"its settings are no JSON object, but {type(settings).__name__}")
    method = {f.name for f in METHOD} - set(FREE_TO_CHANGE)
    known = method | set(SETTINGS)
    if missing := sorted(known - set(settings) - YOUNG):
        raise ValueError(f"its settings lack {', '.join(missing)}")
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"its settings have {', '.join(unknown)}, which this version does not know")
    image = settings.get("image")
    for name, kind in (SETTINGS_OF_AN_IMAGE if image and isinstance(image, str) else SETTINGS).items():
        value = settings.get(name, "")
        if isinstance(value, bool) or not isinstance(value, kind) and name in settings:
            raise ValueError(f"its {name.replace('_', ' ')} is {value!r}, of the wrong type")
    for name in CONTROL:
        kind = (int, float) if name.removeprefix("control_") in CONTROL_NUMBERS else str
        for value in settings.get(name, []):
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"its {name.replace('_', ' ')} has {value!r}, of the wrong type")
    for name in LORAS:
        for value in settings.get(name, []):
            file, weight = value if isinstance(value, list) and len(value) == 2 else (None, None)
            if not isinstance(file, str) or isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"its {name.replace('_', ' ')} has {value!r}, which is no file with a weight")
    if settings["batch_count"] != 1:
        raise ValueError(f"its batch count is {settings['batch_count']}, and a saved phase is of one image")
    if settings["dtype"] not in DTYPES:
        raise ValueError(f"its dtype is {settings['dtype']!r}; {', '.join(DTYPES)} are known")
    if "doubling" not in settings:  # version 0.3, whose stride is in latent pixels, and 0 is half the window
        if settings["stride"] != 0:
            raise ValueError(f"its stride is {settings['stride']!r} latent pixels, as version 0.3 had it; make it again")
        settings["stride"] = 0.5
    settings = {**{name: unwritten_settings()[name] for name in method}, **settings}
    DemoFusionConfig.preset(settings.get("preset", "Paper"), **{name: settings[name] for name in method})
    return settings


def check_phase(args: argparse.Namespace, saved) -> None:
    """Raises ValueError, one line, unless the saved phase is one of those that the settings make."""
    from lib_demofusion.phases import phase_scales

    if len(saved.base) != 1:
        raise ValueError(f"it holds {len(saved.base)} images, and the command goes on with one")
    if saved.from_picture != bool(args.image):
        raise ValueError(f"its phase is of a job with{'' if saved.from_picture else 'out'} an image, and its settings are not")
    if args.image:  # the plan, which needs the checkpoint's own size, says the rest
        return
    scales = [1.0, *phase_scales(args.scale, args.doubling)]
    if saved.number >= len(scales):
        raise ValueError(f"phase {saved.number} is saved, and scale {args.scale:g} has none after it")
    (h, w), scale = saved.base.shape[-2:], scales[saved.number - 1]
    if saved.latents.shape[-2:] != (round(h * scale), round(w * scale)):
        latents = "x".join(map(str, saved.latents.shape[-2:]))
        raise ValueError(f"its latents are {latents}, and phase {saved.number} is {scale:g} times its base of {h}x{w}")
    if args.height % h or args.width % w or args.height // h != args.width // w:
        raise ValueError(f"its base is {w}x{h} latent pixels, which is no image of {args.width}x{args.height}")


def check_channels(saved, channels: int | None) -> None:
    if channels is not None and saved.latents.shape[1] != channels:
        raise Refused(f"its latents have {saved.latents.shape[1]} channels, and the checkpoint takes {channels}")


def channels_of(model: str | Path) -> int | None:
    """What a diffusers folder says that its UNet takes; None for another checkpoint, which says it once it is loaded."""
    try:
        return json.loads((Path(model) / "unet" / "config.json").read_bytes())["in_channels"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def settings_to_resume(args: argparse.Namespace, config: DemoFusionConfig, pipe, plan, seed: int) -> str:
    """What `resumed` reads: every setting that the picture depends on, with the defaults and files resolved."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings.update(scale=config.scale, seed=seed, batch_count=1, dtype=str(pipe.unet.dtype).removeprefix("torch."))
    if args.image:
        settings.update({name: value and str(value.resolve()) for name, value in (("image", args.image), ("mask", args.mask))})
    else:
        h, w = (side * pipe.vae_scale_factor for side in plan.window)
        settings.update(size=None, height=h, width=w)
    settings["control_image"] = [str(file.resolve()) for file in args.control_image]
    settings["controlnet"] = [str(Path(model).resolve()) if Path(model).exists() else model for model in args.controlnet]
    for name in LORAS:
        settings[name] = [(str(file.resolve()), weight) for file, weight in getattr(args, name)]
    for name in ("model", "phase_checkpoint", "upscaler"):
        if settings[name] and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return json.dumps(settings)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises Refused or ValueError, one line, for settings that cannot work whatever the checkpoint is."""
    if args.size and args.scale != DemoFusionConfig().scale:
        raise Refused("give --size or --scale, not both")
    if not args.prompt.strip() and not args.image and not args.resume:
        raise Refused("say what the image shows, or give --image")
    if args.image and (args.width is not None or args.height is not None):
        raise Refused(
            "--width/--height are of a base made from the prompt; with --image use --size or --scale, "
            "and --window for the window"
        )
    if args.mask and not args.image:
        raise Refused("a mask is of an image; give --image too")
    if args.mask_blur != MASK_BLUR and not args.mask:
        raise Refused("--mask-blur is of a mask; give --mask too")
    check_control_arguments(args)
    for name in ("prompt", "negative_prompt", "phase_prompt", "phase_negative_prompt"):
        check_text(getattr(args, name), name.replace("_", " "))
    if args.model == "":
        raise Refused("the model has no name; leave --model out for the small embedded checkpoint")
    for name, low in (("width", 8), ("height", 8), ("steps", 1), ("batch_count", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise Refused(f"{name.replace('_', ' ')} must be at least {low}, got {value}")
        if value is not None and value >= 2**63:
            raise Refused(f"{name.replace('_', ' ')} is too large; use one below 2**63")
    if args.seed + args.batch_count > 2**63:
        raise Refused("the last image's seed is too large; it must be below 2**63")
    if not math.isfinite(args.cfg_scale) or args.cfg_scale < 1:
        raise Refused(f"CFG scale must be at least 1, got {args.cfg_scale:g}")


def check_control_arguments(args: argparse.Namespace) -> None:
    """Raises Refused, one line, for numbers of ControlNet options that do not go together, and for values out of range."""
    models = len(args.controlnet)
    for name in CONTROL[1:]:
        option, values = f"--{name.replace('_', '-')}", getattr(args, name)
        if values and not models:
            raise Refused(f"{option} is of a ControlNet; give --controlnet too")
        once = name != "control_image"
        if len(values) not in ((0, 1, models) if once else (0, models)):
            instead = f"{'once for all, or ' if once else ''}once for each"
            raise Refused(f"{len(values)} {option} do not go with {models} --controlnet; give it {instead}")
    if "" in args.controlnet:
        raise Refused("a ControlNet has no name; give its folder, file or hub name")
    for number, (scale, start, end) in enumerate(zip(*(of_each(args, f"control_{name}") for name in CONTROL_NUMBERS)), 1):
        of = f" of ControlNet {number}" if models > 1 else ""
        if not math.isfinite(scale) or scale < 0:
            raise Refused(f"the control scale{of} must be at least 0, got {scale:g}")
        if not 0 <= start <= end <= 1:
            raise Refused(f"control start and end{of} must be from 0 to 1, the start first, got {start:g} and {end:g}")
    if models and not args.control_image and not args.image:
        raise Refused("--controlnet needs a --control-image, or an --image to enlarge, which it then takes")


def of_each(args: argparse.Namespace, name: str) -> list:
    """One of the ControlNets' settings for each of them."""
    values = getattr(args, name)
    if not values:
        values = [CONTROL_NUMBERS.get(name.removeprefix("control_"), (None,))[0]]
    return values * len(args.controlnet) if len(values) == 1 else values


def check_output(args: argparse.Namespace, shared: bool = False) -> None:
    """Raises Refused or ValueError, one line, unless all that the job writes can be written, as far as that can be told.

    shared: among several processes, which write what it takes to go on after each phase.
    """
    if args.output.suffix.lower() != ".png":
        raise Refused(f"the output must be a .png file, got {args.output}")
    if args.plan:
        return
    paths = [args.output]
    if args.batch_count > 1:
        paths = [suffixed(args.output, f"{number}") for number in (1, args.batch_count)]
    for path in tuple(paths):
        if args.save_phases:
            paths.append(suffixed(path, "phase1"))
        if args.save_phases or shared:
            paths.append(suffixed(path, "phase1").with_suffix(".safetensors"))
        if args.compare:
            paths.append(suffixed(path, "compare"))
    check_writable(*paths)
