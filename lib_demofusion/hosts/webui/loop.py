"""A job: from the base's latents through the phases to what the host decodes; what is finished is never lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modules import devices, errors, images, processing, shared
from PIL import Image
from torch import Tensor

from lib_demofusion.config import DemoFusionConfig, first_line
from lib_demofusion.fusion import Cancelled
from lib_demofusion.hosts.webui import controlnet, neighbours
from lib_demofusion.hosts.webui.checks import plan_for, reached, read_resumed, settings_for
from lib_demofusion.hosts.webui.decoding import decode, may_use_tiles
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.phases import Phases
from lib_demofusion.hosts.webui.picture import Start
from lib_demofusion.hosts.webui.progress import BaseHooks, Progress
from lib_demofusion.hosts.webui.sampling import FACTOR
from lib_demofusion.hosts.webui.second_pass import SecondPass
from lib_demofusion.hosts.webui.settings import NAME, Settings, describe, say, write_down
from lib_demofusion.hosts.webui.step import PhaseHooks
from lib_demofusion.hosts.webui.upscalers import stopped
from lib_demofusion.memory import OutOfMemory, is_out_of_memory
from lib_demofusion.phases import Phase, Plan, upscale
from lib_demofusion.saved import SavedPhase


def before_sampling(p: Any, args: Sequence[Any], start: Start | None = None) -> None:
    """The base is about to be sampled, or one of our phases, whose sampler has its hooks already."""
    denoiser = p.sampler.model_wrap_cfg
    if isinstance(getattr(denoiser, "demofusion", None), PhaseHooks) or getattr(p, "enable_hr", False):
        return
    settings = settings_for(p, args, start)
    if settings is None:
        return
    progress = Progress(plan_for(p, settings.config, start))
    if start is not None and start.from_picture:
        start.skip_base()
    denoiser.demofusion = BaseHooks(progress)
    shared.total_tqdm.updateTotal(progress.total * max(int(shared.state.job_count), 1))


def on_cfg_denoiser(params: Any) -> None:
    """The host's callback at every step of every sampler; ours carry what is to be called."""
    hooks = getattr(params.denoiser, "demofusion", None)
    if hooks is not None:
        hooks.on_step(params)


def post_sample(p: Any, ps: Any, args: Sequence[Any], start: Start | None = None) -> None:
    """Replace the base latents ps.samples [B, C, h, w] with those of the last phase that could be finished.

    start: the picture that the job starts from, if it does. Where no phase could be finished, the picture comes back.

    Where that is not the last of all, whatever the reason, the job says so.
    """
    try:
        settings = settings_for(p, args, start)
        if settings is not None:
            _run_phases(p, ps, settings, start)
    except Exception as error:
        errors.report(f"{NAME} failed", exc_info=True)
        describe(p, DemoFusionConfig(), 1.0)
        made = "the base is the last one finished"
        if start is not None:
            start.hand_over(ps)
            made = "the picture is as it was given" if start.from_picture else made
        say(p, "incomplete", f"{made}, because the next {_verb(_reason(error, start is not None and start.from_picture))}")


def _run_phases(p: Any, ps: Any, settings: Settings, start: Start | None) -> None:
    if getattr(ps.samples, "already_decoded", False):
        describe(p, settings.config, 1.0)
        say(p, "incomplete", "the base is the last one finished, because something else has made pictures of it already")
        return
    base_hooks = vars(p.sampler.model_wrap_cfg).pop("demofusion", None)  # img2img has one sampler for all batches
    progress = base_hooks.progress if base_hooks else Progress(plan_for(p, settings.config, start))
    job = _Job(p, ps, settings, start, progress)
    try:
        neighbours.check_latents(ps.samples, job.plan.window, FACTOR)
    except ValueError as error:
        progress.close()
        job.describe(job.plan.phases[0])
        if job.from_picture:
            start.hand_over(ps)
        say(p, "incomplete", f"{'the picture' if job.from_picture else 'the base'} is what you get, because {error}")
        return
    if stopped() and not job.from_picture:
        progress.close()
        job.describe(job.plan.phases[0])
        say(p, "incomplete", f"{job.called(job.plan.phases[0])}, is not finished, because it was stopped")
        return
    job.run()


