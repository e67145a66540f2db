"""Beside other extensions, each in a host of its own, from the folder NEIGHBOURS_DIR that holds them by their usual names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webui_host import ROOT, encoded, only_on_a1111

pytestmark = only_on_a1111("these extensions are for AUTOMATIC1111's WebUI; Forge has its own of most kinds built in")

NEIGHBOURS_DIR = os.environ.get("NEIGHBOURS_DIR")

BESIDE = """
import hashlib
import json
import sys
from pathlib import Path
tests, checkpoints, data, jobs, setup = sys.argv[1:]
sys.path[:0] = [tests, str(Path(tests).parent)]
import webui_host
from arguments import script_arguments
from PIL import Image

host = webui_host.start(Path(checkpoints), Path(data))
host.shared.opts.data.update(live_previews_enable=False)
from modules import errors
reports = []
errors.report = lambda message, *, exc_info=False: reports.append(f"{message}: {sys.exc_info()[1]}")
unet = host.unet


def hooks():
    return [("forward" in vars(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in unet.modules()]


def interrupt():
    host.shared.state.interrupt()


def box(sides):
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, tuple(sides))
    return mask


exec(setup)
calls = []
pictures = {side: host.generate(width=side[0], height=side[1], seed=3).images[0] for side in ((64, 64), (128, 128))}
unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
before = hooks()
there = {script.title() for script in host.scripts.scripts_txt2img.alwayson_scripts}
for enabled, scripts, settings in json.loads(jobs):
    if not there.issuperset(scripts):
        print(json.dumps(dict(missing=sorted(set(scripts) - there))))
        break
    calls.clear(), reports.clear()
    options = settings.pop("options", {})
    host.shared.opts.data.update(options)
    scripts = {title: {"args": args} for title, args in scripts.items()}
    ours = settings.pop("ours", [2, {"phase_steps": 3}])
    if enabled:
        scripts[host.script.title()] = {"args": script_arguments(host.webui, (True, *ours))}
    stop = settings.pop("interrupt_at", None)
    handle = unet.register_forward_pre_hook(lambda *_: interrupt() if len(calls) == stop else None)
    settings = {"steps": 4, **settings}
    if settings.pop("given", False):
        given = webui_host.encoded(pictures[tuple(settings.pop("size", (64, 64)))])
        if "mask" in settings:
            settings["mask"] = webui_host.encoded(box(settings["mask"]))
        fixed = dict(prompt="two red rings", seed=1, sampler_name="Euler", width=64, height=64, denoising_strength=0.5)
        body = {**fixed, "init_images": [given], "alwayson_scripts": scripts, **settings}
        reply = host.client.post("/sdapi/v1/img2img", json=body)
    else:
        reply = host.post(alwayson_scripts=scripts, **settings)
    handle.remove()
    assert reply.status_code == 200, reply.text
    reply = reply.json()
    images = [webui_host._image(image) for image in reply["images"]]
    print(json.dumps(dict(
        sizes=[image.size for image in images],
        pictures=[hashlib.md5(image.tobytes()).hexdigest() for image in images],
        corners=[hashlib.md5(image.crop((0, 0, 16, 16)).tobytes()).hexdigest() for image in images],
        infotext=json.loads(reply["info"])["infotexts"][0],
        same=[image.convert("RGB").tobytes() == picture.tobytes() for image in images for picture in pictures.values()],
        calls=sum(calls),
        reports=list(reports),
        clean=hooks() == before,
    )), flush=True)
"""


# What an extension asks for at its first use: this one measures the machines, and would wait for the very job that it is in.
MACHINES = {"workers": [{"master": {"avg_ipm": 10.0, "master": True}}], "benchmark_payload": {}}
FILES = {"stable-diffusion-webui-distributed": {"distributed-config.json": json.dumps(MACHINES)}}


def beside(name, jobs, checkpoints, tmp_path, setup="", more=()):
    """What came of jobs (DemoFusion on or off, {title: arguments of other scripts}, settings) beside an extension.

    setup: what is run before the first of them. more: other extensions.
    """
    for each in filter(None, (name, *more)):
        folder = Path(NEIGHBOURS_DIR) / each
        if not folder.is_dir():
            pytest.skip(f"there is no {each} in NEIGHBOURS_DIR")
        shutil.copytree(folder, tmp_path / "data" / "extensions" / each, ignore=shutil.ignore_patterns(".git"))
        for file, text in FILES.get(each, {}).items():
            (tmp_path / "data" / "extensions" / each / file).write_text(text)
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "ui-config.json").write_text("{}")  # as every host has that was used before
    given = map(str, (ROOT / "tests" / "webui", checkpoints, tmp_path / "data", json.dumps(jobs), setup))
    run = subprocess.run([sys.executable, "-c", BESIDE, *given], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    if '{"missing"' in run.stdout:
        pytest.skip(f"{name} does not load here: it needs packages of its own")
    replies = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"sizes"')]
    assert len(replies) == len(jobs)
    return replies


@pytest.fixture(scope="module")
def alone(checkpoints, tmp_path_factory):
    """What DemoFusion makes with no other extension there."""
    if not NEIGHBOURS_DIR:
        pytest.skip("needs NEIGHBOURS_DIR, a folder with other extensions")
    return beside(None, [(True, {}, {})], checkpoints, tmp_path_factory.mktemp("alone"))[0]


TILED = "multidiffusion-upscaler-for-automatic1111"
REFUSED = [  # folder, title, arguments, what the line begins with
    (TILED, "Tiled Diffusion", [True, "MultiDiffusion"], "Tiled Diffusion is on"),
    (TILED, "Tiled Diffusion", [True, "Mixture of Diffusers", True, True, 256, 256], "Tiled Diffusion is on"),
    (TILED, "demofusion", [True], "the DemoFusion of Tiled Diffusion is on"),
    ("sd-webui-regional-prompter", "Regional Prompter", [True], "Regional Prompter is on"),
    ("sd_webui_SAG", "Self Attention Guidance", [True], "Self Attention Guidance is on"),
    ("sd-dynamic-thresholding", "Dynamic Thresholding (CFG Scale Fix)", [True], "Dynamic Thresholding is on"),
    ("sd-webui-animatediff", "AnimateDiff", [{"enable": True}], "AnimateDiff is on"),
    ("sd-webui-controlnet", "ControlNet", [{"enabled": True, "model": "none"}], "a unit of ControlNet is on, and"),
]
REFUSED_BY_FOLDER = {folder: [case for case in REFUSED if case[0] == folder] for folder, *_ in REFUSED}


@pytest.mark.parametrize("folder", REFUSED_BY_FOLDER)
def test_refused_before_anything_is_sampled(folder, alone, checkpoints, tmp_path):
    """And installed but off, it changes no bit."""
    cases = REFUSED_BY_FOLDER[folder]
    jobs = [(True, {}, {}), *((True, {title: args}, {}) for _, title, args, _ in cases), (True, {}, {})]
    off, *refused, again = beside(folder, jobs, checkpoints, tmp_path)
    for reply in (off, again):
        assert reply["pictures"] == alone["pictures"]
        assert reply["reports"] == []
    assert off["clean"]  # after a refusal there may lie what the other extension itself leaves behind
    for reply, (_, _, _, line) in zip(refused, cases):
        assert reply["sizes"] == []
        assert reply["calls"] == 0
        assert f"DemoFusion refused: {line}" in reply["infotext"].replace('refused: "', "refused: ")


TWO = "two red striped rings on grass AND one blue disc"
WORKS = {  # folder: scripts with their arguments, and settings
    "stable-diffusion-webui-two-shot": ({"Latent Couple extension": [True]}, {"prompt": TWO}),
    "stable-diffusion-webui-composable-lora": ({"Composable Lora": [True, False, False]}, {}),
    "CFG_Rescale_webui": ({"CFG Rescale Extension": [0.7, False, 1.0, False]}, {}),
    "sd-webui-kohya-hiresfix": ({"Kohya Hires.fix": [True, True]}, {}),
    "sd-webui-freeu": ({"FreeU": [True]}, {}),
    "sd-webui-neutral-prompt": ({"Neutral Prompt": [0.0]}, {"prompt": "two red rings on grass AND_PERP blue disc :0.8"}),
    "sd-webui-negpip": ({"NegPiP": [True]}, {"prompt": "two red striped rings on grass, (blue:-1.2)"}),
    "stable-diffusion-webui-distributed": ({"Distribute": []}, {}),  # without other machines it leaves a job as it is
    "stable-diffusion-webui-wildcards": ({}, {"prompt": "two __colours__ rings on grass"}),
}


@pytest.mark.parametrize("folder", WORKS)
def test_works_beside(folder, alone, checkpoints, tmp_path):
    """A picture of the asked size, without an error that the host would swallow; installed but off, no bit changes."""
    scripts, settings = WORKS[folder]
    jobs = [(True, {}, {}), (False, scripts, settings), (True, scripts, settings), (True, {}, {})]
    off, base, on, again = beside(folder, jobs, checkpoints, tmp_path)
    for reply in (off, again):
        assert reply["pictures"] == alone["pictures"]
    assert base["sizes"] == [[64, 64]]
    assert on["sizes"] == [[128, 128]]
    assert "DemoFusion scale: 2" in on["infotext"]
    assert "refused" not in on["infotext"]
    assert on["calls"] > base["calls"]
    for reply in (off, base, on, again):
        assert reply["reports"] == []
    assert again["clean"]


# No network that finds faces: a box in the middle is what is found in every picture.
DETECTOR = """
from PIL import Image, ImageDraw
found = next(s for s in host.scripts.scripts_txt2img.alwayson_scripts if s.title() == "ADetailer")
theirs = type(found)._postprocess_image_inner.__globals__


def predict(model, image, confidence=0.3):
    w, h = image.size
    box = [w // 4, h // 4, w // 2, h // 2]
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return theirs["PredictOutput"](bboxes=[box], masks=[mask], confidences=[0.9], preview=image)


theirs["mediapipe_predict"] = predict
"""


def test_adetailer_goes_over_the_finished_picture(alone, checkpoints, tmp_path):
    """Once for each image, and with no phases of ours in its own pass, also where that carries all scripts along."""
    pytest.importorskip("rich")
    pytest.importorskip("cv2")
    scripts = {"ADetailer": [True, False, {"ad_model": "mediapipe_face_full", "ad_denoising_strength": 0.5}]}
    both = {"batch_size": 2}
    every = {"options": {"ad_only_selected_scripts": False}}
    jobs = [(True, {}, {}), (True, scripts, {}), (True, {}, both), (True, scripts, both), (True, scripts, every)]
    jobs += [(False, {}, {}), (False, scripts, every)]
    off, on, two_off, two_on, with_all, base, base_with_all = beside("adetailer", jobs, checkpoints, tmp_path, DETECTOR)
    assert off["pictures"] == alone["pictures"]
    assert on["sizes"] == with_all["sizes"] == [[128, 128]]
    assert two_on["sizes"] == [[128, 128], [128, 128]]
    own_pass = on["calls"] - off["calls"]
    assert own_pass > 0
    assert two_on["calls"] - two_off["calls"] == 2 * own_pass
    assert with_all["calls"] - off["calls"] == base_with_all["calls"] - base["calls"]
    for reply in (on, two_on, with_all):
        assert reply["reports"] == []
        assert "DemoFusion scale: 2" in reply["infotext"]


def test_adetailer_goes_over_an_enlarged_picture(alone, checkpoints, tmp_path):
    """In img2img. What it says of a picture that was interrupted is what was reached, in both tabs."""
    pytest.importorskip("rich")
    pytest.importorskip("cv2")
    detail = {"ad_model": "mediapipe_face_full", "ad_denoising_strength": 0.5}
    scripts, skip = {"ADetailer": [True, False, detail]}, {"ADetailer": [True, True, detail]}
    every, some = ({"options": {"ad_only_selected_scripts": only}} for only in (False, True))
    given = {"given": True, "size": [128, 128], **some}
    stopped = {"ours": [4, {"stride": 1.0, "view_batch_size": 1}], "interrupt_at": 2 * 8 + 3}
    masked = {"mask": [32, 32, 96, 96], "inpaint_full_res": False}
    jobs = [(False, {}, given), (False, scripts, given), (False, scripts, given | every)]
    jobs += [(True, {}, given), (True, scripts, given), (True, scripts, given | every)]
    jobs += [(True, scripts, given | stopped), (True, scripts, stopped | {"interrupt_at": 80})]
    jobs += [(True, skip, given), (True, {}, given | masked), (True, scripts, given | masked)]
    replies = beside("adetailer", jobs, checkpoints, tmp_path, DETECTOR)
    base, base_on, base_with_all, off, on, with_all, interrupted, of_a_prompt, skipped, in_mask_off, in_mask = replies
    assert base_on["calls"] > base["calls"]
    assert off["sizes"] == on["sizes"] == with_all["sizes"] == [[256, 256]]
    assert on["calls"] - off["calls"] == base_on["calls"] - base["calls"]
    assert with_all["calls"] - off["calls"] == base_with_all["calls"] - base["calls"]
    assert on["pictures"] != off["pictures"]
    for reply in (on, with_all):
        assert "DemoFusion scale: 2" in reply["infotext"]
    assert interrupted["sizes"] == [[256, 256]], "ADetailer went over what was reached"
    assert of_a_prompt["sizes"] == [[128, 128]]
    for reply in (interrupted, of_a_prompt):
        assert "DemoFusion scale: 2," in reply["infotext"]
        assert "DemoFusion incomplete: " in reply["infotext"]
    assert skipped["sizes"] == [[128, 128]], "it is asked for details of the picture as it is"
    assert "DemoFusion note: " in skipped["infotext"]
    assert "DemoFusion scale" not in skipped["infotext"]
    assert in_mask["sizes"] == [[256, 256]]
    for reply in replies:
        assert reply["reports"] == []
        assert reply["clean"]


# The tiny control models, and the checkpoint that the extension can hook.
CONTROL = """
sys.path.insert(0, str(Path(tests) / "control"))
import control_models
from scripts import global_state
narrow = control_models.narrow()
narrow.__enter__()
control_models.make_all(Path(global_state.cn_models_dir))
global_state.update_cn_models()
host.load(control_models.make_relative(Path(checkpoints)))
unet = host.unet
"""


def test_adetailer_goes_over_a_picture_that_controlnet_has_steered(alone, checkpoints, tmp_path):
    """It goes over the finished picture; around what it finds each picture of each batch is as without it."""
    pytest.importorskip("rich")
    pytest.importorskip("cv2")
    ramp = encoded(Image.fromarray(np.indices((128, 128)).sum(0).astype(np.uint8)).convert("RGB"))
    unit = {"enabled": True, "module": "none", "model": "sd15_controlnet", "image": ramp, "save_detected_map": False}
    controlled = {"ControlNet": [unit]}
    detailed = {"ADetailer": [True, False, {"ad_model": "mediapipe_face_full", "ad_denoising_strength": 0.5}]}
    both, twice = {**controlled, **detailed}, {"n_iter": 2}
    jobs = [(True, {}, twice), (True, controlled, twice), (True, both, twice), (False, controlled, {}), (False, both, {})]
    setup = DETECTOR + CONTROL
    off, steered, on, base, base_on = beside("adetailer", jobs, checkpoints, tmp_path, setup, ["sd-webui-controlnet"])
    assert steered["sizes"] == on["sizes"] == [[128, 128]] * 2
    assert steered["corners"] == on["corners"]
    assert not set(steered["corners"]) & set(off["corners"])
    assert steered["pictures"] != on["pictures"]
    assert on["calls"] - steered["calls"] == 2 * (base_on["calls"] - base["calls"])
    assert off["clean"]  # ControlNet leaves the model's own forward where its hook was
    for reply in (off, steered, on):
        assert reply["reports"] == []
        assert "DemoFusion scale: 2" in reply["infotext"]


def test_ultimate_sd_upscale_is_refused(alone, checkpoints, tmp_path):
    """It calls for tile after tile, each of which would be enlarged."""
    tiles = [None, 64, 64, 8, 16, 64, 0.35, 32, 0, False, 0, False, 8, 0, 1, 128, 128, 2]
    given = {"given": True, "script_name": "Ultimate SD upscale", "script_args": tiles}
    off, on = beside("ultimate-upscale", [(False, {}, given), (True, {}, given)], checkpoints, tmp_path)
    assert off["sizes"] == [[128, 128]]
    assert off["calls"] > 0
    assert on["calls"] == 0
    assert "DemoFusion refused: the script Ultimate SD upscale is chosen" in on["infotext"].replace('"', "")
