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


def make_sdxl(folder):
    """A tiny SDXL, all weights random; needs the host's modules. Returns its file name."""
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    blocks = "sgm.modules.diffusionmodules"

    def size_embedder(key):
        return {
            "is_trainable": False,
            "input_key": key,
            "target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND",
            "params": {"outdim": 256},
        }

    params = {
        "scale_factor": 0.13025,
        "disable_first_stage_autocast": True,
        "denoiser_config": {
            "target": f"{blocks}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "weighting_config": {"target": f"{blocks}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{blocks}.denoiser_scaling.EpsScaling"},
                "discretization_config": {"target": f"{blocks}.discretizer.LegacyDDPMDiscretization"},
            },
        },
        "network_config": {
            "target": f"{blocks}.openaimodel.UNetModel",
            "params": {
                "adm_in_channels": 6 * 256,
                "num_classes": "sequential",
                "use_checkpoint": False,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 32,
                "attention_resolutions": [2],
                "num_res_blocks": 1,
                "channel_mult": [1, 2],
                "num_head_channels": 16,
                "use_spatial_transformer": True,
                "use_linear_in_transformer": True,
                "transformer_depth": [1, 1],
                "context_dim": 64,
                "spatial_transformer_attn_type": "softmax",
                "legacy": False,
            },
        },
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {
                "emb_models": [
                    {
                        "is_trainable": False,
                        "input_key": "txt",
                        "target": "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
                        "params": {"version": str(folder / "demofusion-embedded-clip"), "layer": "last"},
                    },
                    size_embedder("original_size_as_tuple"),
                    size_embedder("crop_coords_top_left"),
                    size_embedder("target_size_as_tuple"),
                ]
            },
        },
        "first_stage_config": {
            "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "attn_type": "vanilla",
                    "double_z": True,
                    "z_channels": 4,
                    "resolution": 64,
                    "in_channels": 3,
                    "out_ch": 3,
                    "ch": 32,
                    "ch_mult": [1, 1, 1, 1],
                    "num_res_blocks": 1,
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
    }
    config = {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}
    (folder / "tiny-sdxl.yaml").write_text(json.dumps(config, indent=2))

    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "demofusion-embedded-clip"))
    # The host divides by the mean of what the encoder says, which without a bias is nothing but rounding.
    torch.nn.init.constant_(clip.text_model.final_layer_norm.bias, 0.1)
    weights = {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip.state_dict().items()}
    weights["conditioner.embedders.1.model.ln_final.weight"] = torch.ones(1)  # tells the host that CLIP is included
    for part, prefix in (("network_config", "model.diffusion_model."), ("first_stage_config", "first_stage_model.")):
        network = instantiate_from_config(OmegaConf.create(params[part]))
        for name, value in network.state_dict().items():
            spread = 0.05 * torch.randn_like(value) if "out.2" in name else 0  # the last layer starts at zero
            weights[prefix + name] = value + spread
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "tiny-sdxl.safetensors")
    return "tiny-sdxl.safetensors"


def make_large(folder):
    """The embedded checkpoint with a random UNet of 40 million parameters, LDM's own; needs the host's modules."""
    from ldm.util import instantiate_from_config
    from omegaconf import OmegaConf

    config = json.loads((folder / "demofusion-embedded.yaml").read_text())
    unet = config["model"]["params"]["unet_config"]
    unet["target"] = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    for name in ("widths", "groups"):
        del unet["params"][name]
    unet["params"].update(model_channels=96, channel_mult=[1, 2, 4], num_res_blocks=2, attention_resolutions=[1, 2])
    torch.manual_seed(0)
    network = instantiate_from_config(OmegaConf.create(unet))
    weights = load_file(folder / "demofusion-embedded.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("model.diffusion_model.")}
    weights |= {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
    save_file(weights, folder / "large.safetensors")
    (folder / "large.yaml").write_text(json.dumps(config, indent=2))
    return sum(value.numel() for value in network.parameters())
