"""Ways to autoencode in tiles, against the whole: `make bench-decode`.

The same latents through the embedded autoencoder and through one of Stable Diffusion's shape with random weights, whose
output is scaled so that it spans -1 to 1. The Tiled VAE script takes part where TILEVAE names its scripts/tilevae.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lib_demofusion import decode as tiles
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT
from lib_demofusion.memory import Meter

FACTOR = 8
TILEVAE_TILE = 48  # latent pixels, the least that its form offers; it adds 11 on each side


@dataclass
class Method:
    """One row. borders: where neighbouring tiles part, as (rows, columns) of the result."""

    name: str
    run: Callable[[Tensor], Tensor]
    borders: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))


class TiledVAE(nn.Module):
    """A diffusers decoder under the names that the Tiled VAE script expects: those of latent diffusion."""

    def __init__(self, script: str, decoder: nn.Module, tile: int, fast: bool):
        super().__init__()
        self.decoder = decoder
        blocks = list(reversed(decoder.up_blocks))
        self.num_resolutions, self.num_res_blocks = len(blocks), len(blocks[0].resnets) - 1
        self.conv_in, self.norm_out, self.conv_out = decoder.conv_in, decoder.conv_norm_out, decoder.conv_out
        self.give_pre_end = self.tanh_out = False
        first, last = map(self._residual, decoder.mid_block.resnets)
        self.mid = SimpleNamespace(block_1=first, attn_1=self._attention(decoder.mid_block.attentions[0]), block_2=last)
        self.up = [
            SimpleNamespace(
                block=[self._residual(resnet) for resnet in block.resnets],
                upsample=block.upsamplers[0] if block.upsamplers else None,
            )
            for block in blocks
        ]
        self.hook = load_tilevae(script).VAEHook(
            self, tile, is_decoder=True, fast_decoder=fast, fast_encoder=fast, color_fix=False
        )

    @staticmethod
    def _residual(block: nn.Module) -> SimpleNamespace:
        names = ("in_channels", "out_channels", "norm1", "conv1", "norm2", "conv2")
        parts = {name: getattr(block, name) for name in names}
        return SimpleNamespace(**parts, use_conv_shortcut=False, nin_shortcut=block.conv_shortcut)

    @staticmethod
    def _attention(attention: nn.Module) -> SimpleNamespace:
        def attend(x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = attention.to_q(tokens), attention.to_k(tokens), attention.to_v(tokens)
            return attention.to_out[0](F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(x.shape)

        return SimpleNamespace(norm=attention.group_norm, attend=attend)


def load_tilevae(path: str):
    """The script as a module, in a WebUI that is not there."""
    names = ("scripts", "devices", "shared", "ui", "ui_components", "processing", "sd_vae_approx")
    stubs = {name: MagicMock() for name in ["gradio", "modules", *(f"modules.{name}" for name in names)]}
    stubs |= {name: MagicMock() for name in ("ldm", "ldm.modules", "ldm.modules.diffusionmodules", "tile_utils")}
    stubs |= {name: MagicMock() for name in ("ldm.modules.diffusionmodules.model", "tile_utils.attn", "tile_utils.typing")}
    stubs["modules"].scripts, stubs["modules"].devices = stubs["modules.scripts"], stubs["modules.devices"]
    stubs["modules.scripts"].Script = object
    stubs["modules.devices"].device = torch.device("cpu")
    stubs["modules.shared"].state.interrupted = False
    stubs["tile_utils.attn"].get_attn_func = lambda: lambda attention, x: attention.attend(x)
    spec = importlib.util.spec_from_file_location("tilevae", path)
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module


def random_field(channels: int, h: int, w: int) -> Tensor:
    """Noise of all scales, of unit variance, with more of it on one side: tiles differ as parts of an image do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1, channels, h, w)
    for size in (1, 2, 4, 8, 16, 32):
        noise = torch.randn(1, channels, h // size + 2, w // size + 2, generator=generator)
        x += F.interpolate(noise, (h, w), mode="bicubic")
    return x * torch.linspace(0.5, 1.5, w) / x.std()


def stable_diffusion_shaped(latents: Tensor) -> AutoencoderKL:
    """Random weights; the middle 98 % of what they make of the latents is -1 to 1."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    ).eval()
    pixels = vae.decode(latents[..., :32, :32]).sample.flatten()
    low, high = (float(pixels.kthvalue(round(share * len(pixels))).values) for share in (0.01, 0.99))
    vae.decoder.conv_out.weight *= 2 / (high - low)
    vae.decoder.conv_out.bias.sub_((high + low) / 2).mul_(2 / (high - low))
    return vae


def own_borders(size: tuple[int, int], tile: int, pixels: int) -> tuple[list[int], list[int]]:
    rows, columns = ([span.own[0] * pixels for span in tiles.spans(n, tile, tiles.OVERLAP)[1:]] for n in size)
    return rows, columns


def decoders(vae: AutoencoderKL, size: tuple[int, int], tile: int) -> list[Method]:
    def whole(z: Tensor) -> Tensor:
        return vae.decode(z).sample

    ours = own_borders(size, tile, FACTOR)
    parts = [range(tile * 3 // 4 * FACTOR, n * FACTOR, tile * 3 // 4 * FACTOR) for n in size]
    methods = [
        Method("whole", whole),
        Method("ours", lambda z: tiles.decode(whole, z, vae.decoder, tile=tile), ours),
        Method("ours, each tile alone", lambda z: tiles.decode(whole, z, nn.Identity(), tile=tile), ours),
        Method("diffusers' tiling", lambda z: vae.tiled_decode(z).sample, tuple(map(list, parts))),
    ]
    if (script := os.environ.get("TILEVAE")) and vae.config.norm_num_groups == 32:  # it knows no other
        for fast in (True, False):
            hook = TiledVAE(script, vae.decoder, TILEVAE_TILE, fast).hook
            with contextlib.redirect_stdout(io.StringIO()):
                boxes = hook.split_tiles(*size)[1]
            parts = sorted({box[2] for box in boxes} - {0}), sorted({box[0] for box in boxes} - {0})
            name = "Tiled VAE, fast" if fast else "Tiled VAE"
            methods.append(Method(name, lambda z, hook=hook: hook(vae.post_quant_conv(z)), parts))
    return methods


def encoders(vae: AutoencoderKL, size: tuple[int, int], tile: int) -> list[Method]:
    def whole(x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mode()

    ours = own_borders(size, tile, 1)
    parts = tuple(list(range(tile * 3 // 4, n, tile * 3 // 4)) for n in size)
    return [
        Method("whole", whole),
        Method("ours", lambda x: tiles.encode(whole, x, vae.encoder, tile=tile), ours),
        Method("ours, each tile alone", lambda x: tiles.encode(whole, x, nn.Identity(), tile=tile), ours),
        Method("diffusers' tiling", lambda x: vae._tiled_encode(x).chunk(2, 1)[0], parts),
    ]


def psnr(x: Tensor, whole: Tensor, peak: float) -> float:
    return 10 * math.log10(peak**2 / max(float((x - whole).pow(2).mean()), 1e-15))


def border_step(x: Tensor, borders: tuple[list[int], list[int]]) -> float:
    """Mean absolute step across the borders, over the mean step elsewhere."""
    at, elsewhere = [], []
    for axis, lines in zip((-2, -1), borders):
        steps = x.diff(dim=axis).abs().transpose(0, axis).flatten(1).mean(1)
        crossing = torch.zeros(len(steps), dtype=torch.bool)
        crossing[[line - 1 for line in lines]] = True
        at.append(steps[crossing])
        elsewhere.append(steps[~crossing])
    return float(torch.cat(at).mean() / torch.cat(elsewhere).mean())


def counted_passes() -> contextlib.AbstractContextManager:
    """Counts, as `mock.call_count`, the passes of ours."""
    return patch.object(tiles._WholeStatistics, "settled", autospec=True, side_effect=tiles._WholeStatistics.settled)


def compare(title: str, methods: list[Method], x: Tensor, peak: float | None) -> None:
    """peak: of the PSNR; None for the range of the whole."""
    print(f"\n{title}\n{'':24}{'PSNR':>8}  {'border':>6}  {'of whole':>8}  {'time':>6}  {'memory':>6}  passes")
    whole = seconds = memory = None
    for method in methods:
        silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silent[0], silent[1], counted_passes() as passes, Meter() as meter:
            start = time.perf_counter()
            result = method.run(x)
            took = time.perf_counter() - start
        if whole is None:
            whole, seconds, memory = result, took, meter.peak
            peak = peak or float(whole.max() - whole.min())
            print(f"{method.name:24}{'':8}  {'':6}  {'':8}  {took:4.0f} s  {meter.peak / 2**20:4.0f} M", flush=True)
            continue
        print(
            f"{method.name:24}{psnr(result, whole, peak):5.1f} dB  {border_step(result, method.borders):6.3f}  "
            f"{border_step(whole, method.borders):8.3f}  {took / seconds:5.1f}x  {meter.peak / memory:5.2f}x  "
            f"{passes.call_count or 1:6}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs=2, type=int, default=(96, 128), metavar=("H", "W"), help="latent pixels")
    parser.add_argument("--tile", type=int, default=48, help="latent pixels")
    parser.add_argument("--only", choices=("embedded", "random"), help="one of the two autoencoders")
    args = parser.parse_args()
    size, tile = tuple(args.size), args.tile
    print(f"latents {size[0]} x {size[1]}, tiles of {tile}; border: mean step across tile borders over that elsewhere;")
    print("of whole: the same of the untiled result at these borders; time and memory: over the whole's")
    latents = random_field(4, *size)
    with torch.no_grad():
        for kind in filter(lambda kind: args.only in (None, kind), ("embedded", "random")):
            if kind == "embedded":
                vae = AutoencoderKL.from_pretrained(EMBEDDED_CHECKPOINT, subfolder="vae").eval()
            else:
                vae = stable_diffusion_shaped(latents)
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, tile * FACTOR
            compare(f"{kind} autoencoder, decoding", decoders(vae, size, tile), latents, 2.0)
            image = random_field(3, *(n * FACTOR for n in size)).mul(0.4).clamp(-1, 1)
            compare(f"{kind} autoencoder, encoding", encoders(vae, size, tile), image, None)


if __name__ == "__main__":
    main()
