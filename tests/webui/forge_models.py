"""The tests' checkpoints as models of Forge: its own loader knows the sizes of published ones alone.

In the host's process, once its modules are there. `loader` is for `sd_models.forge_loader`.
"""

import inspect
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

CHECKPOINT = Path(__file__).resolve().parent.parent.parent / "lib_demofusion" / "checkpoint"  # in diffusers' layout
SDXL = "tiny-sdxl"


def loader(theirs):
    """In place of the host's: what has a .yaml beside it is one of ours, or our tiny SDXL; `theirs` is for the others."""

    def load(path, additional_state_dicts=None):
        if Path(path).stem == SDXL:
            return _load_sdxl(path)
        if Path(path).with_suffix(".yaml").exists():
            return _load(path, additional_state_dicts)
        return theirs(path, additional_state_dicts=additional_state_dicts)

    return load


def _load(path, vaes):
    """A relative of the embedded checkpoint. vaes: paths; the last one's weights go before its own."""
    from backend.diffusion_engine.sd15 import StableDiffusion

    weights = load_file(path)
    params = json.loads(Path(path).with_suffix(".yaml").read_text())["model"]["params"]
    text_encoder, tokenizer = _text_encoder(), _tokenizer()
    unet, vae = _unet(params["unet_config"]["params"]["in_channels"], storage := _storage()), _vae()
    _fill(unet, _in_blocks(unet, weights) if storage == GGUF else weights, "model.diffusion_model.")
    _fill(vae, weights, "first_stage_model.")
    for file in vaes or []:
        _fill(vae, load_file(file), "")
    _fill(text_encoder, weights, "cond_stage_model.")
    scheduler = _scheduler({"v": "v_prediction"}.get(params.get("parameterization"), "epsilon"))
    parts = dict(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
    model = StableDiffusion(estimated_config=_Guess(unet.in_channels), huggingface_components=parts)
    model.text_processing_engine.embeddings.expected_shape = text_encoder.transformer.config.hidden_size
    model.image_size = params["image_size"]
    return _with_own_scale(model)


def _load_sdxl(path):
    from backend.diffusion_engine.sdxl import StableDiffusionXL

    parts, weights = dict(vae=_vae(), text_encoder=_text_encoder(), text_encoder_2=_text_encoder()), load_file(path)
    with _building(32):
        parts["unet"] = _placed(_sdxl_unet())
    for name, prefix in SDXL_PREFIXES.items():
        _fill(parts[name], weights, prefix)
    parts |= dict(tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), scheduler=_scheduler("epsilon"))
    model = StableDiffusionXL(estimated_config=_Guess(4), huggingface_components=parts)
    return _with_own_scale(model)


# ---------------------------------------------------------------------------------------------------------------------
# The parts, as the host builds them, in our sizes


def _unet(inputs, storage):
    from backend.nn.unet import IntegratedUNet2DConditionModel

    config = _config("unet")
    widths, each = config["block_out_channels"], config["layers_per_block"]
    attention = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"]]
    with _building(config["norm_num_groups"], storage):
        unet = IntegratedUNet2DConditionModel(
            in_channels=inputs,
            out_channels=4,
            model_channels=widths[0],
            channel_mult=[_Width(width) for width in widths],
            num_res_blocks=[each] * len(widths),
            num_heads=config["attention_head_dim"],
            use_spatial_transformer=True,
            context_dim=config["cross_attention_dim"],
            transformer_depth=[there for there in attention for _ in range(each)],
            transformer_depth_middle=1,
            transformer_depth_output=[there for there in attention for _ in range(each + 1)],
        )
    return _placed(unet, storage)


def _vae():
    from backend.nn.vae import IntegratedAutoencoderKL

    config = _config("vae")
    names = ["in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"]
    names += ["layers_per_block", "latent_channels", "scaling_factor"]
    with _building(config["norm_num_groups"]):
        vae = IntegratedAutoencoderKL(**{name: config[name] for name in names})
    for part in (vae.encoder, vae.decoder):
        part.mid.attn_1 = torch.nn.Identity()  # the embedded one has no attention
    return vae


