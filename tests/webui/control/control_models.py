"""Tiny models with random weights for tests of the ControlNet extension: a relative of Stable Diffusion 1 and what controls it.

The relative has Stable Diffusion 1's blocks, which the extension counts on, at a tenth of the width. The control models are
what the extension takes for the real ones, once `narrow` has told it of that width. All need the host's modules.
"""

import base64
import io
import json
from contextlib import contextmanager
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

WIDTH = 32
CONTEXT = 64  # the width of the embedded checkpoint's text encoder
HEADS = 8
MULTIPLES = (1, 2, 4, 4)
RELATIVE = "sd15-relative.safetensors"

# The widths of the 16 transformers in the order in which an IP-Adapter numbers them: on the way down, up, and in the middle.
TRANSFORMERS = [WIDTH * m for m in (1, 1, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1, 4)]


def _random(shapes, seed, gain=0.8):
    """Weights for parameters of these shapes that keep the spread of what they are given; norms change nothing."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = torch.ones(shape) if name.endswith("weight") else 0.02 * value
        else:
            value *= gain / (value[0].numel() ** 0.5)
        weights[name] = value
    return weights


def _shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def _about_grey(weights, convolution):
    """The first convolution sees how a picture differs from grey, so that what it shows weighs more than that it is there."""
    weights[f"{convolution}.bias"] = -0.5 * weights[f"{convolution}.weight"].flatten(1).sum(1)
    return weights


def _save(weights, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in weights.items()}, path)


def make_relative(folder):
    """A UNet with Stable Diffusion 1's blocks beside the embedded checkpoint's other networks; returns its file name.

    It predicts that what it is given is noise, and something random besides: so latents keep a spread of about 1.
    """
    from ldm.util import instantiate_from_config
    from omegaconf import OmegaConf

    config = json.loads((folder / "demofusion-embedded.yaml").read_text())
    unet = config["model"]["params"]["unet_config"]
    unet["target"] = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    for name in ("widths", "groups"):
        del unet["params"][name]
    unet["params"].update(
        model_channels=WIDTH,
        channel_mult=list(MULTIPLES),
        num_res_blocks=2,
        attention_resolutions=[1, 2, 4],
        num_heads=HEADS,
        context_dim=CONTEXT,
    )
    network = _random(_shapes(instantiate_from_config(OmegaConf.create(unet))), seed=1)
    # The input goes through the first block and the last one's shortcut as it is in channels 0 to 3, negated in 4 to 7.
    # The last convolution takes one from the other, and so takes the nonlinearity back that comes before it. What the rest
    # of the network adds is small: with guidance it is 7 times as much.
    both = torch.cat([torch.eye(4), -torch.eye(4)])
    stem, last, out = "input_blocks.0.0", "output_blocks.11.0.skip_connection", "out.2.weight"
    network[f"{stem}.weight"][:8] = 0
    network[f"{stem}.weight"][:8, :, 1, 1] = both
    network[f"{stem}.bias"][:8] = 0
    network[f"{last}.weight"][:8] = 0
    network[f"{last}.weight"][:8, WIDTH : WIDTH + 8, 0, 0] = torch.eye(8)
    network[f"{last}.bias"][:8] = 0
    for part in ("0.out_layers.3", "1.proj_out"):
        network[f"output_blocks.11.{part}.weight"][:8] *= 0.1
    network[out] *= 0.1
    network[out][:, :8, 1, 1] += both.T
    weights = load_file(folder / "demofusion-embedded.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("model.diffusion_model.")}
    _save(weights | {f"model.diffusion_model.{name}": value for name, value in network.items()}, folder / RELATIVE)
    (folder / RELATIVE).with_suffix(".yaml").write_text(json.dumps(config, indent=2))
    return RELATIVE


@contextmanager
def narrow():
    """While it lasts, the extension expects control models of the relative's width; it has the real width written down."""
    from scripts import cldm, controlnet_model_guess

    build = cldm.ControlNet.__init__

    def build_narrow(self, *args, **kwargs):
        build(self, *args, **kwargs)
        kinds = kwargs.get("union_controlnet_num_control_type")
        if kinds is not None:  # these parts have the width of the real model in the midst of the code
            self.task_embedding = torch.nn.Parameter(torch.empty(kinds, WIDTH))
            self.transformer_layes = torch.nn.Sequential(cldm.ResBlockUnionControlnet(WIDTH, HEADS))
            self.spatial_ch_projs = torch.nn.Linear(WIDTH, WIDTH)

    channels = [WIDTH * multiple for multiple in MULTIPLES]
    style = {"width": 32, "context_dim": CONTEXT, "num_head": 4, "n_layes": 1, "num_token": 8}
    guess = controlnet_model_guess
    with (
        mock.patch.dict(guess.controlnet_default_config, model_channels=WIDTH, context_dim=CONTEXT, num_heads=HEADS),
        mock.patch.dict(guess.t2i_adapter_light_config, channels=channels),
        mock.patch.dict(guess.t2i_adapter_style_config, style),
        mock.patch.object(cldm.ControlNet, "__init__", build_narrow),
    ):
        yield


