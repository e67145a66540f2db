"""The host's own features on top of ours: hypernetworks, styles, VAEs, faces, grids, defaults of the form, switches."""

import json
import subprocess
import sys
from pathlib import Path

import forge_host
import numpy as np
import pytest
import torch
import webui_host
from PIL import Image
from safetensors.torch import load_file, save_file
from webui_host import IS_FORGE, ROOT, only_on_a1111


@pytest.fixture
def old_files(monkeypatch):
    """torch.save in the format that the host's check of files knows; it refuses what torch writes by default today."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: save(*args, _use_new_zipfile_serialization=False))


@only_on_a1111("Forge has no hypernetworks")
def test_hypernetworks(host, old_files):
    from modules.hypernetworks import hypernetwork

    torch.manual_seed(0)
    networks = hypernetwork.Hypernetwork(name="bend", enable_sizes=[64], layer_structure=[1, 1], weight_init="XavierNormal")
    networks.save(host.shared.cmd_opts.hypernetwork_dir + "/bend.pt")
    host.shared.reload_hypernetworks()
    plain = host.latents(True, 2, prompt="one red ring")
    used = []
    forward = hypernetwork.HypernetworkModule.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypernetwork.HypernetworkModule, "forward", lambda self, x: used.append(1) or forward(self, x))
        bent = host.latents(True, 2, prompt="one red ring <hypernet:bend:1>")
        with_phases = len(used)
        used.clear()
        host.latents(prompt="one red ring <hypernet:bend:1>")
    assert with_phases > len(used) > 0
    assert not torch.allclose(plain, bent, atol=0.05)
    assert torch.equal(host.latents(True, 2, prompt="one red ring"), plain)


def test_styles(host):
    styles = host.shared.prompt_styles
    styles.styles["snowy"] = type(styles.no_style)("snowy", "{prompt} on snow", "grass", None)
    try:
        reply = host.generate(True, 2, prompt="one red ring", styles=["snowy"])
    finally:
        del styles.styles["snowy"]
    assert reply.infotexts[0].startswith("one red ring on snow\nNegative prompt: grass")
    plain = host.generate(True, 2, prompt="one red ring on snow", negative_prompt="grass")
    assert np.array_equal(np.asarray(reply.images[0]), np.asarray(plain.images[0]))


@pytest.fixture
def another_vae(host, checkpoints):
    """The checkpoint's VAE with brighter pictures, as a file among the host's VAEs; its name."""
    weights = load_file(checkpoints / "demofusion-embedded.safetensors")
    vae = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith("first_stage_model.")}
    vae["decoder.conv_out.bias"] = vae["decoder.conv_out.bias"] + 0.25
    folder = host.data / "models" / "VAE"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae, folder / "brighter.safetensors")
    return "brighter.safetensors"


def test_a_vae_from_the_settings(host, another_vae):
    host.refresh_vaes()
    before, latents = host.generate(True, 2).images[0], host.latents(True, 2)
    with_vae = {"override_settings": host.vae_setting(another_vae)}
    bright = host.generate(True, 2, **with_vae).images[0]
    assert 20 < np.asarray(bright, float).mean() - np.asarray(before, float).mean() < 40  # 0.25 of -1 to 1 is 32 of 256
    assert torch.equal(host.latents(True, 2, **with_vae), latents)
    host.refresh_vaes()
    assert np.array_equal(np.asarray(host.generate(True, 2).images[0]), np.asarray(before))


@pytest.fixture
def taesd(host, old_files):
    """The host's tiny decoder with random weights; the real ones are a download."""
    from modules import paths_internal, sd_vae_taesd

    torch.manual_seed(0)
    folder = Path(paths_internal.models_path) / "VAE-taesd"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(sd_vae_taesd.decoder().state_dict(), folder / "taesd_decoder.pth")
    yield
    sd_vae_taesd.sd_vae_taesd_models.clear()
    (folder / "taesd_decoder.pth").unlink()


def test_taesd_decodes_the_picture_and_the_previews(host, taesd, options):
    from modules import sd_vae_taesd

    options(show_progress_type="TAESD", show_progress_every_n_steps=1)
    decoder, seen, previews = sd_vae_taesd.decoder_model(), [], []
    handle = decoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    unet, state = host.unet, host.shared.state

    def look(module, args):
        state.set_current_image()
        if state.current_image is not None:
            previews.append(state.current_image.size)

    looking = unet.register_forward_pre_hook(look)
    try:
        reply = host.generate(True, 2, override_settings={"sd_vae_decode_method": "TAESD"})
    finally:
        handle.remove()
        looking.remove()
    assert reply.images[0].size == (128, 128)
    assert seen[-1] == (16, 16)
    assert set(previews) == {(64, 64), (128, 128)}


def test_faces_are_restored_in_the_finished_picture(host, options, monkeypatch):
    from modules import face_restoration

    seen = []

    class Restorer(face_restoration.FaceRestoration):
        def name(self):
            return "test"

        def restore(self, picture):
            seen.append(picture.shape)
            return 255 - picture

    monkeypatch.setattr(host.shared, "face_restorers", [Restorer()])
    options(face_restoration_model="test")
    plain = host.generate(True, 2).images[0]
    restored = host.generate(True, 2, restore_faces=True).images[0]
    assert seen == [(128, 128, 3)]
    assert np.array_equal(np.asarray(restored), 255 - np.asarray(plain))


