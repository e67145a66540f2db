"""What fits: how many views go into one model call, what happens when memory runs out, and what a call takes."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

try:  # not among torch's public names; without them check_meter says so, and all else goes on
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    StorageWeakRef, TorchDispatchMode = object, ExitStack  # a mode that sees nothing

V = TypeVar("V")

# Numbers per number of the final latents that sampling holds besides a model call: 8 to 10 as measured, by sampler.
LATENTS = 10
FIXED_SIZE = 4  # automatic, where nothing is measured
WORTH = 0.95  # a larger batch must bring the time per view down to this share


class OutOfMemory(RuntimeError):
    """Not even the smallest piece of work fits; its text is one line for the user."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, on whatever device, says that memory has run out."""
    text = str(error).lower()
    hints = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(hint in text for hint in hints)


def release(device: torch.device) -> None:
    """Give back what torch keeps for later allocations."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def unless_out_of_memory(call: Callable[[], V], device: torch.device) -> V | None:
    """What call returns; None, and all that it took is free again, if memory runs out."""
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release(device)  # only here, since the failed call's tensors hang on the error
    return None


def free_memory(device: torch.device) -> int:
    """Bytes that a device has free; 4 GiB where neither torch nor the system says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own reserve
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return 4 * 2**30


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on a device, where whatever the device is busy with goes on meanwhile."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def taken_before(device: torch.device) -> int:
    """The most bytes that were ever taken beside what is taken now, since torch's last reset; 0 where torch does not say."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


class ViewBatch:
    """How many views go into one model call. One for all phases, since what does not fit once will not fit later.

    setting: the user's number; 0: automatic. On CUDA that starts from one view, which is what the base image's own
    call was, and doubles while the memory for it is free and the time per view falls by 5 %; then a step's views are shared
    out evenly, since a last call of few costs more. Elsewhere it is a fixed number, so that a seed gives one picture to the
    bit: a batch's size moves the last bits of a float.

    Either is halved when memory runs out, for good. view: what the user calls what has a view's size.
    """

    def __init__(self, setting: int, device: torch.device, view: str = "base image"):
        self.device = device
        self.view = view
        self.automatic = setting == 0 and device.type == "cuda"
        self.growing = self.automatic
        self.size = setting or (1 if self.growing else FIXED_SIZE)
        self.fitted = 0  # the largest call that went well
        self._warm = False  # whether a call of this size has been made
        self._before = float("inf")  # seconds per view at half the size

    def run(self, views: Sequence[V], call: Callable[[Sequence[V]], Tensor]) -> Iterator[tuple[Sequence[V], Tensor]]:
        """All views through `call`, in order and in batches; yields each batch with what call answered.

        A call that runs out of memory is made again with half as many views. Raises OutOfMemory if one is too many.
        """
        start = 0
        while start < len(views):
            size, left = self.size, len(views) - start
            if self.automatic and not self.growing:
                size = math.ceil(left / math.ceil(left / size))
            batch = views[start : start + size]
            began = self._now()
            answer = unless_out_of_memory(partial(call, batch), self.device)
            if answer is None:
                if len(batch) == 1:
                    line = f"out of memory with one view at a time; a smaller {self.view} or half precision needs less"
                    raise OutOfMemory(line)
                self.size, self.growing = max(len(batch) // 2, 1), False
                continue
            self.fitted = max(self.fitted, len(batch))
            if self.growing and len(batch) == self.size:
                self._consider(self._now() - began)
            yield batch, answer
            start += len(batch)

    def _now(self) -> float:
        if self.growing:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _consider(self, seconds: float) -> None:
        """Double, stay, or go back to half, after a call of the present size; the first one only warms up."""
        if not self._warm:
            self._warm = True
            return
        per_view = seconds / self.size
        if per_view > WORTH * self._before:
            self.size, self.growing = self.size // 2, False
            release(self.device)
        elif self._room_for_double():
            self.size, self._before, self._warm = 2 * self.size, per_view, False
        else:
            self.growing = False

    def _room_for_double(self) -> bool:
        """Whether twice the most that a call has taken is free."""
        return 2 * taken_before(self.device) < 0.9 * free_memory(self.device)


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that torch makes inside it, on whatever device: `now`, and `peak` so far.

    What an operation takes and frees within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}  # of the storages that were alive when last looked at

    @property
    def now(self) -> int:
        self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs))}
        for storage in (x.untyped_storage() for x in _tensors(out)):
            ref = StorageWeakRef(storage)
            if ref not in old and ref not in self._sizes:
                self._sizes[ref] = storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out


@functools.cache
def check_meter() -> None:
    """Raises RuntimeError, one line, if Meter does not count right with this version of torch: then it knows nothing."""
    with torch.inference_mode(), Meter() as meter:
        x = torch.empty(1000, dtype=torch.uint8, device="meta")
        del x
        x, view = torch.empty(2000, dtype=torch.uint8, device="meta"), None
        x, view = x + x, x[1:]
        counts = [meter.now]
        del x, view
        counts += [meter.now, meter.peak]
    if counts != [4000, 0, 4000]:
        raise RuntimeError(f"torch {torch.__version__} does not tell what its tensors take")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _on_meta(value: Any) -> Any:
    """A value with its tensors, in nested lists, tuples and dicts, as shapes alone."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return type(value)(map(_on_meta, value)) if type(value) in (list, tuple) else value


