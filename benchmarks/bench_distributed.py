"""What several ranks gain: `make bench-distributed`. Ratios, measured side by side in one run; `--foreseen` computes others.

Two ranks on two cores, each with one thread, against one of them alone while the other sleeps, in the same processes and in
turn. The UNet is random and large enough that its time is an honest yardstick.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.performance import pipeline
from lib_demofusion import distributed
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import generate

# docs/performance.md, SDXL on an H200: seconds a view of two branches in calls of eight, the least that a call takes (a step
# of the base), and the share of the time outside the UNet, which each rank has for all views.
VIEW, CALL, OUTSIDE = 0.036, 0.072, 0.012
ANSWER = 4 * 128 * 128 * 4  # bytes of a view's answer
# Bytes a second and seconds until the first one comes; of what the ranks say to each other by TCP, seconds a message.
LINKS = {"NVLink": (200e9, 10e-6), "PCIe 4.0": (20e9, 20e-6), "10 GbE": (1.1e9, 100e-6)}
MESSAGE = 100e-6


def foreseen(views: int, ranks: int, link: str) -> tuple[float, float]:
    """Seconds of a step with so many views of SDXL, and how many of these travelling takes."""
    bandwidth, latency = LINKS[link]
    own = math.ceil(views / ranks)
    travelling = 0.0
    if ranks > 1:
        block = own * ANSWER
        travelling = (ranks - 1) * (block / bandwidth + latency + 2 * MESSAGE)
    return max(own * VIEW, CALL) + OUTSIDE * VIEW * views + travelling, travelling


def print_foreseen() -> None:
    print("| views a step | ranks | views of a rank | seconds a step | times faster | travelling: " + ", ".join(LINKS) + " |")
    print("| --- | --- | --- | --- | --- | --- |")
    for views in (13, 34, 65, 200):
        alone, _ = foreseen(views, 1, "PCIe 4.0")
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            seconds, _ = foreseen(views, ranks, "PCIe 4.0")
            shares = ", ".join(f"{t / s:.1%}" for s, t in (foreseen(views, ranks, link) for link in LINKS))
            own = math.ceil(views / ranks)
            print(f"| {views} | {ranks} | {own} | {seconds:.2f} | {alone / seconds:.1f} | {'' if ranks == 1 else shares} |")


def measure(pipe, group, scale: float) -> tuple[list[float], float]:
    """Seconds of each phase after the base, a step each, and how many of these the ranks waited and latents travelled."""
    ends: list[float] = []
    spent = [0.0]
    originals = {name: getattr(distributed.Ranks, name) for name in ("exchange", "gather")}

    def timed(call):
        def wrapped(*args, **kwargs):
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - began

        return wrapped

    def finished(*_) -> None:
        if not ends:
            spent[0] = 0.0
        ends.append(time.perf_counter())

    for name, call in originals.items():
        setattr(distributed.Ranks, name, timed(call))
    try:
        config = DemoFusionConfig(scale=scale, view_batch_size=1)
        generate(pipe, "", config=config, steps=1, finished=finished, group=group)
    finally:
        for name, call in originals.items():
            setattr(distributed.Ranks, name, call)
    return [after - before for before, after in zip(ends, ends[1:])], spent[0]


def one_of(scale: float, repeats: int) -> None:
    """One of the ranks that torchrun started."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    pipe = pipeline("small", "cpu")
    size = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    if rank == 0:
        print(f"UNet: {size:.0f} million parameters, {scale:g}x, one step a phase, a core for each of {count} ranks")
        print("seconds alone      together           times faster  waiting and travelling", flush=True)
    ratios = []
    for _ in range(repeats):
        alone = measure(pipe, False, scale)[0] if rank == 0 else []
        dist.barrier()
        together, spent = measure(pipe, None, scale)
        dist.barrier()
        if rank == 0:
            ratios.append(sum(alone) / sum(together))
            each = ["  ".join(f"{seconds:.2f}" for seconds in times) for times in (alone, together)]
            print(f"{each[0]:17}  {each[1]:17}  {ratios[-1]:12.2f}  {spent / sum(together):22.1%}", flush=True)
    if rank == 0:
        print(f"median: {statistics.median(ratios):.2f} times faster")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--foreseen", action="store_true", help="the table of docs/distributed.md; nothing is measured")
    args = parser.parse_args()
    if args.foreseen:
        print_foreseen()
    elif "RANK" in os.environ:
        one_of(args.scale, args.repeats)
    else:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{args.ranks}"]
        own = ["-m", "benchmarks.bench_distributed", "--scale", f"{args.scale}", "--repeats", f"{args.repeats}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([sys.executable, *start, *own], env=environment).returncode)


if __name__ == "__main__":
    main()
