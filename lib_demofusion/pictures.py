"""Pictures in and out: the one to start from and its mask, the PNG with its parameters, the comparison."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lib_demofusion.config import first_line
from lib_demofusion.files import check_file

if TYPE_CHECKING:
    from torch import Tensor

ORIENTATION = 0x0112  # the EXIF tag; its values, and what turns each upright
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
ONE_PICTURE = ("MPO", "PSD")  # what else is in such a file are views or layers of the first
MASK_BLUR = 4  # pixels, unless another is asked for
CHECKPOINTS = (".safetensors", ".ckpt", ".pth")  # of a model, and of an upscaler


@dataclass(frozen=True)
class Given:
    """A picture that a job begins with, and what of it is to change.

    picture: RGB. mask: L, as large as the picture and blurred; 255 where the picture is drawn anew, 0 where it stays. It is
    drawn anew everywhere unless given.
    """

    picture: Any
    mask: Any = None

    @classmethod
    def of(cls, image: Any, mask: Any = None, blur: int = 0) -> Given:
        """From an image and a mask, RGB both. blur: of the mask, pixels of the image.

        Raises ValueError, one line, for a mask of another size and one that is nowhere white.
        """
        from PIL import ImageFilter

        if mask is None:
            return cls(image)
        if mask.size != image.size:
            sizes = " and the image ".join(f"{w}x{h}" for w, h in (mask.size, image.size))
            raise ValueError(f"the mask is {sizes}; they must be of one size")
        mask = mask.convert("L")
        if mask.getextrema()[1] < 128:
            raise ValueError("nothing of the mask is white, so nothing would change; white is what is drawn anew")
        return cls(image, mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask)

    def times(self, size: tuple[int, int]) -> float:
        """How many times larger than the picture's sides those of an image of (height, width) pixels are."""
        return math.sqrt(math.prod(size) / math.prod(self.picture.size))

    def mask_at(self, size: tuple[int, int]) -> Tensor:
        """The mask, [1, 1, H, W] for a size of (H, W): 1 where the picture is drawn anew, 0 where it stays."""
        import numpy as np
        from PIL import Image
        from torch import from_numpy

        mask = self.mask.resize(size[::-1], Image.Resampling.BILINEAR)
        return from_numpy(np.array(mask)).ge(128).float()[None, None]

    def over(self, image: Any) -> Any:
        """What was drawn, a PIL image of any size, with the picture around it; there it is the picture's own pixels, enlarged.

        What is drawn shows in full where the mask is half white or more, and fades out with the mask from there.
        """
        from PIL import Image

        if self.mask is None:
            return image
        shown = self.mask.point([min(2 * grey, 255) for grey in range(256)]).resize(image.size, Image.Resampling.BILINEAR)
        return Image.composite(image, self.picture.resize(image.size, Image.Resampling.LANCZOS), shown)


