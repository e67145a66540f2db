"""From the training timestep to the weights of the method: c1, c2 and the blur's standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lib_demofusion.config import DemoFusionConfig

T_MAX = 1000  # training timesteps of Stable Diffusion 1.x, 2.x and XL


@dataclass(frozen=True)
class Weights:
    """What the method does at one noise level."""

    c1: float  # share of the skip residual, Eq. 4
    c2: float  # share of the dilated views, Eq. 5
    blur_sigma: float  # standard deviation of the Gaussian filter before dilated sampling, in latent pixels


def cosine_decay(t: float, t_max: int = T_MAX) -> float:
    """(1 + cos(pi * (T - t) / T)) / 2: 1 at pure noise (t = T), 0 at a clean image (t = 0).

    t: training timestep, not necessarily whole; beyond 0...T it is taken as the nearer end.
    """
    t = min(max(float(t), 0.0), float(t_max))
    return (1 + math.cos(math.pi * (t_max - t) / t_max)) / 2


def weights_at(t: float, config: DemoFusionConfig, t_max: int = T_MAX) -> Weights:
    """The three weights at training timestep t, which belongs to a noise level and not to a step's number.

    So samplers that call the model twice per step, skip levels or go back up get the right ones.
    Paper: arXiv 2311.16973, sections 3.3 and 3.4.
    """
    d = cosine_decay(t, t_max)
    return Weights(
        c1=d**config.alpha1,
        c2=d**config.alpha2,
        blur_sigma=d**config.alpha3 * (config.blur_sigma - config.blur_sigma_end) + config.blur_sigma_end,
    )
