"""The command's job: images from their seeds to their files. What is finished is written, whatever fails."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib_demofusion import __version__
from lib_demofusion.arguments import CONTROL_NUMBERS, LORAS, of_each, settings_to_resume
from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.files import reason, suffixed, write_somewhere
from lib_demofusion.hosts.prompts import as_webui_prompt
from lib_demofusion.pictures import comparison, lora_tags, model_name, parameters_text, save_png


class Ended(Exception):
    """Not all was done as asked for: its text is the one line that the user gets, `code` the exit code."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def trace(error: BaseException) -> None:
    if os.environ.get("DEMOFUSION_TRACEBACK"):
        traceback.print_exception(type(error), error, error.__traceback__)


def told(error: BaseException) -> str:
    """An error in one line; with its type, unless it is of those whose text is for people."""
    line = first_line(error)
    return line if isinstance(error, (OSError, RuntimeError, FloatingPointError)) else f"{type(error).__name__}: {line}"


class Console:
    """The progress bar, and lines above it. A console that is gone, or that cannot show something, ends no job.

    quiet: nothing is shown, as that of another process is.
    """

    def __init__(self, total: int, done: int, quiet: bool = False):
        self.bar = None
        self.quiet = quiet
        with suppress(Exception):
            if quiet:
                return
            from tqdm import tqdm

            class Bar(tqdm):
                monitor_interval = 0  # no thread for it

            # A bar whose console fails keeps its lock. All bars share one, and the thread that watches over those of others
            # would wait for it, and the program's end for that thread.
            Bar.set_lock(threading.RLock())
            self.bar = Bar(total=total, initial=done, unit="call", file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):
            self.bar.close()

    def advance(self, description: str, calls: int) -> None:
        with suppress(Exception):
            self.bar.set_description(description)
            self.bar.update(calls)

    def say(self, line: str) -> None:
        self._write(line, sys.stdout)

    def note(self, line: str) -> None:
        self._write(line, sys.stderr)

    def _write(self, line: str, stream) -> None:
        if self.quiet:
            return
        with suppress(Exception):
            self.bar.write(line, stream) if self.bar is not None else stream.write(f"{line}\n")


@dataclass
class Job:
    """The images of one command.

    ranks: the processes that make them together; those after the first one write nothing. misplaced: how many files of
    intermediate phases are not where they should be.
    """

    args: argparse.Namespace
    config: DemoFusionConfig
    host: Any
    pipe: Any
    plan: Any
    resume: Any
    shape: dict[str, Any]  # of the base, or the image that is given instead, and how it is sampled
    console: Console
    ranks: Any = None
    misplaced: int = 0

    def make(self, path: Path, seed: int, stopped: Callable[[], bool]) -> None:
        """One image, from its seed to its file. Raises Ended, once what is there is written, if it is not as asked for."""
        from lib_demofusion.phases import Pace

        pace, stop, last = Pace(self.plan), None, len(self.plan.phases)
        writes, spare = not self.ranks or self.ranks.rank == 0, []  # spare: files that a finished picture makes needless

        def advance(phase, views):
            pace.count(phase.number, views)
            self.console.advance(f"phase {phase.number} of {last}", views * phase.branches)

        def keep(result, saved):
            number = result.phases[-1][0].number
            if number == last or not writes:
                return
            if line := pace.to_come(number):
                self.console.note(line)
            beside = suffixed(path, f"phase{number}")
            if self.args.save_phases:
                self.write_phase(result, saved, beside, seed)
            elif self.ranks:  # whatever starts them ends all when one is lost
                file = beside.with_suffix(".safetensors")
                spare.extend([] if file.exists() else [file])
                self.write_resume(saved, file, seed)

        try:
            result = self.host.generate(
                self.pipe,
                self.args.prompt,
                negative_prompt=self.args.negative_prompt,
                config=self.config,
                seed=seed,
                progress=advance,
                cancelled=stopped,
                finished=keep,
                resume=self.resume,
                group=self.ranks or False,
                **self.shape,
            )
        except self.host.Incomplete as error:
            stop, result = error, error.result
        if not writes:
            if stop:
                raise Ended(str(stop), 130 if stop.cancelled else 1) from stop
            return
        if result.view_batch.size < self.config.view_batch_size:
            asked = self.config.view_batch_size
            self.console.note(f"a view batch size of {asked} did not fit; {result.view_batch.size} did")
        picture = self.shape["image"]
        place, lost = self.write(result, path, seed) if result.phases or picture else (None, [])
        if not stop and not lost:
            self.console.say(f"{path}: {result.evaluations:,} model calls")
            for file in spare:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            return
        reached = result.phases[-1][0].number if result.phases else 0
        if place is None:
            left = "nothing could be written" if lost else "nothing was finished yet"
        elif picture and reached < 2:
            left = f"no phase was finished; the picture as it was given is in {place}"
        else:
            left = f"{'the picture' if reached == last else f'the last finished phase, {reached} of {last},'} is in {place}"
        raise Ended("; ".join([*([str(stop)] if stop else []), *lost, left]), 130 if stop and stop.cancelled else 1) from stop

    def write(self, result: Any, path: Path, seed: int) -> tuple[Path | None, list[str]]:
        """Write the last finished phase to path, and the comparison beside it if it was asked for; raises nothing.

        Returns where the picture is, None if it could be written nowhere, and a line for each thing that is not as asked for.
        Phases that cannot be decoded are taken off the result, all but the base. A picture that was given is written as it
        was if there is no phase after it.
        """
        picture, lost = self.shape["image"], []
        image = None if result.phases else picture
        while image is None:
            phase = result.phases[-1][0]
            try:
                image = result.images()[0]
            except Exception as error:  # out of memory, or NaN
                trace(error)
                lost = lost or [f"phase {phase.number} cannot be decoded: {told(error)}"]
                if len(result.phases) == 1:
                    return None, lost
                result.phases.pop()
        try:
            given = picture is not None and len(result.phases) < 2  # and nothing made it
            parameters = "" if given else infotext(self.args, self.config, result, seed)
        except Exception as error:
            trace(error)
            parameters = ""
            lost.append(f"the picture's parameters are not in it: {told(error)}")
        try:
            place, why = write_somewhere(path, lambda file: save_png(file, image, parameters))
            if why:
                lost.append(f"{path} cannot be written: {why}")
            if self.args.compare and len(result.phases) > 1:
                lost += self.write_comparison(result, image, suffixed(path, "compare"))
        except Exception as error:
            trace(error)
            return None, [*lost, f"{path} cannot be written: {reason(error)}"]
        return place, lost

    def write_comparison(self, result: Any, image: Any, path: Path) -> list[str]:
        try:
            sheet = comparison(result.images(0)[0], image)
            place, why = write_somewhere(path, lambda file: save_png(file, sheet))
        except Exception as error:
            trace(error)
            return [f"there is no comparison: {told(error)}"]
        return [f"{path} cannot be written: {why}, and is in {place}"] if why else []

    def write_phase(self, result: Any, saved: Any, path: Path, seed: int) -> None:
        """The files of an intermediate phase."""

        def picture(file):
            save_png(file, result.images()[0], infotext(self.args, self.config, result, seed))

        self.write_resume(saved, path.with_suffix(".safetensors"), seed)
        self._write_beside(path, picture)

    def write_resume(self, saved: Any, file: Path, seed: int) -> None:
        """The file from which a job can go on after the phase."""

        def saved_phase(file):
            settings = settings_to_resume(self.args, self.config, self.pipe, self.plan, seed)
            file.write(replace(saved, settings=settings).to_bytes())

        self._write_beside(file, saved_phase)

    def _write_beside(self, file: Path, write: Callable[[Any], None]) -> None:
        """What fails here, a full disk for one, must not end what can still be finished."""
        try:
            place, why = write_somewhere(file, write)
            line = f"{file} cannot be written: {why}; it is in {place}" if why else ""
        except Exception as error:
            trace(error)
            line = f"{file} cannot be written: {told(error)}"
        if line:
            self.misplaced += self.args.save_phases
            self.console.note(line)


