"""Procedural scenes: one to three textured shapes on a gradient, with a caption that says what is there.

A scene is drawn at 512 x 512 pixels. Seen at 128 x 128 its textures are gone; in crops of the 2x and 4x enlargement
they are there. That is the gap that DemoFusion has to fill, as photographs and their close-ups have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

SIZE = 512  # pixels per side of a rendered scene
CROP = 128  # pixels per side of what the model is trained on

COUNTS = {1: "one", 2: "two", 3: "three"}
COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 140, 20),
    "yellow": (245, 215, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "purple": (140, 50, 180),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("ring", "star", "disc", "square", "triangle", "heart")
BACKGROUNDS = {  # top and bottom of the gradient; pale or dark, so that every colour stands out
    "grass": ((196, 224, 170), (120, 168, 104)),
    "sand": ((242, 230, 204), (206, 184, 146)),
    "sky": ((150, 196, 232), (224, 238, 248)),
    "snow": ((252, 252, 254), (214, 222, 234)),
    "night": ((22, 24, 48), (58, 60, 92)),
}
OBJECT = 0.004  # share of an image from which on a spot of the objects' colour is an object
SHADE = 0.42  # the texture's dark tone, as a factor on the colour


def vocabulary() -> list[str]:
    """Every word that a caption can hold."""
    plurals = [f"{shape}s" for shape in SHAPES]
    return sorted({*COUNTS.values(), *COLOURS, *TEXTURES, *SHAPES, *plurals, *BACKGROUNDS, "on"})


@dataclass(frozen=True)
class Scene:
    """What is drawn, apart from where."""

    count: int
    colour: str
    texture: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        noun = self.shape if self.count == 1 else f"{self.shape}s"
        return f"{COUNTS[self.count]} {self.colour} {self.texture} {noun} on {self.background}"

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scene:
        return cls(
            count=int(rng.integers(1, 4)),
            colour=str(rng.choice(list(COLOURS))),
            texture=str(rng.choice(TEXTURES)),
            shape=str(rng.choice(SHAPES)),
            background=str(rng.choice(list(BACKGROUNDS))),
        )


def _implicit(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A function that is negative inside the shape, which fits the unit disc; y points down."""
    r = np.hypot(x, y)
    if shape == "disc":
        return r - 0.92
    if shape == "ring":
        return np.abs(r - 0.72) - 0.26
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.76
    if shape == "triangle":
        return np.maximum(np.abs(x) * 0.866 - y * 0.5, y) - 0.5 + 0.06
    if shape == "heart":
        u, v = x * 1.28, -y * 1.28 + 0.12
        return (u * u + v * v - 1) ** 3 - u * u * v**3
    if shape == "star":
        angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        inner = 0.46 * np.exp(1j * np.pi / 5)
        edge = inner - 1.0
        return ((r * np.cos(angle) - 1.0) * -edge.imag + r * np.sin(angle) * edge.real) / -abs(edge)
    raise ValueError(f"no such shape: {shape}")


def _coverage(f: np.ndarray) -> np.ndarray:
    """How much of each pixel lies where f < 0, from f and its slope per pixel."""
    dy, dx = np.gradient(f)
    return np.clip(0.5 - f / np.maximum(np.hypot(dx, dy), 1e-6), 0, 1)


def _texture(texture: str, x: np.ndarray, y: np.ndarray, angle: float, offset: np.ndarray) -> np.ndarray:
    """Share of the dark tone at each pixel; x and y in pixels."""
    u = x * np.cos(angle) + y * np.sin(angle) + offset[0]
    v = -x * np.sin(angle) + y * np.cos(angle) + offset[1]
    if texture == "plain":
        return np.zeros_like(u)
    if texture == "striped":
        return _coverage(np.cos(2 * np.pi * u / 18))
    if texture == "dotted":
        return _coverage(np.hypot((u % 22) - 11, (v % 22) - 11) - 6)
    if texture == "checkered":
        return _coverage(np.sin(np.pi * u / 13) * np.sin(np.pi * v / 13))
    raise ValueError(f"no such texture: {texture}")


