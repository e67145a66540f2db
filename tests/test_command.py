"""The command: what it writes, what it refuses, and what is left when it is stopped."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageChops, ImageOps
from safetensors.torch import save_file
from tiny import tiny_controlnet, tiny_pipeline
from tiny_files import tiny_lora

import lib_demofusion
from lib_demofusion import __version__, job
from lib_demofusion.__main__ import main
from lib_demofusion.arguments import METHOD, parse, resumed
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.files import suffixed
from lib_demofusion.fusion import Fusion
from lib_demofusion.hosts.diffusers import load_pipeline
from lib_demofusion.saved import SavedPhase, read_saved

# For a process of its own: the package that is tested, whether or not one is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(lib_demofusion.__file__).parent.parent)}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-sd15"
    tiny_pipeline("sd15").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, tmp_path, capsys):
    """Runs the command in this process with a tiny model; (exit code, stdout, stderr, output path)."""

    def run(*args, output="out.png"):
        path = tmp_path / output
        code = main(["--model", model, "--steps", "3", "--device", "cpu", "-o", str(path), *args])
        out, err = capsys.readouterr()
        return code, out, err, path

    return run


def refused(code, err, says, path):
    """Exit code 2, one line that says so, and no file."""
    assert code == 2
    assert re.search(says, err)
    assert err.count("\n") == 1
    assert err.startswith("demofusion: ")
    assert "Traceback" not in err
    assert not path.parent.exists() or not any(p.name.startswith((path.stem, ".")) for p in path.parent.glob("*.p*"))


def test_a_prompt_becomes_an_image_with_its_settings_in_it(run):
    code, out, err, path = run("one red ring", "--scale", "2", "--seed", "7", "--negative-prompt", "star", "--stride", "0.4")
    assert code == 0
    assert "phase 2 of 2" in err
    with Image.open(path) as image:
        assert image.size == (128, 128)
        assert image.info["parameters"] == (
            "one red ring\nNegative prompt: star\nSteps: 3, Sampler: Euler, CFG scale: 7.5, Seed: 7, Size: 64x64, "
            "Model: tiny-sd15, DemoFusion scale: 2, DemoFusion stride: 0.4, DemoFusion hold steps: 50, Version: demofusion "
            + __version__
        )
        values = dict(pair.split(": ") for pair in image.info["parameters"].splitlines()[-1].split(", "))
    assert DemoFusionConfig.from_infotext(values) == DemoFusionConfig(scale=2.0, stride=0.4)
    assert [p.name for p in path.parent.iterdir()] == ["out.png"]


def test_the_same_seed_is_the_same_picture_alone_and_as_one_of_several(run):
    run("one red ring", "--scale", "2", "--seed", "4", output="a.png")
    *_, path = run("one red ring", "--scale", "2", "--seed", "3", "--batch-count", "2", output="b.png")
    alone, second = (Image.open(path.with_name(name)) for name in ("a.png", "b-2.png"))
    assert alone.tobytes() == second.tobytes()
    assert alone.tobytes() != Image.open(path.with_name("b-1.png")).tobytes()
    assert not path.exists()


def test_phases_and_the_comparison_are_written_beside_the_result(run):
    *_, path = run("one red ring", "--scale", "2.5", "--save-phases", "--compare")
    sizes = {p.name: Image.open(p).size for p in path.parent.glob("*.png")}
    assert sizes == {
        "out.png": (160, 160),
        "out-phase1.png": (64, 64),
        "out-phase2.png": (128, 128),
        "out-compare.png": (2 * 160 + 2, 2 * 160 + 2),
    }
    assert "DemoFusion scale: 2," in Image.open(path.with_name("out-phase2.png")).info["parameters"]
    assert "DemoFusion" not in Image.open(path.with_name("out-phase1.png")).info["parameters"]


def test_plan_prints_the_plan_and_stops(run):
    code, out, _, path = run("one red ring", "--plan", "--scale", "2", "--width", "96", "--cfg-scale", "1")
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:-1]] == [
        ["1", "96x64", "3", "1", "3"],
        ["2", "192x128", "3", "9", "+", "4", "39"],
        ["all", "42"],
    ]
    assert not path.exists()


def test_a_size_can_be_asked_for_instead_of_a_scale(run):
    code, out, _, _ = run("one red ring", "--plan", "--width", "96", "--size", "240x160")
    assert code == 0
    assert "240x160" in out


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_is_the_start(run, tmp_path, mode):
    Image.radial_gradient("L").convert(mode).resize((80, 64)).save(tmp_path / "in.jpg")
    code, _, err, path = run("--image", str(tmp_path / "in.jpg"), "--scale", "2")
    assert code == 0, err
    assert Image.open(path).size == (160, 128)


def test_ctrl_c_saves_the_last_finished_phase_and_says_so(run, monkeypatch):
    predict, seen = Fusion.predict, []

    def press(fusion, *args):
        seen.append(fusion.phase)
        if seen.count(3) == 2:
            signal.raise_signal(signal.SIGINT)
        return predict(fusion, *args)

    monkeypatch.setattr(Fusion, "predict", press)
    handler = signal.getsignal(signal.SIGINT)
    code, _, err, path = run("one red ring", "--scale", "3")
    assert code == 130
    assert err.splitlines()[-1] == f"demofusion: stopped; the last finished phase, 2 of 3, is in {path}"
    assert seen == [2, 2, 2, 3, 3]
    with Image.open(path) as image:
        assert image.size == (128, 128)
        assert "DemoFusion scale: 2," in image.info["parameters"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_the_plan_says_what_memory_it_takes_and_the_base_how_long_the_rest(run):
    code, out, _, _ = run("one red ring", "--scale", "4", "--plan")
    assert code == 0
    job, base = re.fullmatch(
        r"memory: about (\d+) MiB with 4 views a call, (\d+) MiB for the base image alone", out.splitlines()[-1]
    ).groups()
    assert int(job) > int(base) > 0
    _, _, err, _ = run("one red ring", "--scale", "3")
    assert re.search(r"to come: about \d+:\d\d \(phase 2 \d+:\d\d, phase 3 \d+:\d\d\)", err)


def small_card(monkeypatch, most, since):
    """From the since-th call of any UNet on, more than `most` views (two rows each) run out of memory."""
    forward, calls = UNet2DConditionModel.forward, []

    def small(unet, sample, *args, **kwargs):
        calls.append(len(sample))
        if len(sample) > 2 * most and len(calls) >= since:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")
        return forward(unet, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small)


@pytest.mark.parametrize("since", [4, 9, 15])  # three calls in the base, then three steps of four
@pytest.mark.parametrize("most", [3, 1])
def test_a_card_that_is_too_small_makes_the_same_picture(run, monkeypatch, most, since):
    *_, path = run("one red ring", "--scale", "2", output="roomy.png")
    small_card(monkeypatch, most, since)
    code, _, err, small = run("one red ring", "--scale", "2", output="small.png")
    assert code == 0
    assert "did not fit" not in err
    difference = ImageChops.difference(Image.open(path), Image.open(small))
    assert max(high for _, high in difference.getextrema()) <= 1


def test_a_number_that_did_not_fit_is_told(run, monkeypatch):
    small_card(monkeypatch, 3, 5)
    code, _, err, _ = run("one red ring", "--scale", "2", "--view-batch-size", "13")
    assert code == 0
    assert "a view batch size of 13 did not fit; 3 did" in err


def test_running_out_of_memory_saves_the_last_finished_phase_and_says_so(run, monkeypatch):
    small_card(monkeypatch, 0, 16)
    code, _, err, path = run("one red ring", "--scale", "3")
    assert code == 1
    line = "out of memory with one view at a time; a smaller base image or half precision needs less"
    assert err.splitlines()[-1] == f"demofusion: {line}; the last finished phase, 2 of 3, is in {path}"
    assert Image.open(path).size == (128, 128)


def test_a_phase_that_cannot_be_decoded_leaves_the_one_before(run, monkeypatch):
    decode = AutoencoderKL.decode

    def small(vae, z, *args, **kwargs):
        if z.shape[-1] > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")
        return decode(vae, z, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", small)
    code, _, err, path = run("one red ring", "--scale", "3")
    assert code == 1
    line = (
        "phase 3 cannot be decoded: out of memory in the autoencoder with tiles of 24 latent pixels; half precision needs less"
    )
    assert err.splitlines()[-1] == f"demofusion: {line}; the last finished phase, 2 of 3, is in {path}"
    assert Image.open(path).size == (128, 128)


# The command in a process of its own, whose model stops to answer in phase 3.
STUCK = """
import sys, time
from lib_demofusion.__main__ import main
from lib_demofusion.hosts import diffusers_run
answer = diffusers_run.Run._model
def stuck(self, phase, *rest):
    time.sleep(600 if phase.number == 3 else 0)
    return answer(self, phase, *rest)