def test_grids(host, options):
    options(grid_format="png")
    before = {*host.outputs.rglob("grid-*.png")}
    reply = host.generate(True, 2, batch_size=2, n_iter=2, save_images=True)
    assert [image.size for image in reply.images] == [(256, 256)] + [(128, 128)] * 4
    [grid] = {*host.outputs.rglob("grid-*.png")} - before
    with Image.open(grid) as image:
        assert image.size == (256, 256)
        assert "DemoFusion scale: 2" in image.info["parameters"]


def test_a_refusal_leaves_no_grid_and_no_file(host):
    before = {*host.outputs.rglob("*")}
    host.generate(True, 9, batch_size=2, save_images=True)
    assert {*host.outputs.rglob("*")} == before


@pytest.mark.parametrize("reduced", [True, False])
def test_jpegs_of_which_the_host_keeps_a_reduced_copy_are_told(host, options, reduced):
    options(samples_format="jpg", target_side_length=100, export_for_4chan=reduced)
    host.generate(True, 2, seed=888 + reduced, save_images=True)
    [file] = host.outputs.rglob(f"*-{888 + reduced}.jpg")
    with Image.open(file) as image:
        assert image.size == ((100, 100) if reduced else (128, 128))
    assert any("the host keeps only a reduced copy" in text for text in host.comments) == reduced


def test_defaults_of_the_form_from_the_hosts_file(host):
    """What a user writes into ui-config.json, the host's file of defaults, stands in the form."""
    file = Path(host.shared.cmd_opts.ui_config_file)
    before = file.read_text()
    ours = {key.removeprefix("customscript/demofusion.py/txt2img/"): value for key, value in json.loads(before).items()
            if key.startswith("customscript/demofusion.py/")}  # fmt: skip
    ticks = "DemoFusion/value" in ours  # of accordions, of which some of Forge's kind keep none
    assert ticks or IS_FORGE
    assert ours.get("DemoFusion/value") is (False if ticks else None)
    assert ours["Scale/value"] == 2
    assert not any("end of the arguments" in key or "cannot read" in key for key in ours)
    scripts = host.scripts.scripts_txt2img, host.scripts.scripts_img2img
    changed = {"DemoFusion/value": True, "Scale/value": 2.5, "Stride/value": 0.3, "Jitter/value": False, "Scale/maximum": 5}
    try:
        texts = {**json.loads(before), **{f"customscript/demofusion.py/txt2img/{k}": v for k, v in changed.items()}}
        file.write_text(json.dumps(texts))
        host.ui.create_ui()
        script = host.script
        values = dict(zip(host.webui.settings.ARGUMENTS, (control.value for control in script.controls)))
        assert script.controls[1].maximum == 5
    finally:
        file.write_text(before)
        host.ui.create_ui()
    assert {name: values[name] for name in ("enabled", "scale", "stride", "jitter")} == dict(
        enabled=ticks, scale=2.5, stride=0.3, jitter=False
    )
    assert values["alpha1"] == 3
    assert host.scripts.scripts_txt2img is scripts[0]


ANOTHER_HOST = """
import sys
from pathlib import Path
tests, checkpoints, data, out = sys.argv[1:]
sys.path[:0] = [tests, str(Path(tests).parent)]
import webui_host
from safetensors.torch import save_file
host = webui_host.start(Path(checkpoints), Path(data))
host.shared.opts.data.update(live_previews_enable=False)
save_file(dict(latents=host.latents(True, 2, sampler_name="DDIM")), out)
assert host.generate(True, 3, sampler_name="DPM++ 2M").images[0].size == (192, 192)
"""


SWITCHES = ["--medvram", "--lowvram", "--opt-sub-quad-attention", "--opt-split-attention-v1"]
if IS_FORGE:  # some of its kind call the latter two otherwise, and have no split attention
    SWITCHES = ["--attention-split", "--attention-pytorch/--use-pytorch-cross-attention", "--vae-in-cpu/--cpu-vae"]


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_hosts_switches_for_memory(host, checkpoints, tmp_path, switches, monkeypatch):
    """A host of its own with one of these switches makes the same picture."""
    known = [name for name in switches.split("/") if not IS_FORGE or name in forge_host.flags(webui_host.WEBUI_DIR)]
    if not known:
        pytest.skip(f"this host has no {switches}")
    monkeypatch.setenv("WEBUI_ARGS", known[0])
    out = tmp_path / "latents.safetensors"
    (tmp_path / "data").mkdir()
    given = map(str, (ROOT / "tests" / "webui", checkpoints, tmp_path / "data", out))
    run = subprocess.run([sys.executable, "-c", ANOTHER_HOST, *given], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert torch.allclose(load_file(out)["latents"], host.latents(True, 2, sampler_name="DDIM"), atol=1e-4)
