"""The phases' own checkpoint: which one is meant, whether it can follow the base's, and its being loaded in between."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules import errors, sd_models, shared

from lib_demofusion.config import first_line
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.settings import NAME, say
from lib_demofusion.memory import OutOfMemory, is_out_of_memory

STEM = "model.diffusion_model.input_blocks.0.0.weight"  # what the UNet begins with; its second side are the inputs
KINDS = {8: "an instruct-pix2pix checkpoint", 9: "an inpainting checkpoint"}  # by how many inputs
LONGEST = 10**8  # bytes of a .safetensors file's header
SD, SDXL, SD3 = "Stable Diffusion 1 or 2", "SDXL", "Stable Diffusion 3"


@dataclass(frozen=True)
class Kind:
    """What must be alike. family: whose latents it has. inputs: channels that the UNet is given; None: not known."""

    family: str
    inputs: int | None


def checkpoint_named(name: str) -> Any:
    """The host's CheckpointInfo of a name, as the host looks for it; None for "". Raises ValueError, one line, if none is."""
    if not name:
        return None
    info = sd_models.get_closet_checkpoint_match(name)
    if info is None:
        known = [own.short_title for own in sd_models.checkpoints_list.values()]
        raise ValueError(f"there is no checkpoint {name!r}; there are: {', '.join(known)}")
    return info


def another(name: str) -> Any:
    """The CheckpointInfo of a name; None where that is the one with which the host begins a base."""
    info = checkpoint_named(name)
    return None if info is None or info.filename == sd_models.select_checkpoint().filename else info


def check_kind(info: Any) -> None:
    """Raises ValueError, one line, where a file's header says that its checkpoint cannot follow the loaded one."""
    if info is None:
        return
    if not Path(info.filename).is_file():
        raise ValueError(f"the file of the checkpoint {info.name_for_extra} is not there; refresh the list of checkpoints")
    if Path(info.filename).suffix.lower() == ".safetensors":  # others say nothing until they are loaded
        _check_alike(_kind_in(info), _kind_of(shared.sd_model), info)


def _kind_in(info: Any) -> Kind:
    """By the names of a .safetensors file's tensors, as the host tells kinds."""
    try:
        with open(info.filename, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST:
                raise ValueError
            header = json.loads(file.read(length))
        shapes = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the checkpoint {info.name_for_extra} cannot be read; choose another") from error
    if "model.diffusion_model.x_embedder.proj.weight" in shapes:
        return Kind(SD3, None)
    if STEM not in shapes:
        raise ValueError(f"{info.name_for_extra} is no checkpoint with a UNet of Stable Diffusion; choose another")
    inner = shapes.get("conditioner.embedders.0.model.ln_final.weight")  # SD 2.1 Turbo is written as SDXL's refiner
    sdxl = any(name.startswith("conditioner.") for name in shapes) and not (inner and math.prod(inner) == 1024)
    return Kind(SDXL if sdxl else SD, shapes[STEM][1])


def _kind_of(model: Any) -> Kind:
    """Of a model that is loaded."""
    if getattr(model, "is_sd3", False):
        return Kind(SD3, None)
    inputs = getattr(host.unet(model), "in_channels", None)
    return Kind(SDXL if getattr(model, "is_sdxl", False) else SD, inputs)


def _check_alike(own: Kind, base: Kind, info: Any) -> None:
    name = info.name_for_extra
    if own.family != base.family:
        raise ValueError(f"the checkpoint {name} is {own.family}, and the base's is {base.family}; choose one of its kind")
    if own.inputs != base.inputs and own.inputs in KINDS:
        raise ValueError(f"{name} is {KINDS[own.inputs]}, and the base's is none; choose a text-to-image checkpoint")
    if own.inputs not in (base.inputs, 4, None):
        raise ValueError(f"{name} wants {own.inputs} channels and not 4 or the base's; choose a text-to-image checkpoint")


class Checkpoint:
    """The phases' checkpoint in place of the loaded one, from `load` to `put_back`.

    info: the host's CheckpointInfo; None: the phases have the base's, and nothing happens here. activate: makes the phases'
    networks active, which loading may have let go.
    """

    def __init__(self, p: Any, info: Any, activate: Callable[[], None]):
        self.p = p
        self.info = info
        self.activate = activate
        self.before: Any = None  # of what was loaded, while it is not
        self.hash: Any = None
        self.layers: Any = None  # of which the host knew, for tiling

    @property
    def waits(self) -> bool:
        """Whether what is loaded now is still the base's."""
        return self.info is not None and self.before is None

    def load(self) -> None:
        """In place of what is loaded. Raises RuntimeError or ValueError, one line, if it cannot be, or is of another kind."""
        base, self.before = _kind_of(shared.sd_model), shared.sd_model.sd_checkpoint_info
        self.hash, self.layers = shared.opts.data.get("sd_checkpoint_hash"), host.layers_that_wrap()
        shared.state.textinfo = f"{NAME} loads {self.info.name_for_extra}"
        try:
            self._swap(self.info)
        except Exception as error:
            self._mend()
            if is_out_of_memory(error):
                raise OutOfMemory(f"out of memory in loading {self.info.name_for_extra}; a smaller one needs less") from error
            raise RuntimeError(f"{self.info.name_for_extra} could not be loaded: {first_line(error)}") from error
        _check_alike(_kind_of(shared.sd_model), base, self.info)
        host.wrap_around(False)  # as of all models while phases run
        self.activate()

    def put_back(self) -> bool:
        """Load what was loaded before, whatever has become of it; says whether there was a need to.

        What fails here is told, and ends nothing.
        """
        if self.before is None:
            return False
        info, self.before, self.info = self.before, None, None
        try:
            shared.state.current_latent = None
            host.load_again(self.p, info, self.layers)
        except Exception as error:
            errors.report(f"{NAME}: {info.name_for_extra} was not loaded again", exc_info=True)
            say(self.p, "note", f"{info.name_for_extra} could not be loaded again: {first_line(error)}; choose it once more")
        shared.opts.data["sd_checkpoint_hash"] = self.hash
        return True

    def _mend(self) -> None:
        """What fails to load leaves the host without a model, or with one that is taken apart."""
        self.layers = None
        try:
            self._swap(self.before, again=True)
        except Exception:  # `put_back` tells of it
            errors.report(f"{NAME}: {self.before.name_for_extra} was not loaded again", exc_info=True)

    def _swap(self, info: Any, again: bool = False) -> None:
        shared.state.current_latent = None  # no preview by half a model
        host.load_checkpoint(self.p, info, again)