class _Call(nn.Module):
    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module = module
        vars(self)["function"] = function  # not as a second child, if it is the module itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def call_bytes(module: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> int:
    """The most bytes that are alive during function(*args, **kwargs), its arguments included and module's weights not.

    function: what it computes with are its arguments and the module. Nothing is computed: weights and arguments are taken
    as shapes alone. Raises RuntimeError, one line, where that cannot be told.
    """
    check_meter()
    call = _Call(module, function)
    weights = {name: x.to("meta") for name, x in (*call.named_parameters(), *call.named_buffers())}
    with torch.inference_mode(), Meter() as meter:
        torch.func.functional_call(call, weights, *_on_meta((args, kwargs)))
    return meter.peak


@dataclass(frozen=True)
class Needs:
    """Bytes that a job takes: its model's weights, what sampling and decoding take beside them, and the finished picture.

    controls: images that a ControlNet is shown. They and the picture are in main memory, the rest on the device.
    """

    weights: int
    sampling: int
    decoding: int
    picture: int
    controls: int = 0

    def peak(self, device: torch.device) -> int:
        """The most on the device at once."""
        picture, controls = (self.picture, self.controls) if device.type == "cpu" else (0, 0)
        return self.weights + max(self.sampling + controls, self.decoding + picture)


def in_words(size: float) -> str:
    """Bytes, for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def latents_bytes(size: tuple[int, int], channels: int = 4) -> int:
    """What sampling latents of (h, w) pixels takes on the device beside the model's calls, for one image."""
    return LATENTS * channels * math.prod(size) * 4


def picture_bytes(size: tuple[int, int], factor: int = 8) -> int:
    """A finished picture of (h, w) latent pixels in main memory, as numbers in single precision."""
    return 3 * math.prod(size) * factor**2 * 4


def check_fits(
    size: tuple[int, int],
    scale: float,
    device: torch.device,
    channels: int,
    images: int,
    factor: int,
    pictures: int = 1,
    start: str = "base",
) -> None:
    """Raises ValueError, one line, if a job's latents or its pictures cannot fit, whatever the view batch and the tiles.

    size: (h, w) of the last phase, latent pixels, which is `scale` times the base. images: made at once. pictures: how
    often the host has each of them in main memory at the end. start: what the user calls the base.
    """
    free = {where: free_memory(where) for where in (device, torch.device("cpu"))}

    def lack(size: tuple[int, int]) -> str | None:
        for what, where, need in (
            ("latents", device, images * latents_bytes(size, channels)),
            ("pictures", torch.device("cpu"), images * pictures * picture_bytes(size, factor)),
        ):
            if need > free[where]:
                h, w = (side * factor for side in size)
                memory = "main memory" if where.type == "cpu" else f"{where.type} memory"
                return f"the {what} of {w}x{h} take {in_words(need)} of {memory}, and {in_words(free[where])} are free"
        return None

    line = lack(size)
    if line is None:
        return
    base = [round(side / scale) for side in size]
    for twentieths in range(math.ceil(20 * scale) - 1, 20, -1):  # as the WebUI's slider goes
        if lack(tuple(round(side * twentieths / 20) for side in base)) is None:
            raise ValueError(f"{line}; scale {twentieths / 20:g} fits")
    raise ValueError(f"{line}; no scale fits, a smaller {start} may")
