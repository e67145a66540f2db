"""A small network that enlarges pictures four times, trained on the checkpoint's scenes, in BSRGAN's role.

As BSRGAN it learns from pictures that were blurred, shrunk and soiled with noise in random measure (arXiv 2103.14006).
Its weights are part of the repository (`load`); `python -m evaluation.upscaler` trains them anew, from seeds.
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
from evaluation.readers import true_render
from lib_demofusion.fusion import gaussian_blur
from training.train import to_unit

FACTOR, WIDTH, BLOCKS = 4, 24, 6
SCENES, STEPS, BATCH, SIDE = 600, 3_000, 12, 32  # SIDE: of a training crop, before it is enlarged
WEIGHTS = Path(__file__).with_name("upscaler.safetensors")
SEED = 78


class Upscaler(nn.Module):
    """Pictures [N, 3, H, W] in -1..1 -> [N, 3, 4 H, 4 W]: what bicubic interpolation lacks, by residual convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
            for _ in range(BLOCKS)
        )
        self.head = nn.Sequential(nn.Conv2d(WIDTH, 3 * FACTOR**2, 3, padding=1), nn.PixelShuffle(FACTOR))

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        for block in self.body:
            features = features + block(features)
        return F.interpolate(x, scale_factor=FACTOR, mode="bicubic", align_corners=False) + self.head(features)


def degraded(x: Tensor, generator: torch.Generator) -> Tensor:
    """A picture [N, 3, H, W], blurred, shrunk to a quarter of its side, and with noise, in random measure."""
    sigma, noise = torch.rand(2, generator=generator).tolist()
    x = F.avg_pool2d(gaussian_blur(x, 9, 0.3 + 3 * sigma), FACTOR)
    return (x + 0.06 * noise * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def _picture(index: int) -> np.ndarray:
    return true_render(SEED, index)[1]


def train(scenes: int = SCENES, steps: int = STEPS) -> Upscaler:
    """An upscaler from nothing; a quarter of an hour on one core."""
    with ProcessPoolExecutor() as pool:
        pictures = np.stack([*tqdm(pool.map(_picture, range(scenes), chunksize=16), "scenes for the upscaler", scenes)])
    torch.manual_seed(SEED)
    generator, rng, upscaler = torch.Generator().manual_seed(SEED), np.random.default_rng(SEED), Upscaler()
    side = SIDE * FACTOR

    def loss() -> Tensor:
        places = zip(rng.integers(0, scenes, BATCH), *rng.integers(0, pictures.shape[1] - side + 1, (2, BATCH)))
        sharp = to_unit(np.stack([pictures[i, y : y + side, x : x + side] for i, y, x in places]))
        return F.l1_loss(upscaler(degraded(sharp, generator)), sharp)

    networks.fit(upscaler, loss, steps, weight_decay=0)
    return upscaler.eval()


def load(file: Path = WEIGHTS) -> Upscaler:
    """The upscaler that is part of the repository, or another file's."""
    return networks.load(Upscaler(), file)


@torch.no_grad()
def enlarge(upscaler: Upscaler, image: Image.Image) -> Image.Image:
    """The image, four times as wide and as high."""
    x = upscaler(to_unit(np.asarray(image)[None]))[0]
    return Image.fromarray(((x + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def main() -> None:
    """Train it anew: `python -m evaluation.upscaler`."""
    networks.save(train(), WEIGHTS)


if __name__ == "__main__":
    main()
