"""The real WebUI in this process, started from nothing, as its webui.py starts it but without its web server."""

import base64
import functools
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import forge_host
import forge_models
import pytest
import relatives
from arguments import script_arguments

ROOT = Path(__file__).resolve().parent.parent.parent
WEBUI_DIR = os.environ.get("WEBUI_DIR")
IS_FORGE = forge_host.is_forge(WEBUI_DIR)


def only_on_a1111(reason):
    """A mark for tests of what only AUTOMATIC1111's own WebUI has, or does in that way."""
    return pytest.mark.skipif(IS_FORGE, reason=reason)


def only_on_forge(reason):
    """A mark for tests of what only hosts of Forge's kind have."""
    return pytest.mark.skipif(not IS_FORGE, reason=reason)


def command_python():
    """The Python of the command's environment, which has diffusers."""
    return os.environ.get("DEMOFUSION_PYTHON", str(ROOT / ".venv" / "bin" / "python"))


@dataclass
class Reply:
    """What the API answered: images, their infotexts, and the rest of `info`."""

    images: list
    info: dict

    @property
    def infotexts(self):
        return self.info["infotexts"]


class Host:
    """The host's modules by name, its API, and what the tests ask of it."""

    is_forge = IS_FORGE

    def __init__(self, modules, client):
        self.__dict__.update(modules)
        self.client = client

    @property
    def script(self):
        return self.script_of(self.scripts.scripts_txt2img)

    @property
    def img2img_script(self):
        return self.script_of(self.scripts.scripts_img2img)

    def script_of(self, runner):
        return next(script for script in runner.alwayson_scripts if type(script).__name__ == "DemoFusionScript")

    @property
    def webui(self):
        """lib_demofusion.hosts.webui, as the script has it."""
        return sys.modules["lib_demofusion.hosts.webui"]

    @property
    def unet(self):
        """The network of the loaded checkpoint's UNet."""
        model = self.shared.sd_model
        return model.forge_objects.unet.model.diffusion_model if self.is_forge else model.model.diffusion_model

    @property
    def autoencoder(self):
        model = self.shared.sd_model
        return model.forge_objects.vae.first_stage_model if self.is_forge else model.first_stage_model

    @property
    def networks(self):
        """All torch modules of the loaded checkpoint, by name."""
        model = self.shared.sd_model
        parts = forge_host.networks(model) if self.is_forge else {"model": model}
        return {f"{part}.{name}": m for part, whole in parts.items() for name, m in whole.named_modules()}

    @property
    def wraps_around(self):
        """Whether the host has made convolutions wrap around, for tiling."""
        if self.is_forge:
            return any(getattr(m, "padding_mode", "zeros") == "circular" for m in self.networks.values())
        return self.sd_hijack.model_hijack.circular_enabled

    @property
    def own_state(self):
        """What a host of Forge's kind keeps beside its networks and modules."""
        return forge_host.state(self.shared.sd_model) if self.is_forge else {}

    @property
    def outputs(self):
        """The folder of its pictures."""
        return Path(importlib.import_module("modules.paths_internal").default_output_dir)

    def refresh_vaes(self):
        """The list of VAEs is of the files that are there; and the checkpoint's own is loaded again."""
        if self.is_forge:
            importlib.import_module("modules_forge.main_entry").refresh_models()
        else:
            sd_vae = importlib.import_module("modules.sd_vae")
            sd_vae.refresh_vae_list()
            sd_vae.reload_vae_weights()

    def vae_setting(self, file):
        """What makes a file the VAE."""
        return {"forge_additional_modules": [file]} if self.is_forge else {"sd_vae": file}

    def steps_rows(self, steps, cfg_scale=7):
        """How many rows the base shows to the UNet: Forge leaves the negative prompt's out where it has no weight."""
        return steps * (1 if self.is_forge and cfg_scale == 1 else 2)

    @contextmanager
    def recorded_loads(self):
        """The names of the checkpoints' files that the host reads meanwhile."""
        loads, module = [], self.sd_models
        name = "forge_loader" if self.is_forge else "load_model_weights"
        load = getattr(module, name)

        def record(*args, **kwargs):
            loads.append(Path(args[0] if self.is_forge else args[1].filename).stem)
            return load(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, record)
            yield loads

    def load(self, checkpoint):
        """Make a checkpoint of the tests' folder, also one that has just come there, the loaded one; returns the model."""
        self.sd_models.list_models()
        if self.is_forge:
            return forge_host.load(checkpoint)
        self.shared.opts.data["sd_model_checkpoint"] = checkpoint
        self.sd_models.reload_model_weights()
        return self.shared.sd_model

    def post(self, **payload):
        """One request to /sdapi/v1/txt2img; small and quick unless told otherwise."""
        defaults = dict(
            prompt="two red striped rings on grass", steps=4, width=64, height=64, seed=1, sampler_name="Euler", cfg_scale=7
        )
        return self.client.post("/sdapi/v1/txt2img", json=self._in_its_words({**defaults, **payload}))

    @functools.cached_property
    def makes_any_size(self):
        """Whether pictures can have sides that are no whole numbers of 64, to which Neo rounds them."""
        if not self.is_forge:
            return True
        made = self.client.post("/sdapi/v1/txt2img", json=dict(prompt="", steps=1, width=96, height=64, sampler_name="Euler"))
        return _image(made.json()["images"][0]).size == (96, 64)

    def needs_refiner(self):
        """Skips a test of it where it is refused."""
        if self.is_forge and hasattr(self.sd_samplers_common, "ORIGINAL_CHECKPOINT"):
            pytest.skip("this host's refiner does not go back to the first checkpoint within a picture, and is refused")

    def _in_its_words(self, payload):
        """A request as this host's API takes it."""
        if not self.makes_any_size and (payload["width"] % 64 or payload["height"] % 64):
            pytest.skip("this host makes pictures whose sides are whole numbers of 64")
        for name in payload.get("override_settings", ()) if self.is_forge else ():
            if name not in self.shared.opts.data_labels:
                pytest.skip(f"this host has no setting {name}")
        if self.is_forge and payload.get("enable_hr"):
            payload["hr_additional_modules"] = ["Use same choices"]  # without which its own API fails
        if "tiling" in payload and isinstance(self.shared.opts.data["tiling"], str):  # the directions
            tiling = {"tiling": "XY" if payload.pop("tiling") else "None"}
            payload["override_settings"] = {**payload.get("override_settings", {}), **tiling}
        return payload

    def generate(self, *args, **payload):
        """Images with DemoFusion's arguments; none: without it."""
        if args:
            ours = {"DemoFusion Upscale": {"args": script_arguments(self.webui, args)}}
            payload["alwayson_scripts"] = {**payload.get("alwayson_scripts", {}), **ours}
        self.comments = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.processing.StableDiffusionProcessing, "comment", lambda p, text: self.comments.append(text))
            reply = self.post(**payload)
        assert reply.status_code == 200, reply.text
        reply = reply.json()
        return Reply([_image(data) for data in reply["images"]], json.loads(reply["info"]))

    def from_pictures(self, pictures, *args, **payload):
        """Images from PIL images in img2img; masks are PIL images too. p is what the host made of the request."""
        defaults = dict(prompt="two red striped rings on grass", steps=4, width=64, height=64, seed=1, sampler_name="Euler")
        payload = {**defaults, "cfg_scale": 7, "denoising_strength": 0.5, "inpaint_full_res": False, **payload}
        if args:
            payload["alwayson_scripts"] = {
                **payload.get("alwayson_scripts", {}),
                "DemoFusion Upscale": {"args": script_arguments(self.webui, args)},
            }
        if "mask" in payload:
            payload["mask"] = encoded(payload["mask"])
        self.comments, self.jobs = [], []
        kind = self.processing.StableDiffusionProcessingImg2Img
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "comment", lambda p, text: self.comments.append(text))
            patch.setattr(kind, "close", lambda p: self.jobs.append(p))
            payload["init_images"] = list(map(encoded, pictures))
            reply = self.client.post("/sdapi/v1/img2img", json=self._in_its_words(payload))
        assert reply.status_code == 200, reply.text
        reply = reply.json()
        return Reply([_image(data) for data in reply["images"]], json.loads(reply["info"]))

    def arguments_of(self, runner, title, **values):
        """The arguments of a script that is chosen, as its form has them but for these, by their labels in lower case."""
        script = next(script for script in runner.selectable_scripts if script.title().lower() == title.lower())
        controls = runner.inputs[script.args_from : script.args_to]
        labels = [(getattr(control, "label", None) or "").lower() for control in controls]
        made = [getattr(control, "value", None) for control in controls]
        for label, value in values.items():
            made[labels.index(label.lower())] = value
        return made

    def latents(self, *args, **payload):
        """The last latents that reach the host's decoder, for comparisons to the bit. pictures: those of img2img."""
        seen = []
        decode = self.processing.decode_latent_batch

        def record(model, batch, *rest, **kwargs):
            seen.append(batch.clone())
            return decode(model, batch, *rest, **kwargs)

        pictures = payload.pop("pictures", None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.processing, "decode_latent_batch", record)
            if pictures is None:
                self.generate(*args, **payload)
            else:
                self.from_pictures(pictures, *args, **payload)
        return seen[-1]


