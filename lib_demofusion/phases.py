"""Progressive Upscaling: the plan of the phases, as a value, and the loop over them, for any host."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_demofusion.areas import Areas, areas_of, asks_for_areas
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion, match_moments
from lib_demofusion.original import Original
from lib_demofusion.views import Size, dilated_views, local_views

LARGEST = 64  # windows that a picture's sides may be long, on average
FITTING = (0.8, 1.25)  # how large windows may be, as a share of what the model was made for
WORTH = 1.02  # a phase must be at least so many times the picture's area
WRAPPED = 8  # latent pixels, at least, that an image which tiles is grown by on each side before it is enlarged


@dataclass(frozen=True)
class Phase:
    """One phase. number: 1 is the base; size: its latent's (H, W); views: looked at for one prediction.

    steps: of its schedule, of which the first `skipped` are not run. calls: predictions that the sampler asks for in
    the others, which is one a step for samplers of first order. branches: 2 with guidance, 1 at CFG scale 1.
    """

    number: int
    scale: float
    size: Size
    steps: int
    skipped: int
    calls: int
    local: int
    dilated: int
    branches: int = 2

    @property
    def dilation(self) -> int:
        return math.ceil(self.scale)

    @property
    def views(self) -> int:
        return self.local + self.dilated

    @property
    def evaluations(self) -> int:
        """Views that the model sees in the phase, per image and branch of guidance."""
        return self.calls * self.views


@dataclass(frozen=True)
class Plan:
    """All that will be done, known before any model is loaded.

    from_picture: phase 1 is a given picture, shrunken to the window; nothing is sampled there, and the next phase begins with
    the picture itself.
    """

    window: Size
    stride: Size
    phases: tuple[Phase, ...]
    from_picture: bool = False

    @property
    def evaluations(self) -> int:
        """Model evaluations per image, over all phases and branches of guidance."""
        return self.evaluations_to(len(self.phases))

    def evaluations_to(self, number: int) -> int:
        """Those of the phases up to and with `number`."""
        return sum(phase.branches * phase.evaluations for phase in self.phases[:number])

    def table(self, factor: int = 8) -> str:
        """The plan for people; factor: image pixels per latent pixel."""
        rows = [("phase", "image", "steps", "views a step", "model calls")]
        for p in self.phases[self.from_picture :]:
            image = f"{p.size[1] * factor}x{p.size[0] * factor}"
            views = f"{p.local} + {p.dilated}" if p.dilated else f"{p.local}"
            rows.append((f"{p.number}", image, f"{p.steps - p.skipped}", views, f"{p.branches * p.evaluations:,}"))
        rows.append(("all", "", "", "", f"{self.evaluations:,}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


class Pace:
    """How long phases take, foreseen from what a view has taken so far in the phase that runs or ran last.

    A phase's first call is not timed: it may have to warm something up. A view in two branches takes twice its time in one.
    """

    def __init__(self, plan: Plan, now: Callable[[], float] = time.monotonic):
        self.plan = plan
        self._now = now
        self._number = 0  # of the phase that is timed
        self._began = 0.0
        self._views = 0
        self._per_view: float | None = None

    def count(self, number: int, views: int) -> None:
        """So many views of phase `number` have just been looked at, by the whole batch and in all its branches.

        Less than none: so many were counted too many.
        """
        now = self._now()
        if number != self._number:
            self._number, self._began, self._views = number, now, 0
            return
        self._views += views * self.plan.phases[number - 1].branches
        if self._views > 0:
            self._per_view = (now - self._began) / self._views

    def seconds(self, number: int) -> float | None:
        """For the whole of phase `number`; None as long as there is nothing to tell it from."""
        phase = self.plan.phases[number - 1]
        return None if self._per_view is None else self._per_view * phase.branches * phase.evaluations

    def to_come(self, number: int) -> str | None:
        """The times of the phases after `number`, in one line; None as long as there is nothing to tell them from."""
        if self._per_view is None:
            return None
        seconds = {phase.number: self.seconds(phase.number) for phase in self.plan.phases[number:]}
        each = ", ".join(f"phase {number} {clock_time(s)}" for number, s in seconds.items())
        return f"to come: about {clock_time(sum(seconds.values()))}" + (f" ({each})" if len(seconds) > 1 else "")


def clock_time(seconds: float) -> str:
    """Seconds for people: 75 -> 1:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def phase_scales(scale: float, doubling: bool = False) -> list[float]:
    """2, 3, ... up to the scale, which comes last also where it is no whole number: 2.5 -> [2, 2.5].

    doubling: 2, 4, 8, ... instead.
    """
    between = [s for s in range(2, math.ceil(scale)) if not doubling or s & (s - 1) == 0]
    return [float(s) for s in (*between, scale)]