diffusers_run.Run._model = stuck
main(sys.argv[1:])
"""


def assert_resumed(whole, resumed, phase):
    """The picture is that of the job that was left alone, and so is what it says of itself."""
    assert main(["--resume", str(phase), "--compare", "-o", str(resumed)]) == 0
    for a, b in ((whole, resumed), (suffixed(whole, "compare"), suffixed(resumed, "compare"))):
        with Image.open(a) as a, Image.open(b) as b:
            assert a.tobytes() == b.tobytes()
            assert a.info == b.info


def to_resume(sampler):
    return ["one red ring", "--negative-prompt", "star", "--scale", "3", "--seed", "5", "--sampler", sampler, "--stride", "0.4"]


def test_a_killed_job_goes_on_from_its_last_phase(run, model):
    """kill -9 in phase 3."""
    args = to_resume("Euler a")
    *_, whole = run(*args, "--compare", output="whole.png")
    killed = whole.with_name("killed.png")
    args += ["--model", model, "--steps", "3", "--device", "cpu", "--save-phases", "-o", str(killed)]
    process = subprocess.Popen([sys.executable, "-c", STUCK, *args], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not suffixed(killed, "phase2").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not killed.exists()
    assert_resumed(whole, killed, killed.with_name("killed-phase2.safetensors"))


def test_a_sampler_that_looks_back_goes_on_from_a_saved_phase(run):
    *_, whole = run(*to_resume("DPM++ 2M"), "--compare", "--save-phases", output="whole.png")
    assert_resumed(whole, whole.with_name("again.png"), whole.with_name("whole-phase2.safetensors"))


def test_each_image_of_several_can_be_resumed(run):
    *_, path = run("one red ring", "--scale", "2", "--seed", "3", "--batch-count", "2", "--save-phases")
    again = path.with_name("again.png")
    assert main(["--resume", str(path.with_name("out-2-phase1.safetensors")), "-o", str(again)]) == 0
    assert Image.open(again).tobytes() == Image.open(path.with_name("out-2.png")).tobytes()


def test_what_cannot_be_resumed(run, tmp_path, capsys):
    run("one red ring", "--scale", "2", "--save-phases")
    saved = tmp_path / "out-phase1.safetensors"
    other, text = tmp_path / "other.safetensors", tmp_path / "text.safetensors"
    save_file({"latents": torch.zeros(1)}, other)
    text.write_text("no")
    webuis = tmp_path / "webuis.safetensors"
    SavedPhase(1, torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), "WebUI").write(webuis)
    for args, says in [
        ([saved, "--seed", "4", "--scale", "3"], "--resume takes seed, scale from the file; leave that out"),
        ([saved, "a red ring"], "--resume takes prompt from the file; leave that out"),
        ([tmp_path / "gone.safetensors"], "no such file to resume from: "),
        ([text], "cannot be read: "),
        ([other], "is no saved phase; one lies beside each image of an intermediate phase"),
        ([webuis], "was made by the WebUI, whose noise the command cannot repeat; go on there"),
    ]:
        assert main(["--resume", *map(str, args), "-o", str(tmp_path / "again.png")]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert not (tmp_path / "again.png").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ring", "--width", "100"], "width must be divisible by 8, got 100; 96 is near"),
        (["ring", "--height", "4"], "height must be at least 8, got 4"),
        (["ring", "--scale", "0"], "scale must be above 1 and at most 8, got 0"),
        (["ring", "--scale", "four"], "argument --scale: invalid float value: 'four'"),
        (["ring", "--size", "200x160"], "a base of 64x64 cannot become 200x160, but 160x160"),
        (["ring", "--size", "200"], "argument --size: must be like 1024x768, got 200"),
        (["ring", "--size", "128x128", "--scale", "3"], "give --size or --scale, not both"),
        (["ring", "--size", "64x64"], "scale must be above 1"),
        (["ring", "--stride", "60"], "stride must be above 0 and at most 1, got 60"),
        (["ring", "--preset", "slow"], "no preset called 'slow'; there are: Paper, Fast, Faithful, Turbo, Few-step"),
        (["red " * 100], "the prompt is too long: 100 tokens, 75 at most"),
        (["ring", "--negative-prompt", "red " * 100], "the negative prompt is too long"),
        (["ring", "--sampler", "Euler b"], "no sampler called 'Euler b'"),
        (["ring", "--cfg-scale", "0"], "CFG scale must be at least 1"),
        (["ring", "--batch-count", "0"], "batch count must be at least 1, got 0"),
        (["ring", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["ring", "--image", "/nowhere/in.png"], "no such image: /nowhere/in.png"),
        (["ring", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["ring", "--device", "warp"], "device warp is not available here"),
        (["ring", "--cfg-scale", "inf"], "CFG scale must be at least 1"),
        (["ring", "--scale", "nan"], "scale must be above 1 and at most 8, got nan"),
        (["ring", "--scale", "-inf"], "scale must be above 1 and at most 8, got -inf"),
        (["ring", "--scale", "1e999"], "scale must be above 1 and at most 8, got inf"),
        (["ring", "--size", "0x0"], "scale must be above 1"),
        (["ring", "--size", "9" * 400 + "x8"], "argument --size: must be like 1024x768"),
        (["ring", "--size", "２x２"], "argument --size: must be like 1024x768"),
        (["ring", "--seed", "9" * 400], "seed is too large; use one below"),
        (["ring", "--seed", str(2**63 - 1), "--batch-count", "2"], "the last image's seed is too large"),
        (["ring", "--batch-count", "9" * 400], "batch count is too large"),
        (["ring", "--width", "8" + "0" * 400], "width is too large"),
        (["ring", "--phase-steps", "9" * 400], "phase steps must be from 0 to 1000"),
        (["ring", "--model", ""], "the model has no name"),
        (["ring", "--negative-prompt"], "argument --negative-prompt: expected one argument"),
        (["ring", "--negative-prompt", "--seed", "4"], "argument --negative-prompt: expected one argument"),
        (["-ring"], r"unrecognized arguments: -ring \(a prompt that begins with a dash goes last, after --\)"),
        (["caf\udce9"], "the prompt is not valid UTF-8 at character 4"),
        (["ring", "--negative-prompt", "\udc80"], "the negative prompt is not valid UTF-8 at character 1"),
        (["ring\0"], "the prompt has a control character"),
        (["a (red:1.2) ring"], r"the prompt has '\(red:1.2\)', which only the WebUI understands"),
        (["ring", "--negative-prompt", "<lora:x:1>"], "the negative prompt has '<lora:x:1>', which only the WebUI understands"),
        (["ring", "--steps", "1001"], "steps"),
        (["ring\nNegative prompt: star"], 'the prompt has a line that begins with "Negative prompt:"'),
        ([" \n\t"], "say what the image shows, or give --image"),
        ([], "say what the image shows, or give --image"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(run, args, says):
    code, _, err, path = run(*args)
    refused(code, err, says, path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_refused(model, tmp_path, capsys):
    path = tmp_path / "out.png"
    code = main(["ring", "--device", "cuda", "--model", model, "-o", str(path)])
    refused(code, capsys.readouterr().err, "device cuda is not available here; cpu is", path)


@pytest.mark.parametrize(
    ("name", "save", "says"),
    [
        ("cmyk.jpg", lambda path: Image.new("CMYK", (64, 64)).save(path), "is CMYK; save it as plain RGB first"),
        ("alpha.png", lambda path: Image.new("RGBA", (64, 64)).save(path), "has transparency; put it on a background first"),
        ("text.png", lambda path: path.write_text("no image"), "cannot be read as an image"),
        ("cut.png", lambda path: path.write_bytes(png()[:200]), "cannot be read as an image"),
        (
            "deep.png",
            lambda path: Image.new("I;16", (64, 64)).save(path),
            r"is I(;16)?, more than 8 bits a channel; save it as",
        ),
        (
            "small.png",
            lambda path: Image.new("RGB", (16, 16)).save(path),
            "64x64 is no larger than what .*; scale 5.25 is the sm",
        ),
        ("folder.png", lambda path: path.mkdir(), "cannot be read: it is a folder"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(run, tmp_path, name, save, says):
    save(tmp_path / name)
    code, _, err, path = run("ring", "--image", str(tmp_path / name))
    refused(code, err, says, path)


def png():
    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("missing/out.png", "output folder .*missing does not exist"),
        ("out.jpg", "the output must be a .png file"),
        ("a" * 252 + ".png", "cannot be written: File name too long"),
        ("a" * 250 + ".png", "a-1.png cannot be written: File name too long"),
        ("a" * 240 + ".png", "a-1-phase1.safetensors cannot be written: File name too long"),
        ("a" * 241 + ".png", "a-1-compare.png cannot be written: File name too long|a-1-phase1"),
        ("a\0.png", "cannot be written: embedded null"),
        ("/sys/out.png", "/sys/out.png cannot be written|-1.png cannot be written: "),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(run, output, says):
    more = [] if output.startswith(("missing", "out")) else ["--batch-count", "2", "--save-phases", "--compare"]
    code, _, err, path = run("ring", "--model", "/nowhere", *more, output=output)
    refused(code, err, says, path if "\0" not in output else path.with_name("a.png"))


def test_a_plan_needs_no_place(run):
    code, _, err, _ = run("one red ring", "--plan", output="missing/out.png")
    assert code == 0, err


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, capsys):
    for name, says in (("x.safetensors", "no such checkpoint"), ("./x/y", "no such checkpoint")):
        code = main(["ring", "--model", str(tmp_path / name), "-o", str(tmp_path / "out.png")])
        refused(code, capsys.readouterr().err, says, tmp_path / "out.png")


def test_words_that_the_embedded_checkpoint_does_not_know_are_named(tmp_path, capsys):
    code = main(["a cat on grass", "-o", str(tmp_path / "out.png")])
    refused(code, capsys.readouterr().err, "does not know a, cat; it knows: .*striped", tmp_path / "out.png")


def test_no_half_written_file_is_left(run, monkeypatch, tmp_path):
    def fail(self, file, *args, **kwargs):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err, path = run("one red ring", "--scale", "2")
    assert code == 1
    assert err.splitlines()[-1] == f"demofusion: {path} cannot be written: No space left on device; nothing could be written"
    assert not list(path.parent.iterdir())


def test_the_package_runs_as_a_module(tmp_path):
    """In a process of its own: nothing but one line on stderr, and the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "lib_demofusion", "ring", "--scale", "9"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "demofusion: scale must be above 1 and at most 8, got 9\n"