def same_but_for_rounding(x, y):
    """Whether latents differ by no more than the order of float32 sums explains, after some steps of a sampler."""
    error = (x - y) / y.std()
    return error.square().mean().sqrt() < 1e-4 and error.abs().max() < 1e-3


def pixels(image):
    """What is seen of a PIL image, [H, W, 3]: Forge writes the parameters and the time into the alpha of what it saves."""
    import numpy as np

    return np.asarray(image.convert("RGB"))


def encoded(image):
    """A PIL image as the API takes it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _image(data):
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(data)))


def export_checkpoints(folder):
    """The embedded checkpoint in the host's format, and its relatives for other kinds of model."""
    subprocess.run([command_python(), "-m", "training.export_webui", str(folder)], cwd=ROOT, check=True)
    relatives.make(folder)


def make_sdxl(checkpoints):
    """A tiny SDXL with random weights; needs the host's modules. Returns its file name."""
    return (forge_models if IS_FORGE else relatives).make_sdxl(checkpoints)


def arguments(checkpoints, data):
    """The host's command line: on the CPU, with these checkpoints, everything else of its own in the folder `data`."""
    if IS_FORGE:
        return forge_host.arguments(WEBUI_DIR, checkpoints, data)
    flags = ["--use-cpu", "all", "--no-half", "--skip-torch-cuda-test", "--no-download-sd-model", "--no-hashing"]
    return ["webui.py", *flags, "--data-dir", str(data), "--ckpt-dir", str(checkpoints)]


