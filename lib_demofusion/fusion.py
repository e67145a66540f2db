"""The method at one noise level: blur, moments, skip residual and the fused prediction.

Life of one denoising step, from the host's side:

1. The host's sampler holds x at some noise level and wants the noise in it. t is the level's training timestep.
2. `Fusion.skip_residual_` blends x, in place, with the noised upsampled image: the sampler steps from the blended x.
3. The host asks its model for the noise; `Fusion.predict` answers in the model's place. It cuts x into local windows
   and the blurred x into dilated views, hands them to the model in batches, and merges what comes back.
4. The host's sampler takes its step from (x, eps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.memory import ViewBatch
from lib_demofusion.schedule import T_MAX, hold_at, weights_at
from lib_demofusion.views import Size, View, dilated_views, jitter_generator, local_views

# The line to the host. Crops [len(views) * B, C, h, w], view by view, each with the B rows of x -> their noise, same
# shape. Prompts, guidance, size conditions and the model's parameterisation stay behind it.
Denoise = Callable[[Tensor, Sequence[View]], Tensor]


class Cancelled(Exception):
    """The user asked to stop; raised between two model calls."""


def gaussian_blur(x: Tensor, size: int, std: float) -> Tensor:
    """Gaussian filter of size x size taps, zeros outside. x: [B, C, H, W]; size: odd; std: latent pixels, > 0."""
    offsets = torch.arange(size, device=x.device, dtype=torch.float32) - size // 2
    taps = torch.exp(-0.5 * (offsets / std) ** 2)
    taps = (taps / taps.sum()).to(x.dtype)
    channels = x.shape[1]
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(size // 2, 0), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, size // 2), groups=channels)


def match_moments(x: Tensor, like: Tensor) -> Tensor:
    """x with the mean and standard deviation of `like`, image by image. Both [B, C, ., .]; sizes may differ.

    Deviation: the authors' code pools the batch; per image, batch mates do not change each other.
    """
    std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    like_std, like_mean = torch.std_mean(like, dim=(1, 2, 3), keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    return (x - mean).mul_(like_std / std.clamp_min(tiny)).add_(like_mean)


def pad_edges(x: Tensor, size: Size) -> tuple[Tensor, Size]:
    """x [B, C, H, W] grown to `size` by repeating its edges on all sides, and where (top, left) x lies in it."""
    h, w = x.shape[-2:]
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    padding = (left, size[1] - w - left, top, size[0] - h - top)
    return (F.pad(x, padding, mode="replicate") if any(padding) else x), (top, left)


def crops_of(x: Tensor, views: Sequence[View]) -> Tensor:
    """Each view's part of x [B, C, H, W], something that lies beside the latent: [len(views) * B, C, h, w], view by view."""
    grown = {1: x}
    for view in views:
        d = view.dilation
        if d not in grown:
            grown[d], _ = pad_edges(x, (view.h * d, view.w * d))
    return torch.cat([view.crop(grown[view.dilation]) for view in views])


def hann_weights(window: Size, device: torch.device | None = None) -> Tensor:
    """How much each pixel of a window counts, [h, w]: 1 in its middle, next to nothing at its edges (Hann, squared sine).

    After the Mixture of Diffusers (arXiv 2302.02412), whose windows' weights are Gaussian.
    """
    h, w = (torch.sin((torch.arange(n, device=device) + 0.5) * (math.pi / n)).square() for n in window)
    return h[:, None] * w