def make_plan(
    window: Size,
    steps: int,
    config: DemoFusionConfig,
    *,
    branches: tuple[int, int] = (2, 2),
    calls: Callable[[int, int], int] | None = None,
    base: tuple[int, int] | None = None,
    base_calls: Callable[[int, int], int] | None = None,
    from_image: bool = False,
    final: Size | None = None,
    begin: float = 0,
) -> Plan:
    """What DemoFusion will do for a base latent of `window` (h, w) latent pixels.

    steps: of the base. branches: of guidance, of the base and of the phases after it. calls: how many predictions the
    phases' sampler asks for in so many steps of which so many are skipped (one for each other step, unless given);
    base_calls: the same of the base, where its sampler is another one. base: the base's own steps, and how many of the first
    ones are skipped, where it is no whole run of `steps`. from_image: a given picture takes the base's place, so that the
    first phase costs nothing. final: (H, W) of the last phase; config.scale times the window unless given. begin: a phase of
    no more latent pixels than that falls away. Raises ValueError, one line, for a size or step count that cannot work.
    """
    h, w = window
    if h < 1 or w < 1:
        raise ValueError(f"the base must be at least one latent pixel each way, got {w}x{h}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    stride = tuple(max(math.floor(side * config.stride + 1e-9), 1) for side in window)  # 0.7 of 10 is 7
    calls = calls or (lambda steps, skipped: steps - skipped)
    phase_steps, base_calls = config.phase_steps_of(steps), base_calls or calls
    late = phase_steps - max(round(phase_steps * config.denoising_strength), 1)
    largest = config.scale if final is None else max(final[0] / h, final[1] / w)

    own, skipped = (0, 0) if from_image else base or (steps, 0)
    made = base_calls(own, skipped) if own else 0
    phases = [Phase(1, 1.0, window, own, skipped, made, local=1, dilated=0, branches=branches[0])]
    for scale in phase_scales(largest, config.doubling):
        if final is None:
            size = (round(h * scale), round(w * scale))
        else:
            size = tuple(max(round(side * scale / largest), 1) for side in final)
        if math.prod(size) <= WORTH * begin and scale != largest:
            continue
        if size == phases[-1].size:
            asked = "the size to resize to" if config.resize_width or config.resize_height else f"scale {config.scale:g}"
            raise ValueError(f"{asked} adds no latent pixel to a base of {w}x{h}; choose a larger one")
        local, dilated = len(local_views(size, window, stride)), len(dilated_views(window, math.ceil(scale)))
        number, made = len(phases) + 1, calls(phase_steps, late)
        phases.append(Phase(number, scale, size, phase_steps, late, made, local, dilated, branches[1]))
    return Plan(window, stride, tuple(phases), from_picture=from_image)


def resize_target(own: Size, config: DemoFusionConfig, factor: int = 8) -> Size | None:
    """The result's (H, W) in latent pixels that config.resize_width and resize_height ask for; None: config.scale says it.

    own: (height, width) in pixels of the base, or of the picture that is given, whose aspect the result has: one side says
    the other, and two may differ from it by a latent pixel or a hundredth. Raises ValueError, one line, for other sizes.
    """
    asked = (config.resize_height, config.resize_width)
    if not any(asked):
        return None
    times = [side / before for side, before in zip(asked, own) if side]
    fitting = [tuple(round(side * t / factor) * factor for side in own) for t in times]
    size = tuple(side or fit for side, fit in zip(asked, fitting[0]))
    named, of = ("{1}x{0}".format(*sides) for sides in (size, own))
    if any(abs(side - before * t) > max(factor, side / 100) for t in times for side, before in zip(size, own)):
        works = " or ".join(dict.fromkeys("{1}x{0}".format(*sides) for sides in fitting))
        raise ValueError(f"{named} has not the aspect of {of}; resize to {works}, or change the aspect first")
    low, high = (DemoFusionConfig.__dataclass_fields__["scale"].metadata[end] for end in ("low", "high"))
    if not low < max(times) <= high:
        raise ValueError(f"{named} is {max(times):.3g} times {of}; resize to more than once and at most {high:g} times that")
    return tuple(max(round(side / factor), 1) for side in size)


def enlarged_size(picture: Size, scale: float, factor: int = 8) -> Size:
    """A picture of (height, width) pixels, so many times larger: (H, W) in latent pixels, the nearest that there is."""
    return tuple(max(math.floor(side * scale / factor + 0.5), 1) for side in picture)


def window_for(final: Size, side: float) -> Size:
    """The window (h, w) by which a picture of `final` (H, W) is made with a model made for images of side x side.

    All in latent pixels. The picture is a whole number of windows long and wide, so that the dilated views see it without
    padding, wherever that leaves windows of about the model's size; else a window has just that size. It has the picture's
    aspect. Where the model draws the whole at once, it is the window.
    """
    ratio = math.sqrt(math.prod(final)) / side
    whole = max(math.floor(ratio + 0.5), 1)
    scale = whole if FITTING[0] <= ratio / whole <= FITTING[1] else ratio
    return tuple(math.ceil(length / max(scale, 1) - 1e-9) for length in final)


def plan_from_picture(
    picture: Size,
    side: float,
    steps: int,
    config: DemoFusionConfig,
    *,
    branches: tuple[int, int] = (2, 2),
    calls: Callable[[int, int], int] | None = None,
    final: Size | None = None,
    factor: int = 8,
) -> Plan:
    """What DemoFusion will do to make a picture of (height, width) pixels config.scale times larger.

    side: of the square images that the model was made for, latent pixels; config.window, if it is not 0, goes before.
    final: (H, W) of the result, latent pixels, instead of the scale. The other arguments are make_plan's. The first phase is
    the first one larger than the picture. Raises ValueError, one line that says what works, for a size that cannot work.
    """
    h, w = picture
    side = config.window / factor or side
    if side < 1 or min(picture) < 1:
        what = f"a window of {config.window} pixels" if side < 1 else f"a picture of {w}x{h}"
        raise ValueError(f"{what} is too small; a latent pixel is {factor} pixels")
    target = final or enlarged_size(picture, config.scale, factor)
    size = "x".join(str(length * factor) for length in reversed(target))
    if math.prod(target) * factor**2 <= h * w:
        raise ValueError(f"{size} is not larger than the picture, {w}x{h}; choose a larger size")
    window = window_for(target, side)
    if window == target:
        scales = _scales_that_work(picture, side, factor)
        works = f"scale {scales[0]:g} is the smallest that works" if scales else "a smaller window works"
        raise ValueError(f"{size} is no larger than what the checkpoint draws at once; {works}")
    if math.sqrt(math.prod(target)) / side > LARGEST:
        scales = _scales_that_work(picture, side, factor)
        works = f"scale {scales[-1]:g} is the largest that works" if scales else "a larger window works"
        raise ValueError(f"{size} is more than {LARGEST} times as long and wide as a window of {side * factor:g}; {works}")
    begin = h * w / factor**2
    return make_plan(window, steps, config, branches=branches, calls=calls, from_image=True, final=target, begin=begin)


def _scales_that_work(picture: Size, side: float, factor: int) -> list[float]:
    """Of the scales, in steps of a twentieth as the WebUI's slider goes, those that plan_from_picture takes."""
    scales = [twentieths / 20 for twentieths in range(21, 161)]
    targets = [enlarged_size(picture, scale, factor) for scale in scales]
    return [
        scale
        for scale, target in zip(scales, targets)
        if math.prod(picture) < math.prod(target) * factor**2 and math.sqrt(math.prod(target)) / side <= LARGEST
        if window_for(target, side) != target
    ]


def fusion_for(plan: Plan, phase: Phase, config: DemoFusionConfig, reference: Tensor, noise: Tensor, **more: Any) -> Fusion:
    """The state of one phase of the plan; more: what Fusion takes besides and only the host knows."""
    return Fusion(
        reference,
        noise,
        window=plan.window,
        stride=plan.stride,
        dilation=phase.dilation,
        config=config,
        phase=phase.number,
        **more,
    )


def enlarge_latents(latents: Tensor, size: Size) -> Tensor:
    """[B, C, h, w] -> [B, C, *size]."""
    return F.interpolate(latents, size=size, mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class Upscaler:
    """What enlarges a phase: of the two the one that is given, by way of images or without.

    images: an image [1, 3, h, w] in -1..1 and a size (H, W) in pixels -> [1, 3, H, W]. latents: those of a phase
    [B, C, h, w] and a size (H, W) in latent pixels -> [B, C, H, W].
    """

    images: Callable[[Tensor, Size], Tensor] | None = None
    latents: Callable[[Tensor, Size], Tensor] = enlarge_latents


BICUBIC = Upscaler(lambda image, size: F.interpolate(image, size=size, mode="bicubic", align_corners=False))


def enlarge(
    latents: Tensor,
    size: Size,
    config: DemoFusionConfig,
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    factor: int = 8,
    tiling: bool = False,
    upscaler: Upscaler | None = None,
) -> tuple[Tensor, Areas]:
    """A phase's latents [B, C, h, w] as the next one's reference, [B, C, *size], and its areas, [B, 1, *size].

    By way of images, one after the other, as far as the settings ask for these. decode: latents [1, C, h, w] -> an
    image [1, 3, factor * h, factor * w] in -1..1; encode: the way back. tiling: what lies beyond a border is the other
    side, of the image, too. upscaler: bicubic, of images or of latents as the settings say, unless given.
    """
    upscaler = upscaler or (BICUBIC if config.pixel_upsampling else Upscaler())
    if tiling:
        (h, w), ((rows, top), (columns, left)) = size, map(_margins, latents.shape[-2:], size)
        grown = F.pad(latents, (columns, columns, rows, rows), mode="circular")
        larger = (h + 2 * top, w + 2 * left)
        reference, areas = enlarge(grown, larger, config, decode, encode, factor, upscaler=upscaler)
        return reference[..., top : top + h, left : left + w], areas.cropped(top, left, size)
    enlarged, areas = [], []
    for z in latents.split(1) if upscaler.images or asks_for_areas(config) else ():
        image = decode(z)
        areas.append(areas_of(image, config, factor).at(size).to(latents))
        if upscaler.images:
            image = upscaler.images(image, tuple(factor * side for side in size))
            enlarged.append(encode(image.clamp_(-1, 1)).to(latents))
    return torch.cat(enlarged) if enlarged else upscaler.latents(latents, size), Areas.cat(areas)


def _margins(side: int, larger: int) -> tuple[int, int]:
    """By how much a side is grown at either end, WRAPPED or more and at most itself, and the whole number that becomes."""
    part = side // math.gcd(side, larger)
    margin = min(math.ceil(WRAPPED / part) * part, side)
    return margin, margin * larger // side


def upscale(
    plan: Plan,
    base: Tensor,
    noise: Callable[[Phase], Tensor],
    denoise: Callable[[Phase, Tensor, Tensor, Areas], Tensor],
    finished: tuple[int, Tensor] | None = None,
    enlarge: Callable[[Tensor, Size], tuple[Tensor, Areas]] | None = None,
    original: Original | None = None,
) -> Iterator[tuple[Phase, Tensor]]:
    """The "upsample, diffuse, denoise" loop of Eq. 3: yields each phase after the base with its finished latents.

    base: [B, C, h, w], of the model, or of a given picture shrunken to the window. noise: a phase's Gaussian noise,
    [B, C, H, W]. denoise: the host's sampler over one phase; gets the phase, the upsampled latents (Fusion's reference),
    the noise and the areas that are treated otherwise, returns the denoised latents. finished: the number of a phase and
    its latents, to go on after it. enlarge: a phase's latents and the next one's size -> reference and areas, as the
    function `enlarge` makes them; the paper's bicubic reference, without areas, unless given. original: the given picture,
    which a plan from a picture needs, and its mask, if only a part is to be changed.
    What was yielded is finished and stays so, whatever happens later.
    """
    number, latents = finished or (1, base)
    for phase in plan.phases[number:]:
        if original is not None and plan.from_picture and phase is plan.phases[1]:
            reference, areas = original.begin(phase.size)
        else:
            reference, areas = enlarge(latents, phase.size) if enlarge else (enlarge_latents(latents, phase.size), Areas())
            if original is not None:
                reference, areas = original.around(reference, areas)
        latents = denoise(phase, reference, noise(phase), areas)
        if original is None:
            latents = match_moments(latents, base)
        else:
            latents = original.keep(match_moments(original.keep(latents), base))
        yield phase, latents
