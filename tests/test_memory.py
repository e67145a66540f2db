"""View batches that size themselves, on machines made up for the test."""

import importlib.util
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from lib_demofusion.memory import (
    Meter,
    OutOfMemory,
    ViewBatch,
    call_bytes,
    check_fits,
    check_meter,
    free_memory,
    is_out_of_memory,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOMY = 10**12


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("failed"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error, memory):
    assert is_out_of_memory(error) is memory


class Machine:
    """Counts the calls; from the `since`-th on, more than `most` views run out of memory."""

    def __init__(self, most=ROOMY, since=1):
        self.most, self.since, self.sizes = most, since, []

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.most and len(self.sizes) >= self.since:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(batch)


def answers(view_batch, machine, views):
    return [int(x) for _, answer in view_batch.run(views, machine) for x in answer]


@pytest.mark.parametrize(("setting", "sizes"), [(0, [4, 4, 4, 1]), (1, [1] * 13), (5, [5, 5, 3]), (13, [13]), (64, [13])])
def test_a_number_is_kept_and_the_cpu_has_a_fixed_one(setting, sizes):
    machine = Machine()
    assert answers(ViewBatch(setting, CPU), machine, range(13)) == [*range(13)]
    assert machine.sizes == sizes


@pytest.mark.parametrize(
    ("most", "since", "sizes"),
    [
        (7, 1, [8, 4, 4, 4, 1]),
        (3, 1, [8, 4, 2, 2, 2, 2, 2, 2, 1]),
        (1, 1, [8, 4, 2, *[1] * 13]),
        (3, 2, [8, 5, 2, 2, 1]),
        (1, 2, [8, 5, 2, 1, 1, 1, 1, 1]),
        (7, 2, [8, 5]),
    ],
)
def test_a_call_that_does_not_fit_is_made_again_with_half_as_many(most, since, sizes):
    machine = Machine(most, since)
    assert answers(ViewBatch(8, CPU), machine, range(13)) == [*range(13)]
    assert machine.sizes == sizes


def test_what_did_not_fit_is_not_tried_again():
    machine, view_batch = Machine(most=3), ViewBatch(8, CPU)
    answers(view_batch, machine, range(13))
    machine.sizes.clear()
    answers(view_batch, machine, range(4))
    assert machine.sizes == [2, 2]
    assert view_batch.fitted == 2


def test_one_view_that_does_not_fit_ends_it():
    machine = Machine(most=0, since=3)
    run = ViewBatch(4, CPU).run(range(13), machine)
    assert [len(batch) for batch, _ in (next(run), next(run))] == [4, 4]
    with pytest.raises(OutOfMemory, match="out of memory with one view at a time; a smaller base image"):
        next(run)
    assert machine.sizes == [4, 4, 4, 2, 1]


def test_other_errors_pass():
    def broken(batch):
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        next(ViewBatch(4, CPU).run(range(13), broken))


def test_the_failed_calls_tensors_are_gone_before_the_next_call():
    held = []

    def call(batch):
        if held:
            assert held[0]() is None
        else:
            big = torch.zeros(1000)
            held.append(weakref.ref(big))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.tensor(batch)

    assert answers(ViewBatch(4, CPU), call, range(4)) == [*range(4)]


@pytest.fixture
def gpu(monkeypatch):
    """A card: gpu.free bytes besides `resident` ones; a call of n views takes n * 10 bytes and gpu.seconds(n)."""
    card = SimpleNamespace(free=ROOMY, resident=100, peak=100, clock=0.0, seconds=lambda n: 1.0, emptied=0, sizes=[])

    def call(batch):
        card.sizes.append(len(batch))
        if 10 * len(batch) > card.free:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        card.peak = max(card.peak, card.resident + 10 * len(batch))
        card.clock += card.seconds(len(batch))
        return torch.tensor(batch)

    card.call = call
    values = {
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: card.resident,
        "memory_reserved": lambda device: card.resident,
        "max_memory_allocated": lambda device: card.peak,
        "mem_get_info": lambda device: (card.free, ROOMY),
        "empty_cache": lambda: setattr(card, "emptied", card.emptied + 1),
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("time.perf_counter", lambda: card.clock)
    return card


def sizes_of(card, setting=0, views=200):
    view_batch = ViewBatch(setting, CUDA)
    assert answers(view_batch, card.call, range(views)) == [*range(views)]
    return view_batch.size, card.sizes


def test_on_a_gpu_it_doubles_while_that_is_faster(gpu):
    gpu.seconds = lambda n: max(1.0, n / 6)  # the card is busy from 6 views on
    size, sizes = sizes_of(gpu)
    assert size == 8
    assert sizes[:10] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]  # each size once to warm up, once to measure
    assert sizes[10:] == [8] * 12 + [7] * 6  # the other 138, evenly
    assert gpu.emptied == 1


def test_on_a_gpu_it_stops_where_the_double_would_not_fit(gpu):
    gpu.free = 70  # 4 views take 40, 8 would take 80
    size, sizes = sizes_of(gpu)
    assert size == 4
    assert max(sizes) == 4


def test_a_gpu_that_gains_nothing_goes_on_with_one_view(gpu):
    gpu.seconds = lambda n: float(n)
    size, sizes = sizes_of(gpu)
    assert size == 1
    assert sizes[:5] == [1, 1, 2, 2, 1]


def test_a_gpu_that_runs_out_while_growing_goes_on_with_what_fitted(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (ROOMY, ROOMY))  # another program takes the rest meanwhile
    gpu.free = 70
    size, sizes = sizes_of(gpu)
    assert size == 4
    assert sizes[:8] == [1, 1, 2, 2, 4, 4, 8, 4]


def test_on_a_gpu_the_views_of_a_step_are_shared_out_evenly(gpu):
    gpu.free = 70
    view_batch = ViewBatch(0, CUDA)
    answers(view_batch, gpu.call, range(200))
    gpu.sizes.clear()
    assert answers(view_batch, gpu.call, range(13)) == [*range(13)]
    assert gpu.sizes == [4, 3, 3, 3]


def test_a_number_is_not_measured(gpu):
    assert sizes_of(gpu, setting=3, views=7) == (3, [3, 3, 1])


def test_free_memory():
    assert 2**20 < free_memory(CPU) < 2**50
    assert free_memory(torch.device("meta")) == 2**32


GIB = 2**30


@pytest.mark.parametrize(
    ("card", "ram", "images", "line"),
    [
        (99, 99, 1, None),
        (10 / 1024, 99, 1, "the latents of 8192x4096 take 80 MiB of cuda memory, and 10 MiB are free; scale 2.8 fits"),
        (99, 0.375 * 0.99, 1, "the pictures of 8192x4096 take 384 MiB of main memory, and 380 MiB are free; scale 7.95 fits"),
        (99, 0.4, 2, "the pictures of 8192x4096 take 768 MiB of main memory, and 410 MiB are free; scale 5.8 fits"),
        (99, 0.001, 1, "the pictures of 8192x4096 take 384 MiB of main memory, and 1 MiB are free; no scale fits"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_scale_that_does(monkeypatch, card, ram, images, line):
    """A base of 128 x 64 latent pixels at 8x: latents take 160 bytes a latent pixel, pictures 768."""
    monkeypatch.setattr("lib_demofusion.memory.free_memory", lambda device: GIB * (card if device == CUDA else ram))
    check = partial(check_fits, device=CUDA, channels=4, images=images, factor=8)
    with nullcontext() if line is None else pytest.raises(ValueError, match="^" + line):
        check((512, 1024), 8.0)
    if line and "no scale" not in line:
        scale = float(line.split()[-2])
        check((round(64 * scale), round(128 * scale)), scale)


def test_the_meter_counts_what_is_alive():
    with Meter() as meter:
        x = torch.zeros(1000)  # 4000 bytes
        y = x + 1
        x.add_(1)
        assert (meter.now, meter.peak) == (8000, 8000)
        z = y.view(10, 100)[2:]
        del x, y
        assert meter.now == 4000
        del z
        assert (meter.now, meter.peak) == (0, 8000)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_meter_counts_each_storage_once_however_it_is_handed_on(device):
    with Meter() as meter:
        x = torch.zeros(1000, device=device)
        pair = torch.chunk(x, 2)  # views
        x = {"all": [x * 2, (x + 1,)]}["all"]
        assert meter.now == 12000
        del pair
        assert meter.now == 8000
        for _ in range(50):  # places of dead storages are taken again
            y = x[0] + 1
            del y
        assert (meter.now, meter.peak) == (8000, 12000)


def test_a_meter_that_counts_wrong_says_that_it_does_not_know(monkeypatch):
    module = torch.nn.Linear(2, 2)
    monkeypatch.setattr(Meter, "now", 0)
    check_meter.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="^torch .* does not tell what its tensors take$"):
            call_bytes(module, module, torch.zeros(1, 2))
    finally:
        check_meter.cache_clear()
    monkeypatch.undo()
    assert call_bytes(module, module, torch.zeros(1, 2)) == 2 * 8


@pytest.mark.parametrize(
    "name", ["torch.utils._python_dispatch.TorchDispatchMode", "torch.multiprocessing.reductions.StorageWeakRef"]
)
def test_a_torch_without_private_names_runs_all_but_knows_no_bytes(name, monkeypatch):
    module = torch.nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.delattr(name)
        spec = importlib.util.find_spec("lib_demofusion.memory")
        memory = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "memory_without", memory)
        patch.setattr(spec, "name", "memory_without")
        spec.loader.exec_module(memory)
    [(views, answer)] = memory.ViewBatch(2, CPU).run([1, 2], lambda views: torch.tensor(views))
    assert answer.tolist() == views == [1, 2]
    with pytest.raises(RuntimeError, match="does not tell what its tensors take"):
        memory.call_bytes(module, module, torch.zeros(1, 2))


def test_a_call_is_measured_without_being_made():
    """Input, the first layer's output, and the second's, of which two are alive at a time besides the input."""
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 32, 1), torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 1))
    x = torch.randn(2, 4, 10, 10)
    with torch.inference_mode(), Meter() as meter:
        module(x.clone())
    assert call_bytes(module, module, x) == meter.peak == 4 * 2 * 100 * (4 + 32 + 32)
    assert next(module.parameters()).device.type == "cpu"


def test_encoding_takes_no_more_than_decoding():
    """So that what is foreseen for decoding holds where phases are enlarged as images, too."""
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2)
    with torch.device("meta"):
        vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512))
        latents, image = torch.empty(1, 4, 64, 64), torch.empty(1, 3, 512, 512)
    decoding = call_bytes(vae, lambda z: vae.decode(z, return_dict=False)[0], latents)
    encoding = call_bytes(vae, lambda x: vae.encode(x, return_dict=False)[0].mean, image)
    assert 0.5 * decoding < encoding < decoding