def skip_residual_(
    x: Tensor,
    reference: Tensor,
    noise: Tensor,
    c1: float | Tensor,
    sigma: float,
    signal: float = 1.0,
    fresh_noise: bool = False,
) -> Tensor:
    """Eq. 4, in place: x = c1 * (signal * reference + sigma * noise) + (1 - c1) * x.

    x, reference, noise: [B, C, H, W]; c1: a number, or [B, 1, H, W]. x holds signal * z + sigma * n: signal is 1 in the
    k-diffusion convention and sqrt(alphas_cumprod) in the variance-preserving one.

    fresh_noise: the sampler adds noise of its own (ancestral, SDE, LCM). Its noise then has only some correlation rho
    with `noise`, and Eq. 4 would shrink its standard deviation, to 0.71 sigma at worst, which washes the picture out.
    So `noise` gets the weight a that keeps it: a² + 2 a (1 - c1) rho + (1 - c1)² = 1; with rho = 1, a is c1.
    rho is read off x itself, image by image, from where it counts.
    """
    a: float | Tensor = c1
    if fresh_noise:
        dims = (1, 2, 3)
        residual = (x - signal * reference) / sigma
        counted = noise * (1 - c1)
        power = (noise * counted).sum(dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        rho = (1 - c1) * ((residual * counted).sum(dims, keepdim=True) / power).clamp(0, 1)
        a = (rho.square() + 1 - (1 - c1) ** 2).sqrt() - rho
    return x.mul_(1 - c1).add_(reference * (c1 * signal)).add_(noise * (a * sigma))


class Fusion:
    """One phase's state: what it is pulled to, and how it looks at x. Born and dead with the phase.

    reference: [B, C, H, W], the previous phase's latents, upsampled; never changed.
    noise: [B, C, H, W], the one noise that x starts with and that the skip residual keeps.
    window: (h, w) of the base latent; stride: latent pixels, (height, width); dilation: ceil of the phase's scale.
    phase: the phase's number, which the jitter depends on.
    fresh_noise: whether the sampler adds noise of its own.
    cancelled: asked before every model call; if it says so, Cancelled is raised.
    held: [B, 1, H, W] in 0..1, what c1 at least is there, at every t: 1 keeps the reference; nowhere unless given.
        After Blended Latent Diffusion (arXiv 2206.02779), which so keeps what lies outside of a mask.
    view_batch: how many views go into a model call, learned over a whole job; this phase's own unless given.
    blur_taps: size of the Gaussian filter; the paper's 4 * dilation - 3 unless given.
    """

    def __init__(
        self,
        reference: Tensor,
        noise: Tensor,
        *,
        window: Size,
        stride: Size,
        dilation: int,
        config: DemoFusionConfig,
        phase: int = 2,
        fresh_noise: bool = False,
        cancelled: Callable[[], bool] | None = None,
        held: Tensor | None = None,
        view_batch: ViewBatch | None = None,
        blur_taps: int | None = None,
        t_max: int = T_MAX,
    ):
        self.reference = reference
        self.noise = noise
        self.window = window
        self.stride = stride
        self.dilation = dilation
        self.config = config
        self.phase = phase
        self.fresh_noise = fresh_noise
        self.cancelled = cancelled
        self.held = held
        self.view_batch = view_batch or ViewBatch(config.view_batch_size, reference.device)
        self.blur_taps = blur_taps if blur_taps is not None else 4 * dilation - 3
        self.t_max = t_max
        self.last_t: float | None = None  # where x was blended last
        self.window_weights = hann_weights(window, reference.device) if config.feather else None  # None: all count the same

    def noised_reference(self, sigma: float, signal: float = 1.0) -> Tensor:
        """signal * reference + sigma * noise: what the phase starts from, at the sampler's first noise level."""
        return signal * self.reference + sigma * self.noise

    def skip_residual_(self, x: Tensor, t: float, sigma: float, signal: float = 1.0, since: float | None = None) -> Tensor:
        """Blend x, the sampler's own state [B, C, H, W], in place with the noised reference (Eq. 4). See skip_residual_.

        since: the timestep where the step began that has led to x at t; that of the last call unless given, which is right
        for samplers that call once a step. The phase's first call makes x the noised reference.
        """
        since, self.last_t = self.last_t if since is None else since, t
        c1 = hold_at(t, since, self.config, self.held, self.t_max)
        return skip_residual_(x, self.reference, self.noise, c1, sigma, signal, self.fresh_noise)

    def views(self, t: float) -> list[View]:
        """The local windows, then the dilated views, that a prediction at timestep t is made of."""
        size = tuple(self.reference.shape[-2:])
        generator = jitter_generator(self.phase, t) if self.config.jitter else None
        return local_views(size, self.window, self.stride, generator) + dilated_views(self.window, self.dilation)

    def predict(self, x: Tensor, t: float, denoise: Denoise, sigma: float | None = None) -> Tensor:
        """The noise in x: c2 * dilated views + (1 - c2) * local windows (Eq. 5).

        x: [B, C, H, W] at training timestep t; B may hold several branches of guidance. Returns x's shape and dtype.
        sigma: how much noise x holds, in x's own units; needed if the sampler adds fresh noise. It then builds its next
        state from the denoised image, and whatever noise of x the blur hid from the dilated views would stay in there as
        if it were image. So their share is taken of the images denoised, the blurred x less its noise.
        The extra memory is a handful of latents and one batch of views, however many views there are.
        Raises Cancelled between two model calls, OutOfMemory if not one view fits into one.
        """
        weights = weights_at(t, self.config, self.t_max)
        # The dilated views do not overlap; the blur lets neighbours agree. Its loss of power is made good.
        blurred = match_moments(gaussian_blur(x, self.blur_taps, weights.blur_sigma), x)
        grown, (top, left) = pad_edges(blurred, (self.window[0] * self.dilation, self.window[1] * self.dilation))
        sources = {"local": x, "dilated": grown}
        totals = {kind: torch.zeros_like(source, dtype=torch.float32) for kind, source in sources.items()}
        count = torch.zeros(x.shape[-2:], device=x.device)

        def call(batch: Sequence[View]) -> Tensor:
            if self.cancelled is not None and self.cancelled():
                raise Cancelled
            return denoise(torch.cat([view.crop(sources[view.kind]) for view in batch]), batch)

        for batch, eps in self.view_batch.run(self.views(t), call):
            for view, noise in zip(batch, eps.split(len(x))):
                if view.kind == "local":
                    noise = noise if self.window_weights is None else noise * self.window_weights
                    view.crop(count).add_(1 if self.window_weights is None else self.window_weights)
                view.crop(totals[view.kind]).add_(noise)

        h, w = x.shape[-2:]
        dilated = totals["dilated"][..., top : top + h, left : left + w]
        if self.fresh_noise:
            dilated.add_((x - blurred) / sigma)
        return totals["local"].div_(count).lerp_(dilated, weights.c2).to(x.dtype)