def open_image(path: Path, what: str = "image") -> Any:
    """The image to start from, or its mask, upright, as RGB. Raises ValueError, one line, for what is no plain picture.

    Plain is what becomes 8-bit RGB without loss: colour, grey, black and white, a palette, transparency that hides nothing.
    """
    from PIL import Image, UnidentifiedImageError

    check_file(path, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large images and odd metadata
            with Image.open(path) as image:
                frames = 1 if image.format in ONE_PICTURE else getattr(image, "n_frames", 1)
                image.load()
                turned = _upright(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read as an image; save it as PNG or JPEG") from error
    except Exception as error:  # a broken file surfaces as nearly any type
        raise ValueError(f"{path} cannot be read as an image: {first_line(error)}; save it anew, as plain RGB") from error
    if frames > 1:
        raise ValueError(f"{path} holds {frames} pictures; save the one to start from as a file of its own")
    return plain(turned, str(path), "save it as plain RGB first")


def _upright(image: Any) -> Any:
    from PIL import Image

    try:
        orientation = image.getexif().get(ORIENTATION)
        turn = UPRIGHT.get(orientation)
    except Exception:  # EXIF that nobody can read turns the image nowhere
        turn = None
    return image.transpose(Image.Transpose[turn]) if turn else image.copy()


def plain(image: Any, name: str, remedy: str) -> Any:
    """A PIL image as RGB. Raises ValueError, one line that begins with its name, for what RGB would lose."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{name} has transparency; put it on a background first")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} is {image.mode}, more than 8 bits a channel; {remedy}")
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "RGBX"):
        raise ValueError(f"{name} is {image.mode}; {remedy}")
    return image.convert("RGB")


def save_png(file: BinaryIO, image: Any, parameters: str = "") -> None:
    """Write a PNG; parameters is what PNG Info shows."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if parameters:
        info.add_text("parameters", parameters) if parameters.isascii() else info.add_itxt("parameters", parameters)
    image.save(file, "PNG", pnginfo=info)


def check_text(text: str, name: str) -> None:
    """Raises ValueError, one line, for a prompt that a picture's parameters cannot hold so that it is read back."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} is not valid UTF-8 at character {error.start + 1}; write it in UTF-8") from None
    for sign in text:
        if unicodedata.category(sign) == "Cc" and sign not in "\t\n\r":
            raise ValueError(f"the {name} has a control character, U+{ord(sign):04X}; leave it out")
    if any(line.strip().startswith("Negative prompt:") for line in text.splitlines()):
        raise ValueError(f'the {name} has a line that begins with "Negative prompt:"; give that as the negative prompt')


def parameters_text(prompt: str, negative_prompt: str, values: Mapping[str, Any]) -> str:
    """A picture's parameters as the WebUI writes and reads them: the prompts, and in the last line the settings.

    The prompts must have passed check_text; nothing in them, or in a value, can then be read as another setting.
    """
    lines = [prompt, f"Negative prompt: {negative_prompt}" if negative_prompt else ""]
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in values.items()))
    return "\n".join(filter(None, lines))


def quote(value: Any) -> str:
    """A value as the WebUI writes it: as JSON where it could be read as more than a value. A path's odd bytes are escaped."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    plain = text and text == text.strip() and text.isprintable() and not re.search('[,:"]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def model_name(model: str | None) -> str:
    """What a picture says of the checkpoint: its name, without the folder, and without the ending if it is one file."""
    if not model:
        return "embedded"
    path = Path(os.path.abspath(model))  # "." has no name
    return path.stem if path.suffix.lower() in CHECKPOINTS and not path.is_dir() else path.name


def lora_tags(loras: Iterable[tuple[str | Path, float]]) -> list[str]:
    """LoRAs, files with their weights, as the WebUI has them in a prompt."""
    return [f"<lora:{re.sub('[<>:]', '_', Path(file).stem)}:{weight:.12g}>" for file, weight in loras]


def comparison(base: Any, result: Any) -> Any:
    """Base enlarged by Lanczos beside the result, and below each the same crop of it, enlarged.

    The crop is where the result has most fine detail.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    enlarged = base.resize(result.size, Image.Resampling.LANCZOS)
    side = max(min(result.size) // 4, 8)
    grey = result.convert("L")
    detail = np.abs(np.asarray(grey, np.float32) - np.asarray(grey.filter(ImageFilter.GaussianBlur(4)), np.float32))
    sums = np.pad(detail, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    top, left = np.unravel_index(boxes.argmax(), boxes.shape)
    box = (int(left), int(top), int(left) + side, int(top) + side)
    gap, width = max(result.width // 64, 2), result.width
    sheet = Image.new("RGB", (2 * width + gap, result.height + gap + width), "white")
    for column, image in enumerate((enlarged, result)):
        x = column * (width + gap)
        sheet.paste(image, (x, 0))
        sheet.paste(image.crop(box).resize((width, width), Image.Resampling.NEAREST), (x, result.height + gap))
    return sheet
