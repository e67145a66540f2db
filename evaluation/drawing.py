"""The pictures that are compared: which there are to be, and the drawing of those that are missing, in worker processes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.methods import (
    ABLATION,
    CONTROL,
    HELD,
    METHODS,
    PICTURES,
    PRESETS,
    STEPS,
    Method,
    Picture,
    make_job,
    tile_controlnet,
)
from lib_demofusion.hosts.diffusers import load_pipeline
from training.scenes import Scene, render

GIVEN_SEED = 4244


@dataclass(frozen=True)
class Size:
    """A size of the paper's table 1: the base's (height, width) as shares of the model's own, and the scale.

    given: the base is not the model's, but a true render of the scene.
    """

    base: tuple[float, float]
    scale: int
    given: bool = False

    def window(self, base: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the methods' windows, of the base's: the base's own, or the model's where it is given."""
        return tuple(round(side / share) for side, share in zip(base, self.base)) if self.given else base


SIZES = {
    "4x": Size((1, 1), 2),
    "8x, 1:2": Size((0.5, 1), 4),
    "16x": Size((1, 1), 4),
    "9x": Size((1, 1), 3),
    # Of a model whose own images are of 128 pixels, as the embedded one's.
    "256 to 512": Size((2, 2), 2, given=True),
    "256 to 1024": Size((2, 2), 4, given=True),
}


@dataclass(frozen=True)
class Table:
    """What a report holds. against: the method that the others are judged by. metrics: all that there are, unless named.

    apart: methods that are judged by another one. embedded: it is of the embedded checkpoint alone.
    """

    methods: dict[str, Method]
    about: str
    against: str = "DemoFusion"
    sizes: tuple[str, ...] = ("4x", "8x, 1:2", "16x")
    metrics: tuple[str, ...] = ()
    apart: dict[str, str] = field(default_factory=dict)
    embedded: bool = False

    @property
    def references(self) -> list[str]:
        return list(dict.fromkeys((self.against, *self.apart.values())))


TABLES = {
    "Methods": Table(METHODS, "The paper's table 1, what users of the WebUI do today, and the presets."),
    "Presets": Table({**PRESETS, **HELD}, "The settings that cost less, against the paper's; and with flat areas held."),
    "Steps": Table(
        STEPS,
        "Phases of fewer steps than the base's 50, the skip residual held as in 50 of them, or blended once a step (Eq. 4).",
        "Paper, 50 steps",
        ("4x", "16x"),
    ),
    "Parts": Table(
        ABLATION,
        "The paper's figure 5: PU progressive upscaling, SR skip residual, DS dilated sampling.",
        "PU + SR + DS",
        ("9x",),
    ),
    "Pictures": Table(
        PICTURES,
        "The base is a given picture, a true render of the scene, of so many pixels each way, and time is over that of an "
        "image of the model's own size, as which the windows are. Paper, 8 steps: the paper's settings, phases of 8 steps.",
        "tiles 0.35",
        ("256 to 512", "256 to 1024"),
        ("count kept", "texture right", "strays", "off the base", "detail", "object detail", "seams"),
    ),
    "Control": Table(
        CONTROL,
        "The presets with the embedded tile ControlNet at scale 1, each against the preset without it: each phase is shown "
        "the one before; tile 1 to 0.5: in the first half of its steps. The ControlNet's own evaluations, as many as the "
        "UNet's in these steps, are not counted; the time holds them.",
        "Fast",
        ("16x",),
        apart={name: "Turbo" for name in CONTROL if name.startswith("Turbo")},
        embedded=True,
    ),
}


@dataclass(frozen=True)
class Task:
    """One caption at one size, whose pictures, one for each of the methods, are kept in a folder of `kept`."""

    kept: Path
    index: int
    subject: Scene | str
    size: Size
    steps: int
    methods: tuple[str, ...]
    layout: str = "anywhere"

    @property
    def caption(self) -> str:
        return self.subject if isinstance(self.subject, str) else self.subject.caption

    def file(self, name: str) -> Path:
        """name: a method's, or "base"."""
        tag = all_methods()[name].tag if name != "base" else ""
        return self.kept / f"{self.index:04}" / f"{name}{tag}.png"

    def missing(self, methods: Iterable[str]) -> list[str]:
        """Of these methods' pictures, and the base."""
        return [name for name in ("base", *methods) if not self.file(name).with_suffix(".json").exists()]


def all_methods() -> dict[str, Method]:
    return {name: method for table in TABLES.values() for name, method in table.methods.items()}


def methods_at(size: str, titles: Iterable[str]) -> tuple[str, ...]:
    """The names of what these tables hold at a size, each once."""
    return tuple(dict.fromkeys(name for title in titles if size in TABLES[title].sizes for name in TABLES[title].methods))


_pipe = None  # of a worker


def start(model: str, device: str, dtype: str, openvino: bool = False) -> None:
    """A worker begins: one thread each on a CPU, since the views of a small model keep no more busy."""
    global _pipe
    warnings.simplefilter("ignore", FutureWarning)
    if device == "cpu":
        torch.set_num_threads(1)
    _pipe = load_pipeline(model, device, getattr(torch, dtype))
    if openvino:
        from evaluation.openvino import compile_controlnet, compile_unet

        compile_unet(_pipe.unet)
        compile_controlnet(tile_controlnet(_pipe))


def draw(task: Task) -> int:
    """Make a task's missing pictures; returns how many."""
    missing = task.missing(task.methods)
    own = _pipe.unet.config.sample_size * _pipe.vae_scale_factor
    shape, given = tuple(int(own * share) for share in task.size.base), task.size.given
    job = make_job(_pipe, task.caption, task.index, task.size.scale, task.steps, (own, own) if given else shape)
    if given:
        true = render(task.subject, np.random.default_rng([GIVEN_SEED, task.index]), task.layout).round().astype(np.uint8)
        picture = Image.fromarray(true).resize(shape[::-1], Image.Resampling.BOX)
        job = replace(job, base=picture, latents=None, window=(own, own))
    for name in missing:
        base = Picture(np.asarray(job.base), 2 * task.steps, job.seconds)
        picture = base if name == "base" else all_methods()[name](job)
        file = task.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.image).save(file)
        file.with_suffix(".json").write_text(json.dumps([picture.evaluations, picture.seconds]))
    return len(missing)


def read(task: Task, name: str) -> Picture:
    file = task.file(name)
    with Image.open(file) as image:
        return Picture(np.asarray(image), *json.loads(file.with_suffix(".json").read_text()))
