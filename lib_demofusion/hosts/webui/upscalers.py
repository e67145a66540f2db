"""What enlarges a phase, or a given picture, by one of the host's upscalers, as its Hires. fix does it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from modules import images, shared
from PIL import Image
from torch import Tensor

from lib_demofusion.config import first_line
from lib_demofusion.fusion import Cancelled
from lib_demofusion.hosts.webui.decoding import shadowed
from lib_demofusion.memory import OutOfMemory, is_out_of_memory
from lib_demofusion.phases import Upscaler
from lib_demofusion.views import Size


def one_of(name: str, what: str, known: Iterable[str]) -> str:
    """A name as the host writes it, whatever its case. Raises ValueError, one line with what there is, for an unknown one."""
    known = list(known)
    wanted = name.strip()
    found = wanted if wanted in known else next((own for own in known if own.lower() == wanted.lower()), None)
    if found is None:
        raise ValueError(f"there is no {what} {name!r}; there are: {', '.join(known) or 'none'}")
    return found


def upscaler_named(name: str) -> str:
    """The host's own name of an upscaler; "" stays. Raises ValueError, one line, if it has none of that name."""
    known = [*shared.latent_upscale_modes, *(upscaler.name for upscaler in shared.sd_upscalers)]
    return name and one_of(name, "upscaler", known)


def is_latent(name: str) -> bool:
    """Whether it enlarges latents, and no images."""
    return name in shared.latent_upscale_modes


def stopped() -> bool:
    """Whether the user wants no more of this; upscalers stop halfway then, and so may give back what they were given."""
    return shared.state.interrupted or shared.state.skipped


def upscaler_for(name: str) -> Upscaler | None:
    """What enlarges a phase; None: what the settings say without a name."""
    if not name:
        return None
    if is_latent(name):
        mode = shared.latent_upscale_modes[name]
        return Upscaler(latents=lambda z, size: F.interpolate(z, size=size, mode=mode["mode"], antialias=mode["antialias"]))

    def enlarged(image: Tensor, size: Size) -> Tensor:
        pixels = image[0].float().add(1).mul(127.5).clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()
        made = resized(Image.fromarray(pixels), size[1], size[0], name)
        if stopped():
            raise Cancelled
        return pixels_of(made).to(image.device)

    return Upscaler(images=enlarged)


def resized(image: Any, width: int, height: int, name: str, mode: int = 0) -> Any:
    """A PIL image, RGB, at another size by an upscaler of the host's, in one of the host's resize modes.

    Raises RuntimeError, one line, where the upscaler fails: the host itself goes on without it then. Where it was stopped,
    what comes back may be anything.
    """
    scaler = next((known.scaler for known in shared.sd_upscalers if known.name == name), None)
    failed = []

    def watched(given: Any, *args: Any) -> Any:
        made = whole(given, *args)
        if made is given:
            failed.append(True)
        return made

    try:
        if name == "None":
            return images.resize_image(mode, image, width, height, upscaler_name=name)
        whole = scaler.do_upscale
        with shadowed(scaler, "do_upscale", watched):
            made = images.resize_image(mode, image, width, height, upscaler_name=name).convert("RGB")
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"out of memory in the upscaler {name}; another one or a smaller scale needs less") from error
        raise RuntimeError(f"the upscaler {name} says: {first_line(error)}") from error
    if failed and not stopped():
        raise RuntimeError(f"the upscaler {name} could not be loaded, as the console says; choose another")
    return made


def pixels_of(image: Any) -> Tensor:
    """A PIL image, RGB, as numbers in -1..1, [1, 3, H, W]."""
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None].div_(127.5).sub_(1)