def _text_encoder():
    from backend import memory_management
    from backend.nn.clip import IntegratedCLIP
    from backend.operations import using_forge_operations
    from transformers import CLIPTextConfig, CLIPTextModel, modeling_utils

    place = dict(device=memory_management.cpu, dtype=torch.float32)
    config = CLIPTextConfig.from_pretrained(CHECKPOINT / "text_encoder")
    with modeling_utils.no_init_weights(), using_forge_operations(**place, manual_cast_enabled=True):
        return IntegratedCLIP(CLIPTextModel, config, add_text_projection=True).to(**place)


def _tokenizer():
    """With a comma, which the host looks for and the embedded one has not as a token."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    vocabulary = tokenizer.get_vocab
    tokenizer.get_vocab = lambda: {",</w>": -1, **vocabulary()}
    return tokenizer


def _scheduler(prediction):
    from diffusers import DDIMScheduler

    config = json.loads((CHECKPOINT / "scheduler" / "scheduler_config.json").read_text())
    betas = {name: config[name] for name in ("beta_start", "beta_end")}
    return DDIMScheduler(**betas, beta_schedule="scaled_linear", prediction_type=prediction)


def _config(part):
    return json.loads((CHECKPOINT / part / "config.json").read_text())


def _controlnet(weights):
    from backend import memory_management
    from backend.nn.cnets import cldm
    from backend.patcher.controlnet import ControlNet

    config = _config("controlnet")
    widths, more = config["block_out_channels"], {}
    if "hint_width" in inspect.signature(cldm.ControlNet.__init__).parameters:  # of the hint's first layer
        more["hint_width"] = len(weights["control_model.input_hint_block.0.weight"])
    with _building(config["norm_num_groups"]):
        network = cldm.ControlNet(
            in_channels=config["in_channels"],
            hint_channels=config["conditioning_channels"],
            model_channels=widths[0],
            channel_mult=[_Width(width) for width in widths],
            num_res_blocks=config["layers_per_block"],
            num_heads=config["attention_head_dim"],
            use_spatial_transformer=True,
            context_dim=config["cross_attention_dim"],
            transformer_depth=[0] * len(widths),
            transformer_depth_middle=0,
            dtype=torch.float32,
            **more,
        )
    network.to(device=memory_management.cpu, dtype=torch.float32)
    _fill(network, {name: value.float() for name, value in weights.items()}, "control_model.")
    return ControlNet(network, load_device=memory_management.get_torch_device(), manual_cast_dtype=torch.float32)


def teach_controlnet(part):
    """The host reads a file with `part` in its name as the embedded ControlNet, as `training.export_webui` writes it."""
    from modules_forge.shared import supported_control_models
    from modules_forge.supported_controlnet import ControlNetPatcher

    class Embedded:
        @staticmethod
        def try_build_from_state_dict(weights, path):
            return ControlNetPatcher(_controlnet(weights)) if part in Path(path).name else None

    supported_control_models.insert(0, Embedded)


class _Guess:
    """What the host would have found out of a published checkpoint."""

    huggingface_repo = "runwayml/stable-diffusion-v1-5"  # by which the host finds the names of a LoRA's layers
    ztsnr = False
    sampling_settings: dict = {}
    memory_usage_factor = 1.0

    class model_type:
        name = "EPS"

    def __init__(self, inputs):
        self.inputs = inputs

    def inpaint_model(self):
        return self.inputs == 9

    @property
    def latent_format(self):
        from huggingface_guess.latent import SD15

        return SD15()


class _Width(int):
    """The channels of a level, where the host asks by how much a level's are more than the first's."""

    def __mul__(self, other):
        return int(self)

    __rmul__ = __mul__


@contextmanager
def _building(groups, storage=torch.float32):
    """The host's layers, whose weights are none until they are loaded, with so many groups in a norm."""
    from backend import memory_management
    from backend.operations import using_forge_operations

    kept = dict(dtype=torch.float32, bnb_dtype=GGUF)
    if storage != GGUF:
        kept = dict(dtype=storage, manual_cast_enabled=storage != torch.float32)
    with using_forge_operations(device=memory_management.cpu, **kept):
        whole = torch.nn.GroupNorm

        class Norm(whole):
            def __init__(self, num_groups=32, num_channels=None, **kwargs):
                super().__init__(groups, num_channels, **kwargs)

        with mock.patch.object(torch.nn, "GroupNorm", Norm):
            yield