def _row(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (y, x) of discs of these radii that stand side by side on one line, at even gaps."""
    ground = rng.uniform(0.6, 0.95) * SIZE
    gap = (SIZE - 2 * sum(radii)) / (len(radii) + 1)
    left = np.cumsum([gap] + [2 * radius + gap for radius in radii[:-1]])
    shift = rng.uniform(-0.8, 0.8) * gap
    return [(ground - radius, float(x) + radius + shift) for x, radius in zip(left, radii, strict=True)]


def _anywhere(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres (y, x) at which discs of these radii neither touch each other nor leave the scene."""
    while True:
        placed: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(20):
                y, x = rng.uniform(radius + 10, SIZE - radius - 10, 2)
                others = zip(placed, radii, strict=False)
                if all(np.hypot(y - oy, x - ox) > radius + other + 18 for (oy, ox), other in others):
                    placed.append((y, x))
                    break
        if len(placed) == len(radii):
            return placed


@dataclass(frozen=True)
class Layout:
    """radii: the least and the largest in pixels, by the number of objects. places: radii, generator -> centres."""

    radii: dict[int, tuple[int, int]]
    places: Callable[[list[float], np.random.Generator], list[tuple[float, float]]]


LAYOUTS = {
    "anywhere": Layout({1: (95, 150), 2: (72, 108), 3: (56, 84)}, _anywhere),
    "row": Layout({1: (80, 120), 2: (64, 96), 3: (48, 70)}, _row),
}


def render(scene: Scene, rng: np.random.Generator, layout: str = "anywhere", times: int = 1) -> np.ndarray:
    """The scene as float32 [512, 512, 3] in 0...255; the generator decides places, sizes and tints.

    layout: "anywhere", or "row": the objects stand side by side on one line. times: so many pixels for one, each way.
    """
    top, bottom = (np.array(c, np.float32) + rng.normal(0, 4, 3).astype(np.float32) for c in BACKGROUNDS[scene.background])
    side = SIZE * times
    ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    image = np.broadcast_to(top + ramp * (bottom - top), (side, side, 3)).copy()

    colour = np.array(COLOURS[scene.colour], np.float32) + rng.normal(0, 6, 3).astype(np.float32)
    angle = np.pi / 4 + rng.uniform(-0.15, 0.15)
    own = LAYOUTS[layout]
    radii = [float(rng.uniform(*own.radii[scene.count])) for _ in range(scene.count)]
    for (cy, cx), radius in zip(own.places(radii, rng), radii, strict=True):
        y0, x0 = int(cy - radius) - 3, int(cx - radius) - 3
        y1, x1 = int(cy + radius) + 4, int(cx + radius) + 4
        box = np.s_[y0 * times : y1 * times, x0 * times : x1 * times]
        y, x = (np.mgrid[box].astype(np.float32) + 0.5) / times - 0.5  # in pixels of 512
        y, x = y - cy, x - cx
        tilt = rng.uniform(-0.2, 0.2)
        u = (x * np.cos(tilt) + y * np.sin(tilt)) / radius
        v = (-x * np.sin(tilt) + y * np.cos(tilt)) / radius
        inside = _coverage(_implicit(scene.shape, u, v))[..., None]
        dark = _texture(scene.texture, x, y, angle, rng.uniform(0, 50, 2))[..., None]
        patch = image[box]
        patch += inside * (colour * (1 - (1 - SHADE) * dark) - patch)
    return np.clip(image, 0, 255)


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Average over factor x factor pixels: [H, W, 3] -> [H/factor, W/factor, 3]."""
    h, w, c = image.shape
    return image.reshape(h // factor, factor, w // factor, factor, c).mean((1, 3))


def crops(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the model sees of a scene: the whole, a crop of 2x, two crops of 4x; uint8 [4, 128, 128, 3]."""
    views = [shrink(image, 4)]
    for larger in (shrink(image, 2), image, image):
        y, x = rng.integers(0, larger.shape[0] - CROP + 1, 2)
        views.append(larger[y : y + CROP, x : x + CROP])
    return np.stack(views).round().astype(np.uint8)


def _distance(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of each pixel [..., 3] to the line between two colours."""
    along = np.clip(((pixels - start) @ (end - start)) / np.maximum((end - start) @ (end - start), 1e-6), 0, 1)
    return np.linalg.norm(pixels - (start + along[..., None] * (end - start)), axis=-1)


def object_mask(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Where an image shows the scene's objects: bool [128, 128], or the image's own size if it is smaller.

    image: uint8 [H, W, 3], H and W multiples of 128. A pixel belongs to an object if its colour lies nearer to the
    object's tones than to the background's, after textures are averaged away.
    """
    small = shrink(image.astype(np.float32), max(image.shape[0] // CROP, 1))
    colour = np.array(COLOURS[scene.colour], np.float32)
    top, bottom = (np.array(c, np.float32) for c in BACKGROUNDS[scene.background])
    return _distance(small, colour * SHADE, colour) < _distance(small, top, bottom)


def object_areas(image: np.ndarray, scene: Scene) -> list[float]:
    """The areas of the separate objects that an image shows, whatever their shape, as shares of the image."""
    labels, _ = ndimage.label(object_mask(image, scene))
    return (np.bincount(labels.ravel())[1:] / labels.size).tolist()


def count_objects(image: np.ndarray, scene: Scene, least: float = OBJECT) -> int:
    """How many separate objects an image shows, whatever their shape; an area below `least` of it is none."""
    return sum(area >= least for area in object_areas(image, scene))