def _controlnet(seed, strength=0.2, **config):
    """A ControlNet's weights, also in its last convolutions, which are zero before training: strength is how large those."""
    from scripts import cldm, controlnet_model_guess

    config = {**controlnet_model_guess.controlnet_default_config, "hint_channels": 3, "use_fp16": False, **config}
    weights = _random(_shapes(cldm.PlugableControlModel(config).control_model), seed)
    for name, value in weights.items():
        if name.startswith("input_hint_block.") and value.ndim > 1:
            value *= 2.25  # each nonlinearity makes what it is given smaller
        if name.startswith(("zero_convs.", "middle_block_out.")):
            value *= strength
    return _about_grey(weights, "input_hint_block.0")


def make_controlnet(path):
    _save(_controlnet(seed=2), path)


def make_shuffle(path):
    """It is the file's name that makes a mean over the picture of what it says; a mean is small."""
    _save(_controlnet(seed=11, strength=4), path)


def make_instant_id(path):
    """For the key points, after a unit with an IP-Adapter; it is the file's name that makes it one."""
    _save(_controlnet(seed=12), path)


def make_union(path):
    weights = _controlnet(seed=3, union_controlnet_num_control_type=8)
    _save({name.replace(".attn.in_proj.", ".attn.in_proj_"): value for name, value in weights.items()}, path)


