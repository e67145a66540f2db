"""The autoencoder of a pipeline: latents to pictures and back, in tiles where they are large; and whose turn a pipeline is."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.hosts.diffusers_checkpoints import device_of, offloaded
from lib_demofusion.views import Size

# One lock for each network that is in use, so that pipelines which share one wait for each other too.
_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def one_at_a_time(*pipes: Any, networks: Iterable[Any] = ()) -> Iterator[None]:
    """Waits until no other thread uses the pipelines' networks, or one of these."""
    parts = [getattr(pipe, part, None) for pipe in pipes for part in ("unet", "vae", "text_encoder", "text_encoder_2")]
    with ExitStack() as stack:
        for network in sorted({x for x in (*parts, *networks) if x is not None}, key=id):  # all wait in one order
            with _LOCKS_LOCK:
                lock = _LOCKS.setdefault(network, threading.RLock())
            stack.enter_context(lock)
        yield


def decode_latents(pipe: Any, latents: Tensor, base: Size) -> list:
    """Latents [B, C, h, w] as PIL images, through the pipeline's autoencoder; in tiles, if they are larger than the base.

    The pipeline's watermark and safety checker see them as in its own call; a warning says if the latter took one.
    """
    from PIL import Image

    images = []
    with torch.inference_mode(), one_at_a_time(pipe):
        try:
            for z in latents.split(1):
                # As the pipeline's own postprocess, in place: it would make several copies of what may be a huge image.
                pixels = _marked(pipe, decode(pipe, z, base))
                pixels = pixels.div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
                images.append(_screened(pipe, Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())))
        finally:
            pipe.maybe_free_model_hooks()
    return images


def _marked(pipe: Any, image: Tensor) -> Tensor:
    """An image [1, 3, H, W] in -1..1 with the pipeline's watermark, if it has one."""
    watermark = getattr(pipe, "watermark", None)
    return image if watermark is None else watermark.apply_watermark(image)


def _screened(pipe: Any, image: Any) -> Any:
    """A PIL image as the pipeline's safety checker lets it pass, if it has one."""
    if getattr(pipe, "safety_checker", None) is None:
        return image
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image, dtype=np.float32)[None] / 255
    passed, flagged = pipe.run_safety_checker(pixels, device_of(pipe, pipe.unet), pipe.unet.dtype)
    if not np.any(flagged):
        return image
    line = "the checkpoint's safety checker did not let a picture pass; pipe.safety_checker = None takes it off"
    warnings.warn(line, stacklevel=2)
    return Image.fromarray((np.asarray(passed[0]) * 255).round().astype(np.uint8))


def decode(pipe: Any, latents: Tensor, base: Size) -> Tensor:
    """Latents [1, C, h, w] as an image [1, 3, H, W] in about -1..1, float32 on the CPU."""
    vae = pipe.vae
    with _enough_precision(vae):
        z = _unscaled(vae, latents.to(device_of(pipe, vae), vae.dtype))
        pixels = _in_tiles(tiles.decode, pipe, vae.decoder, lambda z: vae.decode(z).sample, z, base)
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("the autoencoder gave NaN; use --dtype float32")
    return pixels.cpu().float()


def encode(pipe: Any, image: Tensor, base: Size) -> Tensor:
    """An image [1, 3, H, W] in -1..1 as latents [1, C, h, w], float32, on the autoencoder's device."""
    vae = pipe.vae

    def encode(x: Tensor) -> Tensor:
        encoded = vae.encode(x)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents

    with _enough_precision(vae):
        pixels = image.to(device_of(pipe, vae), vae.dtype)
        latents = _in_tiles(tiles.encode, pipe, vae.encoder, encode, pixels, base)
    return _scaled(vae, latents).float()


def as_image(picture: Any) -> Tensor:
    """A PIL image, RGB, as [1, 3, H, W] in -1..1."""
    import numpy as np

    return torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def encode_picture(pipe: Any, picture: Any, size: Size, base: Size) -> Tensor:
    """A PIL image, resized to (h, w) latent pixels, as latents [1, C, h, w]."""
    from PIL import Image

    w, h = (side * pipe.vae_scale_factor for side in reversed(size))
    image = picture.resize((w, h), resample=Image.Resampling.LANCZOS)
    return encode(pipe, pipe.image_processor.preprocess(image), base)


def _moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mean and spread of the autoencoder's latents, [1, C, 1, 1] each; None if its config does not have both."""
    moments = [vae.config.get(key) for key in ("latents_mean", "latents_std")]
    return None if None in moments else tuple(torch.tensor(m).view(1, -1, 1, 1).to(like) for m in moments)


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """What the autoencoder gives, as the UNet takes it."""
    moments = _moments(vae, latents)
    if moments is None:
        return latents * vae.config.scaling_factor
    return (latents - moments[0]) * vae.config.scaling_factor / moments[1]


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Inverse of _scaled."""
    moments = _moments(vae, latents)
    if moments is None:
        return latents / vae.config.scaling_factor
    return latents * moments[1] / vae.config.scaling_factor + moments[0]


def _in_tiles(tiled: Callable, pipe: Any, network: Any, function: Callable[[Tensor], Tensor], x: Tensor, base: Size) -> Tensor:
    """function(x), through tiles.decode or tiles.encode, unless the user has set up diffusers' own tiling."""
    if getattr(pipe.vae, "use_tiling", False) or not tileable(network):
        return function(x)
    factor = pipe.vae_scale_factor
    tile = tiles.tile_for(network, x.device, base, factor)
    return tiled(function, x, network, factor=factor, tile=tile)


def tileable(network: Any) -> bool:
    """Whether our tiles can run an encoder or a decoder: not one of unknown layout, nor one offloaded layer by layer."""
    if offloaded(network):
        return False
    try:
        return bool(tiles.resamplers(network))
    except ValueError:
        return not tiles.group_norms(network)  # nothing that tiles must share


def overflows(vae: Any) -> bool:
    """Whether the autoencoder says in its config that it overflows in half precision, as SDXL's does, and is in it."""
    return vae.dtype == torch.float16 and vae.config.get("force_upcast", False)


@contextmanager
def _enough_precision(vae: Any) -> Iterator[None]:
    """Run an autoencoder that overflows in half precision in single precision."""
    if not overflows(vae):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)
