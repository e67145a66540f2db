"""One job on diffusers, from its prompts to its last phase, and what is finished of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lib_demofusion.areas import Areas, areas_of, asks_for_areas, guidance_scale
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.distributed import Ranks, SharedViewBatch
from lib_demofusion.fusion import Cancelled, crops_of
from lib_demofusion.hosts.diffusers_autoencoder import as_image, decode, decode_latents, encode, encode_picture
from lib_demofusion.hosts.diffusers_checkpoints import device_of
from lib_demofusion.hosts.diffusers_controlnet import Control, Controls
from lib_demofusion.hosts.diffusers_lora import Adapters
from lib_demofusion.hosts.diffusers_schedules import Sampling, draws_noise, make_schedule, prediction_type, sigma_at, take_steps
from lib_demofusion.memory import ViewBatch, sent
from lib_demofusion.original import Original
from lib_demofusion.phases import Phase, Plan, Upscaler, enlarge, enlarged_size, fusion_for
from lib_demofusion.pictures import Given
from lib_demofusion.saved import SavedPhase
from lib_demofusion.views import Size, View


@dataclass
class Result:
    """Finished phases, the base first, each with its latents [B, C, H, W] on the CPU.

    evaluations: views that the model saw, per image, as counted at the model, or the models of all ranks. view_batch: how
    many went into a call of this process.
    given: the picture that the job began with, if it did; its latents, shrunken to the window, take the base's place.
    phase_pipe: what made the phases after the base, if another pipeline did.
    """

    plan: Plan
    pipe: Any
    phases: list[tuple[Phase, Tensor]]
    view_batch: ViewBatch
    evaluations: int = 0
    given: Given | None = None
    phase_pipe: Any = None

    def images(self, index: int = -1) -> list:
        """The PIL images of one phase: -1 the last one finished, 0 the base, or the picture that was given, at its own size.

        Outside of a mask they are that picture, enlarged by Lanczos.
        """
        phase, latents = self.phases[index]
        if self.given is not None and phase.number == 1:
            return [self.given.picture.copy() for _ in latents]
        pipe = self.pipe if phase.number == 1 else self.phase_pipe or self.pipe
        images = decode_latents(pipe, latents, self.plan.window)
        return images if self.given is None else [self.given.over(image) for image in images]


class Incomplete(Exception):
    """Stopped before the last phase: `result` holds what was finished, `cancelled` says whether the user asked for it."""

    def __init__(self, message: str, result: Result, cancelled: bool = False):
        super().__init__(message)
        self.result = result
        self.cancelled = cancelled


@dataclass
class Part:
    """What the base, or the phases after it, are made with.

    prompts: the prompt and the negative one. loras: how many of the job's, the first ones, it has. embeds, pooled: of the
    prompts, by branch of guidance, the negative prompt's first, [branches, tokens, channels]; set by encode_prompts.
    """

    pipe: Any
    sampling: Sampling
    prompts: tuple[str, str]
    adapters: Adapters
    loras: int
    embeds: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        # Asked once: that looks at every module.
        self.device, self.dtype = device_of(self.pipe, self.pipe.unet), self.pipe.unet.dtype

    def switch(self) -> None:
        """Turns on its LoRAs, and no others of the job."""
        self.adapters.use(self.loras)

    def encode_prompts(self) -> None:
        guided = self.sampling.branches == 2
        self.switch()
        prompt, negative_prompt = self.prompts
        encoded = self.pipe.encode_prompt(
            prompt=prompt,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=(negative_prompt or None) if guided else None,  # none, and the checkpoint says what that is
        )
        # (embeds, negative embeds), and for SDXL (..., pooled, negative pooled)
        pairs = [torch.cat([negative, own]) if guided else own for own, negative in zip(encoded[::2], encoded[1::2])]
        self.embeds, self.pooled = (*pairs, None)[:2]

    @property
    def told(self) -> tuple:
        """What the prompts' embeddings depend on."""
        return id(self.pipe), self.prompts, self.sampling.branches, self.loras

    def schedule(self, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """The scheduler with its steps set; more: settings on top."""
        sampling = self.sampling
        return make_schedule(self.pipe.scheduler, sampling.kind, sampling.steps, more, schedule=sampling.schedule)

    def levels(self, sigma: float) -> tuple[float, float]:
        """How much noise and how much signal the sampler's x holds at noise level sigma."""
        signal = 1 / math.sqrt(1 + sigma * sigma) if self.sampling.kind.variance_preserving else 1.0
        return sigma * signal, signal


class Run:
    """One call of `generate`: the settings, the prompts' embeddings, the seeded generators and what is finished.

    parts: what the base is made with, and what the phases after it are. ranks: the processes that share the job, if it is.
    """

    def __init__(
        self,
        plan: Plan,
        config: DemoFusionConfig,
        parts: tuple[Part, Part],
        seeds: Sequence[int],
        *,
        given: Given | None = None,
        controls: Sequence[Control] = (),
        upscaler: Upscaler | None = None,
        progress: Callable[[Phase, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        finished: Callable[[Result, SavedPhase], None] | None = None,
        ranks: Ranks | None = None,
    ):
        self.plan = plan
        self.config = config
        self.parts = parts
        self.given = given
        self.upscaler = upscaler
        self.progress = progress
        self.cancelled = cancelled or (lambda: False)
        self.finished = finished
        self.ranks = ranks
        base, phases = parts
        self.device, self.factor = base.device, base.pipe.vae_scale_factor
        self.phase_schedule = phases.schedule(phases.sampling.kind.phase_settings)
        self.controls = Controls(controls, plan.window, self.factor)
        # On the CPU whatever the device, so that a seed gives one picture everywhere.
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        batches = (config.view_batch_size, self.device, "window" if given else "base image")
        view_batch = SharedViewBatch(ranks, *batches) if ranks else ViewBatch(*batches)
        self.result = Result(plan, base.pipe, [], view_batch, given=given)
        if phases.pipe is not base.pipe:
            self.result.phase_pipe = phases.pipe

    def part(self, phase: Phase) -> Part:
        """What a phase is made with."""
        return self.parts[phase.number > 1]

    def finish(self, phase: Phase, latents: Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise FloatingPointError(f"phase {phase.number} gave NaN; use --dtype float32")
        self.result.phases.append((phase, latents.cpu()))
        begun = self.plan.from_picture
        if self.finished is not None and not (begun and phase.number == 1):
            states = torch.stack([generator.get_state() for generator in self.generators])
            base = self.result.phases[0][1]
            saved = SavedPhase(phase.number, latents.cpu(), base, "command", states, from_picture=begun)
            self.finished(self.result, saved)

    def take_up(self, saved: SavedPhase) -> tuple[Tensor, tuple[int, Tensor]]:
        """Everything as it was when the phase was saved: the base, and the phase's number and latents."""
        for generator, state in zip(self.generators, saved.generators):
            generator.set_state(state.clone())  # torch takes no row of a tensor
        numbers = dict.fromkeys((1, saved.number))
        self.result.phases = [(self.plan.phases[n - 1], saved.base if n == 1 else saved.latents) for n in numbers]
        self.result.evaluations = self.plan.evaluations_to(saved.number)
        return saved.base.to(self.device).float(), (saved.number, saved.latents.to(self.device).float())

    def encode_prompts(self, base: bool) -> None:
        """base: whether the base is made, too, and not only the phases after it."""
        first, second = self.parts
        second.encode_prompts()
        if base and first.told != second.told:
            first.encode_prompts()
        elif base:
            first.embeds, first.pooled = second.embeds, second.pooled

    def encode(self, size: Size) -> Tensor:
        """The given picture, resized to (h, w) latent pixels, as latents, one copy for each seed."""
        return self._copies(encode_picture(self.parts[1].pipe, self.given.picture, size, self.plan.window))

    def _enlarged(self, size: Size) -> Tensor:
        """The given picture as latents of (h, w), by the upscaler."""
        pipe, (w, h) = self.parts[1].pipe, self.given.picture.size
        if self.upscaler.images is None:
            own = encode_picture(pipe, self.given.picture, enlarged_size((h, w), 1, self.factor), self.plan.window)
            return self._copies(self.upscaler.latents(own, size))
        image = self.upscaler.images(as_image(self.given.picture), self._pixels(size))
        return self._copies(encode(pipe, image.clamp(-1, 1), self.plan.window))

    def _copies(self, latents: Tensor) -> Tensor:
        return latents.to(self.device).repeat(len(self.generators), 1, 1, 1)

    def _pixels(self, size: Size) -> Size:
        return tuple(side * self.factor for side in size)

    def original(self) -> Original | None:
        """The given picture, as the phases take it."""
        if self.given is None:
            return None
        areas, picture = Areas(), self.given.picture
        if asks_for_areas(self.config):
            h, w = self._pixels(enlarged_size(picture.size[::-1], 1, self.factor))
            pixels = self.parts[1].pipe.image_processor.preprocess(picture.resize((w, h)))
            areas = areas_of(pixels.to(self.device), self.config, self.factor)
        if self.upscaler is None:
            return Original(self.encode, areas=areas, mask=None if self.given.mask is None else self.given.mask_at)
        if self.given.mask is None:
            return Original(self._enlarged, areas=areas)

        def fill(picture: Tensor) -> Tensor:
            return self._enlarged(tuple(picture.shape[-2:]))

        # Around the mask it is the picture by Lanczos, which is what the result shows there.
        return Original(self.encode, areas=areas, mask=self.given.mask_at, fill=fill)

    def enlarge(self, latents: Tensor, size: Size) -> tuple[Tensor, Areas]:
        first = tuple(latents.shape[-2:]) == tuple(self.plan.window)
        before, after = self.parts[not first].pipe, self.parts[1].pipe
        code = partial(decode, before, base=self.plan.window), partial(encode, after, base=self.plan.window)
        return enlarge(latents, size, self.config, *code, self.factor, upscaler=self.upscaler)

    def noise(self, phase: Phase) -> Tensor:
        shape = (1, self.part(phase).pipe.unet.config.in_channels, *phase.size)
        return torch.cat([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def base(self) -> Tensor:
        """Phase 1: ordinary sampling from noise."""
        phase, (h, w) = self.plan.phases[0], self.plan.window
        part = self._begin(phase)
        schedule = part.schedule()
        x = self.noise(phase) * schedule.init_noise_sigma
        everything = [View("local", 0, 0, h, w)]

        def predict(x: Tensor, t: Tensor, sigma: float, since: float | None) -> Tensor:
            def call() -> Tensor:
                if self.cancelled():
                    raise Cancelled
                self.controls.step()
                return self._model(phase, x, everything, t, sigma)

            return self.ranks.alike(call) if self.ranks else call()

        return self._sample(part, schedule, x, predict)

    def _begin(self, phase: Phase) -> Part:
        part = self.part(phase)
        part.switch()
        self.controls.begin(phase)
        return part

    def denoise(self, phase: Phase, reference: Tensor, noise: Tensor, areas: Areas) -> Tensor:
        """Phases after the base: the same sampling, of the fused prediction, with the skip residual."""
        part, schedule = self._begin(phase), self.phase_schedule
        if self.ranks:
            reference, *masks = self.ranks.same(reference, areas.held, areas.unguided)
            areas = Areas(*masks)
            self.result.view_batch.elsewhere = lambda views: self._count(phase, views, views * phase.branches)
        fusion = fusion_for(
            self.plan,
            phase,
            self.config,
            reference,
            noise,
            fresh_noise=draws_noise(part.sampling.kind, schedule),
            cancelled=self.cancelled,
            held=areas.held,
            view_batch=self.result.view_batch,
            t_max=schedule.config.num_train_timesteps,
        )

        unguided = None if areas.unguided is None else areas.unguided.expand(len(reference), -1, -1, -1)

        def predict(x: Tensor, t: Tensor, sigma: float, since: float | None) -> Tensor:
            self.controls.step()
            levels = part.levels(sigma)
            fusion.skip_residual_(x, float(t), *levels, since)

            def denoise(crops: Tensor, views: Sequence[View]) -> Tensor:
                own = None if unguided is None else crops_of(unguided, views)
                return self._model(phase, crops, views, t, sigma, own)

            return fusion.predict(x, float(t), denoise, levels[0])

        first = phase.skipped * schedule.order
        x = fusion.noised_reference(*part.levels(sigma_at(schedule, first)))
        return self._sample(part, schedule, x, predict, first)

    def _sample(self, part: Part, schedule: Any, x: Tensor, predict: Callable[..., Tensor], first: int = 0) -> Tensor:
        generators = self.generators if draws_noise(part.sampling.kind, schedule) else None
        return take_steps(schedule, x, predict, first, generators)

    def _model(
        self,
        phase: Phase,
        crops: Tensor,
        views: Sequence[View],
        t: Tensor,
        sigma: float,
        unguided: Tensor | None = None,
    ) -> Tensor:
        """The guided noise in crops [len(views) * B, C, h, w] at noise level sigma. unguided: of each crop."""
        part, branches = self.part(phase), phase.branches
        scale = 1.0 if part.sampling.kind.variance_preserving else 1 / math.sqrt(1 + sigma * sigma)
        x = crops * scale
        rows = len(crops)
        conditions = {"encoder_hidden_states": part.embeds.repeat_interleave(rows, 0)}
        if part.pooled is not None:
            ids = self._size_ids(phase, views).repeat_interleave(rows // len(views), 0).repeat(branches, 1)
            pooled = part.pooled.repeat_interleave(rows, 0)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sent(ids.to(pooled.dtype), self.device)}
        t = sent(t, self.device)
        inputs = x.repeat(branches, 1, 1, 1).to(part.dtype)
        added = self.controls.residuals(views, inputs, t, branches, conditions)
        output = part.pipe.unet(inputs, t, return_dict=False, **conditions, **added)[0].float()
        self._count(phase, len(views), len(output) // len(self.generators))
        if prediction_type(part.pipe.scheduler) == "v_prediction":
            output = (output + sigma * x.repeat(branches, 1, 1, 1)) / math.sqrt(1 + sigma * sigma)
        if branches == 1:
            return output
        uncond, cond = output.chunk(2)
        return uncond + guidance_scale(part.sampling.cfg_scale, unguided) * (cond - uncond)

    def _count(self, phase: Phase, views: int, evaluations: int) -> None:
        self.result.evaluations += evaluations
        if self.progress is not None:
            self.progress(phase, views)

    def _size_ids(self, phase: Phase, views: Sequence[View]) -> Tensor:
        """SDXL's size conditions, a row a view: original (height, width), crop (top, left), target (height, width).

        The base is asked for at its own size; the phases after it at the final one, each window where it lies.
        """
        of = self.plan.phases[0] if phase.number == 1 else self.plan.phases[-1]
        size = self._pixels(of.size)
        return torch.tensor([[*size, *view.crop_pixels(self.factor), *size] for view in views])
