"""What sees pictures and says how good they are, by rule and by networks: what each scored, and metrics of many."""

from __future__ import annotations

import zlib
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
from evaluation.metrics import Normal, Statistic, mean_of
from evaluation.scores import Record, Refused, checksum
from lib_demofusion.views import Size, window_starts
from training.scenes import SIZE, Scene, render
from training.train import to_unit

REAL_SEED = 4243
VERSION = 1  # of what the judges score: one more with each change of it, so that scores are not mixed
FEATURE = 1 / 32  # in steps of which features are kept; FID moves by less than a thousandth of itself


@dataclass(frozen=True)
class Made:
    """A picture, uint8 [H, W, 3], of the prompt with this number, and the base image that it was made from.

    subject: what it is to show, a scene or a caption, as the judge takes it. stride, window, (height, width): the method's.
    """

    subject: Scene | str
    index: int
    image: np.ndarray
    base: np.ndarray
    stride: float
    window: Size

    @property
    def borders(self) -> tuple[list[int], list[int]]:
        """Where windows begin and end, in rows and columns of pixels."""
        return tuple(
            sorted({edge for start in window_starts(side, own, int(own * self.stride)) for edge in (start, start + own)})
            for side, own in zip(self.image.shape, self.window)
        )


class SceneJudge:
    """Everything that known scenes allow, and networks that were trained on them in Inception's and CLIP's roles.

    layout: of the scenes that pictures are compared with.
    """

    draws = 300  # of the bootstrap

    def __init__(self, layout: str = "anywhere"):
        self.reader, self.layout = readers.load(), layout
        self.about = {"judge": VERSION, "reader": checksum(readers.WEIGHTS), "layout": layout}

    @property
    def tag(self) -> str:
        """In the names of the files of what it scored."""
        return "-".join(map(str, self.about.values()))

    @torch.no_grad()
    def read(self, scenes: Sequence[Scene], images: Sequence[np.ndarray], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features of the whole images and of close-ups of them."""
        crops = [readers.close_up(x, s, np.random.default_rng(i)) for i, s, x in zip(indices, scenes, images)]
        return tuple(self.reader(to_unit(np.stack(x))) for x in ([readers.small(x) for x in images], crops))

    def of_base(self, scene: Scene, base: np.ndarray, size: Size) -> Record:
        """What is known of a base image: its objects, and the detail of a true render's at the size of the pictures."""
        objects, _ = metrics.objects_and_strays(base, scene)
        return {"objects": np.uint16(objects), "true object detail": np.float16(self.object_detail(scene, size))}

    def of_picture(self, made: Made) -> Record:
        image, scene = made.image, made.subject
        objects, strays = metrics.objects_and_strays(image, scene)
        numbers = {
            "off the base": metrics.difference_from_base(image, made.base),
            "detail": metrics.detail(image),
            "object detail": metrics.detail(image, scene),
            "base object detail": metrics.detail(image, scene, made.base),
            "seams": metrics.seams(image, made.borders),
        }
        whole, close = (x[0].numpy() for x in self.read([scene], [image], [made.index]))
        return {
            "objects": np.uint16(objects),
            "strays": np.uint16(strays),
            **{name: np.float16(value) for name, value in numbers.items()},
            **{name: np.int16(np.round(x / FEATURE)) for name, x in (("whole", whole), ("close", close))},
        }

    def of_true(self, count: int, size: Size) -> Record:
        """The same of so many true renders at a size, all together: the normal distributions of features, and detail."""
        indices = tqdm(range(count), "true renders", dynamic_ncols=True)
        true = [readers.true_render(REAL_SEED, index, self.layout, _times(size)) for index in indices]
        true = [(scene, _at_size(image, size)) for scene, image in true]
        found = {"detail": np.float32(np.mean([metrics.detail(image) for _, image in true]))}
        for name, features in zip(("whole", "close"), self.read(*zip(*true), range(count))):
            own = Normal.of(features.numpy())
            found |= {f"{name} mean": np.float32(own.mean), f"{name} covariance": np.float32(own.cov)}
        return found

    def object_detail(self, scene: Scene, size: Size) -> float:
        """Of a true render of the scene, square, so that no object is cut off; mostly colour and texture decide it."""
        image = render(scene, np.random.default_rng(REAL_SEED), self.layout, _times(size)).round().astype(np.uint8)
        return metrics.detail(_at_size(image, (size[1], size[1])), scene)

    @torch.no_grad()
    def statistics(self, scenes: Sequence[Scene], made: Record, bases: Record, real: Record) -> dict[str, Statistic]:
        """Metrics of one method's pictures, by what they and their bases scored, row by row, and the true renders."""
        classes = torch.tensor([readers.labels(scene) for scene in scenes])
        features, near = (torch.from_numpy(made[name] * np.float32(FEATURE)) for name in ("whole", "close"))
        chances, near_chances = self.reader.chances(features), self.reader.chances(near)
        names = list(readers.CLASSES)

        def right(seen: dict[str, Tensor], name: str) -> np.ndarray:
            return (seen[name].argmax(-1) == classes[:, names.index(name)]).float().numpy()

        true_object_detail = bases["true object detail"].astype(float)
        means = {
            "count right": made["objects"] == [scene.count for scene in scenes],
            "count kept": made["objects"] == bases["objects"],
            "caption right": np.mean([right(chances, name) for name in readers.WHOLE], 0),
            "texture right": right(near_chances, "texture"),
            "strays": made["strays"],
            "off the base": made["off the base"],
            "detail": made["detail"].astype(float) / real["detail"],
            "object detail": made["object detail"] / true_object_detail,
            "base object detail": made["base object detail"] / true_object_detail,
            "seams": made["seams"],
            "CLIP": (F.normalize(features, dim=-1) * self.reader.captions(classes)).sum(-1).numpy(),
        }
        statistics = {name: mean_of(values) for name, values in means.items()}
        statistics["FID"] = _distance(features.numpy(), _normal(real, "whole"))
        statistics["IS"] = _score([chances[name].numpy() for name in readers.WHOLE])
        statistics["crop FID"] = _distance(near.numpy(), _normal(real, "close"))
        statistics["crop IS"] = _score([near_chances[name].numpy() for name in readers.CLOSE])
        return statistics


def _normal(real: Record, name: str) -> Normal:
    return Normal(*(real[f"{name} {part}"].astype(float) for part in ("mean", "covariance")))


def _at_size(image: np.ndarray, size: Size) -> np.ndarray:
    """A true render, square, at a size: its middle where that is wider than high."""
    side, (height, width) = image.shape[0], size
    cut = round(side * (1 - height / width) / 2)
    middle = Image.fromarray(image[cut : side - cut])
    return np.asarray(middle.resize((width, height), Image.Resampling.BOX))


def _times(size: Size) -> int:
    """How many times larger than 512 x 512 a true render must be not to be enlarged to a size."""
    return -(-max(size) // SIZE)


def _distance(features: np.ndarray, real: Normal) -> Statistic:
    return lambda index: metrics.frechet_distance(features[index], real)


def _score(chances: list[np.ndarray]) -> Statistic:
    """Of networks with several independent heads, whose classes multiply."""
    return lambda index: float(np.prod([metrics.inception_score(own[index]) for own in chances]))


class PhotoJudge:
    """The metrics of the paper's table 1, by the networks that it uses: for a real checkpoint and any captions.

    inception: Inception v3 in TorchScript, as StyleGAN 2 and 3 publish it (inception-2015-12-05.pt): takes [N, 3, H, W] in
    0..255; with return_features=True gives features [N, 2048], with no_output_bias=True class chances [N, 1008]. It is shown
    pictures as clean-fid shows them (arXiv 2104.11222), at 299 x 299 by an antialiased bicubic filter, and would itself
    leave out most of a large picture's pixels. FID is clean-fid's; IS is of all pictures together, not of ten parts.
    clip: a folder that transformers reads. real: a folder of real images. Crops: all that fit side by side, of the
    base's size (the paper says the size, and neither where nor how many).
    """

    draws = 20  # an FID of 2048 features takes seconds

    def __init__(self, inception: Path, clip: Path, real: Path, base: Size, device: str = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        self.device, self.base = device, base
        self.inception = torch.jit.load(str(inception), map_location=device).eval()
        self.clip, self.processor = CLIPModel.from_pretrained(clip).eval().to(device), CLIPProcessor.from_pretrained(clip)
        self.real = real_images(real)
        weights = [inception, *sorted(path for path in clip.rglob("*") if path.is_file())]
        crc = 0
        for path in weights:
            crc = zlib.crc32(path.read_bytes(), crc)
        self.about = {"judge": VERSION, "networks": f"{crc:08x}"}

    @property
    def tag(self) -> str:
        return "-".join(map(str, self.about.values()))

    def crops(self, image: np.ndarray) -> list[np.ndarray]:
        (h, w), (height, width) = self.base, image.shape[:2]
        return [image[y : y + h, x : x + w] for y in range(0, height - h + 1, h) for x in range(0, width - w + 1, w)]

    @torch.no_grad()
    def _ask(self, images: list[np.ndarray], **what: bool) -> np.ndarray:
        x = torch.from_numpy(np.stack([for_inception(image) for image in images])).permute(0, 3, 1, 2).to(self.device)
        return self.inception(x, **what).float().cpu().numpy()

    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return self._ask(images, return_features=True)

    @torch.no_grad()
    def cosine(self, image: np.ndarray, caption: str) -> float:
        """CLIP score: 100 times the cosine, or 0 (Hessel et al. 2021; the paper's scale)."""
        inputs = self.processor(text=[caption], images=[Image.fromarray(image)], return_tensors="pt", truncation=True)
        output = self.clip(**inputs.to(self.device))
        return 100 * max(float(F.cosine_similarity(output.image_embeds, output.text_embeds)), 0.0)

    def of_base(self, caption: str, base: np.ndarray, size: Size) -> Record:
        """Nothing: these metrics do not look at it."""
        return {}

    def of_picture(self, made: Made) -> Record:
        crops = self.crops(made.image)
        return {
            "whole": np.float16(self.features([made.image])[0]),
            "chances": self._ask([made.image], no_output_bias=True)[0],
            "close": np.float16(self.features(crops)),  # [crops, ...]
            "close chances": self._ask(crops, no_output_bias=True),
            "CLIP": np.float32(self.cosine(made.image, made.subject)),
        }

    def of_true(self, count: int, size: Size) -> Record:
        """Of the real images, all that there are, in the size that they have."""
        found = {}
        images = [np.asarray(Image.open(path).convert("RGB")) for path in self.real]
        whole = [self.features([image]) for image in tqdm(images, "real images", dynamic_ncols=True)]
        close = [self.features(self.crops(_no_smaller(image, self.base))) for image in images]
        for name, features in (("whole", whole), ("close", close)):
            own = Normal.of(np.concatenate(features))
            found |= {f"{name} mean": own.mean, f"{name} covariance": own.cov}
        return found

    def statistics(self, captions: Sequence[str], made: Record, bases: Record, real: Record) -> dict[str, Statistic]:
        whole, close = _normal(real, "whole"), _normal(real, "close")
        near, near_chances = made["close"], made["close chances"]
        return {
            "FID": _distance(made["whole"], whole),
            "IS": _score([made["chances"]]),
            "crop FID": lambda index: metrics.frechet_distance(near[index].reshape(-1, near.shape[-1]), close),
            "crop IS": lambda index: metrics.inception_score(near_chances[index].reshape(-1, near_chances.shape[-1])),
            "CLIP": mean_of(made["CLIP"]),
        }


def real_images(folder: Path) -> list[Path]:
    """Its images' files. Refused where there are none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in files if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    if not found:
        raise Refused(f"there are no real images in {folder}")
    return found


def for_inception(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [299, 299, 3] in 0..255, not rounded, as clean-fid has it."""
    channels = [Image.fromarray(channel) for channel in image.transpose(2, 0, 1).astype(np.float32)]
    small = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)) for channel in channels]
    return np.clip(np.stack(small, -1), 0, 255)


def _no_smaller(image: np.ndarray, size: Size) -> np.ndarray:
    """The image, enlarged if a crop of `size` would not fit into it."""
    height, width = image.shape[:2]
    factor = max(size[0] / height, size[1] / width, 1)
    if factor == 1:
        return image
    shape = (max(round(width * factor), size[1]), max(round(height * factor), size[0]))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.LANCZOS))
