"""What the form and the API say, as settings; and what of it a picture's infotext and the comments below it hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from modules import infotext_utils

from lib_demofusion.config import INFOTEXT_PREFIX, PRESETS, DemoFusionConfig, first_line, infotext_label, unwritten_settings

NAME = "DemoFusion"

# The script's arguments, in the order that the API documents; those from "scale" on are optional there. In the form three
# more follow, which nobody is to send: END; why these settings are none ("" if they are), as of pasted parameters; and what
# the gallery's button asks for ("" for nothing).
ARGUMENTS = (
    "enabled",
    "scale",
    "phase_steps",
    "denoising_strength",
    "doubling",
    "pixel_upsampling",
    "stride",
    "feather",
    "hold_flat",
    "jitter",
    "alpha1",
    "alpha2",
    "alpha3",
    "blur_sigma",
    "view_batch_size",
    "save_phases",
    "resume",
    "hold_steps",
    "start_from",
    "window",
    "most_phase_steps",
    "phase_sampler",
    "phase_schedule",
    "phase_cfg_scale",
    "phase_prompt",
    "phase_negative_prompt",
    "phase_checkpoint",
    "upscaler",
    "resize_width",
    "resize_height",
    "unguided_flat",
)
# What the form shows for "as the base", where that is a choice of a list; the API takes it, too.
SAME = {
    "phase_sampler": "Use same sampler",
    "phase_schedule": "Use same scheduler",
    "phase_checkpoint": "Use same checkpoint",
    "upscaler": "Bicubic",
}
_FIRST, _LAST = (ARGUMENTS.index(name) for name in ("phase_sampler", "resize_height"))
SECOND_PASS = ARGUMENTS[_FIRST : _LAST + 1]  # what the form has under that name
END = "end of the arguments"
CONFIG_FIELDS = {f.name: f for f in fields(DemoFusionConfig)}
TEXTS = tuple(name for name, field in CONFIG_FIELDS.items() if isinstance(field.default, str))
NO_PRESETS = ("scale", "view_batch_size", "window", "phase_prompt", "phase_negative_prompt", "phase_checkpoint")
NO_PRESETS += ("upscaler", "resize_width", "resize_height")
PRESET_SETTINGS = [name for name in ARGUMENTS if name in CONFIG_FIELDS and name not in NO_PRESETS]
PICTURE, RESULT = STARTS = ("Picture", "img2img result")  # what a job of img2img can start from; the first is the default
START_KEY = f"{INFOTEXT_PREFIX} start"  # in the infotext of what was made from a picture
PRESET = "Fast"
FORM = DemoFusionConfig.preset(PRESET, scale=2.0)  # what the form shows at first, and the API's values for what is left out


def _last_steps(preset: str) -> str:
    config = DemoFusionConfig.preset(preset)
    return f"the last {100 * config.denoising_strength:.0f} % of at most {config.most_phase_steps} steps a phase"


PRESET_HELP = {  # what it is, and when to take it; what it costs depends on the rest of the form
    "Paper": ("DemoFusion as published", "Where the others add too little detail, and time does not matter"),
    "Fast": ("the last 40 % of each phase's steps, in fewer phases and windows", "For most pictures"),
    "Faithful": (
        f"{_last_steps('Faithful')}, held and without guidance in flat areas, else as Fast",
        "Where small copies of the subject appear; plain areas, skin and sky among them, get little new detail",
    ),
    "Turbo": (
        f"{_last_steps('Turbo')}, without guidance in very flat areas, else as Fast",
        "While you look for a prompt, and on slow machines",
    ),
    "Few-step": (
        f"{_last_steps('Few-step')}, without guidance, with the sampler LCM, else as Fast",
        "For few-step weights alone: put an LCM, Lightning or DMD2 LoRA into the second pass's prompt, or use such a "
        "checkpoint",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the form says.

    save_phases: write the phases before the last beside the outputs. resume: a file so written. start_from: one of STARTS,
    or "" where none is named.
    """

    config: DemoFusionConfig
    save_phases: bool = False
    resume: Path | None = None
    start_from: str = ""


def selected_in(args: Sequence[Any]) -> str:
    """What the gallery's button asks for in the script's arguments; "": nothing."""
    more = args[len(ARGUMENTS) :]
    return more[2] if len(more) > 2 and more[0] == END and isinstance(more[2], str) else ""