def test_the_picture_is_the_same_however_the_views_are_batched(run):
    """To a grey level: sums in another order round differently."""
    from PIL import ImageChops

    run("one red ring", "--scale", "2", "--view-batch-size", "1", output="a.png")
    *_, path = run("one red ring", "--scale", "2", "--view-batch-size", "0", output="b.png")
    a, b = (Image.open(path.with_name(name)) for name in ("a.png", "b.png"))
    assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 1


# --------------------------------------------------------------------------------------------------- files that are resumed


def settings(**changed):
    """The settings in a saved phase of the command's."""
    own = dict(prompt="one red ring", negative_prompt="", model="/nowhere/model", image=None, size=None, width=64, height=64)
    own.update(mask=None, mask_blur=4)
    own.update({f"control_{name}": [] for name in ("image", "type", "scale", "start", "end")}, controlnet=[])
    own.update(steps=3, cfg_scale=7.5, sampler="Euler", seed=0, batch_count=1, dtype="float32", preset="Paper", scale=3.0)
    own.update(schedule="", lora=[], phase_lora=[])
    method = {f.name: f.default for f in METHOD if f.name not in ("scale", "view_batch_size")}
    made = {**own, **method, **changed}
    return {name: value for name, value in made.items() if value is not LEFT_OUT}


LEFT_OUT = object()


def saved_phase(path, text, latents=(1, 4, 16, 16), base=(1, 4, 8, 8), number=2):
    generators = torch.stack([torch.Generator().get_state()] * base[0])
    SavedPhase(number, torch.zeros(latents), torch.zeros(base), "command", generators, text).write(path)
    return path


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        *(({name: LEFT_OUT}, f"its settings lack {name}") for name in ("prompt", "model", "scale", "seed", "alpha1", "dtype")),
        (dict(extra=1), "its settings have extra, which this version does not know"),
        (dict(view_batch_size=4), "its settings have view_batch_size"),
        *(
            ({name: value}, f"its {name.replace('_', ' ')} is .*, of the wrong type|window must be a whole number")
            for name, value in [
                ("prompt", None),
                ("prompt", 3),
                ("negative_prompt", ["a"]),
                ("model", 4),
                ("image", 3),
                ("mask", "a.png"),
                ("mask_blur", None),
                ("window", "64"),
                ("size", [64, 64]),
                ("width", "64"),
                ("width", 64.0),
                ("height", None),
                ("steps", True),
                ("seed", "0"),
                ("cfg_scale", "7"),
                ("cfg_scale", False),
                ("sampler", None),
                ("dtype", 16),
                ("preset", None),
                ("batch_count", 1.5),
                ("controlnet", "canny"),
                ("control_image", None),
                ("schedule", None),
                ("lora", "x.safetensors"),
                ("phase_lora", None),
            ]
        ),
        (dict(lora=["x.safetensors"]), "its lora has 'x.safetensors', which is no file with a weight"),
        (
            dict(phase_lora=[["x.safetensors", "1"]]),
            r"its phase lora has .*, '1'\], which is no file with a weight",
        ),
        (dict(lora=[["x.safetensors", True]]), "its lora has .*, which is no file with a weight"),
        (dict(lora=[["/nowhere/x.safetensors", 1]]), "no such LoRA: /nowhere/x.safetensors"),
        (dict(resize_width=64), "its settings have resize_width, which this version does not know"),
        (dict(phase_prompt=3), "phase prompt must be a text, got 3"),
        (dict(phase_cfg_scale="1"), "phase CFG scale must be a number, got '1'"),
        (dict(phase_sampler="Euler b"), "no sampler called 'Euler b'"),
        (dict(schedule="Cosine"), "no schedule called 'Cosine'"),
        (dict(phase_schedule="Cosine"), "no schedule called 'Cosine'"),
        (dict(upscaler="ESRGAN"), "no upscaler called 'ESRGAN'"),
        (dict(phase_prompt="a\0"), "the phase prompt has a control character"),
        (dict(phase_negative_prompt="<lora:x:1>"), "the phase negative prompt has '<lora:x:1>'"),
        (dict(controlnet=[3]), "its controlnet has 3, of the wrong type"),
        (dict(controlnet=["a/b"], control_image=[None]), "its control image has None, of the wrong type"),
        (dict(controlnet=["a/b"], control_scale=["1"]), "its control scale has '1', of the wrong type"),
        (dict(controlnet=["a/b"], control_end=[True]), "its control end has True, of the wrong type"),
        (
            dict(controlnet=["a/b"], control_start=[2]),
            "control start and end must be from 0 to 1, the start first, got 2 and 1",
        ),
        (dict(control_type=["depth"]), "--control-type is of a ControlNet; give --controlnet too"),
        (dict(controlnet=["a/b"], control_image=["/nowhere.png"]), "no such control image: /nowhere.png"),
        (dict(controlnet=["a/b"]), "--controlnet needs a --control-image, or an --image to enlarge, which it then takes"),
        (dict(image="a.png"), "its width is 64, of the wrong type"),
        (dict(window=9999), "window must be from 0 to 4096, got 9999"),
        (dict(mask_blur=5), "--mask-blur is of a mask; give --mask too"),
        (dict(width=7), "width must be at least 8, got 7|is no image of 7x64"),
        (dict(height=0), "height must be at least 8, got 0"),
        (dict(width=72), "its base is 8x8 latent pixels, which is no image of 72x64"),
        (dict(width=65, height=65), "which is no image of 65x65"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(steps=10**400), "steps is too large"),
        (dict(seed=-1), "seed must be at least 0, got -1"),
        (dict(seed=2**63), "seed is too large"),
        (dict(batch_count=2), "its batch count is 2, and a saved phase is of one image"),
        (dict(cfg_scale=0.5), "CFG scale must be at least 1, got 0.5"),
        (dict(cfg_scale=float("nan")), "its settings are no JSON: NaN is no number"),
        (dict(alpha1=float("inf")), "its settings are no JSON: Infinity is no number"),
        (dict(sampler="Euler b"), "no sampler called 'Euler b'"),
        (dict(dtype="int8"), "its dtype is 'int8'; float32, float16, bfloat16 are known"),
        (dict(preset="Slow"), "no preset called 'Slow'"),
        (dict(scale=None), "scale must be a number, got None"),
        (dict(scale="3"), "scale must be a number, got '3'"),
        (dict(scale=9), "scale must be above 1 and at most 8, got 9"),
        (dict(scale=2), "phase 2 is saved, and scale 2 has none after it"),
        (dict(phase_steps=1.5), "phase steps must be a whole number, got 1.5"),
        (dict(jitter=1), "jitter must be true or false, got 1"),
        (dict(hold_flat=True), "hold flat must be a number, got True"),
        (dict(stride=0), "stride must be above 0"),
        (dict(doubling=LEFT_OUT, stride=32), "its stride is 32 latent pixels, as version 0.3 had it"),
        (dict(prompt="\ud800"), "the prompt is not valid UTF-8"),
        (dict(negative_prompt="a\0"), "the negative prompt has a control character"),
        (dict(model=""), "the model has no name"),
        (dict(model=None), "the embedded checkpoint does not know|its latents have"),
    ],
)
def test_settings_that_no_job_has_are_refused_before_the_model_is_loaded(tmp_path, capsys, changed, says):
    if "model" in changed and changed["model"] is None:
        changed = {**changed, "prompt": "one red zebra"}
    path = saved_phase(tmp_path / "x.safetensors", json.dumps(settings(**changed)))
    code = main(["--resume", str(path), "-o", str(tmp_path / "out.png")])
    err = capsys.readouterr().err
    refused(code, err, says, tmp_path / "out.png")
    assert err.startswith(f"demofusion: {path} cannot be resumed: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its settings are no JSON"),
        ("{", "its settings are no JSON"),
        ("[1]", "its settings are no JSON object, but list"),
        ("null", "its settings are no JSON object"),
        ('{"prompt": "a", "prompt": "b"}', "its settings are no JSON: 'prompt' is there twice"),
        ("[" * 100_000, "its settings are no JSON: it is nested too deeply"),
        ("9" * 10_000, "its settings are no JSON"),
    ],
)
def test_settings_that_say_nothing_are_refused(tmp_path, capsys, text, says):
    path = saved_phase(tmp_path / "x.safetensors", text)
    refused(main(["--resume", str(path), "-o", str(tmp_path / "out.png")]), capsys.readouterr().err, says, tmp_path / "out.png")


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (dict(latents=(2, 4, 16, 16), base=(2, 4, 8, 8)), "it holds 2 images, and the command goes on with one"),
        (dict(latents=(1, 4, 14, 14)), "its latents are 14x14, and phase 2 is 2 times its base of 8x8"),
        (dict(latents=(1, 4, 20, 20), number=3), "phase 3 is saved, and scale 3 has none after it"),
        (dict(latents=(1, 3, 16, 16), base=(1, 3, 8, 8)), "its latents have 3 channels, and the checkpoint takes 4"),
    ],
)
@pytest.mark.parametrize("embedded", [True, False])
def test_latents_that_the_settings_do_not_make_are_refused(tmp_path, capsys, model, shapes, says, embedded):
    text = json.dumps(settings(model=None if embedded else model))
    path = saved_phase(tmp_path / "x.safetensors", text, **shapes)
    refused(main(["--resume", str(path), "-o", str(tmp_path / "out.png")]), capsys.readouterr().err, says, tmp_path / "out.png")


