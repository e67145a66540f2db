"""What sees a set of pictures and says how good it is: metrics by rule and by networks, as statistics of the pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from evaluation import metrics, readers
from evaluation.metrics import Statistic, mean_of
from lib_demofusion.views import Size, window_starts
from training.scenes import SIZE, Scene, render
from training.train import to_unit

REAL_SEED = 4243


@dataclass(frozen=True)
class Set:
    """Pictures of one method, uint8 [H, W, 3] each, the base images that they were made from, and the method's stride.

    subjects: what they are to show, scenes or captions, as the judge takes them. window: the method's, (height, width).
    """

    subjects: Sequence[Scene | str]
    images: Sequence[np.ndarray]
    bases: Sequence[np.ndarray]
    stride: float
    window: Size

    @property
    def borders(self) -> tuple[list[int], list[int]]:
        """Where windows begin and end, in rows and columns of pixels."""
        return tuple(
            sorted({edge for start in window_starts(side, own, int(own * self.stride)) for edge in (start, start + own)})
            for side, own in zip(self.images[0].shape, self.window)
        )


class SceneJudge:
    """Everything that known scenes allow, and networks that were trained on them in Inception's and CLIP's roles.

    size: (height, width) of the pictures. real: how many true renders, of scenes laid out so, they are compared with.
    """

    draws = 300  # of the bootstrap

    def __init__(self, reader: readers.Reader, size: Size, real: int, layout: str = "anywhere"):
        self.reader = reader
        indices = tqdm(range(real), "true renders", dynamic_ncols=True)
        true = [readers.true_render(REAL_SEED, index, layout, _times(size)) for index in indices]
        true = [(scene, _at_size(image, size)) for scene, image in true]
        self.whole, self.close = (x.numpy() for x in self.read(*zip(*true)))
        self.detail = np.mean([metrics.detail(image) for _, image in true])
        self.object_detail = functools.cache(functools.partial(_object_detail, size=size, layout=layout))

    @torch.no_grad()
    def read(self, scenes: Sequence[Scene], images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features of the whole images and of close-ups of them."""
        crops = [readers.close_up(x, s, np.random.default_rng(i)) for i, (s, x) in enumerate(zip(scenes, images))]
        return tuple(self.reader(to_unit(np.stack(x))) for x in ([readers.small(x) for x in images], crops))

    @torch.no_grad()
    def __call__(self, made: Set) -> dict[str, Statistic]:
        scenes = made.subjects
        classes = torch.tensor([readers.labels(scene) for scene in scenes])
        features, near = self.read(scenes, made.images)
        chances, near_chances = self.reader.chances(features), self.reader.chances(near)
        names = list(readers.CLASSES)

        def right(seen: dict[str, Tensor], name: str) -> np.ndarray:
            return (seen[name].argmax(-1) == classes[:, names.index(name)]).float().numpy()

        borders = made.borders
        found = np.array([metrics.objects_and_strays(x, s) for x, s in zip(made.images, scenes)])
        before = np.array([metrics.objects_and_strays(x, s)[0] for x, s in zip(made.bases, scenes)])
        cosine = (F.normalize(features, dim=-1) * self.reader.captions(classes)).sum(-1).numpy()
        means = {
            "count right": found[:, 0] == [scene.count for scene in scenes],
            "count kept": found[:, 0] == before,
            "caption right": np.mean([right(chances, name) for name in readers.WHOLE], 0),
            "texture right": right(near_chances, "texture"),
            "strays": found[:, 1],
            "off the base": [metrics.difference_from_base(x, b) for x, b in zip(made.images, made.bases)],
            "detail": [metrics.detail(x) / self.detail for x in made.images],
            "object detail": [metrics.detail(x, s) / self.object_detail(s) for x, s in zip(made.images, scenes)],
            "seams": [metrics.seams(x, borders) for x in made.images],
            "CLIP": cosine,
        }
        statistics = {name: mean_of(values) for name, values in means.items()}
        statistics["FID"] = _distance(features.numpy(), self.whole)
        statistics["IS"] = _score([chances[name].numpy() for name in readers.WHOLE])
        statistics["crop FID"] = _distance(near.numpy(), self.close)
        statistics["crop IS"] = _score([near_chances[name].numpy() for name in readers.CLOSE])
        return statistics


def _at_size(image: np.ndarray, size: Size) -> np.ndarray:
    """A true render, square, at a size: its middle where that is wider than high."""
    side, (height, width) = image.shape[0], size
    cut = round(side * (1 - height / width) / 2)
    middle = Image.fromarray(image[cut : side - cut])
    return np.asarray(middle.resize((width, height), Image.Resampling.BOX))


