"""The host's one bar over all phases, and its live previews."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from modules import errors, sd_samplers_common, shared
from torch import Tensor

from lib_demofusion import decode as tiles
from lib_demofusion.hosts.webui import readout
from lib_demofusion.hosts.webui.decoding import may_use_tiles
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.settings import NAME
from lib_demofusion.phases import Pace, Plan

PREVIEW_STEPS = 10  # after how many steps the host shows what it has, unless set otherwise


class Progress:
    """The host's one bar, over the phases of one batch and all batches, weighted by what the model sees of them: views, and
    for each the branches of guidance. The console's bar counts the views.

    The host shows (job_no + sampling_step / sampling_steps) / job_count and moves the two latter itself, sampler by
    sampler; job_no is set so that the sum is the share that is done.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.pace = Pace(plan)
        self.previews = _Previews(plan)
        self.began, self.calls = time.monotonic(), 0  # of the model, those of all images and prompts
        self.checkpoint = shared.opts.sd_model_checkpoint
        self.batch = math.ceil(shared.state.job_no)  # which of state.job_count this is
        self.ends: dict[int, int] = {}  # phase number -> what is done when it ends
        self.total = done = 0
        for phase in plan.phases:
            views = phase.steps - phase.skipped if phase.number == 1 else phase.evaluations
            self.total += views
            done += views * phase.branches
            self.ends[phase.number] = done

    def show(self, done: float) -> None:
        state = shared.state
        own = state.sampling_step / state.sampling_steps if state.sampling_steps else 0
        state.job_no = self.batch + min(done / self.ends[len(self.ends)], 1) - own

    def pause(self, number: int) -> None:
        """Phase `number` is finished; the host's own step stands at 0 until the next sampler goes on from there."""
        shared.state.sampling_step = 0
        self.show(self.ends[number])

    def remember(self) -> None:
        """Keep what a model call has taken, for the readout of the next job."""
        if self.calls:
            seconds = (time.monotonic() - self.began) / self.calls
            readout.paces.setdefault(self.checkpoint, {})[math.prod(self.plan.window)] = seconds

    def close(self) -> None:
        state = shared.state
        state.job_no = self.batch
        state.sampling_step = state.current_image_sampling_step = state.sampling_steps


class _Previews:
    """When the host is to show what a phase has got to.

    It does so whenever its page asks and the sampler has made so many steps since (a setting, 10 at first). A phase may
    have fewer, but each is many views. So here a preview is due when the model has looked at as many latent pixels, in all
    branches of guidance, for each pixel that is decoded as it does in the base: what previews cost is the same share of the
    work. Who asks for fewer than the host's own gets these all the same, since else no short phase would show itself; who asks
    for none gets none.

    Lifetime: one batch. views: in all branches, since the last preview. shown: the latents of that one, as far as is known.
    """

    def __init__(self, plan: Plan):
        self.window = math.prod(plan.window) / plan.phases[0].branches  # of the base's work for a latent pixel
        self.sides = plan.window
        self.last, self.views, self.shown = shared.state.id_live_preview, 0, None

    def fit(self) -> None:
        """The host decodes the whole of its latents at once: of what takes us tiles it gets a reduced copy."""
        model, latents = shared.sd_model, shared.state.current_latent
        full = host.DECODES_PREVIEWS and shared.opts.show_progress_type == "Full"
        if latents is None or not full or not may_use_tiles(model):
            return
        h, w = latents.shape[-2:]
        tile = tiles.tile_for(host.coder(model, "decode"), latents.device, self.sides)
        share = tile / math.sqrt(h * w)
        if share < 1:
            size = [max(math.floor(side * share), 1) for side in (h, w)]
            shared.state.current_latent = torch.nn.functional.interpolate(latents, size=size, mode="area")

    def count(self, views: int) -> None:
        """So many views have just been looked at, those of all branches."""
        state, opts = shared.state, shared.opts
        if state.id_live_preview != self.last:
            self.last, self.views, self.shown = state.id_live_preview, 0, state.current_latent
        self.views += views
        latents, steps = state.current_latent, min(opts.show_progress_every_n_steps, PREVIEW_STEPS)
        if not getattr(opts, "live_previews_enable", True) or steps < 1 or latents is None or latents is self.shown:
            return
        if self.views * self.window < steps * math.prod(latents.shape[-2:]):
            return
        if getattr(shared, "parallel_processing_allowed", True):  # due, by the host's own count, when the page asks next
            state.current_image_sampling_step = state.sampling_step - opts.show_progress_every_n_steps
        else:
            self.shown = latents
            _show(latents)


def _show(latents: Tensor) -> None:
    try:
        with host.autocast():
            shared.state.assign_current_image(sd_samplers_common.sample_to_image(latents))
    except Exception:  # no preview is worth a phase
        errors.report(f"{NAME}: no preview", exc_info=True)


class BaseHooks:
    """Hangs on the base's denoiser: makes room in the bar for the phases that follow."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.called = False

    def on_step(self, params: Any) -> None:
        self.progress.show(shared.state.sampling_step * self.progress.plan.phases[0].branches)
        if self.called:  # the callback comes before the model's call
            self.progress.pace.count(1, 1)
        self.called = True
        self.progress.calls += sum(conds.shape[0] for conds in (params.text_cond, params.text_uncond) if conds is not None)
