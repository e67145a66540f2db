"""The way of a new user, in headless Chromium: install from a URL, restart, tick, generate, PNG Info, send back, again.

SCREENSHOTS=folder keeps pictures of the form there; docs/webui holds such ones. The host's buttons are emoji: where they
are made, a font must have these in colour (Debian's package fonts-noto-color-emoji), and says so if none has.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webui_host import IS_FORGE, ROOT, WEBUI_DIR, arguments, pixels, prepare

from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.phases import make_plan

FORM = "script_demofusion"  # what the ids of its elements begin with
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


# An extension that counts what the host's UNet sees, and writes it down when a job is over.
COUNTER = """
from pathlib import Path

from modules import script_callbacks, scripts

FILE = Path(__file__).resolve().parent / "rows"
seen = 0


def count(module, args):
    global seen
    seen += len(args[0])


def watch(model):
    objects = getattr(model, "forge_objects", None)
    unet = objects.unet.model.diffusion_model if objects else model.model.diffusion_model
    unet.register_forward_pre_hook(count)


class Counter(scripts.Script):
    def title(self):
        return "Counter"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process(self, p):
        global seen
        seen = 0

    def postprocess(self, p, processed):
        FILE.write_text(str(seen))


script_callbacks.on_model_loaded(watch)
"""


@pytest.fixture(scope="module")
def page():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    if not CHROMIUM:
        pytest.skip("needs Chromium: CHROMIUM=path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


class Server:
    """A WebUI in a process of its own, which can be started again."""

    def __init__(self, data, checkpoints):
        self.data, self.checkpoints, self.process = data, checkpoints, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, *arguments(self.checkpoints, self.data), "--port", str(self.port)]
        with open(self.data / "log", "a") as log:
            self.process = subprocess.Popen(command, cwd=WEBUI_DIR, stdout=log, stderr=log)
        for _ in range(300):
            assert self.process.poll() is None, "the WebUI ended"
            try:
                urllib.request.urlopen(self.address, timeout=5)
                return
            except OSError:
                time.sleep(1)
        self.stop()
        raise TimeoutError(self.address)

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    """A WebUI without the extension."""
    server = Server(tmp_path_factory.mktemp("a new user's data"), checkpoints)
    # For the pictures: what the host otherwise makes its previews with knows the colours of Stable Diffusion's latents alone.
    prepare(server.data, show_progress_type="Full")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ready(checkpoints, tmp_path_factory):
    """A WebUI with the extension as it is here, which counts model calls, and whose form has been used before."""
    server = Server(tmp_path_factory.mktemp("a user's data"), checkpoints)
    extensions = server.data / "extensions"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, extensions / "demofusion", ignore=ignored)
    (extensions / "counter" / "scripts").mkdir(parents=True)
    (extensions / "counter" / "scripts" / "counter.py").write_text(COUNTER)
    kept = {"txt2img/Checkpoint/value": "one that is gone", "txt2img/Upscaler/value": None, "img2img/Sampler/value": "LCM"}
    kept = {f"customscript/demofusion.py/{path}": value for path, value in kept.items()}
    (server.data / "ui-config.json").write_text(json.dumps(kept))
    prepare(server.data, show_progress_type="Full")
    server.start()
    yield server
    server.stop()


def shot(page, name):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        fonts = subprocess.run(["fc-list", ":lang=und-zsye"], capture_output=True, text=True, check=True).stdout
        assert fonts, "no emoji font: the buttons would be empty boxes; install one, such as fonts-noto-color-emoji"
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def tab(page, name):
    page.locator("#tabs > .tab-nav > button", has_text=name).first.click()


def number(page, element, value):
    box = page.locator(f"#{element} input[type=number]").first
    box.fill(str(value))
    box.press("Tab")


def open_form(page, server):
    page.goto("about:blank")  # a page that waits for its server loads itself again when it is there
    page.goto(server.address)
    page.wait_for_selector("#txt2img_generate", state="visible")


def reload_ui(page):
    """The host's button that loads all scripts again in the same process."""
    tab(page, "Settings")
    page.click("#settings_restart_gradio")
    page.wait_for_timeout(5000)
    page.wait_for_selector("#txt2img_generate", state="visible")
    page.wait_for_selector(f"#{FORM}_enable-visible-checkbox", state="attached")


def readout(page, form=FORM):
    return page.locator(f"#{form}_enable .demofusion-readout").inner_text()