def read_settings(args: Sequence[Any]) -> Settings | None:
    """The script's arguments as settings; None if DemoFusion is off. Raises ValueError, one line, for a wrong value."""
    if all(arg is None for arg in args):  # a list that no form and no request has filled
        return None
    values = dict(zip(ARGUMENTS, args))
    for name in ("enabled", "save_phases"):
        if not isinstance(values.setdefault(name, False), bool):
            raise ValueError(f"{name.replace('_', ' ')} must be true or false, got {values[name]!r}")
    for name in ("resume", "start_from", *TEXTS):  # gradio 4 has None for an empty field
        if values.get(name, "") is None:
            values[name] = ""
    enabled, save_phases, resume = values.pop("enabled"), values.pop("save_phases"), values.pop("resume", "")
    start_from, more = values.pop("start_from", ""), args[len(ARGUMENTS) :]
    if not enabled and not selected_in(args):
        return None
    if more and more[0] != END:
        last = ARGUMENTS[-1].replace("_", " ")
        raise ValueError(f"it has {len(ARGUMENTS)} arguments, of which {last} is the last; got one more, {more[0]!r}")
    if len(more) > 1 and more[1]:
        raise ValueError(more[1])
    if not isinstance(resume, str):
        raise ValueError(f"resume must be the path of a file, got {resume!r}")
    if start_from != "" and start_from not in STARTS:
        raise ValueError(f"start from must be {' or '.join(map(repr, STARTS))}, got {start_from!r}")
    for name, value in values.items():  # a slider's 20.0 is the whole number 20
        if type(CONFIG_FIELDS[name].default) is int and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
        if isinstance(value, str) and (not value.strip() or value == SAME.get(name)) and name in TEXTS:
            values[name] = ""
    path = resume.strip().strip('"')  # as file managers copy a path
    return Settings(replace(FORM, **values), save_phases, Path(path) if path else None, start_from)


def read_pasted(parameters: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The settings in a picture's parameters, by their names, and what is none of them, in one line ("": nothing).

    What is not written, or cannot be read, is as in pictures that do not write it. No settings: the picture was made
    without DemoFusion.
    """
    labels = {name: infotext_label(field) for name, field in CONFIG_FIELDS.items()}
    given = {}
    for name, label in labels.items():
        if label in parameters:
            given[name] = str(parameters[label])
        elif f"{label}-1" in parameters:  # the host takes "2x3" apart, as a size
            given[name] = f"{parameters[f'{label}-1']}x{parameters.get(f'{label}-2')}"
    if "scale" not in given:
        return None, ""
    values, unread = unwritten_settings(), []
    for name, text in given.items():
        default, label = CONFIG_FIELDS[name].default, CONFIG_FIELDS[name].metadata["label"]
        try:
            values[name] = getattr(DemoFusionConfig.from_infotext({labels["scale"]: "2", labels[name]: text}), name)
            if name not in ARGUMENTS and values[name] != default:
                raise ValueError(f"{label} is {text}, and always {default} here")
        except (ValueError, OverflowError) as error:
            unread.append(first_line(error))
    told = f"of what was pasted: {'; '.join(unread)}; set in the form what you want, and empty this field" if unread else ""
    return values, told


def pasted_start(parameters: Mapping[str, Any]) -> str | None:
    """What a picture was made from, of STARTS, by its parameters; None where they do not say it."""
    said = str(parameters.get(START_KEY, ""))
    return next((start for start in STARTS if said.startswith(start)), None)


def shown(name: str, value: Any) -> Any:
    """What the form's control for a setting shows of its value."""
    return SAME[name] if name in SAME and value == "" else value


def presets_table() -> dict[str, list]:
    """What the form's controls for PRESET_SETTINGS show under each preset."""
    configs = {name: DemoFusionConfig.preset(name) for name in PRESETS}
    return {name: [shown(own, getattr(config, own)) for own in PRESET_SETTINGS] for name, config in configs.items()}


def sets_second_pass(values: Mapping[str, Any]) -> bool:
    """Whether settings, by their names, have something of the phases' own that no preset says."""
    is_preset = [shown(name, values[name]) for name in PRESET_SETTINGS] in presets_table().values()
    names = [name for name in SECOND_PASS if not (is_preset and name in PRESET_SETTINGS)]
    return any(values[name] != CONFIG_FIELDS[name].default for name in names)


def say(p: Any, kind: str, line: str) -> None:
    """A line for the form's comments, and through the infotext for the API's reply.

    kind: "incomplete", of what was asked for and is not there; "note", of anything else.
    """
    p.comment(f"{NAME}: {line}")
    write_down(p, kind, line)


def write_down(p: Any, kind: str, line: str) -> None:
    key, line = f"{INFOTEXT_PREFIX} {kind}", " ".join(line.split())
    known = p.extra_generation_params.get(key)
    p.extra_generation_params[key] = f"{known}; {line}" if known else line


def describe(p: Any, config: DemoFusionConfig, scale: float, start: str = "") -> None:
    """Put the settings into the infotext of what is saved from now on, with the scale reached; none of them at scale 1.

    start: what was started from, in words, if it is not a prompt.
    """
    for label in (*map(infotext_label, CONFIG_FIELDS.values()), START_KEY):
        p.extra_generation_params.pop(label, None)
    if scale > 1:
        written = replace(config, scale=scale).to_infotext()
        p.extra_generation_params.update({label: _as_read_back(text) for label, text in written.items()})
        if start:
            p.extra_generation_params[START_KEY] = start


def _as_read_back(text: str) -> str:
    """A text such that the host's parameters give it back: it quotes those with a comma, a colon or a newline, and no other."""
    stripped = text != text.strip() or text[:1] == text[-1:] == '"'
    return json.dumps(text, ensure_ascii=False) if stripped and infotext_utils.quote(text) == text else text