def test_files_of_older_versions_are_resumed(tmp_path):
    young = ("preset", "doubling", "denoising_strength", "pixel_upsampling", "feather", "hold_flat", "hold_steps")
    young += ("window", "mask", "mask_blur", *(name for name in settings() if name.startswith("control")))
    young += ("schedule", "lora", "phase_lora", "most_phase_steps", "phase_sampler", "phase_schedule", "phase_cfg_scale")
    young += ("phase_prompt", "phase_negative_prompt", "phase_checkpoint", "upscaler", "unguided_flat")
    text = json.dumps(settings(**dict.fromkeys(young, LEFT_OUT), stride=0, alpha1=2))
    argv = ["--resume", str(saved_phase(tmp_path / "x.safetensors", text)), "--view-batch-size", "3"]
    args, saved = resumed(parse(argv), argv)
    config = DemoFusionConfig(**{f.name: getattr(args, f.name) for f in METHOD})
    assert (args.schedule, args.lora, args.phase_lora) == ("", [], [])
    assert config == DemoFusionConfig(scale=3.0, alpha1=2, view_batch_size=3, hold_steps=0)
    assert (saved.number, args.prompt, args.seed, args.model) == (2, "one red ring", 0, "/nowhere/model")


# --------------------------------------------------------------------------------------- what begins with a dash is a value


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["a", "--negative-prompt", "-x"], dict(prompt="a", negative_prompt="-x")),
        (["a", "--negative-prompt", "--x"], dict(negative_prompt="--x")),
        (["a", "--negative-prompt=-x"], dict(negative_prompt="-x")),
        (["a", "--negative-prompt", "-o x"], dict(negative_prompt="-o x", output=Path("out.png"))),
        (["a", "--neg", "-x"], dict(negative_prompt="-x")),
        (["a", "--negative-prompt", "-"], dict(negative_prompt="-")),
        (["a", "--negative-prompt", ""], dict(negative_prompt="")),
        (["a", "-o", "-x.png"], dict(output=Path("-x.png"))),
        (["a", "-o-x.png"], dict(output=Path("-x.png"))),
        (["a", "-o", "-a=b.png"], dict(output=Path("-a=b.png"))),
        (["--seed", "4", "--", "-a"], dict(prompt="-a", seed=4)),
        (["-a b"], dict(prompt="-a b")),
        (["a", "--seed", "-1"], dict(seed=-1)),
        (["a", "--no-jitter", "--plan"], dict(prompt="a", jitter=False, plan=True)),
        (["a", "--model", "-m", "--compare"], dict(model="-m", compare=True)),
    ],
)
def test_a_value_may_begin_with_a_dash(argv, wanted):
    args = vars(parse(argv))
    assert {name: args[name] for name in wanted} == wanted


# ------------------------------------------------------------------------------------------------ what is finished is written


def test_a_folder_that_is_gone_at_the_end_costs_nothing(run, tmp_path, monkeypatch):
    """The picture goes to the home folder, so do the phases that are asked for, and the user is told where."""
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir(), folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    predict = Fusion.predict

    def remove(fusion, *args):
        if folder.exists():
            shutil.rmtree(folder)
        return predict(fusion, *args)

    monkeypatch.setattr(Fusion, "predict", remove)
    code, _, err, path = run("one red ring", "--scale", "3", "--save-phases", "--batch-count", "2", output="folder/out.png")
    assert code == 1
    place = re.search(r"; the picture is in (.*)$", err.splitlines()[-1])[1]
    missing = folder / "out-1.png"
    assert (
        err.splitlines()[-1] == f"demofusion: {missing} cannot be written: No such file or directory; the picture is in {place}"
    )
    with Image.open(place) as image:
        assert image.size == (192, 192)
        assert "Seed: 0," in image.info["parameters"]
    told = re.findall(r"(\S+) cannot be written: No such file or directory; it is in (\S+)", err)
    assert [Path(asked).name for asked, _ in told] == ["out-1-phase2.safetensors", "out-1-phase2.png"]
    assert {Path(place), *(Path(there) for _, there in told)} == set(home.iterdir())


