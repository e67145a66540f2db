"""One picture on several ranks: the same to the bit, whoever computes what, and whatever becomes of a rank."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from ranks import JOBS, PROMPT, free_port

import lib_demofusion
from lib_demofusion import distributed
from lib_demofusion.__main__ import main
from lib_demofusion.distributed import shared_out, views_in
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, generate, load_pipeline

HERE = Path(__file__).parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in (*distributed.VARIABLES, "LOCAL_RANK")},
    "PYTHONPATH": os.pathsep.join([str(Path(lib_demofusion.__file__).parent.parent), str(HERE)]),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What tests/ranks.py leaves."""
    folder = tmp_path_factory.mktemp("ranks")
    with open(folder / "log", "w") as log:
        command = [sys.executable, str(HERE / "ranks.py"), str(folder)]
        subprocess.run(command, check=True, env=ENVIRONMENT, stdout=log, stderr=log, timeout=900)
    return folder


@pytest.fixture
def told(folder):
    """What each rank of a job tells, in their order."""

    def told(name, count):
        files = [folder / f"{name}-{count}-{rank}" for rank in range(count)]
        for file in files:
            assert file.with_suffix(".json").exists(), file.with_suffix(".err").read_text()
        return [json.loads(file.with_suffix(".json").read_text()) for file in files]

    return told


@pytest.fixture
def lines(folder):
    """The command's lines on a rank's stderr, and all that it wrote to stdout."""

    def lines(name, count, rank):
        err, out = ((folder / f"{name}-{count}-{rank}.{stream}").read_text() for stream in ("err", "out"))
        assert "Traceback" not in err
        return [line for line in err.replace("\r", "\n").splitlines() if line.startswith("demofusion: ")], out

    return lines


