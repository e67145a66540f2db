"""One picture on several devices: the ranks of torch.distributed share out the views of each step.

Every rank computes the base from the same seeds, then its part of each step's views. The answers are gathered and merged in
the views' order, so that the picture does not depend on how many ranks there are, nor on who had which view. Only latents
travel, and what the ranks say to each other: a few numbers, by gloo, before any latents. There whoever is gone, does not
answer, or cannot go on is found out, and the others end with it instead of waiting for ever.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from lib_demofusion.fusion import Cancelled
from lib_demofusion.memory import OutOfMemory, ViewBatch

V = TypeVar("V")
# By a process group, that of gloo in which its ranks speak. It is made once: torch would give a second one of the same ranks
# the name of the first, and with it the first one's addresses.
_controls: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

ANSWER = timedelta(seconds=45)  # within which a rank must answer another that is through with its part
PATIENCE = timedelta(minutes=30)  # the same where ranks differ by right: a model that is loaded, a picture that is written
ROUND = 20.0  # seconds of work after which the ranks hear of each other, though a step may take longer
UNEQUAL = 1.2  # how many times as long the slowest rank takes for a view before views go by pace
TRIED_AGAIN = 0.9  # a rank that is too slow for any view is thought this much faster each time, until it gets one
ROW = 512  # bytes that a rank says at a time
JOINING = timedelta(minutes=2)  # within which all ranks must have been started
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """A rank is gone or does not answer; its text is one line for the user."""


def shared_out(views: int, paces: Sequence[float]) -> list[list[int]]:
    """Which of so many views each rank has, in their order: every n-th one, or by pace where the paces are unequal.

    paces: seconds per view of each rank, 0 where that is not known. Each view goes to the rank that is through with it
    first, so that with equal paces no rank has two more than another.
    """
    if min(paces) <= 0 or max(paces) <= UNEQUAL * min(paces):
        paces = [1.0] * len(paces)
    shares: list[list[int]] = [[] for _ in paces]
    for view in range(views):
        rank = min(range(len(paces)), key=lambda rank: (len(shares[rank]) + 1) * paces[rank])
        shares[rank].append(view)
    return shares


def views_in(seconds: float, views: int, paces: Sequence[float], unit: int) -> int:
    """How many of the views go into one round of at most so many seconds: all, or a whole number of `unit` for each rank.

    One of these each where a pace is not known, which may be of any length.
    """
    if min(paces) <= 0:
        return min(views, unit * len(paces))
    longest = max(len(share) * pace for share, pace in zip(shared_out(views, paces), paces))
    if longest <= seconds:
        return views
    whole = unit * len(paces)
    return min(views, whole * max(int(views * seconds / longest) // whole, 1))


class Ranks:
    """The processes that make one picture together, of which this is one.

    group: their process group; torch's default one unless given. Of nccl, the latents travel on the cards; of anything else,
    through main memory. cards: make a group of nccl for them. clock: by which the paces are measured.
    rank: of this process in the group. paces: the ranks' seconds per view, as all of them know them; 0: not known.
    over: whether some rank could not go on.
    """

    def __init__(self, group: Any = None, cards: bool = False, clock: Callable[[], float] = time.perf_counter):
        group = dist.group.WORLD if group is None else group
        self.members = dist.get_process_group_ranks(group)  # by their ranks in the default group, as torch wants them
        self.rank = dist.get_rank(group)
        self.clock = clock
        self.paces = [0.0] * len(self.members)
        self.over = False
        own = dict(timeout=ANSWER, use_local_synchronization=True)
        if group not in _controls:
            _controls[group] = dist.new_group(self.members, backend="gloo", **own)
        self._control = _controls[group]
        self._data = self._control
        if dist.get_backend(group) == "nccl":
            self._data = group
        elif cards:
            self._data = dist.new_group(self.members, backend="nccl", **own)

    def __len__(self) -> int:
        return len(self.members)

    def close(self) -> None:
        """The end of what these ranks do together. After a failure the others stay until rank 0 has written what there is.

        What starts the ranks may end rank 0, too, as soon as another one has ended. The group can be used again; if a rank
        is lost, that is what the next job in it hears.
        """
        if self.over:
            word = torch.zeros(1, dtype=torch.uint8)
            for other in range(1, len(self)) if self.rank == 0 else ():
                with suppress(RankLost):
                    self._send(word, other, ANSWER)
            if self.rank:
                with suppress(RankLost):
                    self._receive(word, 0, PATIENCE)

    def exchange(
        self, error: BaseException | None = None, wait: tuple[timedelta, timedelta] | None = None, **told: Any
    ) -> list[dict[str, Any]]:
        """What each rank says of itself, in their order. All of them call it alike.

        error: why this rank cannot go on, which is raised here, and on the others as what it means for them: Cancelled,
        OutOfMemory, or RuntimeError with its line. wait: how long rank 0 waits for the others, and these for it; ANSWER.
        Raises RankLost if a rank is gone or does not answer.
        """
        wait = wait or (ANSWER, ANSWER)
        row, table = _row(error, told), torch.zeros(len(self), ROW, dtype=torch.uint8)
        try:
            if self.rank == 0:
                table[0] = row
                for rank in range(1, len(self)):
                    self._receive(table[rank], rank, wait[0])
                for rank in range(1, len(self)):
                    self._send(table, rank, wait[0])
            else:
                self._send(row, 0, wait[1])
                self._receive(table, 0, wait[1])
        except RankLost:
            self.over = True
            if error is None or isinstance(error, Cancelled):  # whoever starts the ranks stops the others, too
                raise
            raise error from None
        rows = [json.loads(bytes(line.tolist()).rstrip(b"\0")) for line in table]
        failed = [(rank, said["failed"]) for rank, said in enumerate(rows) if said["failed"]]
        self.over = self.over or bool(failed)
        if error is not None:
            raise error
        for rank, (kind, line) in sorted(failed, key=lambda said: said[1][0] == "Cancelled"):
            if kind == "Cancelled":
                raise Cancelled
            line = f"rank {rank}: {line}"
            raise OutOfMemory(line) if kind == "OutOfMemory" else RuntimeError(line)
        return rows

    def _send(self, x: Tensor, rank: int, wait: timedelta) -> None:
        """Until the rank has taken it."""
        with _lost(f"rank {rank}", wait):
            dist.isend(x, self.members[rank], group=self._control).wait(wait)

    def _receive(self, x: Tensor, rank: int, wait: timedelta) -> None:
        with _lost(f"rank {rank}", wait):
            dist.irecv(x, self.members[rank], group=self._control).wait(wait)

    def start(self, *settings: Any) -> None:
        """The begin of a job. Raises ValueError, one line, if the ranks are not given the same settings."""
        rows = self.exchange(wait=(PATIENCE, PATIENCE), job=zlib.crc32(repr(settings).encode()))
        if len({said["job"] for said in rows}) > 1:
            self.over = True
            raise ValueError("the ranks of the group have different jobs; group=False makes a picture on each")

    @contextmanager
    def told(self) -> Iterator[None]:
        """The others hear of what is raised in here, and end with it, unless they know."""
        try:
            yield
        except BaseException as error:
            if not self.over:
                with suppress(BaseException):
                    self.exchange(error, wait=(ANSWER, PATIENCE))
                self.over = True
            raise

    def alike(self, call: Callable[[], Tensor]) -> Tensor:
        """What `call` returns, a view's answer that every rank computes alike; its time is the rank's pace."""
        began, answer, error = self.clock(), None, None
        try:
            answer = call()
            _wait_for(answer.device)
        except BaseException as failure:
            error = failure
        rows = self.exchange(error, pace=self.clock() - began)
        self.paces = [said["pace"] for said in rows]
        return answer

    def same(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """Rank 0's tensors, on every rank: the begin of a phase, where the others may have waited for rank 0 to write."""
        self.exchange(wait=(ANSWER, PATIENCE))
        return [None if x is None else self._broadcast(x) for x in tensors]

    @torch.inference_mode(False)  # gloo of old versions writes from a thread of its own, which no tensor made in it allows
    def _broadcast(self, x: Tensor) -> Tensor:
        sent = self._travelling(x)
        with self._travelling_together():
            dist.broadcast(sent, self.members[0], group=self._data)
        return sent.to(x.device)

    @contextmanager
    def _travelling_together(self) -> Iterator[None]:
        """What torch raises in here says that some rank is lost, and not which."""
        others = [rank for rank in range(len(self)) if rank != self.rank]
        try:
            with _lost(f"rank {others[0]}" if len(others) == 1 else "a rank", ANSWER):
                yield
        except RankLost:
            self.over = True
            raise

    def _travelling(self, x: Tensor) -> Tensor:
        """A tensor where its group takes it from; never one that is somebody else's."""
        return (x if self._data is not self._control else x.cpu()).clone().contiguous()

    @torch.inference_mode(False)
    def gather(self, x: Tensor) -> list[Tensor]:
        """Each rank's x, all of one shape, in the ranks' order."""
        sent = self._travelling(x)
        parts = [torch.empty_like(sent) for _ in self.members]
        with self._travelling_together():
            dist.all_gather(parts, sent, group=self._data)
        return [part.to(x.device) for part in parts]


