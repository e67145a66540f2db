"""What the benchmarks measure with: seconds, peaks of memory, and the calls of a UNet; and the base image alone."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from lib_demofusion.hosts.diffusers import Incomplete, Result, generate


def now(device: str) -> float:
    """Seconds, when all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> int:
    """Bytes since the last reset: of the GPU's memory, or of the process (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def base_alone(pipe, prompt: str = "", steps: int = 1, **settings) -> Result:
    """generate, stopped after the base image, before the first model call of phase 2; for samplers with a call a step."""
    calls: list = []
    try:
        generate(
            pipe,
            prompt,
            steps=steps,
            progress=lambda *call: calls.append(call),
            cancelled=lambda: len(calls) == steps,
            **settings,
        )
    except Incomplete as stopped:
        if stopped.cancelled:
            return stopped.result
        raise
    raise AssertionError("a job that is cancelled after its base went on")


class Clock:
    """Counts the rows that a UNet sees and the seconds that it takes, since the last reset.

    A GPU goes by its own clock, and nobody waits for it.
    """

    def __init__(self, unet: nn.Module, device: str):
        self.device = device
        self.reset()
        self._hooks = unet.register_forward_pre_hook(self._before), unet.register_forward_hook(self._after)

    def remove(self) -> None:
        """Let the UNet run on without it."""
        for hook in self._hooks:
            hook.remove()

    def reset(self) -> None:
        self.rows = 0
        self._calls: list[tuple] = []

    @property
    def seconds(self) -> float:
        now(self.device)
        if self.device == "cuda":
            return sum(began.elapsed_time(ended) for began, ended in self._calls) / 1000
        return sum(ended - began for began, ended in self._calls)

    def _mark(self):
        if self.device != "cuda":
            return now(self.device)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, unet, args):
        self._began = self._mark()
        self.rows += len(args[0])

    def _after(self, unet, args, output):
        self._calls.append((self._began, self._mark()))
