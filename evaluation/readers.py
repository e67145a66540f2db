"""A small network that reads pictures, trained on true renders, in Inception's role and in CLIP's.

It sees 128 x 128 pixels: a whole image averaged down, or a crop of a 4x image around an object, where textures show.
Its weights are part of the repository (`load`); `python -m evaluation.readers` trains them anew, from seeds.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from evaluation import networks
from training.scenes import BACKGROUNDS, COLOURS, COUNTS, CROP, SHAPES, SIZE, TEXTURES, Scene, object_mask, render, shrink
from training.train import to_unit

CLASSES = {
    "count": list(COUNTS),
    "colour": list(COLOURS),
    "texture": list(TEXTURES),
    "shape": list(SHAPES),
    "background": list(BACKGROUNDS),
}
WHOLE = ("count", "colour", "shape", "background")  # what a whole image shows at 128 x 128,
CLOSE = ("colour", "texture")  # and a crop of a 4x image
FEATURES = 32
SCENES, STEPS, BATCH = 5_000, 1_500, 64
WEIGHTS = Path(__file__).with_name("reader.safetensors")
SEED = 77  # of scenes that the checkpoint was not trained on


def labels(scene: Scene) -> list[int]:
    return [values.index(getattr(scene, name)) for name, values in CLASSES.items()]


def close_up(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """128 x 128 pixels [128, 128, 3] of a larger image around a point of an object, or of anything if there is none.

    Of an image of more than 512 x 512 pixels averaged down to that, as whose close-ups the reader knows textures.
    """
    if image.shape[0] > SIZE:
        image = shrink(image, image.shape[0] // SIZE).round().astype(np.uint8)
    scale = image.shape[0] // CROP
    places = np.argwhere(object_mask(image, scene))
    y, x = places[rng.integers(len(places))] * scale if len(places) else rng.integers(0, image.shape[0], 2)
    top, left = (int(np.clip(v - CROP // 2, 0, n - CROP)) for v, n in zip((y, x), image.shape))
    return image[top : top + CROP, left : left + CROP]


def small(image: np.ndarray) -> np.ndarray:
    """The whole image at 128 x 128, whatever its shape."""
    return np.asarray(Image.fromarray(image).resize((CROP, CROP), Image.Resampling.BOX))


def true_render(seed: int, index: int, layout: str = "anywhere", times: int = 1) -> tuple[Scene, np.ndarray]:
    """A scene and its picture, uint8 [512, 512, 3] or so many times larger."""
    rng = np.random.default_rng([seed, index])
    scene = Scene.draw(rng)
    return scene, render(scene, rng, layout, times).round().astype(np.uint8)


def _example(index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    scene, image = true_render(SEED, index)
    return small(image), close_up(image, scene, np.random.default_rng([SEED, index, 1])), labels(scene)


class Reader(nn.Module):
    """Pictures [N, 3, 128, 128] in -1..1 -> features [N, 32]; from these the chances of the classes, and CLIP's cosine."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(given, made, 3, 2, 1), nn.GroupNorm(8, made), nn.SiLU())
                for given, made in zip(widths, widths[1:])
            ),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * widths[-1], FEATURES),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, len(values))) for name, values in CLASSES.items()}
        )
        self.words = nn.ModuleDict({name: nn.Embedding(len(values), FEATURES) for name, values in CLASSES.items()})
        self.sharpness = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def chances(self, features: Tensor) -> dict[str, Tensor]:
        return {name: head(features).softmax(-1) for name, head in self.heads.items()}

    def captions(self, classes: Tensor) -> Tensor:
        """classes [N, 5], as of `labels` -> [N, 32], unit length; without the texture, which whole images hide."""
        words = sum(self.words[name](classes[:, i]) for i, name in enumerate(CLASSES) if name in WHOLE)
        return F.normalize(words, dim=-1)

    def loss(self, whole: Tensor, close: Tensor, classes: Tensor) -> Tensor:
        features, near = self(whole), self(close)
        loss = 0
        for i, name in enumerate(CLASSES):
            for kind, seen in ((WHOLE, features), (CLOSE, near)):
                if name in kind:
                    loss = loss + F.cross_entropy(self.heads[name](seen), classes[:, i])
        cosines = self.sharpness.exp() * F.normalize(features, dim=-1) @ self.captions(classes).T
        own = (classes[:, None, :2] == classes[None, :, :2]).all(-1) & (classes[:, None, 3:] == classes[None, :, 3:]).all(-1)
        target = own / own.sum(1, keepdim=True)  # several pictures of a batch may have the same caption
        return loss + F.cross_entropy(cosines, target) + F.cross_entropy(cosines.T, target)


def train(scenes: int = SCENES, steps: int = STEPS) -> Reader:
    """A reader from nothing; half an hour on one core."""
    with ProcessPoolExecutor() as pool:
        examples = list(tqdm(pool.map(_example, range(scenes), chunksize=32), "scenes for the reader", scenes))
    whole, close, classes = (np.array(column) for column in zip(*examples))
    torch.manual_seed(SEED)
    rng, reader = np.random.default_rng(SEED), Reader()

    def loss() -> Tensor:
        index = rng.integers(0, scenes, BATCH)
        return reader.loss(to_unit(whole[index]), to_unit(close[index]), torch.from_numpy(classes[index]))

    networks.fit(reader, loss, steps, weight_decay=0.01)
    return reader.eval()


def load(file: Path = WEIGHTS) -> Reader:
    """The reader that is part of the repository, or another file's."""
    return networks.load(Reader(), file)


def main() -> None:
    """Train it anew: `python -m evaluation.readers`."""
    networks.save(train(), WEIGHTS)


if __name__ == "__main__":
    main()