@pytest.mark.parametrize("name", ["comparison", "infotext", "settings_to_resume"])
@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ValueError("no\nway")])
def test_whatever_is_raised_the_picture_is_written(run, monkeypatch, name, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(job, name, fail)
    code, _, err, path = run("one red ring", "--scale", "1.5", "--save-phases", "--compare")
    assert code == 1
    assert Image.open(path).size == (96, 96)
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("demofusion: ")


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), TypeError("no\nway"), OSError(5, "Input/output error")])
def test_what_the_decoder_raises_leaves_the_phase_before(run, monkeypatch, error):
    decode = AutoencoderKL.decode

    def fail(vae, z, *args, **kwargs):
        if z.shape[-1] > 8:
            raise error
        return decode(vae, z, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", fail)
    code, _, err, path = run("one red ring", "--scale", "1.5")
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("demofusion: phase 2 cannot be decoded: ")
    assert last.endswith(f"; the last finished phase, 1 of 2, is in {path}")
    assert Image.open(path).size == (64, 64)


def test_a_base_that_cannot_be_decoded_is_one_line(run, monkeypatch):
    def fail(vae, z, *args, **kwargs):
        raise KeyError("x")

    monkeypatch.setattr(AutoencoderKL, "decode", fail)
    code, _, err, path = run("one red ring", "--scale", "1.5")
    assert code == 1
    assert err.splitlines()[-1] == "demofusion: phase 2 cannot be decoded: KeyError: 'x'; nothing could be written"
    assert not path.exists()


class Broken(TextIOWrapper):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("kind", ["ascii", "broken", "closed", "none"])
def test_a_console_that_cannot_show_it_ends_no_batch(model, tmp_path, monkeypatch, kind):
    for name in ("stdout", "stderr"):
        stream = None if kind == "none" else (Broken if kind == "broken" else TextIOWrapper)(BytesIO(), "ascii")
        if kind == "closed":
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    output = tmp_path / "日本.png"
    args = ["--model", model, "--steps", "1", "--scale", "1.5", "--device", "cpu", "--batch-count", "2", "-o", str(output)]
    code = main(["one red ring", *args])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["日本-1.png", "日本-2.png"]
    assert code == 0
    if kind == "ascii":
        sys.stdout.flush()
        assert rb"\u65e5\u672c-2.png: " in sys.stdout.buffer.getvalue()


def test_where_an_error_came_from_can_be_asked_for(run, monkeypatch):
    monkeypatch.setenv("DEMOFUSION_TRACEBACK", "1")
    code, _, err, _ = run("ring", "--scale", "9")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == "demofusion: scale must be above 1 and at most 8, got 9"


def test_a_full_disk_is_told_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr("lib_demofusion.__main__.free_space", lambda path: 10_000)
    monkeypatch.setattr(Fusion, "predict", None)
    code, _, err, path = run("one red ring", "--scale", "2")
    refused(code, err, "out.png may not fit: .* are free there, and the picture takes up to .*; make room", path)


def test_the_record_holds_odd_names_and_the_link_stays(run, model, tmp_path):
    """A model whose folder's name would be read as settings, a prompt of several lines, a link of bytes that are no UTF-8."""
    (tmp_path / "real.png").write_bytes(b"old")
    link = tmp_path / os.fsdecode(b"caf\xe9.png")
    link.symlink_to("real.png")
    folder = tmp_path / "a, Seed: 9, b-1.0"
    folder.symlink_to(model)
    prompt = "one red ring (big)\nSteps: 1, Sampler: x, Seed: 9"
    code, out, err, path = run(prompt, "--model", str(folder), "--negative-prompt", "-x", "--scale", "1.5", output=link.name)
    assert code == 0, err
    assert link.is_symlink()
    with Image.open(tmp_path / "real.png") as image:
        assert image.info["parameters"] == (
            "one red ring \\(big\\)\nSteps: 1, Sampler: x, Seed: 9\nNegative prompt: -x\n"
            "Steps: 3, Sampler: Euler, CFG scale: 7.5, Seed: 0, Size: 64x64, "
            f'Model: "a, Seed: 9, b-1.0", DemoFusion scale: 1.5, DemoFusion hold steps: 50, Version: demofusion {__version__}'
        )


def test_help_says_what_the_exit_codes_are(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit code: 0 done, 1 failed on the way, 2 wrong input, 130 stopped by Ctrl-C." in text


BROKEN_CONSOLE = """
import sys, threading, time, tqdm
from lib_demofusion.job import Console
if {watched}:
    tqdm.tqdm.monitor_interval = 0.01
    list(tqdm.tqdm(range(2), file=sys.stdout))
class Stream:
    gone = False
    def write(self, text):
        if self.gone:
            raise OSError("gone")
    flush = isatty = lambda self: False
sys.stderr = Stream()
with Console(4, 0) as console:
    Stream.gone = True
    for _ in range(4):
        console.advance("phase 1", 1)
        console.say("a line")
    time.sleep(0.2)
assert threading.active_count() == 1 + {watched}
"""


@pytest.mark.parametrize("watched", [False, True])
def test_a_console_that_has_failed_lets_the_program_end(watched):
    """Also where another library's bar has started tqdm's thread, which waits for the lock that all bars share."""
    code, root = BROKEN_CONSOLE.format(watched=watched), Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- a picture that is given


def photo(size=(80, 64)):
    return Image.merge("RGB", [Image.radial_gradient("L").resize(size).rotate(90 * turn) for turn in range(3)])


@pytest.fixture
def given(run, tmp_path):
    """Runs the command with a picture of 80x64 that is to be 240x192, in phases of 2 and 3 windows, and maybe with a mask."""

    def given(*args, picture=None, mask=None, scale="3", **more):
        (picture or photo()).save(tmp_path / "in.png")
        args = ["--image", str(tmp_path / "in.png"), *args]
        if mask is not None:
            mask.save(tmp_path / "mask.png")
            args += ["--mask", str(tmp_path / "mask.png")]
        return run(*args, *(["--scale", scale] if scale else []), **more)

    return given


def spot(size=(80, 64), grey=255):
    mask = Image.new("L", size)
    mask.paste(grey, (24, 24, 48, 48))
    return mask


FAR = (190, 0, 240, 192)  # of the result of 240x192; nothing of the mask, however blurred, is there


def read(path):
    """A picture, and the settings of its parameters, by name."""
    with Image.open(path) as image:
        image.load()
        text = image.info.get("parameters")
    return image, dict(pair.split(": ", 1) for pair in text.splitlines()[-1].split(", ")) if text else None


def test_a_given_pictures_plan_has_its_window_and_its_phases(given):
    code, out, _, path = given("--plan", "--cfg-scale", "1")
    assert code == 0
    assert [line.split() for line in out.splitlines()[:-1]] == [
        ["window:", "80x64"],
        ["phase", "image", "steps", "views", "a", "step", "model", "calls"],
        ["2", "160x128", "3", "9", "+", "4", "39"],
        ["3", "240x192", "3", "25", "+", "9", "102"],
        ["all", "141"],
    ]
    assert re.fullmatch(r"memory: about \d+ MiB with 4 views a call, \d+ MiB for one window alone", out.splitlines()[-1])
    assert not path.exists()
    _, out, _, _ = given("--plan", "--window", "40")
    assert out.splitlines()[0] == "window: 48x40"


def test_a_given_picture_is_enlarged_and_says_so(given):
    code, out, err, path = given("one red ring", "--cfg-scale", "1", "--seed", "7", "--window", "64")
    assert code == 0, err
    assert out == f"{path}: 141 model calls\n"
    assert "141/141" in err
    image, values = read(path)
    assert image.size == (240, 192)
    assert list(values.items()) == [
        *{"Steps": "3", "Sampler": "Euler", "CFG scale": "1", "Seed": "7", "Size": "80x64", "Model": "tiny-sd15"}.items(),
        *{"DemoFusion scale": "3", "DemoFusion hold steps": "50", "DemoFusion window": "64"}.items(),
        ("DemoFusion start", "Picture 80x64"),
        ("Version", f"demofusion {__version__}"),
    ]
    assert DemoFusionConfig.from_infotext(values) == DemoFusionConfig(scale=3.0, window=64)
    assert not any("upscale" in name.lower() for name in values)


def test_around_a_mask_the_picture_is_the_given_one_enlarged(given):
    code, _, err, path = given(mask=spot())
    assert code == 0, err
    image, values = read(path)
    enlarged = photo().resize((240, 192), Image.Resampling.LANCZOS)
    assert ImageChops.difference(image.crop(FAR), enlarged.crop(FAR)).getbbox() is None
    assert min(high for _, high in ImageChops.difference(image, enlarged).getextrema()) > 50
    assert (values["Mask blur"], values["DemoFusion start"]) == ("4", "Picture 80x64")
    *_, sharp = given("--mask-blur", "0", mask=spot(), output="sharp.png")
    changed = ImageChops.difference(read(sharp)[0], enlarged).getbbox()
    assert changed == (71, 71, 145, 145), "the mask's white, and the pixel that is blended with its neighbour"
    assert read(sharp)[1]["Mask blur"] == "0"


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_mask_fits_the_picture_as_it_is_shown(given, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo((64, 80) if orientation == 6 else (80, 64)).save(tmp_path / "turned.jpg", exif=exif)
    spot().save(tmp_path / "spot.png")
    args = ["--image", str(tmp_path / "turned.jpg"), "--mask", str(tmp_path / "spot.png")]
    code, out, err, _ = given("--plan", *args)
    assert code == 0, err
    assert "240x192" in out


def test_the_comparison_has_the_given_picture_on_its_left(given):
    *_, path = given("--compare", scale="2")
    with Image.open(path.with_name("out-compare.png")) as sheet:
        left = sheet.crop((0, 0, 160, 128))
    assert left.tobytes() == photo().resize((160, 128), Image.Resampling.LANCZOS).tobytes()


@pytest.mark.parametrize(("size", "scale"), [("160x128", "2"), ("216x176", f"{math.sqrt(216 * 176 / 80 / 64):.12g}")])
def test_a_given_picture_has_the_size_that_is_asked_for(given, size, scale):
    code, _, err, path = given("--size", size, scale=None)
    assert code == 0, err
    image, values = read(path)
    assert "{}x{}".format(*image.size) == size
    assert (values["Size"], values["DemoFusion scale"]) == ("80x64", scale)


def test_a_picture_whose_sides_no_factor_divides_is_enlarged(given):
    code, _, err, path = given(picture=photo((83, 61)), mask=spot((83, 61)), scale="2.3")
    assert code == 0, err
    image, values = read(path)
    assert image.size == (192, 144)
    assert (values["Size"], values["DemoFusion scale"]) == ("83x61", "2.3")


@pytest.mark.parametrize("size", [(200, 50), (50, 200)])
def test_a_picture_may_be_four_times_as_long_as_it_is_wide(given, size):
    code, _, err, path = given("--steps", "1", picture=photo(size), scale="2")
    assert code == 0, err
    assert read(path)[0].size == tuple(104 if side == 50 else 400 for side in size)


def interrupt(monkeypatch, phase):
    """Ctrl-C at the second step of a phase."""
    predict, seen = Fusion.predict, []

    def press(fusion, *args):
        seen.append(fusion.phase)
        if seen.count(phase) == 2:
            signal.raise_signal(signal.SIGINT)
        return predict(fusion, *args)

    monkeypatch.setattr(Fusion, "predict", press)


@pytest.mark.parametrize("masked", [False, True])
def test_ctrl_c_before_a_phase_is_finished_leaves_the_picture_as_it_was_given(given, monkeypatch, masked):
    interrupt(monkeypatch, 2)
    code, _, err, path = given("--save-phases", "--compare", mask=spot() if masked else None)
    assert code == 130
    line = f"demofusion: stopped; no phase was finished; the picture as it was given is in {path}"
    assert err.splitlines()[-1] == line
    image, values = read(path)
    assert image.tobytes() == photo().tobytes()
    assert values is None, "nothing of it was made"
    assert [p.name for p in path.parent.glob("out*")] == ["out.png"]


@pytest.mark.parametrize("masked", [False, True])
def test_ctrl_c_leaves_the_last_finished_phase_of_a_given_picture(given, monkeypatch, masked):
    interrupt(monkeypatch, 3)
    code, _, err, path = given(mask=spot() if masked else None)
    assert code == 130
    assert err.splitlines()[-1] == f"demofusion: stopped; the last finished phase, 2 of 3, is in {path}"
    image, values = read(path)
    assert image.size == (160, 128)
    assert (values["Size"], values["DemoFusion scale"]) == ("80x64", "2")
    enlarged, far = photo().resize((160, 128), Image.Resampling.LANCZOS), (127, 0, 160, 128)
    assert (ImageChops.difference(image.crop(far), enlarged.crop(far)).getbbox() is None) == masked


@pytest.mark.parametrize("where", ["encode", "decode"])
def test_whatever_fails_the_given_picture_is_not_lost(given, monkeypatch, where):
    def fail(vae, *args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(AutoencoderKL, where, fail)
    code, _, err, path = given(scale="2")
    assert code == 1
    assert re.match("demofusion: (phase 2 cannot be decoded: )?out of memory in the autoencoder", err.splitlines()[-1])
    assert err.splitlines()[-1].endswith(f"; no phase was finished; the picture as it was given is in {path}")
    assert read(path)[0].tobytes() == photo().tobytes()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [[], ["--size", "216x176"]])
def test_a_job_from_an_image_goes_on_with_the_image(given, tmp_path, capsys, monkeypatch, masked, size):
    monkeypatch.chdir(tmp_path)
    *_, path = given("--save-phases", "--compare", *size, mask=spot() if masked else None, scale=None if size else "3")
    assert sorted(p.name for p in tmp_path.glob("out-phase*")) == ["out-phase2.png", "out-phase2.safetensors"]
    again, saved = tmp_path / "again.png", str(tmp_path / "out-phase2.safetensors")
    monkeypatch.chdir("/")
    assert main(["--resume", saved, "-o", str(again), "--compare"]) == 0
    for name in ("{}.png", "{}-compare.png"):
        a, b = (Image.open(tmp_path / name.format(stem)) for stem in ("out", "again"))
        assert a.tobytes() == b.tobytes()
        assert a.info == b.info


def test_a_job_from_an_image_that_is_gone_or_another_one_does_not_go_on(given, tmp_path, capsys):
    given("--save-phases", mask=spot())
    again, saved = tmp_path / "again.png", tmp_path / "out-phase2.safetensors"

    def line(*args):
        capsys.readouterr()
        code = main(["--resume", str(saved), "-o", str(again), *args])
        err = capsys.readouterr().err
        refused(code, err, f"^demofusion: {saved} cannot be resumed: ", again)
        return err.partition(" cannot be resumed: ")[2].strip()

    ImageOps.invert(photo()).save(tmp_path / "in.png")
    assert line() == "the saved phase is of another picture; give the one that it was made from, as it was"
    photo((88, 64)).save(tmp_path / "in.png")
    assert line().startswith("the mask is 80x64 and the image 88x64")
    photo().save(tmp_path / "in.png")
    (tmp_path / "mask.png").unlink()
    assert line() == f"no such mask: {tmp_path / 'mask.png'}"
    (tmp_path / "in.png").unlink()
    assert line() == f"no such image: {tmp_path / 'in.png'}"
    for more in (["--mask", "x.png"], ["--image", "x.png"], ["--mask-blur", "3"], ["--size", "64x64"], ["--window", "64"]):
        assert main(["--resume", str(saved), "-o", str(again), *more]) == 2
        assert f"--resume takes {more[0][2:].replace('-', ' ')} from the file; leave that out" in capsys.readouterr().err


def of_an_image(**changed):
    return settings(**{**dict(image="/nowhere/in.png", width=None, height=None), **changed})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "no such image: /nowhere/in.png"),
        (dict(mask=3), "its mask is 3, of the wrong type"),
        (dict(size="64x64"), "its size is '64x64', of the wrong type"),
        (dict(mask_blur=2.5), "its mask blur is 2.5, of the wrong type"),
        (dict(image="/nowhere/\0"), "cannot be read: embedded null"),
        (dict(image="\udc80"), "no such image"),
        (dict(height=64), "its height is 64, of the wrong type"),
    ],
)
def test_settings_that_no_job_from_an_image_has_are_refused(tmp_path, capsys, changed, says):
    path = tmp_path / "x.safetensors"
    generators, text = torch.stack([torch.Generator().get_state()]), json.dumps(of_an_image(**changed))
    SavedPhase(2, torch.zeros(1, 4, 16, 20), torch.zeros(1, 4, 8, 10), "command", generators, text, True).write(path)
    code = main(["--resume", str(path), "-o", str(tmp_path / "out.png")])
    err = capsys.readouterr().err
    refused(code, err, says, tmp_path / "out.png")
    assert err.startswith(f"demofusion: {path} cannot be resumed: ")