def says(page, text, form=FORM):
    line = f"document.querySelector('#{form}_enable .demofusion-readout')"
    page.wait_for_function(f"text => {line}.innerText.includes(text)", arg=text)


def preset(page):
    """The preset that is chosen; None if none is."""
    page.wait_for_timeout(500)
    return page.evaluate(f"document.querySelector('#{FORM}_preset input:checked')?.value ?? null")


def preset_help(page):
    return page.locator(f"#{FORM}_preset_help .demofusion-preset-help").inner_text()


def choose_preset(page, name):
    page.locator(f"#{FORM}_preset label", has_text=name).click()


def generate(page, data, running=None, tab="txt2img", button=None):
    """The file of the image that is made; running: the name of a picture of the form on the way."""
    before = set((data / "outputs").rglob("*.png")) if (data / "outputs").exists() else set()
    page.click(button or f"#{tab}_generate")
    for _ in range(600):
        new = [path for path in (data / "outputs").rglob("*.png") if path not in before and "grids" not in str(path)]
        if new and page.locator(f"#{tab}_gallery img").count() and page.locator(f"#{tab}_interrupt").is_hidden():
            page.wait_for_timeout(1000)
            return new[0]
        if running and "phase 2 of" in page.locator("#txt2img_results").inner_text():
            shot(page, running)
            running = None
        page.wait_for_timeout(200)
    raise TimeoutError("no image")


