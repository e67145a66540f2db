"""The embedded checkpoint's networks in the WebUI: LDM's own, with the widths and norm groups it was trained with.

LDM multiplies a base width by whole numbers and always normalises in 32 groups. The `.yaml` that
`training.export_webui` writes names the classes here instead. Nothing else uses this file.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules import attention
from ldm.modules.diffusionmodules import model as vae_blocks
from ldm.modules.diffusionmodules import openaimodel


class _Width(int):
    """A level's width in a place where LDM expects the multiple of the base width."""

    def __mul__(self, other: int) -> int:
        return int(self)

    __rmul__ = __mul__


@contextmanager
def _norm_groups(groups: int):
    """LDM's blocks, while they are built, normalise in so many groups."""
    fine = functools.partial(torch.nn.GroupNorm, groups, eps=1e-6)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(openaimodel, "normalization", lambda c: torch.nn.GroupNorm(groups, c)))
        stack.enter_context(mock.patch.object(attention, "Normalize", fine))
        stack.enter_context(mock.patch.object(vae_blocks, "Normalize", fine))
        yield


class UNet(openaimodel.UNetModel):
    def __init__(self, widths, groups, **kwargs):
        with _norm_groups(groups):
            super().__init__(model_channels=widths[0], channel_mult=[_Width(w) for w in widths], **kwargs)


class VAE(AutoencoderKL):
    def __init__(self, groups, **kwargs):
        with _norm_groups(groups):
            super().__init__(**kwargs)
