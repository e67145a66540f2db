"""An autoencoder in the layout of latent diffusion, which the WebUI's checkpoints have, in small."""

import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, given, made):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, given), nn.Conv2d(given, made, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, made), nn.Conv2d(made, made, 3, padding=1)
        self.shortcut = nn.Conv2d(given, made, 1)

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class WebuiNetwork(nn.Module):
    """Decoder or encoder as the WebUI's checkpoints have them: `mid` is called part by part, `up` is stored reversed."""

    def __init__(self, given, made, decoder, width=16):
        super().__init__()
        self.conv_in = nn.Conv2d(given, width, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Residual(width, width), Attention(width), Residual(width, width)
        levels = nn.ModuleList(nn.Module() for _ in range(4))
        for i, level in enumerate(levels):
            level.block = nn.ModuleList([Residual(width, width)])
            if decoder and i > 0:
                level.upsample = Upsample(width)
            if not decoder and i < 3:
                level.downsample = Downsample(width)
        setattr(self, "up" if decoder else "down", levels)
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, made, 3, padding=1)

    def middle(self, h):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)

    def forward(self, x):
        h = self.conv_in(x)
        if hasattr(self, "up"):
            h = self.middle(h)
            for level in reversed(self.up):
                h = level.block[0](h, None)
                h = level.upsample(h) if hasattr(level, "upsample") else h
        else:
            for level in self.down:
                h = level.block[0](h, None)
                h = level.downsample(h) if hasattr(level, "downsample") else h
            h = self.middle(h)
        return self.conv_out(F.silu(self.norm_out(h)))
