"""What the evaluation's own small networks share: their training, and their weights, which are part of the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from training.train import cosine_lr

Network = TypeVar("Network", bound=nn.Module)


def fit(network: nn.Module, loss: Callable[[], Tensor], steps: int, weight_decay: float) -> None:
    """Train in place. loss: that of a new batch."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=weight_decay)
    for step in tqdm(range(steps), f"training the {type(network).__name__.lower()}", dynamic_ncols=True):
        optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, 2e-3, warmup=min(100, steps // 10))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def save(network: nn.Module, file: Path) -> None:
    """In half precision."""
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, file)


def load(network: Network, file: Path) -> Network:
    """The network with a file's weights, of any precision, and no more training."""
    network.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return network.eval().requires_grad_(False)
