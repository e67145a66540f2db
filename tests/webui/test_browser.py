"""The way of a new user, in headless Chromium: install from a URL, restart, tick, generate, PNG Info, send back, again.

SCREENSHOTS=folder keeps pictures of the form there; docs/webui holds such ones.
"""

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
from webui_host import ROOT, WEBUI_DIR, arguments

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


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
        for _ in range(120):
            assert self.process.poll() is None, "the WebUI ended"
            try:
                urllib.request.urlopen(self.address, timeout=5)
                return
            except OSError:
                time.sleep(1)
        raise TimeoutError(self.address)

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    """A WebUI without the extension."""
    server = Server(tmp_path_factory.mktemp("a new user's data"), checkpoints)
    server.start()
    yield server
    server.stop()


def shot(page, name):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png")


def tab(page, name):
    page.locator("#tabs > .tab-nav > button", has_text=name).first.click()


def number(page, element, value):
    box = page.locator(f"#{element} input[type=number]").first
    box.fill(str(value))
    box.press("Tab")


def open_form(page, server):
    page.goto(server.address)
    page.wait_for_selector("#txt2img_generate", state="visible")


def reload_ui(page):
    """The host's button that loads all scripts again in the same process."""
    tab(page, "Settings")
    page.click("#settings_restart_gradio")
    page.wait_for_timeout(5000)
    page.wait_for_selector("#txt2img_generate", state="visible")
    page.wait_for_selector("#script_demofusion_enable-visible-checkbox", state="attached")


def readout(page):
    return page.locator(".demofusion-readout").inner_text()


def says(page, text):
    page.wait_for_function("text => document.querySelector('.demofusion-readout').innerText.includes(text)", arg=text)


def preset(page):
    """The preset that is chosen; None if none is."""
    page.wait_for_timeout(500)
    return page.evaluate("document.querySelector('#script_demofusion_preset input:checked')?.value ?? null")


def choose_preset(page, name):
    page.locator("#script_demofusion_preset label", has_text=name).click()


def generate(page, data):
    before = set((data / "outputs").rglob("*.png")) if (data / "outputs").exists() else set()
    page.click("#txt2img_generate")
    for _ in range(600):
        new = [path for path in (data / "outputs").rglob("*.png") if path not in before]
        if new and page.locator("#txt2img_gallery img").count():
            page.wait_for_timeout(1000)
            return new[0]
        if "phase 2 of" in page.locator("#txt2img_results").inner_text():
            shot(page, "running")
        page.wait_for_timeout(200)
    raise TimeoutError("no image")


def test_a_new_user(page, server, tmp_path_factory):
    data = server.data
    clone = tmp_path_factory.mktemp("remote") / "demofusion.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(clone)], check=True)

    open_form(page, server)
    assert page.locator("#script_demofusion_enable").count() == 0
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

    page.locator("#script_demofusion_enable > .label-wrap").click()  # opens the form and ticks the box
    says(page, "from 128x128 to 512x512")
    assert "3 phases" in readout(page), "Fast, which doubles"
    for element in ("txt2img_width", "txt2img_height"):
        number(page, element, 1024)
    says(page, "from 1024x1024 to 4096x4096")
    form, column = (page.locator(where).bounding_box() for where in ("#script_demofusion_enable", "#txt2img_settings"))
    assert form["x"] + form["width"] <= column["x"] + column["width"], "a long line makes the form wider than its column"
    for element in ("txt2img_width", "txt2img_height"):
        number(page, element, 128)
    number(page, "script_demofusion_scale", 2)
    says(page, "248 model calls")  # 40 of the base, and 8 steps of 9 + 4 views
    choose_preset(page, "Paper")
    says(page, "560 model calls")
    assert readout(page).startswith("from 128x128 to 256x256, 2 phases, 560 model calls, +")
    page.locator("#script_demofusion_advanced .label-wrap").click()
    number(page, "script_demofusion_denoising_strength", 0.4)
    says(page, "248 model calls")
    assert preset(page) is None, "late, and otherwise the paper's"
    choose_preset(page, "Turbo")
    assert page.locator("#script_demofusion_phase_steps input[type=number]").input_value() == "18"
    number(page, "script_demofusion_phase_steps", 0)
    page.wait_for_function("document.querySelector('#script_demofusion_preset input:checked')?.value === 'Fast'")
    choose_preset(page, "Paper")
    says(page, "560 model calls")
    page.locator("#script_demofusion_advanced .label-wrap").click()
    number(page, "txt2img_cfg_scale", 1)
    says(page, "300 model calls")
    number(page, "txt2img_cfg_scale", 7)
    page.click("#txt2img_hr-visible-checkbox")
    says(page, "Hires. fix is ticked")
    page.click("#txt2img_hr-visible-checkbox")
    page.locator("#script_demofusion_advanced .label-wrap").click()
    page.wait_for_timeout(500)
    shot(page, "open")
    page.locator("#script_demofusion_advanced .label-wrap").click()

    first = generate(page, data)
    shot(page, "done")
    with Image.open(first) as image:
        assert image.size == (256, 256)
        assert "DemoFusion scale: 2" in image.info["parameters"]

    number(page, "script_demofusion_scale", 4)
    page.locator("#script_demofusion_advanced .label-wrap").click()
    number(page, "script_demofusion_alpha1", 1)
    assert preset(page) is None
    page.locator("#script_demofusion_enable > .label-wrap").click()
    assert not page.locator("#script_demofusion_enable-visible-checkbox").is_checked()
    tab(page, "PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(first)
    page.wait_for_function("document.querySelector('#tab_pnginfo').innerText.includes('DemoFusion scale')")
    page.locator("#tab_pnginfo button", has_text="txt2img").click()
    page.wait_for_function("document.querySelector('#script_demofusion_enable-visible-checkbox').checked")
    says(page, "560 model calls")
    assert page.locator("#script_demofusion_alpha1 input[type=number]").input_value() == "3"
    assert preset(page) == "Paper", "as the pasted settings say"
    second = generate(page, data)
    with Image.open(first) as a, Image.open(second) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert a.info == b.info

    number(page, "txt2img_batch_count", 2)
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
    page.wait_for_function("!document.querySelector('#script_demofusion_enable-visible-checkbox').checked")

    extension = data / "extensions" / "demofusion"
    written = subprocess.run(["git", "status", "--porcelain"], cwd=extension, check=True, capture_output=True, text=True)
    assert written.stdout == ""
    errors = [line for line in (data / "log").read_text().splitlines() if "demofusion" in line.lower() and "rror" in line]
    assert not errors
