"""The host's side of `lib_demofusion.phases.upscale`: noise, enlarging, and the sampling of one phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modules import devices, rng, shared
from torch import Tensor

from lib_demofusion.areas import Areas, asks_for_areas
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Cancelled
from lib_demofusion.hosts.webui import controlnet, neighbours, sampling
from lib_demofusion.hosts.webui.decoding import decode, encode
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.picture import Start
from lib_demofusion.hosts.webui.progress import Progress
from lib_demofusion.hosts.webui.samplers import SAMPLERS
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.hosts.webui.second_pass import SecondPass
from lib_demofusion.hosts.webui.settings import NAME
from lib_demofusion.hosts.webui.step import PhaseHooks
from lib_demofusion.hosts.webui.upscalers import stopped, upscaler_for
from lib_demofusion.memory import ViewBatch
from lib_demofusion.phases import Phase, Plan, Upscaler, clock_time, enlarge, fusion_for
from lib_demofusion.saved import SavedPhase
from lib_demofusion.views import Size


class Phases:
    """The host's side of `upscale`, for the images of one batch."""

    def __init__(
        self,
        p: Any,
        plan: Plan,
        config: DemoFusionConfig,
        progress: Progress,
        start: Start | None,
        second: SecondPass,
    ):
        self.p = p
        self.start = start
        self.plan = plan
        self.config = config
        self.progress = progress
        self.second = second
        self.upscaler = upscaler_for(config.upscaler)
        self.preprocessed: dict[int, controlnet.Preprocessed] = {}
        self.view_batch = ViewBatch(config.view_batch_size, devices.device, "window" if plan.from_picture else "base image")

    def take_up(self, saved: SavedPhase, base: Tensor) -> tuple[Tensor, tuple[int, Tensor]]:
        """The base and the finished phase of a file, checked against the base just made, [1, C, h, w]."""
        kept = saved.base.to(base)
        if (kept - base).square().mean().sqrt() > 0.1 * base.std():  # another card moves the last bits, not the picture
            raise ValueError("the saved phase is of another image; take prompt, seed and settings from its image's PNG Info")
        self.progress.pause(saved.number)
        return kept, (saved.number, saved.latents.to(base))

    def noise(self, phase: Phase) -> Tensor:
        """The images' own noise at the phase's size; the host's generators then also feed samplers that want more."""
        p = self.p
        p.rng = rng.ImageRNG(
            (host.latent_channels(), *phase.size),
            p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            seed_resize_from_h=p.seed_resize_from_h,
            seed_resize_from_w=p.seed_resize_from_w,
        )
        return p.rng.next()

    def enlarge(self, latents: Tensor, size: Size) -> tuple[Tensor, Areas]:
        """A phase's reference; before the first, the base's images are decoded, and then the phases' checkpoint is loaded."""
        images = iter(self._decoded(latents, size) if self.second.checkpoint.waits else ())
        if stopped():
            raise Cancelled
        self.second.load()

        def as_image(z: Tensor) -> Tensor:
            image = next(images, None)
            return self._image(z) if image is None else image

        def as_latents(image: Tensor) -> Tensor:
            return encode(self.p.sd_model, image, self.plan.window)

        with host.autocast():
            return enlarge(latents, size, self.config, as_image, as_latents, FACTOR, host.tiles(self.p), self.upscaler)

    def _image(self, z: Tensor) -> Tensor:
        return decode(self.p.sd_model, z, self.plan.window)[0].float()[None]

    def _decoded(self, latents: Tensor, size: Size) -> list[Tensor]:
        """The images by which a phase is enlarged, one after the other; none where it is enlarged as latents."""
        made: list[Tensor] = []

        def as_image(z: Tensor) -> Tensor:
            made.append(self._image(z))
            return made[-1]

        upscaler = self.upscaler
        if asks_for_areas(self.config) or (upscaler.images if upscaler else self.config.pixel_upsampling):
            none = Upscaler(images=lambda image, size: image[..., :1, :1].clone())
            with host.autocast():
                config = replace(self.config, hold_flat=0.0, unguided_flat=0.0)
                enlarge(latents, size, config, as_image, lambda image: latents[:1], FACTOR, host.tiles(self.p), none)
        return made

    def denoise(self, phase: Phase, reference: Tensor, noise: Tensor, areas: Areas) -> Tensor:
        """One phase with a sampler of its own. Raises Cancelled if the user interrupts or skips."""
        p = self.p
        shared.state.job = shared.state.textinfo = f"{NAME} phase {phase.number} of {len(self.plan.phases)}"
        seconds = self.progress.pace.seconds(phase.number)
        if seconds is not None and SAMPLERS[p.sampler_name].counts != "unknown":
            shared.state.textinfo += f" (about {clock_time(seconds)})"
        shared.state.current_image_sampling_step = 0  # the steps count from 0 again, and previews with them
        if host.set_up_model(p, phase, self.second.checkpoint.info):
            controlnet.mark(p)
        with host.levels_of(p):
            latents = self._sampled(phase, reference, noise, areas)
        if stopped():
            raise Cancelled
        self.progress.pause(phase.number)
        host.check_finite(latents)
        return latents

    def _sampled(self, phase: Phase, reference: Tensor, noise: Tensor, areas: Areas) -> Tensor:
        p = self.p
        p.sampler = sampler = sampling.create_sampler(p)
        neighbours.check_sampler(sampler)
        hints = controlnet.hints(p, self.plan, phase, self.start, self.preprocessed)
        fusion = fusion_for(
            self.plan,
            phase,
            self.config,
            reference,
            noise,
            fresh_noise=sampling.adds_noise(p, sampler),
            cancelled=stopped,
            held=areas.held,
            view_batch=self.view_batch,
        )
        denoiser = sampler.model_wrap_cfg
        denoiser.demofusion = hooks = PhaseHooks(phase, fusion, SAMPLERS[p.sampler_name], host.tiles(p), self.progress, hints)
        sampler.callback_state = hooks.told_by(sampler.callback_state)
        handle = denoiser.register_forward_pre_hook(hooks.before_step)
        pictures = self.start.pictures if self.plan.from_picture else ()
        try:
            with host.sampling(p, hooks.prediction, reference, noise, areas.unguided, pictures):
                if hasattr(p, "init_images"):
                    image_conditioning = self.start.conditioning(noise, self.plan.window)
                else:
                    h, w = phase.size
                    image_conditioning = p.txt2img_image_conditioning(noise, width=w * FACTOR, height=h * FACTOR)
                return sampling.sample(p, sampler, phase, noise, image_conditioning)
        finally:
            handle.remove()
            del denoiser.demofusion
