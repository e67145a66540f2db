"""The pictures that are compared: which there are to be; drawing and scoring those that are missing, in worker processes."""

from __future__ import annotations

import functools
import json
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.judges import Made, PhotoJudge, SceneJudge
from evaluation.methods import (
    ABLATION,
    CONTROL,
    FEW_STEP_WEIGHTS,
    FEW_STEPS,
    HELD,
    METHODS,
    PICTURES,
    PRESETS,
    STEPS,
    Job,
    Method,
    Picture,
    few_step_pipeline,
    make_job,
    tile_controlnet,
)
from evaluation.scores import BASE, Record, keep, kept, replace_file
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
        ("count kept", "texture right", "strays", "off the base", "detail", "object detail", "base object detail", "seams"),
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
    "Few steps": Table(
        FEW_STEPS,
        "The presets with few steps, against Turbo as it was until version 0.8: the last 7 of 18 steps a phase.",
        "Fast, 18 steps",
    ),
    "Few-step weights": Table(
        FEW_STEP_WEIGHTS,
        "The embedded checkpoint's LCM-LoRA in the phases, without guidance, and with flat areas held, against Turbo.",
        "Turbo",
        embedded=True,
    ),
}


@dataclass(frozen=True)
class Task:
    """One caption at one size, whose pictures, one for each of the methods, are kept in a folder of `kept`.

    judge: the tag of who scores them; "": nobody yet. known: the methods, and "base", of whose pictures it is known what
    they scored, so that they need not be here.
    """

    kept: Path
    index: int
    subject: Scene | str
    size: Size
    steps: int
    methods: tuple[str, ...]
    layout: str = "anywhere"
    judge: str = ""
    known: frozenset[str] = frozenset()

    @property
    def caption(self) -> str:
        return self.subject if isinstance(self.subject, str) else self.subject.caption

    def file(self, name: str) -> Path:
        """The picture's. name: a method's, or "base"."""
        own = f"-{zlib.crc32(self.subject.encode()):08x}" if isinstance(self.subject, str) else ""
        return self.kept / f"{self.index:04}{own}" / f"{label(name)}.png"

    def score(self, name: str) -> Path:
        """The file that says what it scored."""
        return self.file(name).with_suffix(f".{self.judge}.npy")

    def drawn(self, name: str) -> bool:
        return self.file(name).with_suffix(".json").exists() and self.file(name).exists()

    def scored(self, name: str) -> bool:
        return bool(self.judge) and (name in self.known or self.score(name).exists())

    def missing(self) -> list[str]:
        """The methods, and "base", that are to be scored, or drawn where there is no judge."""
        return [name for name in (BASE, *self.methods) if not (self.scored(name) if self.judge else self.drawn(name))]

    def here(self) -> list[str]:
        """Those of them that can be scored from pictures that are here."""
        return [name for name in self.missing() if self.drawn(name) and self.drawn(BASE)] if self.judge else []

    def records(self) -> dict[tuple[str, int], Record]:
        """What is known here of what they scored."""
        scored = [name for name in (BASE, *self.methods) if self.judge and self.score(name).exists()]
        return {(label(name), self.index): kept(self.score(name)) for name in scored}


def label(name: str) -> str:
    """A method's name and settings, or "base"."""
    return name if name == BASE else f"{name}{all_methods()[name].tag}"


def all_methods() -> dict[str, Method]:
    return {name: method for table in TABLES.values() for name, method in table.methods.items()}


def methods_at(size: str, titles: Iterable[str]) -> tuple[str, ...]:
    """The names of what these tables hold at a size, each once."""
    return tuple(dict.fromkeys(name for title in titles if size in TABLES[title].sizes for name in TABLES[title].methods))


_worker: dict = {}  # what `start` was told, of a worker


def start(model: str, device: str, dtype: str, openvino: bool, judge: SceneJudge | None) -> None:
    """A worker begins: one thread each on a CPU, since the views of a small model keep no more busy."""
    warnings.simplefilter("ignore", FutureWarning)
    if device == "cpu":
        torch.set_num_threads(1)
    _worker.update(model=model, device=device, dtype=getattr(torch, dtype), openvino=openvino, judge=judge)
    _pipe.cache_clear()


@functools.cache
def _pipe():
    """The worker's pipeline, once something is to be drawn."""
    pipe = load_pipeline(_worker["model"], _worker["device"], _worker["dtype"])
    if _worker["openvino"]:
        from evaluation.openvino import compile_controlnet, compile_unet

        compile_unet(pipe.unet)
        compile_controlnet(tile_controlnet(pipe))
        compile_unet(few_step_pipeline().unet)
    return pipe


def draw(task: Task) -> int:
    """Make a task's missing pictures, and score each when it is there; returns how many were made."""
    missing, made, job = task.missing(), 0, None
    for name in dict.fromkeys((BASE, *missing)) if missing else ():
        if not task.drawn(name):
            job = job or _job(task)
            base = Picture(np.asarray(job.base), 2 * task.steps, job.seconds)
            _save(base if name == BASE else all_methods()[name](job), task.file(name))
            made += 1
        if name in missing and _worker["judge"]:
            _judge(task, name, _worker["judge"])
    return made


def judge_drawn(task: Task, judge: SceneJudge | PhotoJudge | None = None) -> int:
    """Score those of a task's pictures that are here and are not scored; returns how many. judge: the worker's."""
    names = task.here()
    for name in names:
        _judge(task, name, judge or _worker["judge"])
    return len(names)


def _judge(task: Task, name: str, judge: SceneJudge | PhotoJudge) -> None:
    """Score a picture that is here, and keep that beside it."""
    picture, base = read(task, name), read(task, BASE)
    shape = base.image.shape[:2]
    found = {"evaluations": np.float32(picture.evaluations), "seconds": np.float32(picture.seconds)}
    if name == BASE:
        size = tuple(side * task.size.scale for side in shape)
        found |= {"size": np.uint16(size), **judge.of_base(task.subject, base.image, size)}  # (height, width) of the pictures
    else:
        method, window = all_methods()[name], task.size.window(shape)
        found["base seconds"] = np.float32(base.seconds)
        found |= judge.of_picture(Made(task.subject, task.index, picture.image, base.image, method.stride, window))
    keep(found, task.score(name))


def _job(task: Task) -> Job:
    """What a task's methods are given."""
    pipe = _pipe()
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    shape, given = tuple(int(own * share) for share in task.size.base), task.size.given
    job = make_job(pipe, task.caption, task.index, task.size.scale, task.steps, (own, own) if given else shape)
    if given:
        true = render(task.subject, np.random.default_rng([GIVEN_SEED, task.index]), task.layout).round().astype(np.uint8)
        picture = Image.fromarray(true).resize(shape[::-1], Image.Resampling.BOX)
        job = replace(job, base=picture, latents=None, window=(own, own))
    return job


def _save(picture: Picture, file: Path) -> None:
    """The picture, and beside it, last, what it cost."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.image).save(file)
    replace_file(file.with_suffix(".json"), json.dumps([picture.evaluations, picture.seconds]).encode())


def read(task: Task, name: str) -> Picture:
    file = task.file(name)
    with Image.open(file) as image:
        return Picture(np.asarray(image), *json.loads(file.with_suffix(".json").read_text()))