def views_a_call(setting: int, device: torch.device) -> int:
    """The setting of ViewBatch that ranks keep to: where 0 would be a fixed number by itself, 1."""
    return setting or (0 if device.type == "cuda" else 1)


class SharedViewBatch(ViewBatch):
    """The views of a step, shared out among the ranks; how many go into a call of this one.

    The setting is as in ViewBatch, but 1 where that would be a fixed number by itself. A batch's size moves the last bits of
    a float, and how many views a rank has, and so its last call, hangs on the number of ranks. For the same reason a number
    that was given is always kept to: the last call is filled up with views whose answers are dropped. That leaves a view's
    place in its call, which moves these bits with torch 2.1 on a CPU: with one view a call nothing does.
    After memory has run out on a rank its calls are smaller, those of the others not.
    elsewhere: told after each round how many views the other ranks have looked at, less those filled up with.
    """

    def __init__(self, ranks: Ranks, setting: int, device: torch.device, view: str = "base image"):
        super().__init__(views_a_call(setting, device), device, view)
        self.ranks = ranks
        self.unit = setting or 1  # the same on each rank
        self.elsewhere: Callable[[int], None] = lambda views: None

    def run(self, views: Sequence[V], call: Callable[[Sequence[V]], Tensor]) -> Iterator[tuple[Sequence[V], Tensor]]:
        """All views, each with its answer, in order; some were computed here. Every rank calls it alike.

        Holds the answers of a round. Raises what `exchange` raises besides.
        """
        start = 0
        while start < len(views):
            count = views_in(ROUND, len(views) - start, self.ranks.paces, self.unit)
            part = views[start : start + count]
            for view, answer in zip(part, self._round(part, call)):
                yield [view], answer
            start += count

    def _round(self, views: Sequence[V], call: Callable[[Sequence[V]], Tensor]) -> list[Tensor]:
        ranks = self.ranks
        shares = shared_out(len(views), ranks.paces)
        own = [views[index] for index in shares[ranks.rank]]
        filled = own if self.automatic else own + own[-1:] * (-len(own) % self.size)
        answers, error, began = [], None, ranks.clock()
        try:
            for batch, answer in super().run(filled, call):
                answers += answer.split(len(answer) // len(batch))
            _wait_for(self.device)
        except BaseException as failure:
            error = failure
        pace = (ranks.clock() - began) / len(own) if own else TRIED_AGAIN * ranks.paces[ranks.rank]
        rows = ranks.exchange(error, pace=pace, shape=list(answers[0].shape) if own and error is None else [])
        ranks.paces = [said["pace"] for said in rows]
        shape = next(said["shape"] for said in rows if said["shape"])
        block = torch.zeros(max(map(len, shares)), *shape, device=self.device)
        for place, answer in zip(block, answers[: len(own)]):
            place.copy_(answer)
        gathered = zip(shares, ranks.gather(block))
        merged = {index: answer for share, part in gathered for index, answer in zip(share, part)}
        if len(views) != len(filled):
            self.elsewhere(len(views) - len(filled))
        return [merged[index] for index in range(len(views))]


@contextmanager
def sharing(group: Any) -> Iterator[Ranks | None]:
    """The ranks of a process group, for the time of a job; None for none.

    group: a process group, or its Ranks, which stay; None for torch's default one if there is one, or False for none.
    Raises ValueError, one line, for anything else.
    """
    if group is False or (group is None and not (dist.is_available() and dist.is_initialized())):
        yield None
        return
    if isinstance(group, Ranks):
        with group.told():
            yield group
        return
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"group must be a process group of torch.distributed, got a {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not of the group; group=False makes a picture without it")
    ranks = Ranks(group)
    try:
        with ranks.told():
            yield ranks
    finally:
        ranks.close()


