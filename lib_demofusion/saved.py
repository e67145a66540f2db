"""A finished phase on disk, from which a job can go on: its latents in a .safetensors file, beside its image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.files import check_file, whole_file

FORMAT = "demofusion-phase-1"
# The hosts that write such files, and whether their images' random generators go on from phase to phase.
HOSTS = {"command": True, "WebUI": False}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_SCALE = next(f.metadata["high"] for f in fields(DemoFusionConfig) if f.name == "scale")
MOST_PHASES = 99  # of a job that begins with a picture, more than there can be
LONGEST_HEADER = 10**7  # bytes; a saved phase's has a few thousand, a checkpoint's less than a million


@dataclass(frozen=True)
class SavedPhase:
    """What the phases after `number` need of those before.

    latents: [B, C, H, W], finished; base: [B, C, h, w], the first phase's, whose statistics each phase takes on.
    generators: [B, bytes], the states of the images' random generators, where they go on from phase to phase.
    made_by: the host, since each draws its noise in its own way. settings: whatever it needs to go on.
    from_picture: the job began with a given picture, of which base is the latents, shrunken to the window.
    Raises ValueError, one line, for what no phase can be.
    """

    number: int
    latents: Tensor
    base: Tensor
    made_by: str
    generators: Tensor | None = None
    settings: str = ""
    from_picture: bool = False

    def __post_init__(self) -> None:
        if self.made_by not in HOSTS:
            raise ValueError(f"{self.made_by!r} is no host that saves phases; {' and '.join(HOSTS)} are")
        number, (least, most) = self.number, (2, MOST_PHASES) if self.from_picture else (1, LARGEST_SCALE)
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise ValueError(f"the phase must be a whole number from {least} to {most}, got {number!r}")
        for name, x in (("latents", self.latents), ("base", self.base)):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name} must be a tensor, got a {type(x).__name__}")
            if x.ndim != 4 or 0 in x.shape:
                raise ValueError(f"{name} must have four dimensions (images, channels, height, width), got {_sides(x.shape)}")
            if x.dtype not in FLOATS:
                raise ValueError(f"{name} must be floating point numbers, got {str(x.dtype).removeprefix('torch.')}")
            if not torch.isfinite(x).all():
                raise ValueError(f"{name} must be finite, and some are NaN or infinite")
        self._check_sizes()
        self._check_generators()

    def _check_sizes(self) -> None:
        if self.latents.shape[:2] != self.base.shape[:2]:
            raise ValueError(
                "latents and base must agree in images and channels, got "
                f"{_sides(self.latents.shape[:2])} and {_sides(self.base.shape[:2])}"
            )
        if self.from_picture:  # whose phases are of the result's size
            if any(side < of for side, of in zip(self.latents.shape[-2:], self.base.shape[-2:])):
                raise ValueError("the phase is smaller than its windows")
            return
        # The scales that make, rounded, this side of that one; both sides must have one in common.
        pairs = list(zip(self.latents.shape[-2:], self.base.shape[-2:]))
        low, high = max((side - 0.5) / of for side, of in pairs), min((side + 0.5) / of for side, of in pairs)
        most = min(2 ** (self.number - 1), LARGEST_SCALE)  # phases grow by one, or double; the last ends where it likes
        before = [(side, (self.number - 1) * of) for side, of in pairs]  # the least that the phase before can have
        grown = all(a >= b for a, b in before) and any(a > b for a, b in before)
        if not (low <= high and low <= most and grown if self.number > 1 else self.latents.shape == self.base.shape):
            sizes = " from ".join(_sides(x.shape[-2:]) for x in (self.latents, self.base))
            raise ValueError(f"no phase {self.number} makes latents of {sizes}")
        if self.number == 1 and not torch.equal(self.latents.float(), self.base.float()):
            raise ValueError("phase 1 is the base, and latents and base are not the same")

    def _check_generators(self) -> None:
        if not HOSTS[self.made_by]:
            if self.generators is not None:
                raise ValueError(f"the {self.made_by} saves no generators")
            return
        if self.generators is None:
            raise ValueError("the generators are missing")
        if not isinstance(self.generators, Tensor):
            raise ValueError(f"generators must be a tensor, got a {type(self.generators).__name__}")
        if self.generators.dtype != torch.uint8 or self.generators.ndim != 2 or len(self.generators) != len(self.latents):
            raise ValueError(f"generators must be bytes, a row for each image, got {_sides(self.generators.shape)}")
        for state in self.generators:
            try:
                torch.Generator().set_state(state.clone())  # torch takes no row of a tensor
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"generators must be states of torch's generator: {first_line(error)}") from error

    def to_bytes(self) -> bytes:
        """The file's content."""
        from safetensors.torch import save

        tensors = {"latents": self.latents, "base": self.base, "generators": self.generators}
        notes = {"format": FORMAT, "phase": str(self.number), "made_by": self.made_by, "settings": self.settings}
        if self.from_picture:
            notes["from_picture"] = "yes"
        # Clones, since two names must not share their memory, as the first phase and the base do.
        return save({name: x.cpu().clone().contiguous() for name, x in tensors.items() if x is not None}, notes)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with whole_file(path) as file:
            file.write(self.to_bytes())


def read_saved(path: Path, made_by: str) -> SavedPhase:
    """The phase in a file that `write` made. Raises ValueError, one line that names the file, for any other file.

    Also for one of another host; what its settings say is for the host to check.
    """
    check_file(path, "file to resume from")
    header = _header(path)
    notes = header.pop("__metadata__", None)
    notes = notes if isinstance(notes, dict) and all(isinstance(x, str) for x in notes.values()) else {}
    if notes.get("format") != FORMAT:
        if notes.get("format", "").startswith(FORMAT.rstrip("1")):
            raise ValueError(f"{path} was saved by another version, as {notes['format']}; this one reads {FORMAT}")
        raise ValueError(f"{path} is no saved phase; one lies beside each image of an intermediate phase")
    try:
        _check_names("note", notes, ("phase", "made_by", "settings"))
        if notes["made_by"] in HOSTS and notes["made_by"] != made_by:
            raise ValueError(f"it was made by the {notes['made_by']}, whose noise the {made_by} cannot repeat; go on there")
        _check_names("tensor", header, ("latents", "base"))
        if unknown := sorted(set(header) - {"latents", "base", "generators"}):
            raise ValueError(f"unknown: {', '.join(unknown)}")
        tensors = _tensors(path)
        number = int(notes["phase"]) if re.fullmatch("[0-9]{1,2}", notes["phase"]) else notes["phase"][:20]
        own = dict(made_by=notes["made_by"], settings=notes["settings"], from_picture="from_picture" in notes)
        return SavedPhase(number, **own, **tensors)
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed: {error}") from error


def read_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError, one line, for what is none, a name that is there twice, NaN and infinity."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r} is there twice")
            found[name] = value
        return found

    def none(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=none)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _header(path: Path) -> dict[str, Any]:
    """A .safetensors file's names, among them "__metadata__"."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if 0 < size <= LONGEST_HEADER else b""
        if not text or len(text) != size or not text.startswith(b"{"):
            raise ValueError("it is no .safetensors file, or only a part of one")
        return read_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except Exception as error:  # safetensors' own, and what torch makes of a type it does not know
        raise ValueError(f"its tensors cannot be read: {first_line(error)}") from error


def _check_names(kind: str, found: Iterable[str], needed: Iterable[str]) -> None:
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"the {kind} {', '.join(missing)} is missing")


def _sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
