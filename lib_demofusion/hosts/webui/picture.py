"""A given picture: what a job in img2img, or of the gallery, starts from, and what of it stays as it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from modules import devices, images, masking, processing, rng, shared
from PIL import Image, ImageOps
from torch import Tensor

from lib_demofusion.areas import Areas, areas_of, asks_for_areas
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.webui.decoding import encode, encoding
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.hosts.webui.settings import PICTURE
from lib_demofusion.hosts.webui.upscalers import is_latent, pixels_of, resized, stopped, upscaler_for
from lib_demofusion.original import Original
from lib_demofusion.phases import enlarge
from lib_demofusion.views import Size

WRAPPED = 64  # pixels by which a picture that tiles is grown on each side before it is encoded
FILL, ORIGINAL, LATENT_NOISE, LATENT_NOTHING = range(4)  # the host's "Masked content"
LATENT_RESIZE = 3  # the last of the host's resize modes


class Start:
    """What one job starts from. Lives from the job's first callback to its last; puts back what it changes on p.

    pictures: PIL images, one or as many as the batch has. start_from: one of settings.STARTS. window: the base's (height,
    width) in pixels, if the picture is one that the model has drawn at once; else it follows from the model's own size.
    upscaler: the host's name of what enlarges the pictures; "": what its settings choose for img2img.
    """

    def __init__(self, p: Any, pictures: list, start_from: str, window: Size | None = None, upscaler: str = ""):
        self.p = p
        self.pictures = [images.flatten(picture, shared.opts.img2img_background_color) for picture in pictures]
        self.start_from = start_from
        self.window = window
        self.upscaler = upscaler
        self._enlarged: dict[int, Any] = {}  # by that upscaler, by their place in the batch, at the size asked for last
        self.resize_mode = getattr(p, "resize_mode", 0)
        self.mask = _mask_of(p)
        self.reached: Size | None = None  # (height, width) in pixels of what the job made; None until then
        self._before: dict[str, Any] = {}  # what p had

    @property
    def from_picture(self) -> bool:
        """Whether no base is sampled."""
        return self.start_from == PICTURE

    @property
    def size(self) -> Size:
        """(height, width) of the picture, pixels."""
        return self.pictures[0].height, self.pictures[0].width

    def set(self, **values: Any) -> None:
        """Change fields of p, until `put_back`."""
        for name, value in values.items():
            self._before.setdefault(name, getattr(self.p, name))
            setattr(self.p, name, value)

    def put_back(self) -> None:
        for name, value in self._before.items():
            setattr(self.p, name, value)
        self._before.clear()

    def skip_base(self) -> None:
        """The next sampling of p, the base's, makes no model call: its sampler gives back the picture, at the window's size."""
        sampler = self.p.sampler
        name = "sample_img2img" if hasattr(self.p, "init_images") else "sample"

        def as_it_is(p: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            delattr(sampler, name)
            if name == "sample_img2img":
                return x
            return self._encoded((p.height // FACTOR, p.width // FACTOR))

        setattr(sampler, name, as_it_is)

    def base(self, made: Tensor, another: bool = False) -> Tensor:
        """The base latents, whose moments the phases keep: as the host made them, or of the picture alone.

        img2img encodes with the noise of all programs, and puts other things under a mask. In txt2img they are `skip_base`'s,
        unless another checkpoint has been loaded since.
        """
        again = self.from_picture and (another or hasattr(self.p, "init_images"))
        return self._encoded(tuple(made.shape[-2:])).to(made) if again else made

    def original(self, config: DemoFusionConfig) -> Original | None:
        """The picture for the phases; None where they have no need of it."""
        if not self.from_picture and self.mask is None:
            return None
        areas = Areas()
        if self.from_picture and asks_for_areas(config):
            areas = Areas.cat([areas_of(pixels_of(picture).to(devices.device), config, FACTOR) for picture in self.pictures])
        return Original(
            self._encoded,
            areas=areas,
            mask=None if self.mask is None else self._latent_mask,
            fill=self._filled if self.mask is not None else None,
        )

    def conditioning(self, latents: Tensor, base: Size) -> Tensor:
        """What inpainting, depth and unCLIP checkpoints see of the picture, as the host shows it, at the latents' size."""
        height, width = (side * FACTOR for side in latents.shape[-2:])
        if not host.sees_picture(self.p.sampler):
            return latents.new_zeros(len(latents), 5, 1, 1)
        mask = None if self.mask is None else self._resized(self.mask, height, width)
        seen = []
        for i in range(len(self.pictures)):  # tiles take one image at a time
            source = pixels_of(self._drawn(i, height, width)).to(latents.device)
            with encoding(self.p.sd_model, base):
                seen.append(self.p.img2img_image_conditioning(source, latents[i : i + 1], mask, self.p.mask_round))
        return torch.cat(seen).expand(len(latents), *seen[0].shape[1:])

    def hand_over(self, ps: Any) -> None:
        """Let the host's job end with the picture as it was given; without one, with the base."""
        self.reached = None
        if self.from_picture:
            ps.samples = self.as_given(len(ps.samples))
            self.reached = self.size

    def as_given(self, count: int) -> Any:
        """The picture as it was given, as the host's decoder would have made it, once for each of `count` images."""
        made = processing.DecodedSamples()
        for i in range(count):
            pixels = np.asarray(self.pictures[i % len(self.pictures)])
            # A quarter of a grey level more: the host cuts off what lies behind the point.
            made.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().add_(0.25).div_(127.5).sub_(1))
        return made

    def overlay(self, args: Any) -> None:
        """The host's overlay (PostProcessMaskOverlayArgs): the picture around the mask, at the size that was reached."""
        if self.mask is None or self.reached is None or args.mask_for_overlay is None:
            return
        height, width = self.reached
        kept = Image.fromarray(
            (np.asarray(self._resized(self.mask, height, width), np.float32) * 2).clip(0, 255).astype(np.uint8)
        )
        args.mask_for_overlay = kept
        if self.from_picture and self.reached == self.size:
            args.overlay_image = None  # it is as it was given; half clear pixels would round
        elif args.overlay_image is not None:  # the settings want one
            around = Image.new("RGBa", (width, height))
            picture = self._resized(self.pictures[args.index % len(self.pictures)], height, width)
            around.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(kept))
            args.overlay_image = around.convert("RGBA")

    def _resized(self, image: Any, height: int, width: int) -> Any:
        """As the host resizes it, by the mode and the upscaler that are chosen; nothing where it has that size."""
        if image.size == (width, height):
            return image
        mode = self.resize_mode if self.resize_mode != LATENT_RESIZE else 0
        place = next((i for i, own in enumerate(self.pictures) if own is image), None)
        if place is None or not self.upscaler or is_latent(self.upscaler):
            return images.resize_image(mode, image, width, height).convert(image.mode)
        known = self._enlarged.get(place)
        if known is None or known.size != (width, height):
            known = resized(image, width, height, self.upscaler, mode)
            if not stopped():
                self._enlarged[place] = known
        return known

    def _drawn(self, i: int, height: int, width: int) -> Any:
        """What the base and the phases begin with: a picture, where "Masked content" says so with its masked area filled."""
        picture = self._resized(self.pictures[i], height, width)
        if self.mask is not None and self.p.inpainting_fill != ORIGINAL:
            picture = masking.fill(picture, self._resized(self.mask, height, width))
        return picture

    def _encoded(self, size: Size) -> Tensor:
        """The picture at (H, W) latent pixels, [B, C, H, W]."""
        own = tuple(max(round(side / FACTOR), 1) for side in self.size)
        if is_latent(self.upscaler) and math.prod(size) > math.prod(own):
            how = upscaler_for(self.upscaler)
            return enlarge(self._encoded(own), size, DemoFusionConfig(), None, None, FACTOR, host.tiles(self.p), how)[0]
        height, width = (side * FACTOR for side in size)
        base = (self.p.height // FACTOR, self.p.width // FACTOR)
        encoded = []
        with host.autocast():
            for i in range(len(self.pictures)):
                if host.tiles(self.p):
                    z = encode(self.p.sd_model, pixels_of(self._wrapped(i, height, width)), base)
                    margin = WRAPPED // FACTOR
                    encoded.append(z[..., margin:-margin, margin:-margin])
                else:
                    encoded.append(encode(self.p.sd_model, pixels_of(self._drawn(i, height, width)), base))
        return torch.cat(encoded).expand(len(self.p.seeds), -1, -1, -1)

    def _wrapped(self, i: int, height: int, width: int) -> Any:
        """A picture that tiles, with what lies beyond its borders, by WRAPPED pixels on each side."""
        pixels = np.asarray(self._drawn(i, height, width))
        margins = [(WRAPPED, WRAPPED), (WRAPPED, WRAPPED), (0, 0)]
        return Image.fromarray(np.pad(pixels, margins, mode="wrap"))

    def _latent_mask(self, size: Size) -> Tensor:
        """Where the picture is to change, [1, 1, *size], as the host has it for the base."""
        height, width = (side * FACTOR for side in size)
        mask = self._resized(self.mask, height, width).convert("RGB").resize((size[1], size[0]))
        mask = np.asarray(mask, np.float32)[..., 0] / 255
        return torch.from_numpy(np.around(mask) if self.p.mask_round else mask)[None, None].to(devices.device)

    def _filled(self, latents: Tensor) -> Tensor:
        """Latents of the picture, [B, C, H, W], as "Masked content" wants them under the mask."""
        if self.p.inpainting_fill == LATENT_NOISE:
            return rng.ImageRNG(tuple(latents.shape[1:]), self.p.seeds).next().to(latents)
        return torch.zeros_like(latents) if self.p.inpainting_fill == LATENT_NOTHING else latents


def _mask_of(p: Any) -> Any:
    """The mask of p as the host reads it, inverted and blurred as asked for: a PIL image of one channel, or None."""
    mask = getattr(p, "image_mask", None)
    if mask is None:
        return None
    mask = processing.create_binary_mask(mask, round=p.mask_round)
    if p.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    pixels = torch.from_numpy(np.array(mask, np.float32))[None, None]
    for blur, transposed in ((p.mask_blur_x, False), (p.mask_blur_y, True)):
        if blur > 0:
            pixels = _blurred(pixels.mT, blur).mT if transposed else _blurred(pixels, blur)
    return Image.fromarray(pixels[0, 0].round().to(torch.uint8).numpy())


def _blurred(rows: Tensor, blur: float) -> Tensor:
    """A Gaussian along the last axis of [1, 1, H, W], whose standard deviation is `blur`, over as many pixels as the host's."""
    reach = int(2.5 * blur + 0.5)
    taps = torch.tensor([math.exp(-0.5 * (i / blur) ** 2) for i in range(-reach, reach + 1)])
    mode = "reflect" if reach < rows.shape[-1] else "replicate"
    return F.conv2d(F.pad(rows, (reach, reach, 0, 0), mode=mode), (taps / taps.sum())[None, None, None])