def make_control_lora(path, rank=4):
    """What the checkpoint has too is only told as a difference of low rank, but for norms and biases."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, value in _controlnet(seed=4).items():
        own = name.startswith(("input_hint_block.", "zero_convs.", "middle_block_out."))
        if own or value.ndim == 1:
            weights[name] = value
            continue
        stem, out, into = name.removesuffix(".weight"), len(value), value[0].numel()
        ones = [1] * (value.ndim - 2)
        weights[f"{stem}.up"] = torch.randn(out, rank, *ones, generator=generator) * 0.3 / rank**0.5
        weights[f"{stem}.down"] = torch.randn(rank, *value.shape[1:], generator=generator) / into**0.5
    _save(weights | {"lora_controlnet": torch.zeros(1)}, path)


def make_t2i_adapter(path):
    from scripts import adapter

    channels = [WIDTH * multiple for multiple in MULTIPLES]
    network = adapter.Adapter(channels, cin=3 * 64, nums_rb=2, ksize=1, sk=True, use_conv=False, is_sdxl=False)
    _save(_about_grey(_random(_shapes(network), seed=5, gain=2), "conv_in"), path)


def make_t2i_adapter_light(path):
    from scripts import adapter

    network = adapter.Adapter_light([WIDTH * multiple for multiple in MULTIPLES], nums_rb=4, cin=3 * 64)
    _save(_about_grey(_random(_shapes(network), seed=6, gain=1.5), "body.0.in_conv"), path)


def make_style_adapter(path):
    from scripts import adapter, controlnet_model_guess

    network = adapter.StyleAdapter(**controlnet_model_guess.t2i_adapter_style_config)
    weights = _random(_shapes(network), seed=7)
    weights["proj"] *= WIDTH**0.5
    weights["style_embedding"] *= WIDTH**0.5
    _save(weights, path)


def make_lllite(path):
    """On queries of self- and cross-attention and on keys of self-attention, at three of the four sizes."""
    shapes = {}
    places = {"input_blocks_1": 1, "input_blocks_4": 2, "input_blocks_8": 4, "output_blocks_5": 4, "output_blocks_11": 1}
    for place, multiple in places.items():
        for projection in ("attn1_to_q", "attn1_to_k", "attn2_to_q"):
            name = f"lllite_unet_{place}_1_transformer_blocks_0_{projection}"
            width, middle, kernel = WIDTH * multiple, 16, 2 if multiple == 1 else 4
            shapes[f"{name}.conditioning1.0.weight"] = (8, 3, 4, 4)
            shapes[f"{name}.conditioning1.0.bias"] = (8,)
            shapes[f"{name}.conditioning1.2.weight"] = (16, 8, kernel, kernel)
            shapes[f"{name}.conditioning1.2.bias"] = (16,)
            shapes[f"{name}.down.0.weight"] = (middle, width)
            shapes[f"{name}.down.0.bias"] = (middle,)
            shapes[f"{name}.mid.0.weight"] = (middle, middle + 16)
            shapes[f"{name}.mid.0.bias"] = (middle,)
            shapes[f"{name}.up.0.weight"] = (width, middle)
            shapes[f"{name}.up.0.bias"] = (width,)
    _save(_random(shapes, seed=8, gain=2.5), path)


IP_EMBEDDING = 16
IP_TOKENS = 4


def make_ip_adapter(path):
    shapes = {
        "image_proj.proj.weight": (IP_TOKENS * CONTEXT, IP_EMBEDDING),
        "image_proj.proj.bias": (IP_TOKENS * CONTEXT,),
        "image_proj.norm.weight": (CONTEXT,),
        "image_proj.norm.bias": (CONTEXT,),
    }
    for i, width in enumerate(TRANSFORMERS):
        for part in "kv":
            shapes[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = (width, CONTEXT)
    _save(_random(shapes, seed=9, gain=1.2), path)


def ip_adapter_input(seed=0):
    """What an image's encoder would say, as a unit's `ipadapter_input` in the API."""
    embedding = torch.randn(1, IP_EMBEDDING, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    torch.save({"image_embeds": embedding}, file)
    return base64.b64encode(file.getvalue()).decode()


STYLE_PREPROCESSOR = "style_of_nothing"


def add_style_preprocessor():
    """A preprocessor for a style adapter that encodes every image alike; the real one needs a large model."""
    from scripts.supported_preprocessor import Preprocessor

    class StyleOfNothing(Preprocessor):
        def __call__(self, *args, **kwargs):
            generator = torch.Generator().manual_seed(10)
            return {"last_hidden_state": torch.randn(1, 5, 32, generator=generator)}

    preprocessor = StyleOfNothing(name=STYLE_PREPROCESSOR)
    preprocessor.returns_image = False
    Preprocessor.add_supported_preprocessor(preprocessor)


# kind: the file's name without its ending, which says what the extension must know, and who makes it
MODELS = {
    "controlnet": ("sd15_controlnet", make_controlnet),
    "shuffle": ("sd15_shuffle", make_shuffle),
    "union": ("sd15_union", make_union),
    "control_lora": ("sd15_control_lora", make_control_lora),
    "instant_id": ("sd15_instant_id", make_instant_id),
    "t2i_adapter": ("sd15_t2i_adapter", make_t2i_adapter),
    "t2i_adapter_light": ("sd15_t2i_adapter_light", make_t2i_adapter_light),
    "lllite": ("sd15_lllite", make_lllite),
    "ip_adapter": ("sd15_ip_adapter", make_ip_adapter),
    "style_adapter": ("sd15_style_adapter", make_style_adapter),
}


def make_all(folder):
    """A control model of each kind into a folder that the extension lists; within `narrow`."""
    for name, make in MODELS.values():
        make(folder / f"{name}.safetensors")
