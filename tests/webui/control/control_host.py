"""The real WebUI with the ControlNet extension from NEIGHBOURS_DIR and the tiny models of control_models.py.

A test file that wants it in place of the host without the extension says `host = control_host.host`. There is one host in
a process, so such files run apart from the others, in one pytest for all of them.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import control_models
import numpy as np
import pytest
import webui_host
from PIL import Image

NEIGHBOURS_DIR = os.environ.get("NEIGHBOURS_DIR")
FOLDER = "sd-webui-controlnet"
CONTROL_TYPES = {  # kind of model: what the extension calls it
    "controlnet": "ControlNet",
    "shuffle": "ControlNet",
    "union": "ControlNetUnion",
    "control_lora": "ControlLoRA",
    "instant_id": "InstantID",
    "t2i_adapter": "T2I_Adapter",
    "t2i_adapter_light": "T2I_Adapter",
    "lllite": "Controlllite",
    "ip_adapter": "IPAdapter",
    "style_adapter": "T2I_StyleAdapter",
    "revision": "ReVision",
}


_running = []


def _start(checkpoints, data):
    shutil.copytree(Path(NEIGHBOURS_DIR) / FOLDER, data / "extensions" / FOLDER, ignore=shutil.ignore_patterns(".git"))
    host = webui_host.start(checkpoints, data)
    if script(host) is None:
        pytest.skip(f"{FOLDER} does not load here: it needs packages of its own")
    host.load(control_models.make_relative(checkpoints))
    return host


@pytest.fixture(scope="session")
def host(checkpoints, tmp_path_factory):
    """The host with the relative loaded and a control model of each kind that the extension finds by its file's name."""
    if not NEIGHBOURS_DIR or not (Path(NEIGHBOURS_DIR) / FOLDER).is_dir():
        pytest.skip(f"needs {FOLDER} in the folder NEIGHBOURS_DIR")
    if _running:
        yield _running[0]
        return
    if "modules.shared" in sys.modules:
        pytest.skip("a host without ControlNet runs in this process: these files need one of their own")
    started = _start(checkpoints, tmp_path_factory.mktemp("a controlled host's data"))
    from scripts import global_state

    with control_models.narrow():
        control_models.make_all(Path(global_state.cn_models_dir))
        control_models.add_style_preprocessor()
        control_models.add_revision_preprocessor()
        global_state.update_cn_models()
        _running.append(started)
        yield started


def script(host, img2img=False):
    """The extension's script, of which each tab has one."""
    runner = host.scripts.scripts_img2img if img2img else host.scripts.scripts_txt2img
    return next((script for script in runner.alwayson_scripts if script.title() == "ControlNet"), None)


def unit(model, image=None, **fields):
    """A unit as the API takes it; model: a file's name without its ending. No preprocessor, and only the picture comes back."""
    if image is not None:
        fields["image"] = webui_host.encoded(image)
    return {"enabled": True, "module": "none", "model": model, "save_detected_map": False, **fields}


@contextmanager
def sdxl(host):
    """Meanwhile SDXL's relative is loaded, and there is a control model of each of its kinds; then the first one's again."""
    from scripts import global_state

    name = control_models.make_xl_relative(Path(host.shared.cmd_opts.ckpt_dir))
    control_models.make_all_xl(Path(global_state.cn_models_dir))
    global_state.update_cn_models()
    previews = host.shared.opts.data["show_progress_type"]
    host.shared.opts.data["show_progress_type"] = "Approx cheap"  # the usual one is a download for SDXL
    host.load(name)
    try:
        yield
    finally:
        host.shared.opts.data["show_progress_type"] = previews
        host.load(control_models.RELATIVE)


def _models():
    """What controls the loaded checkpoint."""
    from modules import shared

    return control_models.XL_MODELS if shared.sd_model.is_sdxl else control_models.MODELS


def units(kind, image, **fields):
    """The units, a list, that a model of this kind needs to be used; the fields go to its own, which is the last."""
    name, _ = _models()[kind]
    if kind == "ip_adapter":
        return [unit(name, **{"ipadapter_input": control_models.ip_adapter_input(), **fields})]
    if kind == "instant_id":
        return [*units("ip_adapter", image), unit(name, image, **fields)]
    if kind == "union":
        fields = {"union_control_type": "Depth", **fields}
    if kind == "style_adapter":
        fields = {"module": control_models.STYLE_PREPROCESSOR, **fields}
    if kind == "revision":
        fields = {"module": control_models.REVISION_PREPROCESSOR, **fields}
    return [unit(name, image, **fields)]


def scripts(units):
    """What a request has as `alwayson_scripts` for these units."""
    return {"ControlNet": {"args": units}}


def ramp(width, height, tiling=False):
    """A picture whose colours say where they are: red grows to the right, green downwards; to the middle, where it tiles."""
    columns, rows = (_along(side, tiling) for side in (width, height))
    return Image.fromarray(np.stack(np.broadcast_arrays(columns[None], rows[:, None], np.uint8(128)), 2).copy())


def _along(side, tiling):
    along = (np.arange(side) + 0.5) / side
    return np.round(255 * (1 - np.abs(2 * along - 1) if tiling else along)).astype(np.uint8)
