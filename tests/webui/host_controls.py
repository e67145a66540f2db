"""The embedded checkpoint's tile ControlNet in a host of the tests, for jobs that are compared between hosts.

AUTOMATIC1111's WebUI has ControlNet as an extension, from the folder NEIGHBOURS_DIR; Forge has one of its own.
"""

import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forge_models
import webui_host

sys.path.append(str(Path(__file__).resolve().parent / "control"))
import embedded_controlnet  # noqa: E402

FOLDER = "sd-webui-controlnet"
ABSENT = f"one host has no ControlNet: AUTOMATIC1111's, as the other one, needs {FOLDER} in NEIGHBOURS_DIR, and its packages"


def add_extension(data):
    """Before the host starts: what it needs to have ControlNet, as far as it is there."""
    folder = Path(os.environ.get("NEIGHBOURS_DIR", "")) / FOLDER
    if not webui_host.IS_FORGE and "NEIGHBOURS_DIR" in os.environ and folder.is_dir():
        shutil.copytree(folder, data / "extensions" / FOLDER, ignore=shutil.ignore_patterns(".git"))


@functools.cache
def model_of(host):
    """The tile ControlNet's name in the host's list; None where the host has no ControlNet."""
    titles = [script.title() for script in host.scripts.scripts_txt2img.alwayson_scripts]
    if "ControlNet" not in titles:
        return None
    if host.is_forge:
        lists = importlib.import_module("lib_controlnet.global_state")
        folder, update, names = lists.controlnet_dir, lists.update_controlnet_filenames, lists.get_all_controlnet_names
        forge_models.teach_controlnet(embedded_controlnet.NAME)
    else:
        lists = importlib.import_module("scripts.global_state")
        folder, update, names = lists.cn_models_dir, lists.update_cn_models, lambda: lists.cn_models
        assert embedded_controlnet.teach(host.scripts.scripts_data)
    export_to(folder)
    update()
    return next(name for name in names() if name.startswith(embedded_controlnet.NAME))


def export_to(folder):
    """Write the tile ControlNet into a folder, as both read it."""
    write = "import sys; from pathlib import Path; from training.export_webui import export_controlnet as write; "
    write += "write(Path(sys.argv[1]))"
    subprocess.run([webui_host.command_python(), "-c", write, folder], cwd=webui_host.ROOT, check=True)


def scripts(model, image, **fields):
    """What a request has as `alwayson_scripts`, for both: a unit with this PIL image, or with none, and no preprocessor."""
    given = {"enabled": True, "model": model, "image": image and webui_host.encoded(image), "save_detected_map": False}
    return {"ControlNet": {"args": [{**given, **fields}]}}


def end_after(covered, steps):
    """The ending control step of a unit that is to cover the first few, more than one, of so many steps from pure noise.

    AUTOMATIC1111's extension goes by the share of the steps that were done before the last one; Forge by the timestep, of which
    the steps have equal parts.
    """
    return (covered - 0.5) / (steps - 1) if webui_host.IS_FORGE else (covered - 1.5) / steps