def test_a_new_user(page, server, tmp_path_factory):
    data = server.data
    clone = tmp_path_factory.mktemp("remote") / "demofusion.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(clone)], check=True)

    open_form(page, server)
    assert page.locator(f"#{FORM}_enable").count() == 0
    tab(page, "Extensions")
    page.locator("#tabs_extensions .tab-nav button", has_text="Install from URL").click()
    page.get_by_label("URL for extension's git repository").fill(clone.as_uri())
    page.get_by_role("button", name="Install", exact=True).click()
    page.wait_for_function("document.querySelector('#extension_install_result').innerText.includes('Installed into')")
    page.locator("#tabs_extensions .tab-nav button", has_text="Installed").click()
    page.get_by_role("button", name="Apply and quit").click()  # "... and restart UI" where a start script restarts it
    server.process.wait(timeout=60)
    (data / "log").rename(data / "log before")  # without the extension the host cannot build this checkpoint, and says so
    server.start()
    open_form(page, server)
    reload_ui(page)
    reload_ui(page)

    page.locator("#txt2img_prompt textarea").fill("two purple striped discs on snow")
    for element, value in [("txt2img_width", 128), ("txt2img_height", 128), ("txt2img_steps", 20), ("txt2img_seed", 1)]:
        number(page, element, value)
    assert readout(page) == ""
    shot(page, "closed")

    page.locator(f"#{FORM}_enable > .label-wrap").click()  # opens the form and ticks the box
    says(page, "from 128x128 to 256x256, 2 phases, 248 model calls")  # 40 of the base, and 8 steps of 9 + 4 views
    says(page, "fits in memory")
    assert "about" not in readout(page), "no job has run"
    assert preset(page) == "Fast"
    page.locator(f"#{FORM}_advanced .label-wrap").click()
    page.wait_for_timeout(500)
    shot(page, "open")
    page.locator(f"#{FORM}_advanced .label-wrap").click()

    number(page, f"{FORM}_scale", 4)
    says(page, "3 phases")  # it doubles
    number(page, f"{FORM}_scale", 2)
    says(page, "248 model calls")

    assert preset_help(page).startswith("Fast: ")
    assert "6.2 times the base image's model calls" in preset_help(page)
    page.locator(f"#{FORM}_preset input[value=Fast]").focus()
    # Forge's gradio 4 gives each of them a name of its own, by which arrows do not go from one to the other.
    for key in ("Shift+Tab", "Space") if IS_FORGE else ("ArrowLeft",):
        page.keyboard.press(key)
    page.wait_for_function("document.querySelector('.demofusion-preset-help').innerText.startsWith('Paper: ')")
    assert "14 times the base image's model calls" in preset_help(page)
    for name in PRESETS:
        radio = page.locator(f"#{FORM}_preset input[value={name}]")
        described = radio.evaluate("radio => [radio.title, radio.closest('label').title]")
        assert described[0] == described[1]
        assert described[0].startswith(f"{name}: ")
        assert "times the base image's model calls" in described[0]
    says(page, "from 128x128 to 256x256, 2 phases, 560 model calls")
    page.locator(f"#{FORM}_advanced .label-wrap").click()
    number(page, f"{FORM}_denoising_strength", 0.4)
    says(page, "248 model calls")
    assert preset(page) is None, "late, and otherwise the paper's"
    assert preset_help(page) == "Your own settings: 6.2 times the base image's model calls."
    choose_preset(page, "Turbo")
    most = page.locator(f"#{FORM}_most_phase_steps input[type=number]")
    assert most.input_value() == str(PRESETS["Turbo"]["most_phase_steps"])
    choose_preset(page, "Fast")
    number(page, f"{FORM}_most_phase_steps", 10)
    assert preset(page) is None
    number(page, f"{FORM}_most_phase_steps", 0)
    page.wait_for_function(f"document.querySelector('#{FORM}_preset input:checked')?.value === 'Fast'")
    choose_preset(page, "Paper")
    says(page, "560 model calls")
    page.locator(f"#{FORM}_advanced .label-wrap").click()
    number(page, "txt2img_cfg_scale", 1)
    says(page, "280 model calls" if IS_FORGE else "300 model calls")  # Forge leaves the negative prompt out of the base, too
    number(page, "txt2img_cfg_scale", 7)
    page.click("#txt2img_hr-visible-checkbox")
    says(page, "cannot run: Hires. fix is on too, and only one of the two can enlarge the image; untick one of them")
    page.click("#txt2img_hr-visible-checkbox")

    choose_preset(page, "Fast")
    says(page, "248 model calls")

    first = generate(page, data, "running")
    says(page, "248 model calls, about ")
    shot(page, "done")
    with Image.open(first) as image:
        assert image.size == (256, 256)
        assert "DemoFusion scale: 2" in image.info["parameters"]

    for element in ("txt2img_width", "txt2img_height"):
        number(page, element, 2048)
    number(page, f"{FORM}_scale", 8)
    number(page, "txt2img_batch_size", 8)
    says(page, "from 2048x2048 to 16384x16384")
    says(page, "does not fit: the pictures of 16384x16384 take 96.0 GiB of main memory, and ")
    form, column = (page.locator(where).bounding_box() for where in (f"#{FORM}_enable", "#txt2img_settings"))
    assert form["x"] + form["width"] <= column["x"] + column["width"], "a long line makes the form wider than its column"
    page.click("#txt2img_generate")
    page.wait_for_function("document.querySelector('#txt2img_results').innerText.includes('the pictures of 16384x16384 take')")
    for element, value in [("txt2img_width", 128), ("txt2img_height", 128), ("txt2img_batch_size", 1)]:
        number(page, element, value)
    number(page, f"{FORM}_scale", 2)
    says(page, "from 128x128 to 256x256")

    number(page, f"{FORM}_scale", 4)
    page.locator(f"#{FORM}_advanced .label-wrap").click()
    number(page, f"{FORM}_alpha1", 1)
    assert preset(page) is None
    page.locator(f"#{FORM}_enable > .label-wrap").click()
    assert not page.locator(f"#{FORM}_enable-visible-checkbox").is_checked()
    tab(page, "PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(first)
    page.wait_for_function("document.querySelector('#tab_pnginfo').innerText.includes('DemoFusion scale')")
    page.locator("#tab_pnginfo button", has_text="txt2img").click()
    page.wait_for_function(f"document.querySelector('#{FORM}_enable-visible-checkbox').checked")
    says(page, "248 model calls")
    assert page.locator(f"#{FORM}_alpha1 input[type=number]").input_value() == "3"
    assert preset(page) == "Fast", "as the pasted settings say"
    second = generate(page, data)
    with Image.open(first) as a, Image.open(second) as b:
        assert np.array_equal(pixels(a), pixels(b))
        assert a.info == b.info

    number(page, "txt2img_batch_count", 2)
    number(page, f"{FORM}_phase_steps", 60)  # that *Skip* comes while the first picture is made, on a busy machine too
    says(page, "664 model calls, about ")  # 40 of the base, and 24 steps of 9 + 4 views
    before = set((data / "outputs" / "txt2img-images").rglob("*.png"))
    page.click("#txt2img_generate")
    page.wait_for_function("document.querySelector('#txt2img_results').innerText.includes('phase 2 of')")
    page.click("#txt2img_skip")
    for _ in range(600):
        new = sorted(set((data / "outputs" / "txt2img-images").rglob("*.png")) - before)
        if len(new) == 2:
            break
        page.wait_for_timeout(200)
    page.wait_for_timeout(1000)
    assert [Image.open(path).size for path in new] == [(128, 128), (256, 256)]

    page.locator("#txt2img_prompt textarea").fill("a disc\nSteps: 4, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64")
    page.click("#paste")
    page.wait_for_function(f"!document.querySelector('#{FORM}_enable-visible-checkbox').checked")

    extension = data / "extensions" / "demofusion"
    written = subprocess.run(["git", "status", "--porcelain"], cwd=extension, check=True, capture_output=True, text=True)
    assert written.stdout == ""
    server.stop()
    server.start()
    open_form(page, server)
    page.locator(f"#{FORM}_enable > .label-wrap").click()
    says(page, ", about ")  # the browser remembers the pace; of the nearest size, since the form starts at 512x512

    from_pictures(page, data, first)

    errors = [line for line in (data / "log").read_text().splitlines() if "demofusion" in line.lower() and "rror" in line]
    assert not errors


def from_pictures(page, data, large):
    """The gallery's button, and a picture that is dropped on img2img."""
    page.locator("#txt2img_prompt textarea").fill("two purple striped discs on snow")
    for element, value in [("txt2img_width", 128), ("txt2img_height", 128), ("txt2img_steps", 20), ("txt2img_seed", 1)]:
        number(page, element, value)
    page.locator(f"#{FORM}_enable > .label-wrap").click()  # off again
    base = generate(page, data)
    with Image.open(base) as image:
        assert image.size == (128, 128)
    number(page, "txt2img_seed", 7)
    made = generate(page, data, button=f"#{FORM}_gallery")
    shot(page, "gallery")
    with Image.open(made) as image, Image.open(large) as before:
        assert image.size == (256, 256)
        assert "Seed: 1," in image.info["parameters"], "the picture's own"
        assert "DemoFusion start: Picture 128x128" in image.info["parameters"]
        apart = np.abs(pixels(image).astype(float) - pixels(before)).mean()
        assert apart < 12, "nearly what txt2img makes at once: the base has gone through the VAE once more"
    again = generate(page, data)
    with Image.open(again) as image:
        assert image.size == (128, 128), "the button's request is gone"

    form = f"{FORM}_img2img"
    tab(page, "img2img")
    page.locator("#img2img_image input[type=file]").first.set_input_files(large)
    page.locator("#img2img_prompt textarea").fill("two purple striped discs on snow")
    page.locator(f"#{form}_enable > .label-wrap").click()
    number(page, "img2img_steps", 20)
    number(page, "img2img_denoising_strength", 0.4)
    says(page, "from 256x256 to 512x512, windows of 128x128, 1 phase, 832 model calls", form)  # 8 steps of 36 + 16 views
    says(page, "of main memory for its pictures", form)
    page.locator(f"#{form}_advanced .label-wrap").click()
    assert page.locator(f"#{form}_denoising_strength").is_hidden(), "the tab's own counts"
    page.locator(f"#{form}_start_from label", has_text="img2img result").click()
    page.wait_for_timeout(500)
    assert page.locator(f"#{form}_denoising_strength").is_visible()
    page.locator(f"#{form}_start_from label", has_text="Picture").click()
    page.wait_for_timeout(500)
    page.locator(f"#{form}_enable").scroll_into_view_if_needed()
    shot(page, "img2img")
    page.locator(f"#{form}_advanced .label-wrap").click()
    enlarged = generate(page, data, tab="img2img")
    page.locator("#img2img_gallery").scroll_into_view_if_needed()
    shot(page, "img2img-done")
    with Image.open(enlarged) as image:
        assert image.size == (512, 512)
        assert "DemoFusion start: Picture 256x256" in image.info["parameters"]
    page.locator(f"#{form}_enable > .label-wrap").click()
    page.click("#img2img_send_to_inpaint")
    page.wait_for_timeout(2000)
    assert not page.locator(f"#{form}_enable-visible-checkbox").is_checked(), "it would be enlarged once more"


# ------------------------------------------------------------------------------------------------------------ the second pass


def shown(page, name, form=FORM):
    """What a control of the form shows: a list, a number or a text."""
    return page.locator(f"#{form}_{name}").locator("input[type=number], input:not([type]), textarea").first.input_value()


def choose(page, name, choice, form=FORM):
    page.locator(f"#{form}_{name} input").first.click()
    page.locator(f'#{form}_{name} .options li[aria-label="{choice}"]').click()


def hint_at(page, element):
    """What the browser shows when the pointer rests on the middle of an element: the innermost title there."""
    element.scroll_into_view_if_needed()
    element.hover(force=True)
    page.wait_for_timeout(50)
    return element.evaluate(
        """element => {
            const box = element.getBoundingClientRect();
            const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            if (!at || !(element.contains(at) || at.contains(element))) return "something else is there";
            return at.closest("[title]")?.title ?? "";
        }"""
    )


def test_every_hint_is_ours(page, ready):
    """The host has hints for texts, whosever they are, such as "Denoising strength"; and puts them there after a while."""
    open_form(page, ready)
    help = {name: field.metadata["help"] for name, field in DemoFusionConfig.__dataclass_fields__.items()}
    for name, form in (("txt2img", FORM), ("img2img", f"{FORM}_img2img")):
        tab(page, name)
        for part in ("enable", "second_pass", "advanced"):
            page.locator(f"#{form}_{part} > .label-wrap").click()
            page.wait_for_timeout(500)
        if name == "img2img":
            page.locator(f"#{form}_start_from label", has_text="img2img result").click()
        choose(page, "upscaler", "None", form)  # of which the host has a hint, too
        page.wait_for_timeout(2500)
        config = "gradio_config.components.map(({props}) => [props.elem_id ?? '', props.webui_tooltip ?? ''])"
        ours = {id: text for id, text in page.evaluate(config) if id.startswith(f"{FORM}_")}
        checked = []
        for id, text in ours.items():
            control = page.locator(f"#{id}")
            if not text or not id.startswith(f"{form}_") or not control.count() or not control.is_visible():
                continue
            setting = id.removeprefix(f"{form}_")
            assert help.get(setting, text) == text
            for where in ("label span", "[data-testid=block-info]", "input", "textarea", "button"):
                for part in control.locator(where).all():
                    if part.is_visible():
                        assert hint_at(page, part) == text, (id, where)
            checked.append(setting)
        absent = {"blur_sigma_end", *(["window"] if name == "txt2img" else [])}
        assert set(help) - set(checked) == absent
        theirs = page.evaluate(
            """form => [...document.querySelectorAll(`#${form}_enable [title]`)]
                .filter(element => !element.closest(".options") && Object.values(titles).includes(element.title))
                .map(element => element.outerHTML)""",
            form,
        )
        assert theirs == []
        unhinted = page.evaluate(
            """form => [...document.querySelectorAll(`#${form}_enable [id^=${form}]`)].map(element => element.id)
                .filter(id => gradio_config.components.some(({type, props}) => props.elem_id === id && props.visible &&
                    ["slider", "dropdown", "textbox", "checkbox", "radio"].includes(type) && !props.webui_tooltip))""",
            form,
        )
        assert unhinted == [f"{form}_preset"], "each of the presets has a hint of its own"


def calls(ready):
    """What the UNet saw in the last job."""
    file = ready.data / "extensions" / "counter" / "scripts" / "rows"
    seen = int(file.read_text())
    file.unlink()
    return seen


def test_a_second_pass_of_its_own(page, ready):
    data = ready.data
    open_form(page, ready)
    page.locator("#txt2img_prompt textarea").fill("two purple striped discs on snow")
    for element, value in [("txt2img_width", 128), ("txt2img_height", 64), ("txt2img_steps", 20), ("txt2img_seed", 1)]:
        number(page, element, value)
    page.locator(f"#{FORM}_enable > .label-wrap").click()
    page.locator(f"#{FORM}_second_pass > .label-wrap").click()
    first = {"phase_checkpoint": "Use same checkpoint", "phase_sampler": "Use same sampler", "upscaler": "Bicubic"}
    first |= {"phase_schedule": "Use same scheduler", "phase_cfg_scale": "0", "phase_prompt": "", "resize_width": "0"}
    assert {name: shown(page, name) for name in first} == first, "whatever is gone since the form was used"
    assert shown(page, "phase_sampler", f"{FORM}_img2img") == "LCM", "as it was kept"

    # A checkpoint comes, and is found.
    for kind in (".safetensors", ".yaml"):
        shutil.copy(ready.checkpoints / f"demofusion-embedded{kind}", ready.checkpoints / f"just come, 2{kind}")
    page.locator(f"#{FORM}_phase_checkpoint input").first.click()
    assert not page.locator(f"#{FORM}_phase_checkpoint .options li", has_text="just come").count()
    page.keyboard.press("Escape")
    page.click(f"#{FORM}_phase_checkpoint_refresh")
    page.wait_for_timeout(2000)

    choose_preset(page, "Few-step")
    page.locator(f"#{FORM}_phase_prompt textarea").fill("<lora:lcm-lora-sdv1-5:1>")
    few = DemoFusionConfig.preset("Few-step", scale=2.0)
    says(page, f" {make_plan((8, 16), 20, few, branches=(2, 1)).evaluations} model calls")
    assert [shown(page, name) for name in ("phase_sampler", "phase_schedule")] == [few.phase_sampler, few.phase_schedule]
    page.evaluate("document.activeElement.blur()")
    page.locator(f"#{FORM}_enable").scroll_into_view_if_needed()
    shot(page, "second-pass")
    choose_preset(page, "Fast")
    page.wait_for_function(f"document.querySelector('#{FORM}_phase_sampler input').value === 'Use same sampler'")

    chosen = {"phase_checkpoint": "just come, 2", "phase_sampler": "LCM", "phase_schedule": "Karras", "upscaler": "Lanczos"}
    for name, choice in chosen.items():
        choose(page, name, choice)
    number(page, f"{FORM}_phase_cfg_scale", 1)
    typed = {"phase_prompt": 'two "purple" discs,\nstriped: sharp', "phase_negative_prompt": "blur, rings"}
    for name, text in typed.items():
        page.locator(f"#{FORM}_{name} textarea").fill(text)
    number(page, f"{FORM}_resize_width", 384)
    assert preset(page) is None, "its sampler and its guidance are not Fast's"
    fast = DemoFusionConfig.preset("Fast")
    plan = make_plan((8, 16), 20, fast, branches=(2, 1), final=(24, 48))
    says(page, f"from 128x64 to 384x192, {len(plan.phases)} phases, {plan.evaluations} model calls")
    number(page, f"{FORM}_resize_height", 384)
    says(page, "cannot run: 384x384 has not the aspect of 128x64; resize to 768x384 or 384x192, or change the aspect first")
    number(page, f"{FORM}_resize_height", 0)
    says(page, f"{plan.evaluations} model calls")

    made = generate(page, data)
    assert calls(ready) == plan.evaluations
    with Image.open(made) as image:
        assert image.size == (384, 192)
        parameters = image.info["parameters"]
    own = "Euler a" if IS_FORGE else "DPM++ 2M"  # the host's first
    assert f"Sampler: {own}," in parameters, "the base's"

    # PNG Info brings it back.
    page.reload()
    page.wait_for_selector("#txt2img_generate", state="visible")
    tab(page, "PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(made)
    page.wait_for_function("document.querySelector('#tab_pnginfo').innerText.includes('DemoFusion scale')")
    page.locator("#tab_pnginfo button", has_text="txt2img").click()
    page.wait_for_function(f"document.querySelector('#{FORM}_enable-visible-checkbox').checked")
    says(page, f"from 128x64 to 384x192, {len(plan.phases)} phases, {plan.evaluations} model calls")
    assert page.locator(f"#{FORM}_phase_sampler").is_visible(), "its part of the form is open"
    expected = {**chosen, **typed, "phase_cfg_scale": "1", "resize_width": "384", "resize_height": "0"}
    assert {name: shown(page, name) for name in expected} == expected
    again = generate(page, data)
    with Image.open(made) as a, Image.open(again) as b:
        assert np.array_equal(pixels(a), pixels(b))
        assert a.info == b.info

    # What is not there is shown, and refused by its name; and without the setting the form is as it was.
    page.locator("#txt2img_prompt textarea").fill(parameters.replace("phase sampler: LCM", "phase sampler: Euler of tomorrow"))
    page.click("#paste")
    says(page, "cannot run: there is no sampler 'Euler of tomorrow'; there are: ")
    assert shown(page, "phase_sampler") == "Euler of tomorrow"
    page.locator(f"#{FORM}_phase_sampler input").first.click()
    page.keyboard.press("Tab")
    assert shown(page, "phase_sampler") == "Euler of tomorrow"
    page.click("#txt2img_generate")
    page.wait_for_function("document.querySelector('#txt2img_results').innerText.includes('there is no sampler')")
    line = readout(page).removeprefix("cannot run: ")
    assert f"DemoFusion: {line}" in page.locator("#txt2img_results").inner_text().splitlines()
    page.locator("#txt2img_prompt textarea").fill("a disc\nSteps: 20, Seed: 1, Size: 128x64, DemoFusion scale: 2")
    page.click("#paste")
    page.wait_for_function(f"document.querySelector('#{FORM}_phase_sampler input').value === 'Use same sampler'")
    assert {name: shown(page, name) for name in first} == first
