"""What can be said of pictures by rule: of one whose scene is known, of one beside its base, and of two sets of features.

Images are uint8 [H, W, 3]; H and W are multiples of 128, the side of a base image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from training.scenes import OBJECT, Scene, count_objects, object_areas, shrink

SPECK = 0.0003  # share of an image up to which a spot of the objects' colour is nothing; between that and OBJECT it is a stray


def count_is_right(image: np.ndarray, scene: Scene) -> bool:
    return count_objects(image, scene) == scene.count


def strays(image: np.ndarray, scene: Scene) -> int:
    """Small repeated objects on the background (figure 7 b of the paper)."""
    return sum(SPECK < area < OBJECT for area in object_areas(image, scene))


def difference_from_base(image: np.ndarray, base: np.ndarray) -> float:
    """RMS over the pixels of the image, averaged down to the base's size, in 0..255."""
    small = shrink(image.astype(np.float32), image.shape[0] // base.shape[0])
    return float(np.sqrt(np.square(small - base).mean()))


def detail(image: np.ndarray) -> float:
    """Energy that is lost when 2 x 2 pixels are averaged, in 0..255 squared: what the next smaller image cannot hold."""
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    coarse = shrink(grey, 2).repeat(2, 0).repeat(2, 1)
    return float(np.square(grey - coarse).mean())


def seams(image: np.ndarray, step: int) -> float:
    """Mean absolute step between neighbouring pixels across the borders of windows, every `step` pixels, over that elsewhere.

    1 where nothing is to be seen of them.
    """
    at, elsewhere = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(image.astype(np.float32), axis=axis)).mean(axis=(1 - axis, 2))
        border = np.arange(1, len(steps) + 1) % step == 0
        at.append(steps[border])
        elsewhere.append(steps[~border])
    return float(np.concatenate(at).mean() / np.concatenate(elsewhere).mean())


def frechet_distance(features: np.ndarray, real: np.ndarray) -> float:
    """Between the normal distributions that fit two sets of features, [N, D] and [M, D] (Heusel et al. 2017)."""
    (mean, cov), (real_mean, real_cov) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (features, real))
    # The trace of the root of a product of two covariances is the sum of the roots of its eigenvalues.
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov @ real_cov).real, 0, None)).sum()
    return float(np.square(mean - real_mean).sum() + np.trace(cov) + np.trace(real_cov) - 2 * roots)


def inception_score(chances: np.ndarray) -> float:
    """exp of the mean divergence of each image's class chances [N, classes] from their mean (Salimans et al. 2016)."""
    mean = chances.mean(0, keepdims=True)
    logs = np.log(np.clip(chances, 1e-12, None)) - np.log(np.clip(mean, 1e-12, None))
    return float(np.exp((chances * logs).sum(1).mean()))


def interval(
    values: Sequence, statistic: Callable[[np.ndarray], float] = np.mean, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of a statistic over bootstrap samples of the values' first axis."""
    values, rng = np.asarray(values), np.random.default_rng(seed)
    found = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)