class _Job:
    """The phases of one batch: from the base, or a given picture, to what the host is given to decode and save."""

    def __init__(self, p: Any, ps: Any, settings: Settings, start: Start | None, progress: Progress):
        self.p = p
        self.ps = ps
        self.settings = settings
        self.config = settings.config
        self.start = start
        self.progress = progress
        self.plan = progress.plan
        self.from_picture = start is not None and start.from_picture
        self.second = SecondPass(p, self.config)
        self.own_checkpoint = self.second.checkpoint.info is not None
        self.finished: list[tuple[Phase, Tensor]] = []  # with its latents; of a given picture the base's stand for itself

    def run(self) -> None:
        try:
            self._run()
            self._hand_over()
        finally:
            self.second.put_back()
        if not self.own_checkpoint:
            self.progress.remember()

    def _run(self) -> None:
        p, plan = self.p, self.plan
        self.progress.pause(1)
        trouble = None
        self.finished.append((plan.phases[0], self.ps.samples))
        with _restored(p), self.second.running():
            phases = Phases(p, plan, self.config, self.progress, self.start, self.second)
            try:
                self._sample(phases)
            except Cancelled:
                trouble = "stopped"
            except Exception as error:  # whatever it is, what is finished must not be lost
                errors.report(f"{NAME} failed", exc_info=True)
                trouble = _reason(error, self.from_picture)
        self.progress.close()
        if phases.view_batch.size < self.config.view_batch_size:
            say(p, "note", f"a view batch size of {self.config.view_batch_size} did not fit; {phases.view_batch.size} did.")
        if trouble:
            last = self.finished[-1][0]
            kept, which = f"phase {last.number} of {len(plan.phases)} is the last one finished", "the last one finished"
            if self._given(last):
                kept, which = "the picture is as it was given", "what you get"
            p.comment(f"{NAME}: {trouble}; {self.called(last)}, is {which}.")
            write_down(p, "incomplete", f"{kept}, because the next {_verb(trouble)}")
            _keep_what_is_finished()
            devices.torch_gc()

    def _sample(self, phases: Phases) -> None:
        """The phases after the base, as far as they get; each is kept in `finished`."""
        plan, settings, base, done = self.plan, self.settings, self.ps.samples, None
        self.second.begin()
        if self.from_picture:
            self.second.load()
        if self.start is not None:
            base = self.start.base(base, another=self.own_checkpoint)
        if settings.resume is not None:
            base, done = phases.take_up(read_resumed(settings.resume), base)
            self.finished.append((plan.phases[done[0] - 1], done[1]))
            if done[0] > 1:
                self.second.load()
        elif settings.save_phases and not self.from_picture:
            self._save(plan.phases[0], base, base)
        original = None if self.start is None else self.start.original(self.config)
        for phase, latents in upscale(plan, base, phases.noise, phases.denoise, done, phases.enlarge, original):
            self.finished.append((phase, latents))
            if settings.save_phases and phase is not plan.phases[-1]:
                self._save(phase, latents, base)

    def _hand_over(self) -> None:
        """Give the host the last of the finished phases that can be decoded, decoded already if the host cannot do that."""
        p, ps = self.p, self.ps
        while True:
            phase, latents = self.finished.pop()
            self.describe(phase)
            if self._given(phase):
                self.start.hand_over(ps)
                return
            if self.start is not None:
                self.start.reached = tuple(side * FACTOR for side in phase.size)
            theirs = self.own_checkpoint and phase.number > 1
            if theirs:
                host.wrap_around(host.tiles(p))
                if shared.opts.sd_vae_decode_method != "Full":
                    p.extra_generation_params["VAE Decoder"] = shared.opts.sd_vae_decode_method  # as the host says it
            else:
                self.second.put_back()
            if not theirs and (not self.finished or not may_use_tiles(p.sd_model)):
                ps.samples = latents
                return
            try:
                ps.samples = decode(p.sd_model, latents, self.plan.window)
                return
            except Exception as error:
                errors.report(f"{NAME}: phase {phase.number} cannot be decoded", exc_info=True)
                lost = f"{self.called(phase)}, cannot be decoded: {_reason(error, self.from_picture)}"
                say(p, "incomplete", f"{lost}; {self.called(self.finished[-1][0])}, is what you get.")

    def _given(self, phase: Phase) -> bool:
        """Whether a phase is the picture that was given."""
        return self.from_picture and phase.number == 1

    def called(self, phase: Phase) -> str:
        if self._given(phase):
            return "the picture as it was given, {1}x{0}".format(*self.start.size)
        return f"phase {phase.number} of {len(self.plan.phases)}, {phase.size[1] * FACTOR}x{phase.size[0] * FACTOR}"

    def describe(self, phase: Phase) -> None:
        """Let the infotext say the scale that was reached."""
        describe(self.p, *reached(self.p, self.plan, phase, self.config, self.start))
        self.second.describe(phase.number)

    def _save(self, phase: Phase, latents: Tensor, base: Tensor) -> None:
        """Write a phase's images, and beside each the file from which it can be resumed. What fails here ends no phase."""
        if not self.p.save_samples():
            return
        self.describe(phase)
        try:
            with self.second.aside():
                _write(self.p, self.plan, phase, latents, base)
        except Exception as error:  # a full disk, or no memory to decode
            errors.report(f"{NAME}: phase {phase.number} was not saved", exc_info=True)
            say(self.p, "note", f"phase {phase.number} was not saved: {first_line(error)}")


