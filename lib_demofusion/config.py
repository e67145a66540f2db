"""One frozen, validated value holds the settings of the method; every host reads the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

INFOTEXT_PREFIX = "DemoFusion"

# What differs from the paper's settings. docs/evaluation.md has what each costs and gives. Each asks the model no more
# often than the one before, whatever the base's steps and sampler are.
_FAST: dict[str, Any] = dict(denoising_strength=0.4, doubling=True, pixel_upsampling=True, stride=0.625, feather=True)
_FEW: dict[str, Any] = {**_FAST, "most_phase_steps": 10, "phase_schedule": "SGM Uniform"}
PRESETS: dict[str, dict[str, Any]] = {
    "Paper": {},
    "Fast": _FAST,
    "Faithful": {**_FEW, "hold_flat": 15.0, "unguided_flat": 50.0},
    "Turbo": {**_FEW, "unguided_flat": 10.0},
    # Of few-step weights, which need no guidance: an LCM, Lightning or DMD2 LoRA in the phases, or such a checkpoint.
    "Few-step": {**_FEW, "denoising_strength": 0.3, "phase_sampler": "LCM", "phase_cfg_scale": 1.0},
}


def _setting(
    default: Any, label: str, help: str, low: float = 0, high: float = 0, above: bool = False, unwritten: Any = None
) -> Any:
    """A field with its infotext label, its tooltip and its range (`above`: the lower end itself is excluded).

    unwritten: what pictures were made with whose parameters do not name the setting; the default unless given.
    """
    unwritten = default if unwritten is None else unwritten
    metadata = {"label": label, "help": help, "low": low, "high": high, "above": above, "unwritten": unwritten}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DemoFusionConfig:
    """Settings of DemoFusion (arXiv 2311.16973); the defaults are the paper's.

    The window of the local views is the base latent's size. Where a given picture is enlarged, and no base is made,
    `scale` is of the picture, and `window` says how large about the windows are. Those from `phase_sampler` on are of the
    phases after the base, as Hires. fix has them for its second pass; names are the host's, "" and 0: as the base.
    Raises ValueError, one line, for a value of the wrong type or out of range.
    """

    scale: float = _setting(4.0, "scale", "how many times larger each side becomes", 1, 8, above=True)
    phase_steps: int = _setting(0, "phase steps", "sampling steps of each phase after the base; 0: as the base", 0, 1000)
    doubling: bool = _setting(False, "doubling", "phases double the sides, 2x, 4x, 8x, instead of 2x, 3x, 4x")
    denoising_strength: float = _setting(
        1.0,
        "denoising strength",
        "share of a phase's steps that are run, the last ones; less is faster and keeps more of the phase before",
        0,
        1,
        above=True,
    )
    pixel_upsampling: bool = _setting(
        False,
        "pixel upsampling",
        "enlarge each phase as an image, through the VAE, instead of as latents: sharper, which a late start needs",
    )
    stride: float = _setting(
        0.5,
        "stride",
        "from one local window to the next, as a share of the window; smaller is smoother and slower",
        0,
        1,
        above=True,
    )
    feather: bool = _setting(False, "feather", "local windows count less towards their edges, against seams")
    hold_flat: float = _setting(
        0.0,
        "hold flat",
        "keep what differs from its own blur by less than this, of 255: fewer stray objects in plain areas, no new detail "
        "there; 0: off",
        0,
        50,
    )
    unguided_flat: float = _setting(
        0.0,
        "unguided flat",
        "no guidance, as at CFG scale 1, where the phase before differs from its own blur by less than this, of 255: fewer "
        "stray objects in plain areas, whose own detail is drawn; 0: off",
        0,
        50,
    )
    jitter: bool = _setting(True, "jitter", "shift the local windows at random at every step, against seams")
    alpha1: float = _setting(3.0, "alpha1", "skip residual: more lets go of the previous phase sooner", 0, 20)
    alpha2: float = _setting(1.0, "alpha2", "dilated sampling: more hands over to the local windows sooner", 0, 20)
    alpha3: float = _setting(1.0, "alpha3", "blur of the dilated views: more makes it fade sooner", 0, 20)
    blur_sigma: float = _setting(
        1.0, "blur sigma", "blur before dilated sampling at the start, in latent pixels; more is smoother", 0, 10, above=True
    )
    blur_sigma_end: float = _setting(
        0.01, "blur sigma end", "blur before dilated sampling at the end, in latent pixels", 0, 10, above=True
    )
    view_batch_size: int = _setting(
        0, "view batch size", "views per model call; the picture is the same; 0: as many as fit and pay", 0, 4096
    )
    hold_steps: int = _setting(
        50,
        "hold steps",
        "skip residual: a phase is held to the one before as in so many steps, 50 being the paper's, however many there are; "
        "more keeps more; 0: once a step",
        0,
        1000,
        unwritten=0,
    )
    window: int = _setting(
        0,
        "window",
        "side in pixels of the images that the checkpoint was made for, where a picture is enlarged; 0: as the checkpoint says",
        0,
        4096,
    )
    most_phase_steps: int = _setting(
        0, "most phase steps", "where phases have the base's steps (phase steps 0), no more than these; 0: all", 0, 1000
    )
    phase_sampler: str = _setting("", "phase sampler", "sampler of the phases after the base; none: as the base")
    phase_schedule: str = _setting("", "phase schedule", "noise schedule of the phases after the base; none: as the base")
    phase_cfg_scale: float = _setting(
        0.0, "phase CFG scale", "guidance in the phases after the base; 1 is none, at half the time; 0: as the base", 0, 30
    )
    phase_prompt: str = _setting("", "phase prompt", "what the phases after the base are to show; none: as the base")
    phase_negative_prompt: str = _setting(
        "", "phase negative prompt", "what the phases after the base are not to show; none: as the base"
    )
    phase_checkpoint: str = _setting("", "phase checkpoint", "model of the phases after the base; none: as the base")
    upscaler: str = _setting(
        "", "enlarged by", "what enlarges each phase; none: bicubic, of images or of latents as pixel upsampling says"
    )
    resize_width: int = _setting(
        0, "resize width", "of the result in pixels, instead of the scale; 0: by the height, if that is given", 0, 65536
    )
    resize_height: int = _setting(
        0, "resize height", "of the result in pixels, instead of the scale; 0: by the width, if that is given", 0, 65536
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if isinstance(f.default, (bool, str)):
                if not isinstance(value, type(f.default)):
                    what = "a text" if isinstance(f.default, str) else "true or false"
                    raise ValueError(f"{meta['label']} must be {what}, got {value!r}")
                continue
            kind = int if isinstance(f.default, int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind):
                number = "a whole number" if kind is int else "a number"
                raise ValueError(f"{meta['label']} must be {number}, got {value!r}")
            low, high, above = meta["low"], meta["high"], meta["above"]
            if not low <= value <= high or (above and value == low):  # NaN is not between either
                bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
                text = f"{value:g}" if isinstance(value, float) else f"{value}"  # a float cannot hold every whole number
                raise ValueError(f"{meta['label']} must be {bounds}, got {text}")
        if 0 < self.phase_cfg_scale < 1:
            raise ValueError(f"phase CFG scale must be 0, as the base's, or at least 1, got {self.phase_cfg_scale:g}")

    def phase_steps_of(self, steps: int) -> int:
        """The steps of the schedule of each phase after a base of so many."""
        return self.phase_steps or min(steps, self.most_phase_steps or steps)

    @classmethod
    def preset(cls, name: str, **settings: Any) -> DemoFusionConfig:
        """The settings of one of PRESETS, whatever the case of its name, with others on top.

        Raises ValueError, one line, if there is none of that name.
        """
        for known, values in PRESETS.items():
            if str(name).lower() == known.lower():
                return cls(**{**values, **settings})
        raise ValueError(f"no preset called {name!r}; there are: {', '.join(PRESETS)}")

    def to_infotext(self) -> dict[str, str]:
        """Labels and values for a picture's parameters: the scale always, the rest where it must be written to be read."""
        return {
            infotext_label(f): _text(getattr(self, f.name))
            for f in fields(self)
            if f.name == "scale" or getattr(self, f.name) != f.metadata["unwritten"]
        }

    @classmethod
    def from_infotext(cls, parameters: Mapping[str, str]) -> DemoFusionConfig | None:
        """The settings a picture was made with; None if it was made without DemoFusion. Inverse of to_infotext.

        Raises ValueError for a value that cannot be read or is out of range.
        """
        values = unwritten_settings()
        for f in fields(cls):
            text = parameters.get(infotext_label(f))
            if text is not None:
                values[f.name] = _parse(text, f.default, f.metadata["label"])
        return cls(**values) if infotext_label(cls.__dataclass_fields__["scale"]) in parameters else None


def unwritten_settings() -> dict[str, Any]:
    """What a picture was made with as far as its parameters are silent, by the settings' names."""
    return {f.name: f.metadata["unwritten"] for f in fields(DemoFusionConfig)}


def first_line(error: BaseException) -> str:
    """What an error says, in one line, for a host to tell its user; its type where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def infotext_label(setting: Field) -> str:
    """The name of one of DemoFusionConfig's fields in a picture's parameters."""
    return f"{INFOTEXT_PREFIX} {setting.metadata['label']}"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, bool) else f"{value:.12g}"


def _parse(text: str, default: Any, label: str) -> Any:
    try:
        if isinstance(default, bool):
            return {"True": True, "False": False}[text]
        if isinstance(default, str) and not isinstance(text, str):
            raise TypeError
        return type(default)(text)
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{label} cannot be read from {text!r}") from None
