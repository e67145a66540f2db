"""What enlarges a phase on diffusers: the WebUI's latent upscalers, ways to resample an image, and networks in files.

The package spandrel reads the networks; it is imported only where a file is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_demofusion.config import first_line
from lib_demofusion.decode import Tile, shares, spans
from lib_demofusion.files import check_file
from lib_demofusion.fusion import Cancelled
from lib_demofusion.memory import OutOfMemory, unless_out_of_memory
from lib_demofusion.phases import BICUBIC, Upscaler
from lib_demofusion.views import Size

TILES = (256, 128, 64)  # pixels that a network is given at once; the next where the memory does not do
OVERLAP = 32  # pixels that neighbours share, and fade into one another in the middle of
LATENT: dict[str, dict[str, Any]] = {  # how torch interpolates
    "Latent": {"mode": "bilinear"},
    "Latent (antialiased)": {"mode": "bilinear", "antialias": True},
    "Latent (bicubic)": {"mode": "bicubic"},
    "Latent (bicubic antialiased)": {"mode": "bicubic", "antialias": True},
    "Latent (nearest)": {"mode": "nearest"},
    "Latent (nearest-exact)": {"mode": "nearest-exact"},
}
SUFFIXES = (".pth", ".safetensors")


def pillow(image: Tensor, size: Size, resampling: str) -> Tensor:
    """An image [1, 3, h, w], resized to (H, W) as Pillow does it, without its rounding to bytes: [1, 3, H, W] on the CPU."""
    import numpy as np
    from PIL import Image

    channels = [Image.fromarray(channel.numpy()) for channel in image[0].float().cpu()]
    resized = [np.array(channel.resize(size[::-1], Image.Resampling[resampling])) for channel in channels]
    return torch.from_numpy(np.stack(resized))[None]


IMAGES: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "Lanczos": partial(pillow, resampling="LANCZOS"),
    "Bicubic": BICUBIC.images,
    "Nearest": partial(pillow, resampling="NEAREST"),
}
UPSCALERS = (*LATENT, *IMAGES)


def upscaler_named(name: str) -> str:
    """An upscaler by its name, whatever the case, as it is written; or the file that is named, as it is.

    Raises ValueError, one line, if there is none.
    """
    for known in ("", *UPSCALERS):
        if name.lower() == known.lower():
            return known
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"no upscaler called {name!r}; there are: {', '.join(UPSCALERS)}, or a .pth or .safetensors file")
    check_file(path, "upscaler")
    return name


def load_upscaler(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cancelled: Callable[[], bool] = lambda: False,
) -> Upscaler | None:
    """What enlarges a phase by that name, or with the network in that file; None for "".

    device, dtype: that the network computes on and, where it can, in. cancelled: asked before each of its calls. Raises
    ValueError, one line, for a name that is none, and for a file that holds no such network.
    """
    name = upscaler_named(name)
    if name in LATENT:
        return Upscaler(latents=lambda latents, size: F.interpolate(latents, size=size, **LATENT[name]))
    if name in IMAGES:
        return Upscaler(IMAGES[name])
    if not name:
        return None
    network = _load(Path(name))
    half = {torch.float16: network.supports_half, torch.bfloat16: network.supports_bfloat16}
    network.to(torch.device(device), dtype if half.get(dtype, False) else torch.float32)
    return Upscaler(partial(_enlarge, network, cancelled))


def _load(path: Path) -> Any:
    """spandrel's network in a file."""
    try:
        import spandrel
    except ImportError as error:
        raise ValueError(
            f"{error.name} is missing, which upscalers in files need; pip install 'demofusion[upscaler]'"
        ) from error
    except Exception as error:  # torchvision's, if it is of another torch
        raise ValueError(f"spandrel, which upscalers in files need, cannot be imported: {first_line(error)}") from error
    try:
        network = spandrel.ModelLoader("cpu").load_from_file(path)
    except spandrel.UnsupportedModelError as error:
        raise ValueError(f"{path} is no upscaler that spandrel knows; use another one") from error
    except Exception as error:  # a broken file surfaces as nearly any type
        raise ValueError(f"{path} cannot be loaded as an upscaler: {first_line(error)}") from error
    if not isinstance(network, spandrel.ImageModelDescriptor) or network.scale < 2:
        raise ValueError(f"{path} holds a network that enlarges nothing; use another one")
    if (network.input_channels, network.output_channels) != (3, 3):
        raise ValueError(f"{path} holds an upscaler for images of {network.input_channels} channels; use one for RGB")
    network.model.requires_grad_(False)
    return network.eval()


def _enlarge(network: Any, cancelled: Callable[[], bool], image: Tensor, size: Size) -> Tensor:
    """An image [1, 3, h, w] in -1..1 as [1, 3, *size]: through the network as often as that takes, then Lanczos."""
    image = (image.float() / 2 + 0.5).clamp_(0, 1)
    while any(side < wanted for side, wanted in zip(image.shape[-2:], size)):
        image = _in_tiles(network, cancelled, image)
    if tuple(image.shape[-2:]) != tuple(size):
        image = IMAGES["Lanczos"](image, size)
    return image * 2 - 1


def _in_tiles(network: Any, cancelled: Callable[[], bool], image: Tensor) -> Tensor:
    """An image [1, 3, h, w] in 0..1 through the network, tile by tile: [1, 3, scale * h, scale * w] on the CPU."""
    for side in TILES:
        larger = unless_out_of_memory(lambda side=side: _tiled(network, cancelled, image, side), network.device)
        if larger is not None:
            return larger
    raise OutOfMemory(f"out of memory in the upscaler with tiles of {TILES[-1]} pixels; a smaller one needs less")


def _tiled(network: Any, cancelled: Callable[[], bool], image: Tensor, side: int) -> Tensor:
    scale = network.scale
    rows, columns = (spans(length, side, OVERLAP) for length in image.shape[-2:])
    larger = torch.zeros(1, 3, *(scale * length for length in image.shape[-2:]))
    for row, down in zip(rows, shares(rows, OVERLAP, scale)):
        for column, across in zip(columns, shares(columns, OVERLAP, scale)):
            if cancelled():
                raise Cancelled
            tile = Tile(row, column)
            made = network(tile.crop(image).to(network.device, network.dtype)).cpu().float()
            tile.crop(larger, scale).add_(made * down[:, None] * across)
    return larger


def upscaler_bytes(upscaler: str) -> int:
    """What the network in an upscaler's file takes, about; 0 where it is none."""
    name = upscaler_named(upscaler)
    return 0 if name in ("", *UPSCALERS) else Path(name).stat().st_size
