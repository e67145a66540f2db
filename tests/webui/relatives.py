"""Relatives of the embedded checkpoint for the kinds of model that it is not: same sizes, some weights random.

Their pictures mean nothing; shapes, conditions and parameterisations are what the tests look at.
"""

import json

import torch
from safetensors.torch import load_file, save_file


def make(folder):
    weights = load_file(folder / "demofusion-embedded.safetensors")
    config = json.loads((folder / "demofusion-embedded.yaml").read_text())
    torch.manual_seed(0)

    def write(name, change, weights=weights):
        other = json.loads(json.dumps(config))
        other = change(other) or other
        (folder / f"{name}.yaml").write_text(json.dumps(other, indent=2))
        save_file(weights, folder / f"{name}.safetensors")

    def copy(other):
        """The same model under another name, as a refiner."""

    def v_prediction(other):
        other["model"]["params"]["parameterization"] = "v"

    def inpainting(other):
        other["model"]["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
        params = other["model"]["params"]
        params["conditioning_key"] = "hybrid"
        params["finetune_keys"] = None
        params["unet_config"]["params"]["in_channels"] = 9

    blurred = {name: value + 0.02 * torch.randn_like(value) for name, value in weights.items()}
    write("refiner", copy, blurred)
    write("v-prediction", v_prediction)
    stem = "model.diffusion_model.input_blocks.0.0.weight"
    grown = torch.cat([weights[stem], 0.1 * torch.randn(len(weights[stem]), 5, 3, 3).half()], 1)
    write("inpainting", inpainting, {**weights, stem: grown})