@pytest.mark.parametrize("from_picture", [False, True])
def test_a_phase_and_settings_of_two_kinds_of_jobs_are_refused(tmp_path, capsys, from_picture):
    path = tmp_path / "x.safetensors"
    generators, text = torch.stack([torch.Generator().get_state()]), json.dumps(settings() if from_picture else of_an_image())
    x = torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 8, 8)
    SavedPhase(2, *x, "command", generators, text, from_picture).write(path)
    code = main(["--resume", str(path), "-o", str(tmp_path / "out.png")])
    says = f"its phase is of a job with{'' if from_picture else 'out'} an image, and its settings are not"
    refused(code, capsys.readouterr().err, says, tmp_path / "out.png")


@pytest.mark.parametrize(("size", "says"), [([64], "size must be"), ([64, "a"], "must be a whole"), ([], "size must be")])
def test_a_size_in_a_file_that_is_none_is_refused(given, tmp_path, capsys, size, says):
    given("--save-phases", scale="3")
    text = json.dumps(
        {**json.loads(read_saved(tmp_path / "out-phase2.safetensors", "command").settings), "size": size, "scale": 4.0}
    )
    saved = dataclasses.replace(read_saved(tmp_path / "out-phase2.safetensors", "command"), settings=text)
    saved.write(tmp_path / "x.safetensors")
    capsys.readouterr()
    code = main(["--resume", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "again.png")])
    refused(code, capsys.readouterr().err, says, tmp_path / "again.png")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["--width", "64"],
            "--width/--height are of a base made from the prompt; with --image use --size or --scale, and --win",
        ),
        (["--height", "64"], "--width/--height are of a base"),
        (["--size", "160x128", "--scale", "2"], "give --size or --scale, not both"),
        (["--size", "64x48"], "64x48 is not larger than the picture, 80x64; choose a larger size"),
        (["--size", "162x128"], "size must be divisible by 8, got 162x128; 160x128 is near"),
        (["--size", "160x160"], "160x160 has not the aspect of the picture, 80x64; 176x144 is near"),
        (["--size", "800x640"], "800x640 is more than 8 times the picture's sides; 640x512 is the largest"),
        (["--window", "1024"], "320x256 is no larger than what the checkpoint draws at once; a smaller window works"),
        (
            ["--window", "256"],
            "320x256 is no larger than what the checkpoint draws at once; scale 4.45 is the smallest that works",
        ),
        (
            ["--window", "8", "--scale", "8"],
            "640x512 is more than 64 times as long and wide as a window of 8; scale 7.1 is the la",
        ),
        (["--window", "4"], "a window of 4 pixels is too small"),
        (["--window", "5000"], "window must be from 0 to 4096, got 5000"),
        (["--mask-blur", "3"], "--mask-blur is of a mask; give --mask too"),
        (["--mask", "/nowhere/mask.png"], "no such mask: /nowhere/mask.png"),
    ],
)
def test_what_a_given_picture_cannot_have_is_refused(given, args, says):
    code, _, err, path = given(*args, scale=None)
    refused(code, err, says, path)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (spot((80, 72)), "the mask is 80x72 and the image 80x64; they must be of one size"),
        (spot(grey=0), "nothing of the mask is white, so nothing would change; white is what is drawn anew"),
        (Image.new("LA", (80, 64)), "mask.png has transparency; put it on a background first"),
        (Image.new("I;16", (80, 64)), r"mask.png is I(;16)?, more than 8 bits a channel; save it as plain RGB first"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_before_the_model_is_loaded(given, mask, says):
    code, _, err, path = given("--model", "/nowhere", mask=mask)
    refused(code, err, says, path)


def test_more_that_cannot_be_used_of_a_mask(given, run, tmp_path):
    spot().convert("CMYK").save(tmp_path / "cmyk.jpg")
    code, _, err, path = given("--mask", str(tmp_path / "cmyk.jpg"))
    refused(code, err, "cmyk.jpg is CMYK; save it as plain RGB first", path)
    for blur in ("-1", "65"):
        code, _, err, path = given("--mask-blur", blur, mask=spot())
        refused(code, err, f"mask blur must be at least 0 and at most 64, got {blur}", path)
    code, _, err, path = run("ring", "--mask", str(tmp_path / "mask.png"))
    refused(code, err, "a mask is of an image; give --image too", path)
    code, _, err, path = run("ring", "--window", "64")
    refused(code, err, "a window is for a picture that is given; without one it is the base's size", path)


def test_a_large_photo_is_planned_for_the_embedded_checkpoint(tmp_path, capsys):
    """Also with what its first phase is: the picture's own size is none."""
    photo((1920, 1280)).save(tmp_path / "in.png")
    assert main(["two red rings", "--image", str(tmp_path / "in.png"), "--scale", "2", "--plan", "--preset", "Fast"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "window: 160x112"
    assert [line.split()[:2] for line in lines[2:-2]] == [["2", "2560x1704"], ["3", "3840x2560"]]


# ------------------------------------------------------------------------------------------------------------- ControlNets


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlnet") / "tiny, canny"
    tiny_controlnet(tiny_pipeline("sd15")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def edges(tmp_path):
    image = Image.new("RGB", (160, 160))
    image.paste("white", (20, 40, 90, 150))
    image.save(tmp_path / "edges.png")
    return str(tmp_path / "edges.png")


def test_a_controlnet_with_its_image_goes_on_from_a_saved_phase(run, net, edges, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--scale", "3", "--save-phases", "--controlnet", net, "--control-image", "edges.png", "--controlnet", net]
    args += ["--control-image", "edges.png", "--control-scale", "0.5", "--control-end", "1", "--control-end", "0.7"]
    code, _, err, path = run("one red ring", *args)
    assert code == 0, err
    *_, plain = run("one red ring", "--scale", "3", output="plain.png")
    assert Image.open(path).tobytes() != Image.open(plain).tobytes()
    text = Image.open(path).info["parameters"]
    for number, end in enumerate(("1", "0.7")):
        values = f"Module: none, Model: tiny_ canny, Weight: 0.5, Guidance Start: 0, Guidance End: {end}"
        assert f'ControlNet {number}: "{values}", ' in text
    assert text.partition("ControlNet 0")[2] == Image.open(path.with_name("out-phase1.png")).info["parameters"].partition(
        "ControlNet 0"
    )[2].replace("Version", "DemoFusion scale: 3, DemoFusion hold steps: 50, Version")
    monkeypatch.chdir("/")
    for number in (1, 2):
        again = tmp_path / "again.png"
        assert main(["--resume", str(tmp_path / f"out-phase{number}.safetensors"), "-o", str(again)]) == 0
        with Image.open(path) as a, Image.open(again) as b:
            assert (a.tobytes(), a.info) == (b.tobytes(), b.info)


def test_a_given_picture_and_a_controlnet_go_together(given, net, tmp_path):
    photo((240, 192)).save(tmp_path / "depth.png")
    pictures = []
    for args in ([], ["--controlnet", net], ["--controlnet", net, "--control-image", str(tmp_path / "depth.png")]):
        code, _, err, path = given("ring", *args, mask=spot())
        assert code == 0, err
        pictures.append(Image.open(path).copy())
    for picture in pictures[1:]:
        assert picture.tobytes() != pictures[0].tobytes()
        assert ImageChops.difference(picture.crop(FAR), pictures[0].crop(FAR)).getbbox() is None


def test_the_plan_counts_a_controlnets_memory(run, net, edges):
    sizes = []
    for args in ([], ["--controlnet", net, "--control-image", edges]):
        code, out, _, path = run("one red ring", "--plan", *args)
        assert code == 0
        assert not path.exists()
        sizes.append([int(size) for size in re.findall(r"(\d+) MiB", out)])
    assert all(more > less for more, less in zip(sizes[1], sizes[0]))


def test_the_type_of_a_union_model_is_told_as_the_webui_does():
    from lib_demofusion.job import control_parameters

    argv = ["a", *(["--controlnet", "u"] * 4)]
    for kind in ("Lineart", "1", "none", "9"):
        argv += ["--control-type", kind]
    kinds = [text.partition("Union Control Type: ")[2] for text in control_parameters(parse(argv)).values()]
    assert kinds == ["Hard Edge", "Depth", "", "9"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["NET"], "--controlnet needs a --control-image, or an --image to enlarge, which it then takes"),
        (["--control-image", "EDGES"], "--control-image is of a ControlNet; give --controlnet too"),
        (["--control-scale", "1"], "--control-scale is of a ControlNet; give --controlnet too"),
        (["--control-type", "depth"], "--control-type is of a ControlNet; give --controlnet too"),
        (["NET", "NET", "--control-image", "EDGES"], "1 --control-image do not go with 2 --controlnet; give it once for each"),
        (
            ["NET", "NET", "NET", "--control-end", "1", "--control-end", ".5"],
            "2 --control-end do not go with 3 --controlnet; give it once for all, or once for each",
        ),
        (["--controlnet", ""], "a ControlNet has no name; give its folder, file or hub name"),
        (["NET", "--control-scale", "-1"], "the control scale must be at least 0, got -1"),
        (["NET", "--control-scale", "inf"], "the control scale must be at least 0, got inf"),
        (
            ["NET", "NET", "--control-scale", "1", "--control-scale", "nan"],
            "the control scale of ControlNet 2 must be at least 0",
        ),
        (["NET", "--control-start", ".6", "--control-end", ".4"], "control start and end must be from 0 to 1, the start first"),
        (["NET", "--control-end", "nan"], "control start and end must be from 0 to 1"),
        (["NET", "--control-image", "/nowhere.png"], "no such control image: /nowhere.png"),
        (["--controlnet", "/nowhere", "--control-image", "EDGES"], "no such ControlNet: /nowhere"),
        (
            ["NET", "--control-image", "EDGES", "--control-type", "depth"],
            "the ControlNet is no union model and has no types; leave the type out",
        ),
        (
            ["NET", "--control-image", "EDGES", "--width", "96"],
            "the ControlNet's image is 160x160, which has not the aspect of",
        ),
    ],
)
def test_what_a_controlnet_cannot_have_is_refused(run, net, edges, args, says):
    args = [part for arg in args for part in (["--controlnet", net] if arg == "NET" else [edges if arg == "EDGES" else arg])]
    code, _, err, path = run("ring", *args)
    refused(code, err, says, path)


def test_a_controlnet_is_refused_before_the_model_is_loaded_and_is_the_files_when_resumed(run, net, edges, tmp_path, capsys):
    for args, says in (
        (["--controlnet", "/nowhere", "--control-image", edges], "no such ControlNet: /nowhere"),
        (["--controlnet", net, "--control-image", str(tmp_path)], "cannot be read: it is a folder"),
    ):
        code, _, err, path = run("ring", "--model", "/nowhere/either", *args)
        refused(code, err, says, path)
    saved = saved_phase(tmp_path / "x.safetensors", json.dumps(settings(controlnet=[net])))
    for more in (["--controlnet", net], ["--control-image", edges], ["--control-scale", "1"], ["--control-type", "depth"]):
        assert main(["--resume", str(saved), "-o", str(tmp_path / "again.png"), *more]) == 2
        assert f"--resume takes {more[0][2:].replace('-', ' ')} from the file; leave that out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- the phases' own settings


@pytest.fixture(scope="session")
def files(model, tmp_path_factory):
    """A checkpoint of the model's kind, one of another, and two LoRAs, one with a name that the WebUI cannot have."""
    folder = tmp_path_factory.mktemp("files")
    pipe = tiny_pipeline("sd15")
    ink = tiny_lora(folder / "ink.v1.safetensors", pipe)
    few = tiny_lora(folder / "few<steps>.safetensors", pipe, ("unet",), seed=1)
    with torch.no_grad():
        for x in pipe.unet.parameters():
            x.mul_(1.1)
    pipe.save_pretrained(folder / "tiny-other")
    tiny_pipeline("sdxl").save_pretrained(folder / "tiny-sdxl")
    return {"ink": ink, "few": few, "other": folder / "tiny-other", "sdxl": folder / "tiny-sdxl"}


def parameters(path):
    """(prompt, settings) of a picture, as the WebUI reads them."""
    with Image.open(path) as image:
        *prompt, last = image.info["parameters"].split("\n")
    pairs = re.findall(r'\s*([\w /-]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return "\n".join(prompt), {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def all_of_them(files):
    """Arguments of a second pass with everything that it can have."""
    args = ["--phase-sampler", "LCM", "--phase-schedule", "sgm uniform", "--phase-cfg-scale", "1", "--upscaler", "lanczos"]
    args += [
        "--phase-prompt",
        "three (blue) stars, glowing",
        "--phase-negative-prompt",
        "a [plain] disc",
        "--schedule",
        "karras",
    ]
    args += ["--phase-model", str(files["other"]), "--lora", f"{files['ink']}:0.5", "--phase-lora", str(files["few"])]
    return [*args, "--schedule", "karras", "--most-phase-steps", "2"]


def test_what_a_second_pass_was_made_with_is_in_the_picture_as_the_webui_reads_it(run, files):
    code, out, err, path = run("one red (ring)", "--scale", "2", "--seed", "7", *all_of_them(files))
    assert code == 0, err
    prompt, values = parameters(path)
    assert prompt == r"one red \(ring\) <lora:ink.v1:0.5>"
    assert values["Schedule type"] == "Karras"
    method = {key.removeprefix("DemoFusion "): value for key, value in values.items() if key.startswith("DemoFusion ")}
    assert method == {
        "scale": "2",
        "hold steps": "50",
        "most phase steps": "2",
        "phase sampler": "LCM",
        "phase schedule": "SGM Uniform",
        "phase CFG scale": "1",
        "phase prompt": r"three \(blue\) stars, glowing <lora:ink.v1:0.5> <lora:few_steps_:1>",
        "phase negative prompt": r"a \[plain\] disc",
        "phase checkpoint": "tiny-other",
        "enlarged by": "Lanczos",
    }
    config = DemoFusionConfig.from_infotext(values)
    assert (config.phase_sampler, config.phase_cfg_scale, config.upscaler) == ("LCM", 1.0, "Lanczos")
    assert f"{path}: {2 * 3 + 2 * 13:,} model calls" in out, "three guided steps, and two without guidance of 13 views"


@pytest.mark.parametrize(
    ("args", "prompt", "phases"),
    [
        ([], "ring", None),
        (["--lora", "INK"], "ring <lora:ink.v1:1>", None),
        (["--phase-lora", "INK:0.25"], "ring", "<lora:ink.v1:0.25>"),
        (["--lora", "INK:-2", "--phase-lora", "FEW"], "ring <lora:ink.v1:-2>", "<lora:few_steps_:1>"),
        (["--phase-prompt", "star"], "ring", "star"),
        (["--phase-prompt", "star", "--lora", "INK"], "ring <lora:ink.v1:1>", "star <lora:ink.v1:1>"),
    ],
)
def test_loras_are_written_as_the_webui_has_them_in_prompts(files, args, prompt, phases):
    """There LoRAs alone are added to the base's prompt, and any other prompt takes its place, LoRAs included."""
    args = parse(["ring", *(arg.replace("INK", str(files["ink"])).replace("FEW", str(files["few"])) for arg in args)])
    config = DemoFusionConfig(**{f.name: getattr(args, f.name) for f in METHOD})
    own, changed = job.webui_prompts(args, config)
    assert own == prompt
    assert changed.phase_prompt == (phases or "")


def test_the_base_is_told_without_the_phases_settings(run, files):
    *_, path = run("one red ring", "--scale", "2", "--save-phases", *all_of_them(files))
    prompt, values = parameters(path.with_name("out-phase1.png"))
    assert prompt == "one red ring <lora:ink.v1:0.5>"
    assert not [key for key in values if key.startswith("DemoFusion")]
    assert values["Schedule type"] == "Karras"


@pytest.mark.parametrize("number", [1, 2])
def test_a_second_pass_goes_on_from_a_saved_phase(run, files, tmp_path, monkeypatch, number):
    monkeypatch.chdir(files["ink"].parent)
    args = [arg.replace(f"{files['ink'].parent}/", "") for arg in all_of_them(files)]
    code, _, err, path = run("one red ring", "--scale", "3", "--save-phases", *args)
    assert code == 0, err
    monkeypatch.chdir("/")
    again = tmp_path / "again.png"
    assert main(["--resume", str(tmp_path / f"out-phase{number}.safetensors"), "-o", str(again)]) == 0
    with Image.open(path) as a, Image.open(again) as b:
        assert (a.tobytes(), a.info) == (b.tobytes(), b.info)


def test_each_setting_of_a_second_pass_makes_another_picture_of_the_same_base(run, files):
    def pictures(*args):
        code, _, err, path = run("one red ring", "--scale", "2", "--save-phases", *args)
        assert code == 0, err
        return [Image.open(p).tobytes() for p in (suffixed(path, "phase1"), path)]

    plain = pictures()
    for args in (
        ["--phase-sampler", "LCM"],
        ["--phase-schedule", "Karras"],
        ["--phase-cfg-scale", "2"],
        ["--phase-prompt", "three blue stars"],
        ["--phase-negative-prompt", "three blue stars"],
        ["--phase-model", str(files["other"])],
        ["--phase-lora", str(files["ink"])],
        ["--upscaler", "Nearest"],
        ["--upscaler", "Latent (nearest-exact)"],
    ):
        base, last = pictures(*args)
        assert base == plain[0], args
        assert last != plain[1], args
    assert (
        pictures("--phase-sampler", "EulerDiscreteScheduler", "--phase-cfg-scale", "7.5", "--phase-prompt", "one red ring")
        == plain
    )
    assert pictures("--lora", str(files["ink"]))[0] != plain[0]
    assert pictures("--schedule", "Karras")[0] != plain[0]


def test_a_given_picture_is_made_by_the_phases_model_alone(given, files, tmp_path):
    args = ["--phase-prompt", "blue star", "--upscaler", "Lanczos"]
    *_, whole = given("ring", *args, "--model", str(files["other"]))
    pixels = Image.open(whole).tobytes()
    code, _, err, path = given(
        "ring", *args, "--model", "/nowhere/no-model", "--phase-model", str(files["other"]), "--save-phases"
    )
    assert code == 0, err
    assert Image.open(path).tobytes() == pixels
    [saved] = path.parent.glob("*-phase2.safetensors")
    assert main(["--resume", str(saved), "-o", str(tmp_path / "again.png")]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == pixels


def test_ctrl_c_in_a_second_pass_saves_the_phase_before(run, files, monkeypatch):
    predict, seen = Fusion.predict, []

    def press(fusion, *args):
        seen.append(fusion.phase)
        if seen.count(3) == 1:
            signal.raise_signal(signal.SIGINT)
        return predict(fusion, *args)

    monkeypatch.setattr(Fusion, "predict", press)
    code, _, err, path = run("one red ring", "--scale", "3", *all_of_them(files))
    assert code == 130
    assert err.splitlines()[-1] == f"demofusion: stopped; the last finished phase, 2 of 3, is in {path}"
    assert parameters(path)[1]["DemoFusion phase checkpoint"] == "tiny-other"


def test_the_plan_counts_both_models_and_the_loras(run, files):
    lines = []
    for args in ([], ["--phase-model", str(files["other"])], ["--lora", str(files["ink"]), "--upscaler", "Latent"]):
        code, out, _, path = run("one red ring", "--plan", *args)
        assert code == 0
        assert not path.exists()
        lines.append(out.splitlines()[-1])
    assert lines[1].endswith("for the base image alone; both models are held all the time")
    assert not lines[0].endswith("all the time")
    plain, both, _ = ([int(size) for size in re.findall(r"(\d+) MiB", line)] for line in lines)
    assert both[0] >= plain[0]


def test_the_plan_counts_the_phases_own_calls(run):
    args = ["one red ring", "--plan", "--scale", "2", "--sampler", "Heun", "--phase-sampler", "LCM", "--phase-cfg-scale", "1"]
    code, out, _, _ = run(*args, "--most-phase-steps", "2")
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:-1]] == [
        ["1", "64x64", "3", "1", "10"],
        ["2", "128x128", "2", "9", "+", "4", "26"],
        ["all", "36"],
    ]


@pytest.fixture(scope="module")
def loaded_model(model):
    return load_pipeline(model)


@pytest.mark.parametrize("cfg", ["1", "7"])
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "LCM", "UniPC"])
@pytest.mark.parametrize("steps", ["2", "8", "30"])
def test_each_preset_asks_the_model_no_more_often_than_the_one_before(
    model, loaded_model, monkeypatch, capsys, steps, sampler, cfg
):
    """The model is loaded once for all of them, and no memory is counted, which takes longer than the plan."""
    monkeypatch.setattr("lib_demofusion.__main__.load", lambda *args: loaded_model)
    monkeypatch.setattr("lib_demofusion.__main__.memory_line", lambda *args: "memory: not counted")
    calls = []
    for preset in ("Turbo", "Faithful", "Fast", "Paper"):
        args = ["ring", "--model", model, "--device", "cpu", "--plan", "--preset", preset, "--steps", steps]
        args += ["--phase-cfg-scale", cfg]
        assert main([*args, "--phase-sampler", sampler]) == 0
        calls.append(int(capsys.readouterr().out.splitlines()[-2].split()[-1].replace(",", "")))
    assert calls == sorted(calls)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--schedule", "Cosine"], "no schedule called 'Cosine'; there are: Automatic, Uniform, Karras"),
        (["--phase-schedule", "Cosine"], "no schedule called 'Cosine'; there are: Automatic"),
        (["--phase-sampler", "Euler b"], "no sampler called 'Euler b'; there are: Euler"),
        (
            ["--sampler", "DDIM", "--schedule", "Karras"],
            "DDIM of diffusers .* has no schedule Karras; it has: Automatic, Uniform",
        ),
        (["--phase-sampler", "LCM", "--phase-schedule", "Beta"], "LCM of diffusers .* has no schedule Beta; it has: Automatic"),
        (["--phase-cfg-scale", "0.5"], "phase CFG scale must be 0, as the base's, or at least 1, got 0.5"),
        (["--phase-cfg-scale", "nan"], "phase CFG scale must be from 0 to 30, got nan"),
        (["--most-phase-steps", "-1"], "most phase steps must be from 0 to 1000, got -1"),
        (["--phase-prompt", "(red:1.2)"], r"the phase prompt has '\(red:1.2\)', which only the WebUI understands"),
        (["--phase-prompt", "red " * 76], "the phase prompt is too long: 76 tokens, 75 at most"),
        (["--phase-negative-prompt", "a\0"], "the phase negative prompt has a control character, U.0000"),
        (["--phase-model", "/nowhere/x"], "no such checkpoint: /nowhere/x"),
        (
            ["--phase-model", "SDXL"],
            "the phases' checkpoint is of another kind than the base's: its UNet's addition_embed_type is",
        ),
        (["--upscaler", "ESRGAN"], "no upscaler called 'ESRGAN'; there are: Latent, "),
        (["--upscaler", "/nowhere/4x.pth"], "no such upscaler: /nowhere/4x.pth"),
        (["--lora", "/nowhere/x.safetensors"], "no such LoRA: /nowhere/x.safetensors"),
        (["--phase-lora", "/nowhere/x.safetensors:0.4"], "no such LoRA: /nowhere/x.safetensors$"),
        (["--lora", "INK:strong"], "argument --lora: the weight of .*ink.v1.safetensors must be a number, got strong"),
        (["--phase-lora", "INK:nan"], "argument --phase-lora: the weight of .* must be a number, got nan"),
        (["--lora", "INK:"], "argument --lora: the weight of .* must be a number, got none"),
        (["--lora", ""], "argument --lora: the LoRA has no name"),
        (["--lora", ":1"], "argument --lora: the LoRA has no name"),
        (
            ["--lora", "INK", "--phase-lora", "INK:2"],
            "the LoRA .*ink.v1.safetensors is given twice; give it once, with the weight",
        ),
        (["--lora", "INK", "--phase-model", "SDXL"], "of another kind than the base's"),
        (
            ["--lora", "SDXL/unet/diffusion_pytorch_model.safetensors"],
            "cannot be used as a LoRA: it is none: none of its tensors",
        ),
        (["--resize-width", "640"], "unrecognized arguments: --resize-width 640"),
    ],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_what_a_second_pass_cannot_have_is_refused(run, files, args, says, plan):
    places = {"INK": str(files["ink"]), "SDXL": str(files["sdxl"])}
    for name, place in places.items():
        args = [arg.replace(name, place) for arg in args]
    code, _, err, path = run("ring", *args, *plan)
    refused(code, err, says, path)


