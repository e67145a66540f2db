"""The gallery's button: the selected picture, and what the host knows of it, instead of a base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modules import infotext_utils

from lib_demofusion.config import first_line, infotext_label
from lib_demofusion.hosts.webui.picture import LATENT_RESIZE
from lib_demofusion.hosts.webui.settings import CONFIG_FIELDS, selected_in
from lib_demofusion.views import Size


@dataclass(frozen=True)
class Selected:
    """A picture of the gallery. image: a PIL image. parameters: by name, of its infotext."""

    image: Any
    parameters: dict[str, Any]

    @property
    def drawn_at_once(self) -> Size | None:
        """Its (height, width), if the model has drawn it in one piece, without Hires. fix or DemoFusion; else None."""
        said = self.parameters
        size = (said.get("Size-2"), said.get("Size-1"))
        names = ("Hires upscale", "Hires resize-1", infotext_label(CONFIG_FIELDS["scale"]))
        enlarged = any(said.get(name) for name in names)  # the host adds some that were not written, as 0
        own = (self.image.height, self.image.width)
        return own if not enlarged and size == tuple(map(str, own)) else None


def read_selected(text: str) -> Selected:
    """What the page says of the selected picture. Raises ValueError, one line, if there is none or it is gone."""
    try:
        told = json.loads(text)
        picture, infotext = told["picture"], told.get("infotext") or ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the gallery's picture cannot be told from {text[:40]!r}") from error
    if picture is None:
        raise ValueError("no picture is selected in the gallery; click one, and then the button")
    if told.get("grid"):
        raise ValueError("the gallery shows the grid; select a single picture, and then click the button")
    try:
        image = infotext_utils.image_from_url_text(_as_the_host_reads_it(picture))
    except Exception as error:  # a file that was deleted, or that may not be read
        raise ValueError(f"the gallery's picture cannot be read: {first_line(error)}") from error
    if image is None:
        raise ValueError(f"the gallery's picture cannot be told from {text[:40]!r}")
    parameters = infotext_utils.parse_generation_parameters(infotext, []) if infotext else {}
    return Selected(image, parameters)


def _as_the_host_reads_it(picture: Any) -> Any:
    """What the page has names a file: gradio 3 as the host reads it, gradio 4 within it, and by another name."""
    file = picture.get("image") if isinstance(picture, dict) else None
    return {"name": file["path"], "is_file": True} if isinstance(file, dict) and "path" in file else picture


def take(p: Any, args: Sequence[Any]) -> Selected | None:
    """The picture that the gallery's button asks for, with its seed in place of p's, for one image; None: nothing is asked.

    Before the host has looked at p. Raises ValueError, one line, if the picture cannot be had.
    """
    text = selected_in(args)
    if not text:
        return None
    selected = read_selected(text)
    p.batch_size = p.n_iter = 1
    for name, key in (("seed", "Seed"), ("subseed", "Variation seed")):
        if str(selected.parameters.get(key, "")).lstrip("-").isdigit():
            setattr(p, name, int(selected.parameters[key]))
    if hasattr(p, "init_images"):
        p.init_images, p.image_mask = [selected.image], None
        p.resize_mode = p.resize_mode if p.resize_mode != LATENT_RESIZE else 0  # which would encode the picture as it is
    else:
        p.enable_hr = False  # the base is there
    return selected
