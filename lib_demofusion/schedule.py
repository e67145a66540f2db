"""From training timesteps to the weights of the method: how much x is held, c2 and the blur's standard deviation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_demofusion.config import DemoFusionConfig

T_MAX = 1000  # training timesteps of Stable Diffusion 1.x, 2.x and XL
NODES = 4096  # of the table of a hold's integral; its error is below 1e-6 of the whole
NEVER_LETS_GO = 1e9  # a rate that leaves nothing, in place of infinity, which times no time is no number


@dataclass(frozen=True)
class Weights:
    """What a prediction is made with at one noise level."""

    c2: float  # share of the dilated views, Eq. 5
    blur_sigma: float  # standard deviation of the Gaussian filter before dilated sampling, in latent pixels


def cosine_decay(t: float, t_max: int = T_MAX) -> float:
    """(1 + cos(pi * (T - t) / T)) / 2: 1 at pure noise (t = T), 0 at a clean image (t = 0).

    t: training timestep, not necessarily whole; beyond 0...T it is taken as the nearer end.
    """
    t = min(max(float(t), 0.0), float(t_max))
    return (1 + math.cos(math.pi * (t_max - t) / t_max)) / 2


def weights_at(t: float, config: DemoFusionConfig, t_max: int = T_MAX) -> Weights:
    """The weights of a prediction at training timestep t, which belongs to a noise level and not to a step's number.

    So samplers that call the model twice per step, skip levels or go back up get the right ones.
    Paper: arXiv 2311.16973, sections 3.3 and 3.4.
    """
    d = cosine_decay(t, t_max)
    return Weights(
        c2=d**config.alpha2,
        blur_sigma=d**config.alpha3 * (config.blur_sigma - config.blur_sigma_end) + config.blur_sigma_end,
    )


def hold_at(
    t: float, since: float | None, config: DemoFusionConfig, held: Tensor | None = None, t_max: int = T_MAX
) -> float | Tensor:
    """The skip residual's share of x (Eq. 4) at training timestep t, where a step has led that began at `since`.

    The paper blends with c1(t) = d(t) ** alpha1 once in each of its 50 steps, so that less of x is left the more steps there
    are. Here the hold is a rate, -ln(1 - c1(t)) over T / hold_steps, the paper's step, and exp(-its integral) is left of x,
    however few or uneven the steps are (not in the paper; docs/tried.md has what it was chosen from). A blend of the paper's
    holds the stretch of half its step around it, and so a step those from half of that step below `since` to as much below
    t: at even steps of the paper's number this is Eq. 4, up to the rate's curvature. Where a phase begins, `since` None, and
    at pure noise x is the reference: 1. With hold_steps 0 it is c1(t) at every call, the paper's formula.

    held: [B, 1, H, W] in 0..1, what c1 at least is there; the share is a tensor of that shape then.
    """
    if config.hold_steps == 0:
        c1 = cosine_decay(t, t_max) ** config.alpha1
        return c1 if held is None else held.clamp_min(c1)
    if since is None or t >= t_max:
        return 1.0 if held is None else torch.ones_like(held)
    half = 0.5 / config.hold_steps
    low, high = (min(max(end / t_max - half, 0.0), 1.0) for end in sorted((float(t), float(since))))
    table = _hold_table(config.alpha1)
    if held is None:
        return -math.expm1(-config.hold_steps * float(_hold_integral(high, table) - _hold_integral(low, table)))
    least, table = held.float(), table.to(held.device, torch.float32)
    rate = -torch.log1p(-least).clamp(min=-NEVER_LETS_GO)
    # c1 falls with t: down to where it is `least` it counts, from there on `least` does.
    turn = (1 - torch.acos(least ** (0.5 / max(config.alpha1, 1e-3))) * (2 / math.pi)).clamp(low, high)
    passed = _hold_integral(high, table) - _hold_integral(turn, table) + rate * (turn - low)
    return -torch.expm1(-config.hold_steps * passed).to(held.dtype)


def _hold_integral(at: float | Tensor, table: Tensor) -> Tensor:
    """The integral of -ln(1 - c1) from 0 to `at`, both in units of T."""
    place = (1 - torch.as_tensor(at).to(table)).sqrt() * NODES
    node = place.long().clamp(max=NODES - 1)
    return torch.lerp(table[node], table[node + 1], place - node)


@functools.lru_cache(maxsize=64)
def _hold_table(alpha1: float) -> Tensor:
    """`_hold_integral` at 1 - v², v from 0 to 1: -ln(1 - c1) is infinite at T, and its integral over v is smooth there."""
    v = torch.linspace(0, 1, NODES + 1, dtype=torch.float64)
    log_c1 = alpha1 * torch.log1p(-(torch.sin(math.pi / 2 * v**2) ** 2))
    rate = -torch.log(-torch.expm1(log_c1))
    slope = (2 * v * rate.clamp(max=NEVER_LETS_GO)).nan_to_num(0)
    pieces = (slope[1:] + slope[:-1]) / (2 * NODES)
    return torch.cat([pieces.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
