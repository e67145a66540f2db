"""Pictures of the embedded checkpoint that the real ControlNet steers with its tile model, in the phases too.

SCREENSHOTS=folder keeps them there, beside the same without and the control image.
"""

import os
from pathlib import Path

import control_host
import embedded_controlnet
import numpy as np
import pytest
from command import assert_same
from host_controls import export_to
from PIL import Image

from training.scenes import Scene, render

host = control_host.host
SIDE = 128  # of the images that the checkpoint was made for


@pytest.fixture(scope="module")
def steered(host, tmp_path_factory):
    """The host with the embedded checkpoint loaded, and its tile model among the extension's."""
    from scripts import global_state

    export_to(global_state.cn_models_dir)
    assert embedded_controlnet.teach(host.scripts.scripts_data)
    global_state.update_cn_models()
    host.load("demofusion-embedded.safetensors")
    yield host
    import control_models

    host.load(control_models.RELATIVE)


def scene(side):
    """A picture as the checkpoint has learnt them, three squares that lie across the windows' borders too, and its caption."""
    generator = np.random.default_rng([0, 5])
    drawn = Scene.draw(generator)
    picture = Image.fromarray(render(drawn, generator).round().astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.LANCZOS), drawn.caption


def seen(image):
    """A picture as the tile model's hint has it: small, in 0..1."""
    return np.asarray(image.convert("RGB").resize((SIDE // 4, SIDE // 4), Image.Resampling.BOX), float) / 255


def keep(name, image):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        image.save(Path(folder) / f"{name}.png")


@pytest.mark.parametrize("scale", [2, 4])
def test_the_picture_follows_the_hint_everywhere(steered, scale):
    """Also where windows meet: its error there is not larger than elsewhere."""
    image, caption = scene(scale * SIDE)
    settings = dict(steps=12, width=SIDE, height=SIDE, cfg_scale=5, prompt=caption, seed=4)
    more = {"phase_steps": 12, "doubling": True}
    blurred = image.resize((SIDE // 2, SIDE // 2)).resize(image.size, Image.Resampling.BICUBIC)
    unit = control_host.unit(embedded_controlnet.NAME, blurred)
    with_hint = steered.generate(True, scale, more, alwayson_scripts=control_host.scripts([unit]), **settings).images[0]
    without = steered.generate(True, scale, more, **settings).images[0]
    for name, picture in (("with", with_hint), ("without", without), ("hint", blurred)):
        keep(f"control-{scale}x-{name}", picture)
    assert with_hint.size == without.size == image.size
    near, far = (np.abs(seen(picture) - seen(image)).mean(2) for picture in (with_hint, without))
    assert near.mean() < 0.5 * far.mean()
    # Windows of half a stride apart meet at every 1 / (2 * scale) of the picture.
    borders = np.zeros(near.shape, bool)
    for number in range(1, 2 * scale):
        at = round(near.shape[0] * number / (2 * scale))
        borders[at - 1 : at + 1], borders[:, at - 1 : at + 1] = True, True
    assert near[borders].mean() < 1.5 * near[~borders].mean()


@pytest.mark.parametrize(("scale", "h", "w", "settings"), [(2, 16, 16, {}), (4, 16, 24, {"doubling": True})])
def test_same_latents_as_the_command(steered, options, monkeypatch, tmp_path, scale, h, w, settings):
    """A map of few colours, at whole scales: both enlarge it to the bit alike."""
    image, _ = scene(SIDE)
    path = tmp_path / "map.png"
    image.resize((8 * w, 8 * h)).quantize(24).convert("RGB").save(path)
    unit = control_host.unit(embedded_controlnet.NAME, Image.open(path))
    scripts = control_host.scripts([unit])
    assert_same(steered, options, monkeypatch, tmp_path, scale, h, w, settings, path, alwayson_scripts=scripts)
