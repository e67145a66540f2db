"""Stand-ins for the networks and images of the paper's own metrics, in the formats that these have."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from evaluation.readers import true_render
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT


class Layers(nn.Module):
    """[N, 3, 299, 299] in -1..1 -> 20 features: colours in four quarters, and how much of eight patterns there is."""

    def __init__(self) -> None:
        super().__init__()
        patterns = np.random.default_rng(0).normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32)
        self.patterns = nn.Parameter(torch.from_numpy(patterns - patterns.mean((1, 2, 3), keepdims=True)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = 4 * nn.functional.conv2d(x, self.patterns).abs().mean((2, 3))
        return torch.cat([nn.functional.adaptive_avg_pool2d(x, 2).flatten(1), found], 1)


class Inception(nn.Module):
    """Answers as the published TorchScript file does, and enlarges or shrinks pictures to 299 x 299 as that does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        whole = torch.eye(2, 3).unsqueeze(0).repeat(x.shape[0], 1, 1)
        grid = nn.functional.affine_grid(whole, [x.shape[0], 3, 299, 299], align_corners=False)
        small = nn.functional.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
        features = self.layers((small - 128) / 128)
        if return_features:
            return features
        return (10 * features[:, :3]).softmax(-1)


def make_stand_ins(folder):
    """inception.pt, clip/ and real/, a dozen images of 200 x 160, in the folder."""
    torch.jit.script(Inception()).save(str(folder / "inception.pt"))
    _clip(folder / "clip")
    (folder / "real").mkdir()
    for index in range(12):
        Image.fromarray(true_render(5, index)[1]).resize((200, 160)).save(folder / "real" / f"{index}.png")


def _clip(folder):
    """A tiny random CLIP, as transformers saves one, with the embedded checkpoint's tokenizer."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT / "tokenizer")
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    words = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    config = CLIPConfig(
        text_config={**tower, **words}, vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    size = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
