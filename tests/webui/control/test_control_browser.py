"""A unit of the real ControlNet as a user sets it, in headless Chromium, with DemoFusion on.

SCREENSHOTS=folder keeps pictures of the form there; docs/webui holds such ones.
"""

import json
import shutil
from pathlib import Path

import control_host
import embedded_controlnet
import pytest
import test_browser
from PIL import Image
from test_browser import FORM, Server, generate, number, open_form, says, shot
from test_controlled_pictures import SIDE, export_to, scene
from webui_host import ROOT

page = test_browser.page
UNIT = "txt2img_controlnet_ControlNet-0"


@pytest.fixture
def server(checkpoints, tmp_path_factory):
    """A WebUI with ControlNet, which can read the embedded checkpoint's tile model, and with this extension."""
    if not control_host.NEIGHBOURS_DIR or not (Path(control_host.NEIGHBOURS_DIR) / control_host.FOLDER).is_dir():
        pytest.skip(f"needs {control_host.FOLDER} in the folder NEIGHBOURS_DIR")
    server = Server(tmp_path_factory.mktemp("a user's data"), checkpoints)
    extensions = server.data / "extensions"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, extensions / "demofusion", ignore=ignored)
    shutil.copytree(Path(control_host.NEIGHBOURS_DIR) / control_host.FOLDER, extensions / control_host.FOLDER, ignore=ignored)
    (extensions / "taught" / "scripts").mkdir(parents=True)
    shutil.copy(embedded_controlnet.__file__, extensions / "taught" / "scripts")
    export_to(extensions / control_host.FOLDER / "models")
    settings = {"show_progress_type": "Full", "sd_model_checkpoint": "demofusion-embedded.safetensors"}
    (server.data / "config.json").write_text(json.dumps(settings))
    server.start()
    yield server
    server.stop()


def test_a_unit_in_the_form(page, server, tmp_path):
    image, caption = scene(4 * SIDE)
    image.resize((SIDE // 2, SIDE // 2)).resize(image.size, Image.Resampling.BICUBIC).save(tmp_path / "hint.png")
    open_form(page, server)
    page.locator("#txt2img_prompt textarea").fill(caption)
    for element, value in [("txt2img_width", SIDE), ("txt2img_height", SIDE), ("txt2img_steps", 12), ("txt2img_seed", 4)]:
        number(page, element, value)
    page.locator("#txt2img_controlnet #controlnet > .label-wrap").click()
    page.locator(f"#{UNIT}_input_image input[type=file]").first.set_input_files(tmp_path / "hint.png")
    model = page.locator(f"#{UNIT}_controlnet_model_dropdown input")
    model.click()
    model.fill(embedded_controlnet.NAME)
    model.press("Enter")
    page.wait_for_timeout(1000)
    if not page.locator(f"#{UNIT}_controlnet_enable_checkbox input").is_checked():
        page.locator(f"#{UNIT}_controlnet_enable_checkbox input").check()
    page.locator(f"#{FORM}_enable > .label-wrap").click()
    says(page, "from 128x128 to 256x256, 2 phases")
    page.wait_for_timeout(1000)
    shot(page, "controlnet-form")
    made = generate(page, server.data)
    shot(page, "controlnet-done")
    with Image.open(made) as picture:
        assert picture.size == (256, 256)
        assert "DemoFusion scale: 2" in picture.info["parameters"]
        assert f"Model: {embedded_controlnet.NAME}" in picture.info["parameters"]
        assert "incomplete" not in picture.info["parameters"]
        closeness(picture, image)

    page.locator(f"#{UNIT}_controlnet_preprocessor_dropdown input").click()
    page.locator(f"#{UNIT}_controlnet_preprocessor_dropdown input").fill("inpaint_only")
    page.locator(f"#{UNIT}_controlnet_preprocessor_dropdown input").press("Enter")
    page.wait_for_timeout(1000)
    page.click("#txt2img_generate")
    page.wait_for_function("document.querySelector('#txt2img_results').innerText.includes('cannot follow windows')")
    shot(page, "controlnet-refused")


def closeness(picture, image):
    import numpy as np
    from test_controlled_pictures import seen

    assert np.abs(seen(picture) - seen(image)).mean() < 0.12
