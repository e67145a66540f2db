"""A finished phase on disk, from which a job can go on: its latents in a .safetensors file, beside its image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

FORMAT = "demofusion-phase-1"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields another path to write to, which becomes `path` if all goes well and is gone if not."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class SavedPhase:
    """What the phases after `number` need of those before.

    latents: [B, C, H, W], finished; base: [B, C, h, w], the first phase's, whose statistics each phase takes on.
    generators: [B, bytes], the states of the images' random generators, where they go on from phase to phase.
    made_by: the host, since each draws its noise in its own way. settings: whatever it needs to go on.
    """

    number: int
    latents: Tensor
    base: Tensor
    made_by: str
    generators: Tensor | None = None
    settings: str = ""

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {"latents": self.latents, "base": self.base, "generators": self.generators}
        notes = {"format": FORMAT, "phase": str(self.number), "made_by": self.made_by, "settings": self.settings}
        with whole_file(path) as part:
            # Clones, since two names must not share their memory, as the first phase and the base do.
            save_file({name: x.cpu().clone().contiguous() for name, x in tensors.items() if x is not None}, part, notes)


def read_saved(path: Path, made_by: str) -> SavedPhase:
    """The phase in a file that `write` made. Raises ValueError, one line, for any other file or another host's."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no such file to resume from: {path}")
    try:
        with safe_open(str(path), "pt") as file:
            notes: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if notes.get("format") != FORMAT:
        raise ValueError(f"{path} is no saved phase; one lies beside each image of an intermediate phase")
    if notes["made_by"] != made_by:
        raise ValueError(f"{path} was made by the {notes['made_by']}, whose noise the {made_by} cannot repeat; go on there")
    return SavedPhase(
        int(notes["phase"]), tensors["latents"], tensors["base"], made_by, tensors.get("generators"), notes["settings"]
    )