def control_parameters(args: argparse.Namespace) -> dict[str, str]:
    """What a picture's parameters say of the ControlNets, as the WebUI's sd-webui-controlnet writes and reads them."""
    from lib_demofusion.hosts.diffusers_controlnet import UNION_TITLES, UNION_TYPES

    settings = zip(*(of_each(args, f"control_{name}") for name in ("type", *CONTROL_NUMBERS)))
    parameters = {}
    for number, (model, (kind, *numbers)) in enumerate(zip(args.controlnet, settings)):
        values = {"Module": "none", "Model": re.sub("[,:]", "_", model_name(model))}
        values.update(zip(("Weight", "Guidance Start", "Guidance End"), (f"{value:.12g}" for value in numbers)))
        if kind not in (None, "none"):
            titles = dict(enumerate(UNION_TITLES))
            titles.update({name: titles[of] for name, of in UNION_TYPES.items()})
            values["Union Control Type"] = titles.get(int(kind) if kind.isdecimal() else kind.lower(), kind)
        parameters[f"ControlNet {number}"] = ", ".join(f"{key}: {value}" for key, value in values.items())
    return parameters


def webui_prompts(args: argparse.Namespace, config: DemoFusionConfig) -> tuple[str, DemoFusionConfig]:
    """The prompt as the WebUI must be given it, with its LoRAs, and the settings with the phases' prompts as it must be.

    There a phase prompt takes the place of the whole prompt, LoRAs included, unless it is LoRAs alone.
    """
    own, phases = (lora_tags(getattr(args, name)) for name in LORAS)
    prompt = as_webui_prompt(config.phase_prompt)
    texts = {"phase_prompt": " ".join([prompt, *own, *phases] if prompt else phases)}
    texts["phase_negative_prompt"] = as_webui_prompt(config.phase_negative_prompt)
    return " ".join(filter(None, [as_webui_prompt(args.prompt), *own])), replace(config, **texts)


def infotext(args: argparse.Namespace, config: DemoFusionConfig, result, seed: int) -> str:
    """The last phase's settings as the WebUI writes them.

    Size is the base's, or the given picture's, and the scale is the one that was reached.
    """
    phase, factor = result.phases[-1][0], result.pipe.vae_scale_factor
    h, w = (side * factor for side in result.plan.window)
    scale, start = phase.scale, {}
    if given := result.given:
        w, h = given.picture.size
        start = {"DemoFusion start": f"Picture {w}x{h}"}
        if given.mask is not None:
            start["Mask blur"] = args.mask_blur
        whole = phase is result.plan.phases[-1] and not args.size
        scale = config.scale if whole else given.times([side * factor for side in phase.size])
    values = {
        "Steps": args.steps,
        "Sampler": args.sampler,
        **({"Schedule type": args.schedule} if args.schedule else {}),
        "CFG scale": f"{args.cfg_scale:.12g}",
        "Seed": seed,
        "Size": f"{w}x{h}",
        "Model": model_name(args.model),
        **control_parameters(args),
    }
    prompt, config = webui_prompts(args, config)
    if phase.number > 1:
        named = {name: model_name(text) for name in ("phase_checkpoint", "upscaler") if (text := getattr(config, name))}
        values.update(replace(config, scale=scale, **named).to_infotext(), **start)
    values["Version"] = f"demofusion {__version__}"
    return parameters_text(prompt, as_webui_prompt(args.negative_prompt), values)
