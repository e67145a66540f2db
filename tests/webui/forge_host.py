"""Hosts of Forge's kind, which keep their models in `backend`: how such a host is told, started, and given a checkpoint."""

import ast
import importlib
import re
from pathlib import Path

EMBEDDED = "demofusion-embedded.safetensors"
SETTINGS = {  # its relatives begin with others, which make other pictures or load a model
    "CLIP_stop_at_last_layers": 1,
    "show_progress_type": "Approx cheap",
}


def is_forge(webui):
    return bool(webui) and (Path(webui) / "backend" / "patcher" / "unet.py").is_file()


def flags(webui):
    """What its command line knows: the relatives call some flags otherwise, and end at one that they do not know."""
    texts = [(Path(webui) / file).read_text(encoding="utf-8") for file in ("modules/cmd_args.py", "backend/args.py")]
    return {word for text in texts for word in text.split('"') if word.startswith("--")}


def arguments(webui, checkpoints, data):
    """The host's command line: on the CPU in float32, with these checkpoints, everything else of its own in `data`."""
    known = flags(webui)
    wanted = [("--always-cpu", "--cpu"), ("--all-in-fp32", "--force-fp32"), ("--no-download-sd-model",), ("--no-hashing",)]
    wanted += [("--skip-torch-cuda-test",), ("--skip-version-check",), ("--no-prompt-history",)]
    found = [next((name for name in names if name in known), None) for names in wanted]
    folder = next(name for name in ("--ckpt-dir", "--ckpt-dirs") if name in known)
    served = ["--gradio-allowed-path", str(Path(webui).resolve())]  # its own scripts, which it else serves from `data` alone
    return ["webui.py", *filter(None, found), *served, "--data-dir", str(data), folder, str(checkpoints)]


LOADER = f"""
import sys

sys.path.append({str(Path(__file__).resolve().parent)!r})
import forge_models
from modules import sd_models

sd_models.forge_loader = forge_models.loader(sd_models.forge_loader)
"""


def add_loader(data):
    """An extension in the folder `data` by which the host can load the tests' checkpoints."""
    scripts = data / "extensions" / "checkpoints of tests" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "loader_of_tests.py").write_text(LOADER)


def initialize():
    """Its modules, in the order of its own start."""
    for name in ("timer", "initialize_util"):
        importlib.import_module(f"modules.{name}")
    from modules import initialize
    from modules_forge.initialization import initialize_forge

    getattr(initialize, "shush", lambda: None)()
    initialize_forge()
    initialize.imports()
    initialize.initialize()


def networks(model):
    """The torch modules of a loaded checkpoint, by what they are."""
    objects = model.forge_objects
    return {
        "unet": objects.unet.model,
        "autoencoder": objects.vae.first_stage_model,
        "text encoder": objects.clip.cond_stage_model,
    }


OF_THE_HOST = {"alphas_cumprod", "gguf_baked"}  # attributes that it gives a checkpoint: DDIM does, and being put on a card


def _contents(part):
    """What a patcher has, but for its network: as text without addresses, which are others when a model is loaded again.

    And without what the host notes itself: whether its weights are merged now, how large they are once it has asked, and the
    levels of the last sampling.
    """
    own = {name: value for name, value in vars(part).items() if name not in ("patches_uuid", "backup", "size")}
    if "model_options" in own:
        transformer = own["model_options"].get("transformer_options", {})
        own["model_options"] = {
            **own["model_options"],
            "transformer_options": {name: value for name, value in transformer.items() if name != "sampling_sigmas"},
        }
    texts = {name: repr(value) for name, value in own.items() if not hasattr(value, "named_modules")}
    return {name: re.sub(r"0x[0-9a-f]+", "", text) for name, text in texts.items()}


def state(model):
    """What of a loaded checkpoint an extension could leave changed: its parts, their options, and its noise levels.

    Of the parts that the last sampling had, which others may have patched for it, only whether anything of ours is there.
    """
    last, unet = model.forge_objects.unet, model.forge_objects_after_applying_lora.unet
    stages = ("forge_objects_original", "forge_objects_after_applying_lora")
    parts = {stage: {name: part for name, part in vars(getattr(model, stage)).items() if part is not None} for stage in stages}
    return {
        "parts": {stage: {name: type(part) for name, part in group.items()} for stage, group in parts.items()},
        "patches": {stage: {name: _contents(part) for name, part in group.items()} for stage, group in parts.items()},
        "own": sorted((vars(unet.model) | vars(model)).keys() - OF_THE_HOST),
        "ours": "lib_demofusion" in repr(vars(last)),
        "sigmas": unet.model.predictor.sigmas.tolist(),
        "tiling": model.tiling_enabled,
    }


def loras(model):
    """The LoRAs that a loaded checkpoint has, and the UNet's weight of each, by the host's own note of them."""
    return [(Path(file).stem, weight) for file, weight, *_ in ast.literal_eval(model.current_lora_hash)]


def load(checkpoint=EMBEDDED):
    """Make a checkpoint of its list the loaded one; returns the model."""
    from modules import sd_models, shared
    from modules_forge import main_entry

    shared.opts.data["sd_model_checkpoint"] = checkpoint
    main_entry.refresh_model_loading_parameters()
    model, _ = sd_models.forge_model_reload()
    return model
