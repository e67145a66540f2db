"""What a job on diffusers is given: numbers, seeds, sizes and pictures, each as the host takes it, or refused in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.phases import enlarged_size
from lib_demofusion.pictures import Given, plain
from lib_demofusion.saved import LARGEST_SCALE
from lib_demofusion.views import Size

LARGEST_SEED = 2**63 - 1
LARGEST_BLUR = 64  # pixels
ASPECT = 0.02  # by so much a result's sides may be stretched against the picture's


def whole_number(value: Any, name: str, low: int, high: int | None = None) -> int:
    """A whole number of whatever type, numpy's too. Raises ValueError, one line, for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value != int(value):
        raise ValueError(f"{name} must be a whole number, got {short(value)}")
    if value < low or high is not None and value > high:
        raise ValueError(f"{name} must be at least {low}{f' and at most {high}' if high is not None else ''}, got {int(value)}")
    return int(value)


def short(value: Any) -> str:
    """A value for a line of text."""
    return repr(value) if isinstance(value, (int, float, str)) and len(repr(value)) < 40 else f"a {type(value).__name__}"


def seeds_of(seed: Any) -> list[int]:
    """One seed or several, as a list. Raises ValueError, one line, for anything else."""
    if isinstance(seed, Real):
        return [whole_number(seed, "seed", 0, LARGEST_SEED)]
    if isinstance(seed, (str, bytes, Mapping)) or not hasattr(seed, "__iter__"):
        raise ValueError(f"the seed must be a whole number or several, got {short(seed)}")
    seeds = [whole_number(s.item() if isinstance(s, Tensor) and s.ndim == 0 else s, "seed", 0, LARGEST_SEED) for s in seed]
    if not seeds:
        raise ValueError("there is no seed; give one for each image")
    return seeds


def plain_image(image: Any, name: str = "image") -> Any:
    """A PIL image as RGB. Raises ValueError, one line, for another object and for what RGB would lose."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise ValueError(f"the {name} must be a PIL image, got a {type(image).__name__}; Image.open makes one of a file")
    try:
        image.load()
        return plain(image, f"the {name}", "convert it to plain RGB first")
    except OSError as error:  # Pillow reads a file when it is asked for its pixels
        raise ValueError(f"the {name} cannot be read: {first_line(error)}") from error


def given_picture(image: Any, mask: Any, mask_blur: Any) -> Given | None:
    """What a job begins with; None if that is a base. Raises ValueError, one line, for what cannot work."""
    blur = whole_number(mask_blur, "mask blur", 0, LARGEST_BLUR)
    if image is None:
        if mask is not None:
            raise ValueError("a mask is of an image; give the image too")
        return None
    return Given.of(plain_image(image), None if mask is None else plain_image(mask, "mask"), blur)


def own_side(pipe: Any, config: DemoFusionConfig) -> float:
    """Of the square images that the checkpoint was made for, in latent pixels; 0 if it does not say so and need not."""
    native = pipe.unet.config.sample_size
    if native is None and not config.window:
        raise ValueError("this checkpoint does not say its own size; give window, the side in pixels that it was made for")
    return math.sqrt(math.prod(native)) if isinstance(native, (list, tuple)) else native or 0


def final_size(size: Any, given: Given, factor: int) -> Size:
    """A result's size (height, width) in pixels as (H, W) latent pixels. Raises ValueError, one line, where it is no size."""
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"size must be height and width, got {short(size)}")
    pixels = [whole_number(value, f"the result's {name}", 1) for name, value in zip(("height", "width"), size)]
    final = tuple(max(round(side / factor), 1) for side in pixels)

    def text(latents: Sequence[int]) -> str:
        return "x".join(str(side * factor) for side in reversed(latents))

    if [side * factor for side in final] != pixels:
        raise ValueError(f"size must be divisible by {factor}, got {pixels[1]}x{pixels[0]}; {text(final)} is near")
    picture, times = given.picture.size[::-1], given.times(pixels)
    if times > LARGEST_SCALE:
        most = text(enlarged_size(picture, LARGEST_SCALE, factor))
        raise ValueError(f"{text(final)} is more than {LARGEST_SCALE} times the picture's sides; {most} is the largest")
    near = enlarged_size(picture, times, factor)
    stretched = pixels[0] * picture[1] / (pixels[1] * picture[0])
    if times > 1 and final != near and not 1 - ASPECT <= stretched <= 1 / (1 - ASPECT):
        own = f"{picture[1]}x{picture[0]}"
        raise ValueError(f"{text(final)} has not the aspect of the picture, {own}; {text(near)} is near")
    return final


def base_size(pipe: Any, height: Any, width: Any) -> Size:
    """The base's (height, width) in pixels: as given, else the model's own."""
    factor = pipe.vae_scale_factor
    native = pipe.unet.config.sample_size
    if native is not None:
        own = [side * factor for side in ((native, native) if isinstance(native, int) else native)]
    elif height is None or width is None:
        raise ValueError("this checkpoint does not say its own size; give height and width")
    else:
        own = (height, width)
    multiple = factor * 2 ** (len(pipe.unet.config.down_block_types) - 1)
    size = []
    for name, value in zip(("height", "width"), (own[0] if height is None else height, own[1] if width is None else width)):
        value = whole_number(value, name, 1)
        if value % factor:
            near = max(round(value / multiple), 1) * multiple
            raise ValueError(f"{name} must be divisible by {factor}, got {value}; {near} is near")
        size.append(value)
    return tuple(size)