def test_a_lora_for_another_kind_of_checkpoint_is_refused(run, tmp_path):
    file = tiny_lora(tmp_path / "xl.safetensors", tiny_pipeline("sdxl"), ("unet",))
    code, _, err, path = run("ring", "--phase-lora", str(file))
    refused(
        code,
        err,
        "the LoRA .*xl.safetensors does not fit this checkpoint: its layers are of other sizes",
        path.with_name("o.png"),
    )


def test_words_of_the_phases_that_the_embedded_checkpoint_does_not_know_are_named(tmp_path, capsys):
    for option in ("--phase-prompt", "--phase-negative-prompt"):
        code = main(["one red ring", option, "one red zebra", "-o", str(tmp_path / "a.png")])
        refused(code, capsys.readouterr().err, "the embedded checkpoint does not know zebra; it knows: ", tmp_path / "a.png")
    code = main(["one red ring", "--phase-prompt", "zebra", "--phase-model", "/nowhere/x", "-o", str(tmp_path / "a.png")])
    refused(code, capsys.readouterr().err, "no such checkpoint: /nowhere/x", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "file", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors:0.8", r"C:\x.safetensors", 0.8),
        ("C:/x:y.safetensors", "C:/x:y.safetensors", 1.0),
        ("a.SAFETENSORS:2", "a.SAFETENSORS", 2.0),
        ("x:y", "x:y", 1.0),
    ],
)
def test_the_colon_before_a_loras_weight(text, file, weight):
    for option, name in (("--lora", "lora"), ("--phase-lora", "phase_lora")):
        assert getattr(parse(["a", option, text, option, "b:3"]), name) == [(Path(file), weight), (Path("b"), 3.0)]


def test_a_file_whose_name_ends_in_a_number_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors:2").touch()
    assert parse(["a", "--lora", "a.safetensors:2"]).lora == [(Path("a.safetensors:2"), 1.0)]
    assert parse(["a", "--lora", "a.safetensors:2:3"]).lora == [(Path("a.safetensors:2"), 3.0)]


def test_help_names_every_schedule_sampler_and_upscaler(capsys):
    from lib_demofusion.hosts.diffusers import AUTOMATIC, SAMPLERS, SCHEDULES, UPSCALERS

    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name in (AUTOMATIC, *SCHEDULES, *SAMPLERS, *UPSCALERS):
        assert name in text
    assert "--resize" not in text
    assert "(default: )" not in text
    for option in ("sampler", "schedule", "cfg-scale", "prompt", "negative-prompt", "model", "lora"):
        assert f"--phase-{option} " in text