def join() -> tuple[Ranks, str | None]:
    """Joins the processes that torchrun has started; with them, this one's device if it is a card: "cuda:1".

    Raises ValueError, one line, if the environment does not say how; RuntimeError if there is no card for this process, or
    the others do not come.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        given = next(name for name in VARIABLES if os.environ.get(name))
        raise ValueError(f"{given} is set and {missing[0]} is not; start the command with torchrun, or unset {given}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise ValueError(f"{name} must be a whole number, got {os.environ[name]}; start the command with torchrun")
    rank, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if rank >= count:
        raise ValueError(f"RANK is {rank} of a WORLD_SIZE of {count}; start the command with torchrun")
    if not dist.is_available():
        raise ValueError("this torch was built without torch.distributed; start the command without torchrun")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", rank))
    if cards and local < cards:
        torch.cuda.set_device(local)
    began = time.monotonic()
    try:
        dist.init_process_group("gloo", timeout=JOINING)
    except RuntimeError as error:
        if time.monotonic() - began < 0.9 * JOINING.total_seconds():
            raise
        raise RuntimeError(f"not all of {count} ranks have come within {JOINING.seconds} seconds; start all of them") from error
    ranks = Ranks(cards=cards > 0)
    with ranks.told():
        if cards and local >= cards:
            raise RuntimeError(
                f"{cards} cards are here, and none for local rank {local}; give torchrun --nproc-per-node {cards}"
            )
    return ranks, f"cuda:{local}" if cards else None


def leave(ranks: Ranks) -> None:
    """The end of what `join` began."""
    ranks.close()
    if not ranks.over:
        with suppress(Exception):
            dist.destroy_process_group()


def _row(error: BaseException | None, told: dict[str, Any]) -> Tensor:
    """What a rank says, in ROW bytes."""
    failed = None
    if error is not None:
        kind = "Cancelled" if isinstance(error, (Cancelled, KeyboardInterrupt, SystemExit)) else type(error).__name__
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        failed = [kind, line.encode("ascii", "replace").decode()[:200]]
    text = json.dumps({**told, "failed": failed}).encode()
    return torch.frombuffer(bytearray(text.ljust(ROW, b"\0")), dtype=torch.uint8)


@contextmanager
def _lost(rank: str, wait: timedelta) -> Iterator[None]:
    """What torch raises in here, waiting for it so long, says that this rank, as the line names it, is lost."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        late = time.monotonic() - began >= 0.9 * wait.total_seconds()
        why = f"has not answered for {wait.seconds} seconds" if late else "is gone"
        raise RankLost(f"{rank} {why}") from error


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
