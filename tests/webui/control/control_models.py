"""Tiny models with random weights for tests of the ControlNet extension: relatives of Stable Diffusion and what controls them.

One relative has Stable Diffusion 1's blocks, which the extension counts on, at a tenth of the width; the other has those of
SDXL, at that width too, and one transformer where SDXL has 2 or 10. The control models are what the extension takes for the
real ones, once `narrow` has told it of that width. All need the host's modules.
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

XL_MULTIPLES = (1, 2, 4)
XL_CONTEXT = 2 * CONTEXT  # SDXL has two text encoders; the second, here of the first's width, pools the text besides
XL_POOLED = 1280  # not narrower: ReVision counts on it
XL_HEAD = 16
XL_DEPTHS = (0, 1, 1)
XL_RELATIVE = "sdxl-relative.safetensors"

# The widths of the 16 transformers in the order in which an IP-Adapter numbers them: on the way down, up, and in the middle.
TRANSFORMERS = [WIDTH * m for m in (1, 1, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1, 4)]
XL_TRANSFORMERS = [WIDTH * m for m in (2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 4)]


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


def _predict_noise(network, last, parts, rest=0.1):
    """Weights, in place, of a UNet that predicts that what it is given is noise, and something random besides.

    The input goes through the first block and the last one's shortcut as it is in channels 0 to 3, negated in 4 to 7. The last
    convolution takes one from the other, and so takes the nonlinearity back that comes before it. What the rest of the network
    adds, by these parts of the last block, is small: with guidance it is 7 times as much.
    """
    both = torch.cat([torch.eye(4), -torch.eye(4)])
    stem, shortcut, out = "input_blocks.0.0", f"{last}.0.skip_connection", "out.2.weight"
    network[f"{stem}.weight"][:8] = 0
    network[f"{stem}.weight"][:8, :, 1, 1] = both
    network[f"{stem}.bias"][:8] = 0
    network[f"{shortcut}.weight"][:8] = 0
    network[f"{shortcut}.weight"][:8, WIDTH : WIDTH + 8, 0, 0] = torch.eye(8)
    network[f"{shortcut}.bias"][:8] = 0
    for part in parts:
        network[f"{last}.{part}.weight"][:8] *= rest
    network[out] *= 0.1
    network[out][:, :8, 1, 1] += both.T


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
    _predict_noise(network, "output_blocks.11", ("0.out_layers.3", "1.proj_out"))
    weights = load_file(folder / "demofusion-embedded.safetensors")
    weights = {name: value for name, value in weights.items() if not name.startswith("model.diffusion_model.")}
    _save(weights | {f"model.diffusion_model.{name}": value for name, value in network.items()}, folder / RELATIVE)
    (folder / RELATIVE).with_suffix(".yaml").write_text(json.dumps(config, indent=2))
    return RELATIVE


def make_xl_relative(folder):
    """The same for SDXL, beside random networks but for the first text encoder; returns its file name.

    Its y is SDXL's: the pooled text, then the embeddings of the sizes.
    """
    import open_clip
    import relatives
    from omegaconf import OmegaConf
    from sgm.util import instantiate_from_config

    name = relatives.make_sdxl(folder)
    weights = load_file(folder / name)
    config = json.loads((folder / name).with_suffix(".yaml").read_text())
    params = config["model"]["params"]
    params["network_config"]["params"].update(
        model_channels=WIDTH,
        channel_mult=list(XL_MULTIPLES),
        num_res_blocks=2,
        attention_resolutions=[2, 4],
        transformer_depth=[1, 1, 1],
        num_head_channels=XL_HEAD,
        context_dim=XL_CONTEXT,
        adm_in_channels=XL_POOLED + 6 * 256,
    )
    network = _random(_shapes(instantiate_from_config(OmegaConf.create(params["network_config"]))), seed=21)
    _predict_noise(network, "output_blocks.8", ("0.out_layers.3",), rest=0.2)
    text = load_file(folder / "demofusion-embedded.safetensors")
    prefix, clip = "cond_stage_model.", "conditioner.embedders.0."
    first = {clip + key.removeprefix(prefix): value for key, value in text.items() if key.startswith(prefix)}
    first_stage = {key: value.shape for key, value in weights.items() if key.startswith("first_stage_model.")}

    layers = {"width": CONTEXT, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 32, "width": 64, "head_width": 32, "layers": 1}
    encoder = {"embed_dim": XL_POOLED, "vision_cfg": vision, "text_cfg": {**layers, "context_length": 77, "vocab_size": 49408}}
    (folder / "tiny-open-clip.json").write_text(json.dumps(encoder))
    open_clip.add_model_config(folder / "tiny-open-clip.json")
    shapes = _shapes(open_clip.create_model("tiny-open-clip", pretrained=None))
    shapes = {key: shape for key, shape in shapes.items() if len(shape) and not key.startswith("visual.")}
    second = _random(shapes, seed=22)
    second["text_projection"] *= 5  # each number of the pooled text is about 1
    params["conditioner_config"]["params"]["emb_models"].insert(
        1,
        {
            "is_trainable": False,
            "input_key": "txt",
            "target": "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
            "params": {"arch": "tiny-open-clip", "layer": "penultimate", "always_return_pooled": True, "legacy": False},
        },
    )
    weights = {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    weights |= {f"model.diffusion_model.{key}": value for key, value in network.items()}
    _save({**weights, **first, **_random(first_stage, seed=23, gain=1)}, folder / XL_RELATIVE)
    (folder / XL_RELATIVE).with_suffix(".yaml").write_text(json.dumps(config, indent=2))
    return XL_RELATIVE


@contextmanager
def narrow():
    """While it lasts, the extension expects control models of the relative's width; it has the real width written down."""
    from scripts import cldm, controlnet_model_guess, enums

    guess, versions = controlnet_model_guess, enums.StableDiffusionVersion
    build, load, ids = cldm.ControlNet.__init__, guess.IPAdapterModel.load, versions.transformer_ids

    def load_narrow(weights, path):
        adapter = load(weights, path)
        adapter.is_sdxl = "xl" in path.rsplit("/", 1)[-1]  # known by the width of the prompts
        return adapter

    def first_of_each(version):
        every = ids.fget(version)
        return type(every)(*([place for place in places if place.block_index == 0] for places in every))

    def build_narrow(self, *args, **kwargs):
        build(self, *args, **kwargs)
        kinds = kwargs.get("union_controlnet_num_control_type")
        if kinds is not None:  # these parts have the width of the real model in the midst of the code
            self.task_embedding = torch.nn.Parameter(torch.empty(kinds, WIDTH))
            self.transformer_layes = torch.nn.Sequential(cldm.ResBlockUnionControlnet(WIDTH, HEADS))
            self.spatial_ch_projs = torch.nn.Linear(WIDTH, WIDTH)

    channels = [WIDTH * multiple for multiple in MULTIPLES]
    style = {"width": 32, "context_dim": CONTEXT, "num_head": 4, "n_layes": 1, "num_token": 8}
    xl = {"model_channels": WIDTH, "context_dim": XL_CONTEXT, "num_head_channels": XL_HEAD}
    xl.update(transformer_depth=list(XL_DEPTHS), transformer_depth_middle=1)
    with (
        mock.patch.dict(guess.controlnet_default_config, model_channels=WIDTH, context_dim=CONTEXT, num_heads=HEADS),
        mock.patch.dict(guess.controlnet_sdxl_config, xl),
        mock.patch.dict(guess.t2i_adapter_light_config, channels=channels),
        mock.patch.dict(guess.t2i_adapter_style_config, style),
        mock.patch.object(cldm.ControlNet, "__init__", build_narrow),
        mock.patch.object(guess.IPAdapterModel, "load", staticmethod(load_narrow)),
        mock.patch.object(versions, "transformer_ids", property(first_of_each)),
    ):
        yield