def _keep_what_is_finished() -> None:
    """The host does not save images that were interrupted or skipped; a finished phase is a whole image.

    So an interrupt becomes "stop after this image", and a skip, which is done, is over.
    """
    if shared.state.interrupted:
        shared.state.stop_generating()
        shared.state.interrupted = False
    shared.state.skipped = False


def _reason(error: Exception, from_picture: bool) -> str:
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):  # not in a view: the whole latents or picture
        return f"out of memory beside the views; a smaller scale or {'window' if from_picture else 'base image'} needs less"
    return str(error) if isinstance(error, OutOfMemory) else f"failed: {first_line(error)}"


def _verb(trouble: str) -> str:
    """What a phase did that ended in `trouble`."""
    return {"stopped": "was stopped"}.get(trouble, f"ran {trouble}" if trouble.startswith("out of memory") else trouble)


@contextmanager
def _restored(p: Any) -> Iterator[None]:
    """Put back what any phase changes on p and in the host's state."""
    names = ("rng", "sampler", "mask", "nmask")
    before = {name: vars(p)[name] for name in names if name in vars(p)}
    job, textinfo = shared.state.job, shared.state.textinfo
    try:
        for name in {"mask", "nmask"} & before.keys():
            setattr(p, name, None)  # of the base's size; samplers would take them
        with host.untiled(p), controlnet.kept(p):
            yield
    finally:
        for name, value in before.items():
            setattr(p, name, value)
        shared.state.job, shared.state.textinfo = job, textinfo


def _write(p: Any, plan: Plan, phase: Phase, latents: Tensor, base: Tensor) -> None:
    for i, pixels in enumerate(decode(p.sd_model, latents, plan.window)):
        image = pixels.float().add(1).mul(127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        info = processing.create_infotext(p, p.prompts, p.seeds, p.subseeds, index=i, all_negative_prompts=p.negative_prompts)
        path, _ = images.save_image(
            Image.fromarray(image),
            p.outpath_samples,
            "",
            p.seeds[i],
            p.prompts[i],
            shared.opts.samples_format,
            info=info,
            p=p,
            suffix=f"-demofusion-phase{phase.number}",
        )
        saved = SavedPhase(phase.number, latents[i : i + 1], base[i : i + 1], "WebUI", from_picture=plan.from_picture)
        saved.write(Path(path).with_suffix(".safetensors"))