def _times(size: Size) -> int:
    """How many times larger than 512 x 512 a true render must be not to be enlarged to a size."""
    return -(-max(size) // SIZE)


def _object_detail(scene: Scene, size: Size, layout: str) -> float:
    """Of a true render of the scene, square, so that no object is cut off; mostly colour and texture decide it."""
    image = render(scene, np.random.default_rng(REAL_SEED), layout, _times(size)).round().astype(np.uint8)
    return metrics.detail(_at_size(image, (size[1], size[1])), scene)


def _distance(features: np.ndarray, real: np.ndarray) -> Statistic:
    return lambda index: metrics.frechet_distance(features[index], real)


def _score(chances: list[np.ndarray]) -> Statistic:
    """Of networks with several independent heads, whose classes multiply."""
    return lambda index: float(np.prod([metrics.inception_score(own[index]) for own in chances]))


class PhotoJudge:
    """The metrics of the paper's table 1, by the networks that it uses: for a real checkpoint and any captions.

    inception: Inception v3 in TorchScript, as StyleGAN 2 and 3 publish it (inception-2015-12-05.pt): takes uint8
    [N, 3, H, W]; with return_features=True gives features [N, 2048], with no_output_bias=True class chances [N, 1008].
    clip: a folder that transformers reads. real: a folder of real images. Crops: all that fit side by side, of the
    base's size (the paper says the size, and neither where nor how many).
    """

    draws = 20  # an FID of 2048 features takes seconds

    def __init__(self, inception: Path, clip: Path, real: Path, base: Size, device: str = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        self.device, self.base = device, base
        self.inception = torch.jit.load(str(inception), map_location=device).eval()
        self.clip, self.processor = CLIPModel.from_pretrained(clip).eval().to(device), CLIPProcessor.from_pretrained(clip)
        files = sorted(path for path in real.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not files:
            raise ValueError(f"no real images in {real}")
        images = [np.asarray(Image.open(path).convert("RGB")) for path in files]
        self.whole = np.concatenate([self.features([image]) for image in tqdm(images, "real images", dynamic_ncols=True)])
        self.close = np.concatenate([self.features(self.crops(_no_smaller(image, base))) for image in images])

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        (h, w), (height, width) = self.base, image.shape[:2]
        return [image[y : y + h, x : x + w] for y in range(0, height - h + 1, h) for x in range(0, width - w + 1, w)]

    @torch.no_grad()
    def _ask(self, images: list[np.ndarray], **what: bool) -> np.ndarray:
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device)
        return self.inception(x, **what).float().cpu().numpy()

    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return self._ask(images, return_features=True)

    @torch.no_grad()
    def cosine(self, image: np.ndarray, caption: str) -> float:
        """CLIP score: 100 times the cosine, or 0 (Hessel et al. 2021; the paper's scale)."""
        inputs = self.processor(text=[caption], images=[Image.fromarray(image)], return_tensors="pt", truncation=True)
        output = self.clip(**inputs.to(self.device))
        return 100 * max(float(F.cosine_similarity(output.image_embeds, output.text_embeds)), 0.0)

    def __call__(self, made: Set) -> dict[str, Statistic]:
        whole = np.concatenate([self.features([x]) for x in made.images])
        chances = np.concatenate([self._ask([x], no_output_bias=True) for x in made.images])
        near, near_chances = [], []
        for image in made.images:
            crops = self.crops(image)
            near.append(self.features(crops))
            near_chances.append(self._ask(crops, no_output_bias=True))
        near, near_chances = np.stack(near), np.stack(near_chances)  # [images, crops, ...]
        return {
            "FID": _distance(whole, self.whole),
            "IS": _score([chances]),
            "crop FID": lambda index: metrics.frechet_distance(near[index].reshape(-1, near.shape[-1]), self.close),
            "crop IS": lambda index: metrics.inception_score(near_chances[index].reshape(-1, near_chances.shape[-1])),
            "CLIP": mean_of([self.cosine(x, caption) for x, caption in zip(made.images, made.subjects)]),
        }


def _no_smaller(image: np.ndarray, size: Size) -> np.ndarray:
    """The image, enlarged if a crop of `size` would not fit into it."""
    height, width = image.shape[:2]
    factor = max(size[0] / height, size[1] / width, 1)
    if factor == 1:
        return image
    shape = (max(round(width * factor), size[1]), max(round(height * factor), size[0]))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))