def _placed(unet, storage=torch.float32):
    """Says where it is, and where it computes."""
    from backend import memory_management

    if storage != GGUF:
        unet.to(device=memory_management.cpu, dtype=storage)
    unet.storage_dtype, unet.computation_dtype = storage, torch.float32
    unet.load_device = memory_management.get_torch_device()
    unet.initial_device = unet.offload_device = memory_management.cpu
    return unet


def _fill(module, weights, prefix):
    """Weights by their names in a checkpoint's file; those that it lacks stay as they are."""
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    said = module.load_state_dict(own, strict=False)
    odd = [name for name in said.unexpected_keys if not name.endswith("position_ids")]
    assert not odd, odd
    assert set(said.missing_keys) <= {"logit_scale", "transformer.text_projection.weight"}, said.missing_keys


def _with_own_scale(model):
    """Neo scales latents as the kind of checkpoint has it, instead of by the autoencoder's own factor."""
    vae = model.forge_objects.vae.first_stage_model
    if hasattr(vae, "latent_format"):
        vae.latent_format.scale_factor = _config("vae")["scaling_factor"]
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Weights in few bits

GGUF = "gguf"


def _storage():
    """How the UNet's weights are to be kept, by the host's setting."""
    from backend.args import dynamic_args

    return dict(vars(dynamic_args) if not isinstance(dynamic_args, dict) else dynamic_args).get(SETTING) or torch.float32


SETTING = "forge_unet_storage_dtype"


def _in_blocks(unet, weights):
    """Its weights as a .gguf file has them: those of linear layers in Q8_0, the others in half precision."""
    import gguf
    from backend.operations_gguf import ParameterGGUF

    kinds, prefix = gguf.GGMLQuantizationType, "model.diffusion_model."
    linear = {f"{prefix}{name}.weight" for name, layer in unet.named_modules() if type(layer).__name__ == "Linear"}
    by_itself = "tensor_shape" in inspect.signature(ParameterGGUF.__init__).parameters  # else of what a file's reader gives
    made = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            kind = kinds.Q8_0 if name in linear and value.shape[-1] % 32 == 0 else kinds.F16
            data = gguf.quants.quantize(value.float().numpy(), kind) if kind == kinds.Q8_0 else value.half().numpy()
            if by_itself:
                made[name] = ParameterGGUF(torch.from_numpy(data), tensor_type=kind, tensor_shape=value.shape)
            else:
                made[name] = ParameterGGUF(SimpleNamespace(tensor_type=kind, shape=value.shape[::-1], data=data))
    return made


def values(unet):
    """What its weights are in single precision, by name; and how many of them are kept in fewer bits."""
    from backend.operations_gguf import dequantize_tensor

    kept = dict(unet.named_parameters())
    few = sum(x.element_size() < 2 for x in kept.values())
    return {name: dequantize_tensor(x).detach().float() for name, x in kept.items()}, few


# ---------------------------------------------------------------------------------------------------------------------
# A tiny SDXL

SDXL_PREFIXES = {  # the parts, and what their weights' names begin with in the file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}


def _sdxl_unet():
    from backend.nn.unet import IntegratedUNet2DConditionModel

    return IntegratedUNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        channel_mult=[1, 2],
        num_res_blocks=[1, 1],
        num_head_channels=16,
        num_classes="sequential",
        adm_in_channels=64 + 6 * 256,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        context_dim=2 * 64,
        transformer_depth=[0, 1],
        transformer_depth_middle=1,
        transformer_depth_output=[0, 0, 1, 1],
    )


def make_sdxl(folder):
    """A tiny SDXL with a random UNet, and the embedded checkpoint's encoder, twice, and autoencoder. Returns its file name."""
    given = load_file(folder / "demofusion-embedded.safetensors")

    def of(prefix):
        return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}

    torch.manual_seed(0)
    encoder = {**of("cond_stage_model."), "transformer.text_projection.weight": torch.eye(64)}
    parts = dict(vae=of("first_stage_model."), text_encoder=encoder, text_encoder_2=encoder, unet={})
    for name, value in _sdxl_unet().state_dict().items():
        spread = 0.05 * torch.randn_like(value) if "out.2" in name else 0  # the last layer starts at zero
        parts["unet"][name] = value + spread
    weights = {SDXL_PREFIXES[part] + name: value.clone() for part, own in parts.items() for name, value in own.items()}
    save_file(weights, folder / f"{SDXL}.safetensors")
    return f"{SDXL}.safetensors"
