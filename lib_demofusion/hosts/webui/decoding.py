"""The host's autoencoder; what is larger than the base is decoded, or encoded, in tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from modules import devices, processing, sd_samplers_common, shared
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.views import Size


def may_use_tiles(model: Any, kind: str = "decode") -> bool:
    """Whether the host would decode, or encode, with the whole of a network that we can run in tiles, and nobody else does."""
    network = host.coder(model, kind)
    if network is None or getattr(shared.opts, f"sd_vae_{kind}_method") != "Full":
        return False
    if getattr(network.forward, "__func__", None) is not type(network).forward:  # Tiled VAE, for one, has taken its place
        return False
    try:
        tiles.resamplers(network)
    except ValueError:
        return False
    return True


def decode(model: Any, latents: Tensor, base: Size) -> Any:
    """latents [B, C, h, w] as the host decodes them, images [3, H, W] in -1..1 on the CPU; large ones in tiles.

    base: (h, w) of what the model makes at once, latent pixels.
    """
    with _in_tiles(model, base, "decode", tiles.decode):
        checked = {name: True for name in ("check_for_nans",) if name in signature(processing.decode_latent_batch).parameters}
        made = processing.decode_latent_batch(model, latents, devices.cpu, **checked)
    for image in made:
        host.check_finite(image)
    return made


@contextmanager
def encoding(model: Any, base: Size) -> Iterator[None]:
    """What is encoded meanwhile, by whomever, is encoded as `encode` does it."""
    with _in_tiles(model, base, "encode", tiles.encode), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def encode(model: Any, image: Tensor, base: Size) -> Tensor:
    """An image [1, 3, H, W] in -1..1 as latents, as the host encodes it; a large one in tiles.

    The host draws them from a distribution, whose spread is next to nothing, with the noise of all programs; here always
    the same noise, so that a seed gives one picture.
    """
    with encoding(model, base):
        return sd_samplers_common.images_tensor_to_samples(image.div(2).add_(0.5), model=model)


@contextmanager
def _in_tiles(model: Any, base: Size, kind: str, tiled: Callable) -> Iterator[None]:
    """The model decodes, or encodes, in tiles, where that may be: its method is shadowed on this one object."""
    name = f"{kind}_first_stage"
    whole = getattr(model, name)

    def code(x: Tensor) -> Any:
        network = host.coder(model, kind)
        with _coding:
            function, x = host.coding(model, kind, whole, x, base)
            tile = tiles.tile_for(network, x.device, base)
            made = [tiled(function, part, network, tile=tile) for part in x.split(1)]
            return made[0] if len(made) == 1 else torch.cat(made)

    latents, shared.state.current_latent = shared.state.current_latent, None  # nor does the host begin a preview now
    try:
        with shadowed(model, name, code if may_use_tiles(model, kind) else whole):
            yield
    finally:
        shared.state.current_latent = latents


# The host decodes a preview whenever its page asks, on another thread. What decodes in tiles changes the decoder meanwhile.
_coding = threading.RLock()


@contextmanager
def in_turns(model: Any) -> Iterator[None]:
    """While it lasts the model decodes for one thread at a time."""
    whole = model.decode_first_stage

    def decode(*args: Any, **kwargs: Any) -> Any:
        with _coding:
            return whole(*args, **kwargs)

    with shadowed(model, "decode_first_stage", decode):
        yield


@contextmanager
def shadowed(thing: Any, name: str, value: Any) -> Iterator[None]:
    """thing.name is value, on this one object; then it is as before."""
    before = vars(thing).get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)
        if before is not None:
            setattr(thing, name, before)