def prepare(data, **settings):
    """The host's file of settings, as it finds it at its first start; and whatever it needs to load the tests' checkpoints."""
    if IS_FORGE:
        forge_host.add_loader(data)
    settings = {"sd_model_checkpoint": "demofusion-embedded.safetensors", **settings}
    (data / "config.json").write_text(json.dumps({**(forge_host.SETTINGS if IS_FORGE else {}), **settings}))


def start(checkpoints, data):
    """The host, with this repository as an extension in the folder `data`, and its API, whose routes are called directly."""
    webui = Path(WEBUI_DIR).resolve()
    extension = data / "extensions" / "demofusion"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, extension, ignore=ignored)
    prepare(data)
    os.chdir(webui)
    sys.path.insert(0, str(webui))
    sys.argv = [*arguments(checkpoints, data), "--api", "--disable-console-progressbars"]
    sys.argv += os.environ.get("WEBUI_ARGS", "").split()

    if IS_FORGE:
        forge_host.initialize()
    else:
        from modules import initialize

        initialize.imports()
        initialize.initialize()
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from modules import script_callbacks, shared, ui
    from modules.api.api import Api
    from modules.call_queue import queue_lock

    script_callbacks.before_ui_callback()
    shared.demo = ui.create_ui()
    app = FastAPI()
    Api(app, queue_lock)
    names = [
        "devices",
        "images",
        "img2img",
        "infotext_utils",
        "processing",
        "progress",
        "rng",
        "script_callbacks",
        "scripts",
        "sd_hijack",
    ]
    names += ["sd_models", "sd_samplers", "sd_samplers_cfg_denoiser", "sd_samplers_common", "sd_samplers_kdiffusion"]
    names += ["sd_samplers_timesteps", "sd_schedulers", "shared", "ui", "ui_tempdir"]
    there = [name for name in names if importlib.util.find_spec(f"modules.{name}")]
    host = Host({name: importlib.import_module(f"modules.{name}") for name in there}, TestClient(app))
    host.data = data
    for name, option in shared.opts.data_labels.items():  # the host only puts back overridden settings that it has saved
        shared.opts.data.setdefault(name, option.default)
    if IS_FORGE:
        forge_host.load()
        _ = host.makes_any_size  # found out before any test looks at what the host does
    assert "demofusion-embedded" in shared.sd_model.sd_checkpoint_info.name
    return host