def _controlnet(seed, strength=0.2, xl=False, **config):
    """A ControlNet's weights, also in its last convolutions, which are zero before training: strength is how large those."""
    from scripts import cldm, controlnet_model_guess

    default = controlnet_model_guess.controlnet_sdxl_config if xl else controlnet_model_guess.controlnet_default_config
    config = {**default, "hint_channels": 3, "use_fp16": False, **config}
    weights = _random(_shapes(cldm.PlugableControlModel(config).control_model), seed)
    for name, value in weights.items():
        if name.startswith("input_hint_block.") and value.ndim > 1:
            value *= 2.25  # each nonlinearity makes what it is given smaller
        if name.startswith(("zero_convs.", "middle_block_out.")):
            value *= strength
    return _about_grey(weights, "input_hint_block.0")


# By which the extension knows an SDXL ControlNet with all transformers, of which there is only the first here.
XL_LAST = {"input_blocks.8.1.transformer_blocks.9.norm3.weight": torch.ones(WIDTH)}


def make_controlnet(path, xl=False):
    _save(_controlnet(seed=2, xl=xl) | (XL_LAST if xl else {}), path)


def make_shuffle(path):
    """It is the file's name that makes a mean over the picture of what it says; a mean is small."""
    _save(_controlnet(seed=11, strength=4), path)


