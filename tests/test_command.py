"""The command: what it writes, what it refuses, and what is left when it is stopped."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageChops
from safetensors.torch import save_file
from tiny import tiny_pipeline

from lib_demofusion import __version__
from lib_demofusion.__main__ import main, suffixed
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.saved import SavedPhase


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
            "Model: tiny-sd15, DemoFusion scale: 2, DemoFusion stride: 0.4, Version: demofusion " + __version__
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
from lib_demofusion.hosts import diffusers
answer = diffusers._Run._model
def stuck(self, phase, *rest):
    time.sleep(600 if phase.number == 3 else 0)
    return answer(self, phase, *rest)
diffusers._Run._model = stuck
main(sys.argv[1:])
"""


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M"])
def test_a_killed_job_goes_on_from_its_last_phase(run, model, sampler):
    """kill -9 in phase 3; the picture is that of the job that was left alone, and so is what it says of itself."""
    job = ["one red ring", "--negative-prompt", "star", "--scale", "3", "--seed", "5", "--sampler", sampler, "--stride", "0.4"]
    *_, whole = run(*job, "--compare", output="whole.png")
    killed = whole.with_name("killed.png")
    job += ["--model", model, "--steps", "3", "--device", "cpu", "--save-phases", "-o", str(killed)]
    process = subprocess.Popen([sys.executable, "-c", STUCK, *job], stderr=subprocess.DEVNULL)
    while not suffixed(killed, "phase2").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not killed.exists()
    assert main(["--resume", str(killed.with_name("killed-phase2.safetensors")), "--compare", "-o", str(killed)]) == 0
    for a, b in ((whole, killed), (suffixed(whole, "compare"), suffixed(killed, "compare"))):
        with Image.open(a) as a, Image.open(b) as b:
            assert a.tobytes() == b.tobytes()
            assert a.info == b.info


def test_a_job_from_an_image_goes_on_without_the_image(run, tmp_path):
    Image.radial_gradient("L").resize((80, 64)).save(tmp_path / "in.png")
    *_, path = run("--image", str(tmp_path / "in.png"), "--size", "240x192", "--save-phases")
    (tmp_path / "in.png").unlink()
    for number in (1, 2):
        assert main(["--resume", str(tmp_path / f"out-phase{number}.safetensors"), "-o", str(tmp_path / "again.png")]) == 0
        assert Image.open(path).tobytes() == Image.open(tmp_path / "again.png").tobytes()
        assert Image.open(path).info == Image.open(tmp_path / "again.png").info


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
        (["ring", "--preset", "slow"], "no preset called 'slow'; there are: Paper, Fast, Turbo"),
        (["red " * 100], "the prompt is too long: 100 tokens, 75 at most"),
        (["ring", "--negative-prompt", "red " * 100], "the negative prompt is too long"),
        (["ring", "--sampler", "Euler b"], "no sampler called 'Euler b'"),
        (["ring", "--cfg-scale", "0"], "CFG scale must be at least 1"),
        (["ring", "--batch-count", "0"], "batch count must be at least 1, got 0"),
        (["ring", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["ring", "--image", "/nowhere/in.png"], "no such image: /nowhere/in.png"),
        (["ring", "--dtype", "int8"], "argument --dtype: invalid choice"),
        (["ring", "--device", "warp"], "device warp is not available here"),
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
        ("alpha.png", lambda path: Image.new("RGBA", (64, 64)).save(path), "has transparency; save it as plain RGB first"),
        ("text.png", lambda path: path.write_text("no image"), "cannot be read as an image"),
        ("cut.png", lambda path: path.write_bytes(png()[:200]), "cannot be read as an image"),
        ("odd.png", lambda path: Image.new("RGB", (65, 64)).save(path), "width must be divisible by 8, got 65; 64 is near"),
        ("folder.png", lambda path: path.mkdir(), "no such image"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(run, tmp_path, name, save, says):
    save(tmp_path / name)
    code, _, err, path = run("ring", "--image", str(tmp_path / name))
    refused(code, err, says, path)


def png():
    from io import BytesIO

    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("output", "says"),
    [("missing/out.png", "output folder .*missing does not exist"), ("out.jpg", "the output must be a .png file")],
)
def test_an_output_that_cannot_be_written_is_refused_first(run, output, says):
    code, _, err, path = run("ring", output=output)
    refused(code, err, says, path)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, capsys):
    for name, says in (("x.safetensors", "no such checkpoint"), ("./x/y", "no such checkpoint")):
        code = main(["ring", "--model", str(tmp_path / name), "-o", str(tmp_path / "out.png")])
        refused(code, capsys.readouterr().err, says, tmp_path / "out.png")


def test_words_that_the_embedded_checkpoint_does_not_know_are_named(tmp_path, capsys):
    code = main(["a cat on grass", "-o", str(tmp_path / "out.png")])
    refused(code, capsys.readouterr().err, "does not know a, cat; it knows: .*striped", tmp_path / "out.png")


def test_no_half_written_file_is_left(run, monkeypatch):
    def fail(self, *args, **kwargs):
        args[0].write_bytes(b"half") if hasattr(args[0], "write_bytes") else None
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    code, _, err, path = run("one red ring", "--scale", "2")
    assert code == 1
    assert "No space left on device" in err.splitlines()[-1]
    assert not list(path.parent.iterdir())


def test_the_package_runs_as_a_module(tmp_path):
    """In a process of its own: nothing but one line on stderr, and the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "lib_demofusion", "ring", "--scale", "9"],
        cwd=tmp_path,
        env=os.environ,
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


def test_names_of_more_files_keep_the_folder_and_the_ending(tmp_path):
    assert suffixed(tmp_path / "a.b.png", "phase2") == tmp_path / "a.b-phase2.png"
