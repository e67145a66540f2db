"""One step of a phase's sampler: "Life of one denoising step", in `fusion`, is told from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from modules import sd_samplers_common, shared
from torch import Tensor

from lib_demofusion.fusion import Cancelled, Fusion
from lib_demofusion.hosts.webui import sampling
from lib_demofusion.hosts.webui.controlnet import Hints
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.progress import Progress
from lib_demofusion.hosts.webui.samplers import Sampler
from lib_demofusion.phases import Phase
from lib_demofusion.views import View, jitter_generator


class PhaseHooks:
    """What hangs on the denoiser of one phase's sampler. "Life of one denoising step", in `fusion`, is told from here."""

    def __init__(
        self, phase: Phase, fusion: Fusion, sampler: Sampler, tiling: bool, progress: Progress, hints: Hints | None = None
    ):
        self.phase = phase
        self.fusion = fusion
        self.timesteps = sampler.timesteps
        self.tiling = tiling
        self.progress = progress
        self.done = progress.ends[phase.number - 1]
        around = None if hints is None else hints.around
        self.prediction = host.Prediction(phase, self.fused, around, self.timesteps, fusion.window, fusion.view_batch)
        self.calls: list[tuple[Tensor, float]] = []  # x and t of each since the sampler has last told of a step
        self.since: float | None = None  # t where the last step began that it has told of; None before the first
        self.told_midway = False  # rather than at a step's end
        self.log_alphas = host.log_alphas()
        self.log_sigmas = 0.5 * (np.log1p(-np.exp(self.log_alphas)) - self.log_alphas)
        self.steps = np.arange(len(self.log_alphas))

    def levels(self, sigma: float, timesteps: bool | None = None) -> tuple[float, float, float]:
        """(t, noise, signal): the training timestep of the host's sigma, and x = signal * z + noise * n there.

        timesteps: whether that sigma is a timestep; as the sampler has it unless given.
        """
        if self.timesteps if timesteps is None else timesteps:
            kept = math.exp(np.interp(sigma, self.steps, self.log_alphas))
            return sigma, math.sqrt(1 - kept), math.sqrt(kept)
        return float(np.interp(math.log(sigma), self.log_sigmas, self.steps)), sigma, 1.0

    def before_step(self, denoiser: Any, args: tuple) -> None:
        """The skip residual, in place on the x that the sampler goes on with."""
        x, level = args[0], float(args[1][0])
        t, noise, signal = self.levels(level)
        if self.since is None and not self.calls:  # the phase begins
            x.copy_(self.fusion.noised_reference(noise, signal))
            if self.phase.skipped:  # prompts that change on the way, and the refiner, go by the host's count of its calls
                skipped = denoiser.sampler.config.total_steps(self.phase.skipped)
                denoiser.step += skipped
                denoiser.total_steps += skipped
        elif any(x is before and t == at for before, at in self.calls):
            return  # it asks again
        since = self.since if self.told_midway or not self.calls else self.calls[0][1]
        self.calls.append((x, t))
        self.fusion.skip_residual_(x, t, noise, signal, since)

    def told_by(self, callback: Callable) -> Callable:
        """The sampler's callback, which it calls once a step: between its calls here, those of a new step begin.

        k-diffusion's samplers tell midway, of the x that they have asked about last and that their step starts from: what
        follows until they tell again is tried out on the way, but for the last. Others tell at a step's end, of the x that
        it has led to, and what they try out comes after the call that the step starts with; one with adaptive steps may
        reject a step, to start from the same x again.
        """

        def told(state: dict) -> Any:
            if self.calls:
                first, last = self.calls[0], self.calls[-1]
                self.told_midway = state["x"] is last[0]
                self.since = (last if self.told_midway else first)[1]
                self.calls = [first] if state["x"] is first[0] and not self.told_midway else []
            return callback(state)

        return told

    def on_step(self, params: Any) -> None:
        self.prediction.on_step(params)
        self.announced = 1  # the host counts a step as one
        self.progress.previews.fit()
        self.progress.show(self.done)

    def fused(self, x: Tensor, sigma: Tensor, call: Callable, first: bool) -> Tensor:
        """The model's answer, as the host's inner model gives it, from its answers for the views (`host.Prediction`)."""
        level, answers_noise = float(sigma[0]), self.prediction.timesteps
        t, noise, _ = self.levels(level, answers_noise)
        # Where the image is to tile, the plane is rolled by another offset at every step, so that no border stays one.
        generator = jitter_generator(-self.phase.number, t)
        h, w = self.phase.size
        roll = [int(torch.randint(side, (), generator=generator)) if self.tiling else 0 for side in (h, w)]

        def denoise(crops: Tensor, views: Sequence[View]) -> Tensor:
            out = call(crops, views, roll)
            self.progress.calls += len(crops)
            if first:
                self._count(len(views))
            return out if answers_noise else (crops - out) / noise

        try:
            with host.without_autocast():
                eps = self.fusion.predict(sampling.rolled(x, roll), t, denoise, noise)
        except Cancelled:
            raise sd_samplers_common.InterruptedException from None
        eps = sampling.rolled(eps, [-shift for shift in roll])
        return eps if answers_noise else x - noise * eps

    def _count(self, views: int) -> None:
        self.progress.pace.count(self.phase.number, views)
        self.progress.previews.count(views * self.phase.branches)
        self.done = min(self.done + views * self.phase.branches, self.progress.ends[self.phase.number])
        self.progress.show(self.done)
        for _ in range(views - self.announced):
            shared.total_tqdm.update()
        self.announced = 0
