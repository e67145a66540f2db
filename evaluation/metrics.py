"""What can be said of pictures by rule: of one whose scene is known, of one beside its base, and of two sets of features.

Images are uint8 [H, W, 3]; H and W are multiples of 128, the side of a base image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from training.scenes import OBJECT, Scene, object_areas, object_mask, shrink

AROUND = 4  # pixels of a base around its objects that still are their place
SPECK = 0.0003  # share of an image up to which a spot of the objects' colour is nothing; between that and OBJECT it is a stray


def objects_and_strays(image: np.ndarray, scene: Scene) -> tuple[int, int]:
    """How many objects an image shows, and how many small repeated ones on the background (figure 7 b of the paper)."""
    areas = object_areas(image, scene)
    return sum(area >= OBJECT for area in areas), sum(SPECK < area < OBJECT for area in areas)


def difference_from_base(image: np.ndarray, base: np.ndarray) -> float:
    """RMS over the pixels of the image, averaged down to the base's size, in 0..255."""
    small = shrink(image.astype(np.float32), image.shape[0] // base.shape[0])
    return float(np.sqrt(np.square(small - base).mean()))


def detail(image: np.ndarray, scene: Scene | None = None, base: np.ndarray | None = None) -> float:
    """Energy that is lost when 2 x 2 pixels are averaged, in 0..255 squared: what the next smaller image cannot hold.

    Of the whole image, where each copy of an object adds to it, or of the pixels of the scene's objects (0 without any).
    base: of those of them that lie where this image, the base, has its objects, so that copies elsewhere are left out.
    """
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    coarse = shrink(grey, 2).repeat(2, 0).repeat(2, 1)
    energy = np.square(grey - coarse)[..., 0]
    if scene is None:
        return float(energy.mean())
    mask = _at(object_mask(image, scene), image)
    if base is not None:
        around = np.ones((2 * AROUND + 1,) * 2, bool)
        mask &= _at(ndimage.binary_dilation(_at(object_mask(base, scene), base), around), image)
    inside = energy[mask]
    return float(inside.mean()) if inside.size else 0.0


def _at(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """A mask in an image's pixels, so many times as many."""
    factor = image.shape[0] // mask.shape[0]
    return mask.repeat(factor, 0).repeat(factor, 1)


def seams(image: np.ndarray, borders: tuple[Sequence[int], Sequence[int]]) -> float:
    """Mean absolute step between neighbouring pixels across the borders of windows, over that elsewhere.

    borders: the first pixels after them, in rows and in columns. 1 where nothing is to be seen of them.
    """
    at, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float32), axis=axis)).mean(axis=(1 - axis, 2))
        border = np.isin(np.arange(1, len(steps) + 1), borders[axis])
        at.append(steps[border])
        elsewhere.append(steps[~border])
    return float(np.concatenate(at).mean() / np.concatenate(elsewhere).mean())


@dataclass(frozen=True)
class Normal:
    """The normal distribution that fits features [N, D]: their mean and their covariance, unbiased, as numpy has it."""

    mean: np.ndarray
    cov: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Normal:
        features = np.asarray(features, float)
        return cls(features.mean(0), np.cov(features, rowvar=False))

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric root of the covariance."""
        values, vectors = np.linalg.eigh(self.cov)
        return vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T


def frechet_distance(features: np.ndarray, real: Normal) -> float:
    """Between the normal distribution that fits features [N, D] and that of real images (Heusel et al. 2017)."""
    own = Normal.of(features)
    # The trace of the root of a product of two covariances is the sum of the roots of its eigenvalues, which are those of
    # this symmetric one.
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(real.root @ own.cov @ real.root), 0, None)).sum()
    return float(np.square(own.mean - real.mean).sum() + np.trace(own.cov) + np.trace(real.cov) - 2 * roots)


def inception_score(chances: np.ndarray) -> float:
    """exp of the mean divergence of each image's class chances [N, classes] from their mean (Salimans et al. 2016)."""
    mean = chances.mean(0, keepdims=True)
    logs = np.log(np.clip(chances, 1e-12, None)) - np.log(np.clip(mean, 1e-12, None))
    return float(np.exp((chances * logs).sum(1).mean()))


Statistic = Callable[[np.ndarray], float]  # of the pictures with these numbers


def mean_of(values: Sequence[float]) -> Statistic:
    values = np.asarray(values, float)
    return lambda index: float(values[index].mean())


@dataclass(frozen=True)
class Estimate:
    """A statistic's value of a set of pictures, and its values `drawn` of bootstrap samples of them.

    The samples are the same for every statistic of as many pictures, so that two methods' estimates are paired.
    """

    value: float
    drawn: np.ndarray

    @classmethod
    def of(cls, statistic: Statistic, count: int, draws: int = 1000, seed: int = 0) -> Estimate:
        rng = np.random.default_rng(seed)
        drawn = np.array([statistic(rng.integers(0, count, count)) for _ in range(draws)])
        return cls(statistic(np.arange(count)), drawn)

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the samples, less their bias.

        Distances between distributions grow where pictures are drawn twice; the bias is how far the samples' mean is off.
        """
        low, high = np.percentile(self.drawn, (2.5, 97.5)) + self.value - self.drawn.mean()
        return float(low), float(high)