def make_instant_id(path, xl=False):
    """For the key points, after a unit with an IP-Adapter; it is the file's name that makes it one."""
    _save(_controlnet(seed=12, xl=xl) | (XL_LAST if xl else {}), path)


def make_union(path, xl=False):
    weights = _controlnet(seed=3, xl=xl, union_controlnet_num_control_type=8) | (XL_LAST if xl else {})
    _save({name.replace(".attn.in_proj.", ".attn.in_proj_"): value for name, value in weights.items()}, path)


def make_control_lora(path, xl=False, rank=4):
    """What the checkpoint has too is only told as a difference of low rank, but for norms and biases."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, value in _controlnet(seed=4, xl=xl).items():
        own = name.startswith(("input_hint_block.", "zero_convs.", "middle_block_out."))
        if own or value.ndim == 1:
            weights[name] = value
            continue
        stem, out, into = name.removesuffix(".weight"), len(value), value[0].numel()
        ones = [1] * (value.ndim - 2)
        weights[f"{stem}.up"] = torch.randn(out, rank, *ones, generator=generator) * 0.3 / rank**0.5
        weights[f"{stem}.down"] = torch.randn(rank, *value.shape[1:], generator=generator) / into**0.5
    _save(weights | {"lora_controlnet": torch.zeros(1)}, path)


def make_t2i_adapter(path, xl=False):
    from scripts import adapter

    channels = [WIDTH * multiple for multiple in MULTIPLES]
    pixels = 16 if xl else 8
    network = adapter.Adapter(channels, cin=3 * pixels**2, nums_rb=2, ksize=1, sk=True, use_conv=False, is_sdxl=xl)
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


def make_lllite(path, xl=False):
    """On queries of self- and cross-attention and on keys of self-attention, at three of the four sizes; of SDXL at two."""
    shapes = {}
    places = {"input_blocks_1": 1, "input_blocks_4": 2, "input_blocks_8": 4, "output_blocks_5": 4, "output_blocks_11": 1}
    if xl:
        places = {"input_blocks_4": 2, "input_blocks_8": 4, "middle_block": 4, "output_blocks_1": 4, "output_blocks_5": 2}
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


def make_ip_adapter(path, xl=False):
    context = XL_CONTEXT if xl else CONTEXT
    shapes = {
        "image_proj.proj.weight": (IP_TOKENS * context, IP_EMBEDDING),
        "image_proj.proj.bias": (IP_TOKENS * context,),
        "image_proj.norm.weight": (context,),
        "image_proj.norm.bias": (context,),
    }
    for i, width in enumerate(XL_TRANSFORMERS if xl else TRANSFORMERS):
        for part in "kv":
            shapes[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = (width, context)
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


REVISION_PREPROCESSOR = "revision_of_a_corner"


def add_revision_preprocessor():
    """ReVision, which is a preprocessor alone: it encodes an image's first colour; the real one needs a large model."""
    from scripts.supported_preprocessor import Preprocessor

    class RevisionOfACorner(Preprocessor):
        def __call__(self, image, *args, **kwargs):
            weights = torch.randn(3, XL_POOLED, generator=torch.Generator().manual_seed(24))
            return {"image_embeds": torch.tensor(image[:1, 0, :3] / 127.5 - 1).float() @ weights}

    preprocessor = RevisionOfACorner(name=REVISION_PREPROCESSOR)
    preprocessor.returns_image = False
    preprocessor.do_not_need_model = True
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

XL_MODELS = {
    "controlnet": ("sdxl_controlnet", make_controlnet),
    "union": ("sdxl_union", make_union),
    "control_lora": ("sdxl_control_lora", make_control_lora),
    "instant_id": ("sdxl_instant_id", make_instant_id),
    "t2i_adapter": ("sdxl_t2i_adapter", make_t2i_adapter),
    "lllite": ("sdxl_lllite", make_lllite),
    "ip_adapter": ("sdxl_ip_adapter", make_ip_adapter),
    "revision": ("None", None),
}


def make_all(folder):
    """A control model of each kind into a folder that the extension lists; within `narrow`."""
    for name, make in MODELS.values():
        make(folder / f"{name}.safetensors")


def make_all_xl(folder):
    for name, make in XL_MODELS.values():
        if make is not None:
            make(folder / f"{name}.safetensors", xl=True)