def pixels(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


GIVEN = dict(zip((*distributed.VARIABLES, "LOCAL_RANK"), ("0", "2", "127.0.0.1", "1", "0")))
SAME = ("euler", "ancestral", "batch", "picture")


@pytest.mark.parametrize(("name", "count"), [(name, count) for name in SAME for count in JOBS[name][1:]])
def test_the_picture_does_not_depend_on_the_number_of_ranks(folder, told, name, count):
    for rank in told(name, count):
        assert [rank.get("code", 0), rank.get("failed", "")] == [0, ""]
    assert (folder / f"{name}-{count}.png").read_bytes() == (folder / f"{name}-1.png").read_bytes()


def test_with_several_views_a_call_it_is_the_same_but_for_rounding(folder, told):
    """A view's place in its call moves the last bits with torch 2.1."""
    assert [rank["failed"] for rank in told("fours", 3)] == [""] * 3
    with Image.open(folder / "fours-3.png") as several, Image.open(folder / "fours-1.png") as one:
        assert max(high for _, high in ImageChops.difference(several, one).getextrema()) <= 1


def test_one_process_makes_it_too(folder):
    assert pixels(folder / "alone-1.png") == pixels(folder / "euler-1.png")
    assert pixels(folder / "alone-1.png")[0] == (320, 256)


@pytest.mark.parametrize("name", SAME)
def test_the_ranks_share_out_what_one_does_alone(told, name):
    [alone] = told(name, 1)
    for count in JOBS[name][1:]:
        ranks = told(name, count)
        rows = 1 if name == "ancestral" else 4 if name == "batch" else 2  # of a view
        for parts in zip(*(rank["steps"] for rank in ranks)):
            assert max(parts) - min(parts) <= rows
        assert [sum(parts) for parts in zip(*(rank["steps"] for rank in ranks))] == alone["steps"]
        base = alone["rows"] - sum(alone["steps"])  # which each computes
        assert all(rank["rows"] - sum(rank["steps"]) == base for rank in ranks)


def test_the_result_counts_what_all_have_seen(told):
    for name in ("batch", "fours", "pace"):
        for count in JOBS[name]:
            assert [rank["evaluations"] for rank in told(name, count)] == [2 * (3 + 3 * 13)] * count


@pytest.mark.parametrize("name", ["euler", "ancestral", "picture"])
def test_only_the_first_rank_speaks_and_leaves_only_the_picture(folder, told, lines, name):
    assert [rank["code"] for rank in told(name, 3)] == [0, 0, 0]
    assert lines(name, 3, 0)[0] == []
    assert f"{folder / name}-3.png: " in lines(name, 3, 0)[1]
    for rank in (1, 2):
        assert lines(name, 3, rank) == ([], "")
        assert "phase" not in (folder / f"{name}-3-{rank}.err").read_text()
    assert not list(folder.glob(f"{name}-3-phase*"))


def test_a_group_makes_one_picture_after_another_also_after_one_that_was_stopped(told):
    assert told("again", 2) == [{"same": True, "stopped": 1, "lost": False}] * 2


def test_out_of_memory_on_one_rank_makes_its_calls_smaller(folder, told):
    assert [rank["size"] for rank in told("small", 2)] == [4, 2]
    with Image.open(folder / "small-2.png") as small, Image.open(folder / "fours-1.png") as roomy:
        assert max(high for _, high in ImageChops.difference(small, roomy).getextrema()) <= 1


def test_no_room_for_a_view_on_one_rank_is_told_by_the_first(folder, told, lines):
    assert [rank["code"] for rank in told("none", 2)] == [1, 1]
    why = "rank 1: out of memory with one view at a time; a smaller base image or half precision needs less"
    place = folder / "none-2.png"
    assert lines("none", 2, 0)[0] == [f"demofusion: {why}; the last finished phase, 1 of 2, is in {place}"]
    assert lines("none", 2, 1) == ([], "")
    assert pixels(place) == pixels(folder / "none-2-phase1.png")


def test_a_rank_that_is_three_times_slower_gets_fewer_views(folder, told):
    quick, slow = told("pace", 2)
    assert quick["steps"] == [20, 20, 20]
    assert slow["steps"] == [6, 6, 6]
    assert pixels(folder / "pace-2.png") == pixels(folder / "pace-1.png")


def test_sigterm_to_one_rank_ends_all_with_the_last_finished_phase(folder, told, lines):
    assert [rank["code"] for rank in told("term", 2)] == [130, 130]
    line = f"demofusion: stopped; the last finished phase, 1 of 2, is in {folder / 'term-2.png'}"
    assert lines("term", 2, 0)[0] == [line]
    assert lines("term", 2, 1) == ([], "")
    assert (folder / "term-2-phase1.safetensors").exists()


def test_a_rank_that_does_not_answer_is_told(folder, lines):
    line = "demofusion: failed: rank 1 has not answered for 3 seconds; the last finished phase, 1 of 2, is in "
    assert lines("silent", 2, 0)[0] == [f"{line}{folder / 'silent-2.png'}"]
    assert json.loads((folder / "silent-2-0.json").read_text())["code"] == 1
    assert (folder / "silent-2-phase1.safetensors").exists()
    assert distributed.ANSWER.seconds < 60


def test_another_job_in_the_group_of_a_lost_rank_is_told_so(folder):
    file = folder / "gone-2-0.json"
    assert file.exists(), file.with_suffix(".err").read_text()
    (first, line), second = json.loads(file.read_text())["heard"]
    assert first == "Incomplete"
    assert "rank 1 is gone" in line
    assert second == ["RankLost", "rank 1 is gone"]


@pytest.mark.parametrize(("count", "line"), [(2, "rank 1 is gone"), (3, "a rank is gone")])
def test_a_rank_that_goes_while_latents_travel_is_told(monkeypatch, count, line):
    """Of what torch says then nothing is a line for the user."""

    def gone(*args, **kwargs):
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:11143: Connection reset by peer")

    ranks = object.__new__(distributed.Ranks)
    ranks.__dict__.update(rank=0, members=[*range(count)], over=False, _control=None, _data=None)
    for call, name in ((ranks.gather, "all_gather"), (ranks._broadcast, "broadcast")):
        monkeypatch.setattr(torch.distributed, name, gone)
        with pytest.raises(distributed.RankLost, match=f"^{line}$"):
            call(torch.zeros(2))
    assert ranks.over


def test_ranks_with_different_jobs_are_refused(told):
    for rank in told("different", 2):
        assert rank["failed"].startswith("ValueError: the ranks of the group have different jobs")
        assert rank["rows"] == 0


def test_what_one_rank_lacks_is_told_by_the_first(told, lines):
    assert [rank["code"] for rank in told("missing", 2)] == [1, 2]
    [line] = lines("missing", 2, 0)[0]
    assert line.startswith("demofusion: failed: rank 1: no such checkpoint: ")
    assert lines("missing", 2, 1) == ([], "")


def test_a_killed_rank_leaves_a_line_and_the_phase_from_which_one_rank_goes_on(tmp_path, monkeypatch, capsys):
    job = [PROMPT, "--scale", "3", "--steps", "3", "--seed", "5"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lib_demofusion"]
    saved, err = tmp_path / "out-phase2.safetensors", tmp_path / "err"
    with open(err, "w") as log:
        run = subprocess.Popen([sys.executable, *start, *job, "-o", str(tmp_path / "out.png")], env=ENVIRONMENT, stderr=log)
    try:
        while not saved.exists():
            assert run.poll() is None, err.read_text()
            time.sleep(0.02)
        os.kill(second_of(run.pid), signal.SIGKILL)
        began = time.monotonic()
        assert run.wait(120) == 1
        assert time.monotonic() - began < 60
    finally:
        run.kill()
    lines = [line for line in err.read_text().replace("\r", "\n").splitlines() if line.startswith("demofusion: ")]
    line = f"demofusion: failed: rank 1 is gone; the last finished phase, 2 of 3, is in {tmp_path / 'out.png'}"
    assert lines == [line], err.read_text()
    assert not [text for text in err.read_text().splitlines() if "lib_demofusion/" in text]  # torchrun has its own traceback
    own = ["--view-batch-size", "1", "--device", "cpu"]
    assert main([*job, *own, "-o", str(tmp_path / "whole.png")]) == 0
    for name, value in zip(distributed.VARIABLES, ("0", "1", "127.0.0.1", str(free_port()))):
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--resume", str(saved), "-o", str(tmp_path / "resumed.png")]) == 0
    signal.signal(signal.SIGTERM, before)
    assert pixels(tmp_path / "resumed.png") == pixels(tmp_path / "whole.png")
    assert not torch.distributed.is_initialized()


def second_of(agent):
    """The process of rank 1 that torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("torchrun has no second process")


@settings(deadline=None)
@given(st.integers(0, 200), st.lists(st.floats(0.001, 100), min_size=1, max_size=64))
def test_every_view_has_one_rank(views, paces):
    shares = shared_out(views, paces)
    assert len(shares) == len(paces)
    assert sorted(view for share in shares for view in share) == [*range(views)]
    assert all(share == sorted(share) for share in shares)


@given(st.integers(0, 200), st.integers(1, 64), st.floats(1, 1.2))
def test_ranks_of_equal_pace_have_every_nth_view(views, count, unequal):
    even = [[*range(rank, views, count)] for rank in range(count)]
    assert shared_out(views, [1.0] * count) == even
    assert shared_out(views, [0.0] * count) == even  # nothing is known
    assert shared_out(views, [1.0] * (count - 1) + [unequal]) == even


def test_views_go_by_pace_where_the_paces_are_unequal():
    assert [len(share) for share in shared_out(65, [1.0, 3.0])] == [49, 16]
    assert [len(share) for share in shared_out(13, [1.0, 1.3])] == [7, 6]
    assert [len(share) for share in shared_out(65, [1.0, 2.0, 4.0])] == [38, 18, 9]
    assert shared_out(4, [1.0, 100.0]) == [[0, 1, 2, 3], []]
    assert shared_out(5, [0.0, 3.0]) == [[0, 2, 4], [1, 3]]


@settings(deadline=None)
@given(st.integers(1, 200), st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.integers(1, 8))
def test_a_round_is_short_unless_a_view_is_long(views, paces, unit):
    taken = views_in(20, views, paces, unit)
    assert 1 <= taken <= views
    shares = shared_out(taken, paces)
    least = unit * len(paces)
    assert taken <= least or max(len(share) * pace for share, pace in zip(shares, paces)) <= 20 + max(paces)
    assert taken == views or taken % least == 0


def test_the_first_round_is_a_call_of_each_rank_where_no_pace_is_known():
    assert views_in(20, 65, [0.0, 0.0], 1) == 2
    assert views_in(20, 65, [0.0, 1.0], 4) == 8
    assert views_in(20, 3, [0.0, 0.0], 4) == 3


def test_ranks_that_were_not_started_are_told(tmp_path, monkeypatch, capsys):
    for name, value in {**GIVEN, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    assert main(["one red ring", "-o", str(tmp_path / "out.png")]) == 1
    line = "demofusion: failed: not all of 2 ranks have come within 1 seconds; start all of them\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("environment", "args", "says"),
    [
        ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE is set and RANK is not; start the command with torchrun, or unset WORLD_SIZE"),
        ({**GIVEN, "MASTER_ADDR": ""}, [], "RANK is set and MASTER_ADDR is not; start the command with torchrun"),
        ({**GIVEN, "WORLD_SIZE": "two"}, [], "WORLD_SIZE must be a whole number, got two"),
        ({**GIVEN, "RANK": "2"}, [], "RANK is 2 of a WORLD_SIZE of 2"),
        (GIVEN, ["--device", "cpu"], "--device is not for torchrun, which gives each process a card of its own"),
    ],
)
def test_what_torchrun_does_not_give_is_refused(tmp_path, monkeypatch, capsys, environment, args, says):
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["one red ring", "-o", str(tmp_path / "out.png"), *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_the_plan_says_how_many_views_a_rank_has_in_a_call(tmp_path, monkeypatch, capsys):
    for name, value in {**GIVEN, "WORLD_SIZE": "1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["one red ring", "--plan", "-o", str(tmp_path / "out.png")]) == 0
    signal.signal(signal.SIGTERM, before)
    assert "with 1 view a call" in capsys.readouterr().out


def test_another_rank_says_nothing_of_what_is_refused(tmp_path, monkeypatch, capsys):
    for name, value in {**GIVEN, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["one red ring", "-o", str(tmp_path / "out.png"), "--device", "cpu"]) == 2
    assert capsys.readouterr() == ("", "")


def test_what_is_no_group_is_refused():
    pipe = load_pipeline(EMBEDDED_CHECKPOINT, "cpu", torch.float32)
    with pytest.raises(ValueError, match="^group must be a process group of torch.distributed, got a str$"):
        generate(pipe, "one red ring", steps=1, group="nccl")
