"""Jobs on 1, 2 and 3 ranks, for test_distributed: `python ranks.py FOLDER` leaves pictures and what the ranks saw there.

What takes long to import is imported once; each rank is a fork. JOBS has the name of each job and for how many ranks it is.
NAME-COUNT.png is a picture, NAME-COUNT-RANK.json what a rank tells of it.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny import photo

from lib_demofusion import distributed
from lib_demofusion.__main__ import main
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.hosts import diffusers as host
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, Incomplete, generate, load_pipeline

PROMPT = "two purple striped discs on snow"
FOLDER = Path(sys.argv[1] if __name__ == "__main__" else ".")
JOBS = {
    "euler": (1, 2, 3),
    "ancestral": (1, 3),
    "batch": (1, 2),
    "picture": (1, 3),
    "fours": (1, 3),
    "again": (2,),
    "pace": (1, 2),
    "small": (2,),
    "none": (2,),
    "term": (2,),
    "silent": (2,),
    "gone": (2,),
    "different": (2,),
    "missing": (2,),
    "alone": (1,),
}
calls = []  # rows of each call of the UNet
steps = []  # rows of each fused prediction
most = [10**6]  # rows that fit into a call


class Rank:
    """One of the ranks of a job."""

    def __init__(self, name, rank, count):
        self.name, self.rank, self.count = name, rank, count

    def command(self, *args, prompt=PROMPT):
        """The command, in a group."""
        code = main([prompt, "-o", str(FOLDER / f"{self.name}-{self.count}.png"), *args])
        return {"code": code, "rows": sum(calls), "steps": steps}

    def generate(self, seed=1, clock=time.perf_counter, **config):
        """The function, in a group of its own making; the pictures beside one another."""
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        pipe = host.load_pipeline(EMBEDDED_CHECKPOINT, "cpu", torch.float32)
        group = distributed.Ranks(clock=clock) if clock is not time.perf_counter else None
        own = dict(config=DemoFusionConfig(**config), steps=3, sampler="DPM++ 2M", seed=seed, group=group)
        failed = ""
        try:
            result = generate(pipe, PROMPT, **own)
        except (Incomplete, ValueError) as error:
            result, failed = getattr(error, "result", None), f"{type(error).__name__}: {error}"
        if not self.rank and result and result.phases:
            images = result.images()
            sheet = images[0].resize((images[0].width * len(images), images[0].height))
            for place, image in enumerate(images):
                sheet.paste(image, (place * image.width, 0))
            sheet.save(FOLDER / f"{self.name}-{self.count}.png")
        size, seen = result and result.view_batch.size, result and result.evaluations
        if not failed:
            dist.destroy_process_group()
        return {"failed": failed, "rows": sum(calls), "steps": steps, "size": size, "evaluations": seen}

    def euler(self):
        return self.command(*EULER)

    def ancestral(self):
        return self.command("--steps", "2", "--scale", "4", "--doubling", "--sampler", "Euler a", "--cfg-scale", "1")

    def batch(self):
        return self.generate(seed=[1, 2], scale=2.0)

    def picture(self):
        if self.rank == 0:
            photo().save(FOLDER / f"photo-{self.count}.bmp")
        else:
            while not (FOLDER / f"photo-{self.count}.bmp").exists():
                time.sleep(0.05)
            time.sleep(0.2)
        return self.command("--image", str(FOLDER / f"photo-{self.count}.bmp"), "--scale", "1.5", "--steps", "2")

    def fours(self):
        """Four views a call, which neither 13 nor its parts are whole numbers of."""
        return self.generate(scale=2.0, view_batch_size=4)

    def again(self):
        """In a group that has had two jobs, of which the second was stopped."""
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        pipe, made = host.load_pipeline(EMBEDDED_CHECKPOINT, "cpu", torch.float32), []
        own = dict(config=DemoFusionConfig(scale=2.0), steps=2, seed=1)
        for stopped in (False, True, False):
            try:
                made.append(generate(pipe, PROMPT, cancelled=lambda stopped=stopped: stopped and sum(steps) > 40, **own))
            except Incomplete as error:
                made.append(error.result)
        first, second, third = (result.phases[-1][1] for result in made)
        dist.destroy_process_group()
        return {"same": torch.equal(first, third), "stopped": len(made[1].phases), "lost": second.shape == first.shape}

    def pace(self):
        """The second rank takes three times as long for a view."""
        return self.generate(scale=2.0, clock=lambda: sum(calls) * (1.0 + 2.0 * self.rank))

    def small(self):
        """As fours, where two views fit on the second rank."""
        most[0] = 4 if self.rank else most[0]
        return self.fours()

    def none(self):
        """The second rank has no room for one view, from the base on."""
        before = Fusion.predict

        def predict(*args):
            most[0] = 1 if self.rank else most[0]
            return before(*args)

        Fusion.predict = predict
        return self.command("--steps", "2", "--scale", "2", "--save-phases")

    def term(self):
        """The second rank alone is asked to end, in the first phase after the base."""
        before = Fusion.predict

        def predict(*args):
            if self.rank:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return before(*args)

        Fusion.predict = predict
        return self.command("--steps", "2", "--scale", "2")

    def silent(self):
        """The second rank stops in the first phase after the base, and says nothing any more."""
        before, distributed.ANSWER = Fusion.predict, timedelta(seconds=3)

        def predict(*args):
            if self.rank:
                os.kill(os.getpid(), signal.SIGSTOP)
            return before(*args)

        Fusion.predict = predict
        return self.command("--steps", "2", "--scale", "2")

    def gone(self):
        """The second rank ends in the first phase after the base; the first begins another job in their group."""
        before = Fusion.predict

        def predict(*args):
            if self.rank:
                os._exit(3)
            return before(*args)

        Fusion.predict = predict
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        pipe, heard = host.load_pipeline(EMBEDDED_CHECKPOINT, "cpu", torch.float32), []
        for _ in range(2):
            try:
                generate(pipe, PROMPT, config=DemoFusionConfig(scale=2.0), steps=2, seed=1)
            except (Incomplete, distributed.RankLost) as error:
                heard.append([type(error).__name__, str(error)])
        return {"heard": heard}

    def different(self):
        return self.generate(seed=self.rank, scale=2.0)

    def missing(self):
        """The second rank lacks the model."""
        return self.command("--scale", "2", *(["--model", str(FOLDER / "nowhere")] if self.rank else []))

    def alone(self):
        """Without a group, as euler."""
        for name in distributed.VARIABLES:
            del os.environ[name]
        code = main([PROMPT, "-o", str(FOLDER / "alone-1.png"), "--view-batch-size", "1", "--device", "cpu"] + EULER)
        return {"code": code}


EULER = ["--steps", "3", "--scale", "2", "--width", "160", "--hold-flat", "6"]


def fork(name, rank, count, port):
    """A rank in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    place, code = FOLDER / f"{name}-{count}-{rank}", 1
    try:
        for number, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{place}.{suffix}", os.O_WRONLY | os.O_CREAT), number)
        told = getattr(Rank(name, rank, count), name)()
        place.with_name(f"{place.name}.json").write_text(json.dumps(told))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def everything():
    torch.set_num_threads(1)
    assert StableDiffusionPipeline  # imported before the forks, like all else
    distributed.UNEQUAL, unequal = float("inf"), distributed.UNEQUAL  # a machine's load would decide
    forward, predict = UNet2DConditionModel.forward, Fusion.predict

    def counted(unet, sample, *args, **kwargs):
        if len(sample) > most[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")
        calls.append(len(sample))
        return forward(unet, sample, *args, **kwargs)

    def noted(*args):
        before = sum(calls)
        answer = predict(*args)
        steps.append(sum(calls) - before)
        return answer

    pipe = load_pipeline(EMBEDDED_CHECKPOINT, "cpu", torch.float32)
    host.load_pipeline = lambda model, *kind: pipe if model == EMBEDDED_CHECKPOINT else load_pipeline(model, *kind)
    UNet2DConditionModel.forward, Fusion.predict = counted, noted
    for name, counts in JOBS.items():
        distributed.UNEQUAL = unequal if name == "pace" else float("inf")
        for count in counts:
            port = free_port()
            ranks = [fork(name, rank, count, port) for rank in range(count)]
            os.waitpid(ranks[0], 0)
            for rank in ranks[1:]:
                if name == "silent":
                    os.kill(rank, signal.SIGKILL)
                os.waitpid(rank, 0)


if __name__ == "__main__":
    everything()
