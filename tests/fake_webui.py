"""A stand-in for the AUTOMATIC1111 WebUI: the calls that the extension makes, a sampling loop, and a toy model.

`installed` puts its modules into sys.modules, loads scripts/demofusion.py on them, and takes everything away again.
Exceptions in a script are not swallowed here, as they are in the WebUI. What is offered here is compared with the real
host, name by name, in tests/webui/test_contract.py.
"""

import importlib.util
import json
import os
import re
import sys
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import script_arguments
from PIL import Image, ImageFont
from torch import nn
from webui_autoencoder import WebuiNetwork

ROOT = Path(__file__).resolve().parent.parent
CHANNELS, WIDTH, FACTOR = 4, 8, 8

# What the tests look at; emptied by `build`.
decoded = []  # latents, as they reach the decoder
saved = []  # images that were written: dicts of path, size, info and suffix
reports = []  # errors that were reported

shared = ModuleType("modules.shared")  # filled by `build`

# ---------------------------------------------------------------------------------------------------------- modules.shared


class State:
    def __init__(self):
        self.begin("")
        self.job_count = 0

    def begin(self, job="(unknown)"):
        self.job, self.textinfo = job, None
        self.job_no, self.job_count = 0, -1
        self.sampling_step = self.sampling_steps = self.current_image_sampling_step = self.id_live_preview = 0
        self.current_latent = self.current_image = None
        self.interrupted = self.skipped = self.stopping_generation = False

    def end(self):
        self.job, self.job_count = "", 0

    def interrupt(self):
        self.interrupted = True

    def skip(self):
        self.skipped = True

    def stop_generating(self):
        self.stopping_generation = True

    def nextjob(self):
        self.job_no += 1
        self.sampling_step = self.current_image_sampling_step = 0

    def set_current_image(self):
        """The page asks."""
        every, made = shared.opts.show_progress_every_n_steps, self.sampling_step - self.current_image_sampling_step
        if shared.parallel_processing_allowed and shared.opts.live_previews_enable and every != -1 and made >= every:
            self.do_set_current_image()

    def do_set_current_image(self):
        if self.current_latent is not None:
            self.assign_current_image(sample_to_image(self.current_latent))
            self.current_image_sampling_step = self.sampling_step

    def assign_current_image(self, image):
        self.current_image = image
        self.id_live_preview += 1


class TotalTQDM:
    def __init__(self):
        self._done = self._total = 0

    def update(self):
        self._done += 1

    def updateTotal(self, new_total):
        self._total = new_total


class Options:
    def __init__(self):
        self.sd_model_checkpoint = "main"
        self.samples_save, self.samples_format = False, "png"
        self.sd_vae_decode_method = self.sd_vae_encode_method = "Full"
        self.export_for_4chan, self.target_side_length = True, 4000
        self.batch_cond_uncond = True
        self.img2img_background_color, self.img2img_fix_steps, self.overlay_inpaint = "#ffffff", False, True
        self.sdxl_crop_top = self.sdxl_crop_left = 0
        self.eta_ancestral, self.eta_ddim, self.s_churn, self.uni_pc_order = 1.0, 0.0, 0.0, 3
        self.live_previews_enable, self.show_progress_every_n_steps, self.show_progress_type = True, 10, "Full"
        self.sd_checkpoint_hash, self.token_merging_ratio = None, 0
        self.enable_quantization = False

    @property
    def data(self):
        return vars(self)


class Styles:
    """Of the one style that there is, "snowy"."""

    def apply_styles_to_prompt(self, prompt, styles):
        return f"{prompt} on snow" if "snowy" in styles else prompt

    def apply_negative_styles_to_prompt(self, prompt, styles):
        return f"{prompt} grass" if "snowy" in styles else prompt


# -------------------------------------------------------------------------------------------------------- modules.upscaler


class Upscaler:
    """Enlarges as often as it takes. model: an image -> a larger one; None: what fails to load."""

    model = None

    def do_upscale(self, img, selected_model):
        return img if self.model is None else self.model(img)

    def upscale(self, img, scale, selected_model=None):
        width, height = (int(side * scale) // 8 * 8 for side in img.size)
        while img.width < width or img.height < height:
            made = self.do_upscale(img, selected_model)
            if made.size == img.size:
                break
            img = made
        return img.resize((width, height), Image.Resampling.LANCZOS)


class Doubling(Upscaler):
    def __init__(self):
        self.model = doubled


class UpscalerData:
    def __init__(self, name, path, upscaler=None):
        self.name, self.data_path, self.scaler = name, path, upscaler


def doubled(img):
    """Each pixel four times, and less of it."""
    return img.resize((2 * img.width, 2 * img.height), Image.Resampling.NEAREST).point(lambda value: value * 3 // 4)


# ----------------------------------------------------------------------------------------- modules.devices, errors, images

cpu = torch.device("cpu")


class NansException(Exception):
    pass


def autocast(disable=False):
    return nullcontext()


def without_autocast(disable=False):
    return nullcontext()


def torch_gc():
    pass


def test_for_nans(x, where):
    if x.flatten()[0].isnan():
        raise NansException(f"NaN in what the {where} made")


def report(message, *, exc_info=False):
    reports.append(message)


def get_font(fontsize):
    return ImageFont.load_default()


def flatten(img, bgcolor):
    if img.mode == "RGBA":
        background = Image.new("RGBA", img.size, bgcolor)
        background.paste(img, mask=img)
        img = background
    return img.convert("RGB")


def resize_image(resize_mode, im, width, height, upscaler_name=None):
    """Every mode stretches here."""
    scale = max(width / im.width, height / im.height)
    if scale > 1 and upscaler_name not in (None, "None") and im.mode != "L":
        upscaler = next(known for known in shared.sd_upscalers if known.name == upscaler_name)
        im = upscaler.scaler.upscale(im, scale, upscaler.data_path)
    return im.resize((width, height), Image.Resampling.LANCZOS)


def fill(image, mask):
    """The masked area in one colour."""
    return Image.composite(Image.new("RGB", image.size, (10, 200, 30)), image, mask.convert("L"))


def save_image(image, path, basename, seed=None, prompt=None, extension="png", info=None, *, p=None, suffix=""):
    """Writes nothing, but says where it would have."""
    path = os.path.join(path, f"{len(saved):05}-{seed}{suffix}.{extension}")
    saved.append(dict(path=path, size=image.size, info=info, suffix=suffix))
    return path, None


# -------------------------------------------------------------------------------------------------------------- modules.rng


class ImageRNG:
    def __init__(self, shape, seeds, subseeds=None, subseed_strength=0.0, seed_resize_from_h=0, seed_resize_from_w=0):
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self):
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


# ------------------------------------------------------------------------------------------------- the model, and its cases


class ToyUNet(nn.Module):
    """Noise from x, the level and the prompt. kernel 1: no pixel looks at another."""

    def __init__(self, kernel=3, channels=CHANNELS, seed=0):
        super().__init__()
        self.in_channels = channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(channels, CHANNELS, kernel, padding=kernel // 2)
            self.text = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x, timesteps, context, y=None):
        shift = self.text(context.mean(1)) + timesteps[:, None] / 1000 + networks.strength()
        if y is not None:
            shift = shift + y.mean(1, keepdim=True)
        return torch.tanh(self.conv(x) + shift[:, :, None, None])


class SizeEmbedder(nn.Module):
    """Numbers [rows, n] -> [rows, n * outdim], each of them readable in what comes out."""

    def __init__(self, input_key, outdim=4):
        super().__init__()
        self.input_key, self.outdim = input_key, outdim

    def forward(self, numbers):
        return (numbers[..., None] / 1000 * torch.arange(1, self.outdim + 1)).flatten(1)


class ToyModel(nn.Module):
    """A checkpoint: its UNet, its noise levels and its prompts. sdxl: the keys of its size conditions."""

    def __init__(self, name="main", kernel=3, seed=0, inpainting=False, sdxl=()):
        super().__init__()
        self.sd_checkpoint_info = CheckpointInfo(name)
        self.is_sdxl, self.is_sd3 = bool(sdxl), False
        self.cond_stage_key = "txt"
        self.parameterization = "eps"
        self.model = nn.Module()
        self._inpaints = inpainting
        self.model.conditioning_key = "hybrid" if inpainting else "crossattn"
        self.model.diffusion_model = ToyUNet(kernel, CHANNELS + 5 * inpainting, seed)
        self.first_stage_model = nn.Module()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first_stage_model.decoder = WebuiNetwork(CHANNELS, 3, decoder=True, width=4)
            self.first_stage_model.encoder = WebuiNetwork(3, CHANNELS, decoder=False, width=4)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        if sdxl:
            self.conditioner = nn.Module()
            text = nn.Module()
            text.input_key = "txt"
            self.conditioner.embedders = nn.ModuleList([text, *map(SizeEmbedder, sdxl)])
        self.requires_grad_(False)

    def get_learned_conditioning(self, batch):
        """Prompts -> [n, tokens, WIDTH]; with size conditions a dict, whose vector starts with the pooled text."""

        def tokens(prompt):
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            return torch.randn(3, WIDTH, generator=generator) * (1 + networks.strength())

        text = torch.stack([tokens(prompt) for prompt in batch])
        if not self.is_sdxl:
            return text
        numbers = {
            "original_size_as_tuple": [batch.height, batch.width],
            "crop_coords_top_left": [shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left],
            "target_size_as_tuple": [batch.height, batch.width],
            "aesthetic_score": [6.0],
        }
        embedded = [
            embedder(torch.tensor([numbers[embedder.input_key]], dtype=torch.float32)).expand(len(batch), -1)
            for embedder in self.conditioner.embedders
            if hasattr(embedder, "outdim")
        ]
        return {"crossattn": text, "vector": torch.cat([text[:, 0], *embedded], 1)}

    def decode_first_stage(self, z):
        return torch.tanh(self.first_stage_model.decoder(z))

    def encode_first_stage(self, x):
        return self.first_stage_model.encoder(x)

    def get_first_stage_encoding(self, encoder_posterior):
        return encoder_posterior + 0.01 * torch.randn(encoder_posterior.shape)

    def apply_model(self, x_noisy, t, cond):
        context = cond["crossattn"] if self.is_sdxl else torch.cat(cond["c_crossattn"], 1)
        if self.model.conditioning_key == "hybrid":
            x_noisy = torch.cat([x_noisy, *cond["c_concat"]], 1)
        return self.model.diffusion_model(x_noisy, t, context, y=cond.get("vector"))


# -------------------------------------------------------------------------- modules.sd_models, extra_networks and sd_hijack


class CheckpointInfo:
    def __init__(self, filename):
        self.filename, self.metadata, self.sha256 = filename, {}, f"sha256 of {filename}"
        self.name = self.title = os.path.basename(filename)
        self.name_for_extra = self.short_title = os.path.splitext(self.name)[0]


_models = {}  # name -> ToyModel
checkpoints_list = {}  # title -> CheckpointInfo


def list_models():
    pass


def checkpoint_tiles(use_short=False):
    return [info.short_title if use_short else info.title for info in checkpoints_list.values()]


def get_closet_checkpoint_match(search_string):
    return next((info for title, info in checkpoints_list.items() if search_string in (title, info.short_title)), None)


def select_checkpoint():
    return checkpoints_list[shared.opts.sd_model_checkpoint]


class SkipWritingToConfig:
    skip, previous = False, None

    def __enter__(self):
        self.previous, SkipWritingToConfig.skip = SkipWritingToConfig.skip, True

    def __exit__(self, exc_type, exc_value, exc_traceback):
        SkipWritingToConfig.skip = self.previous


def reload_model_weights(sd_model=None, info=None, forced_reload=False):
    """As the host does where it keeps several models; and a model that is built forgets all networks."""
    info, before = info or select_checkpoint(), shared.sd_model
    if before is not None and before.sd_checkpoint_info is info:
        return before
    loads.append(info.name)
    shared.sd_model = model_data.sd_model = _models[info.name]
    if shared.sd_model not in _built:
        _built.append(shared.sd_model)
        model_hijack.layers = list(shared.sd_model.modules())
    if not SkipWritingToConfig.skip:
        shared.opts.sd_model_checkpoint = info.title
    shared.opts.sd_checkpoint_hash = info.sha256
    activate(SimpleNamespace(scripts=None), {})
    return shared.sd_model


loads = []  # the names of what was loaded
_built = []  # the models that are there already


class SdModelData:
    sd_model = None  # what is loaded; the host's shared.sd_model loads what is not


model_data = SdModelData()


def apply_alpha_schedule_override(sd_model, p=None):
    pass


def apply_token_merging(sd_model, token_merging_ratio):
    if getattr(sd_model, "applied_token_merged_ratio", 0) != token_merging_ratio:
        sd_model.applied_token_merged_ratio = token_merging_ratio


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = self.positional = items or []
        self.named = {}

    def __eq__(self, other):
        return self.items == other.items


class Network:
    """A LoRA's file; what is loaded of it is the same here."""

    def __init__(self, name, alias=None, metadata=None):
        self.name = self.mentioned_name = name
        self.alias, self.metadata, self.network_on_disk = alias or name, metadata or {}, self
        self.strength, self.fits = 1.0, True  # it can be loaded


networks = ModuleType("networks")  # of the host's own extension Lora


def _list_available_networks():
    for known in (networks.available_networks, networks.available_network_aliases):
        known.clear()
    for network in networks.files:
        networks.available_networks[network.name] = network
        networks.available_network_aliases |= {network.name: network, network.alias: network}


def _strength():
    """What the active LoRAs add up to; that of each is told by its name."""
    return sum(active.strength * (0.1 + zlib.crc32(active.name.encode()) % 1000 / 1000) for active in networks.loaded_networks)


vars(networks).update(
    files=[],  # those in the host's folder
    available_networks={},
    available_network_aliases={},
    forbidden_network_aliases={},
    loaded_networks=[],
    list_available_networks=_list_available_networks,
    strength=_strength,
)


class ExtraNetworkLora:
    name = "lora"

    def activate(self, p, params_list):
        networks.loaded_networks.clear()
        p.lora_hashes = {}
        for params in params_list:
            network = networks.available_network_aliases.get(params.positional[0])
            if network is None or not network.fits:
                model_hijack.comments.append(f"Lora not found: {params.positional[0]}")
                continue
            network.mentioned_name, network.strength = params.positional[0], float((*params.positional, 1)[1])
            networks.loaded_networks.append(network)
            p.lora_hashes[network.mentioned_name] = f"hash of {network.name}"
        if p.lora_hashes:
            hashes = ", ".join(f"{name}: {value}" for name, value in p.lora_hashes.items())
            p.extra_generation_params["Lora hashes"] = hashes

    def deactivate(self, p):
        pass


extra_network_registry = {"lora": ExtraNetworkLora()}
activations = []  # the LoRAs that were made the active ones, each time


def parse_prompt(prompt):
    found = {}

    def take(match):
        found.setdefault(match[1], []).append(ExtraNetworkParams(match[2].split(":")))
        return ""

    return re.sub(r"<(\w+):([^>]+)>", take, prompt), found


def parse_prompts(prompts):
    parsed = [parse_prompt(prompt) for prompt in prompts]
    return [text for text, _ in parsed], parsed[0][1] if parsed else None


def activate(p, extra_network_data):
    activations.append([params.positional for params in extra_network_data.get("lora", [])])
    extra_network_registry["lora"].activate(p, extra_network_data.get("lora", []))


def deactivate(p, extra_network_data):
    extra_network_registry["lora"].deactivate(p)


class StableDiffusionModelHijack:
    circular_enabled = False
    layers = []  # of the model that was built last

    def __init__(self):
        self.comments = []

    def apply_circular(self, enable):
        if self.circular_enabled == enable:
            return
        self.circular_enabled = enable
        for layer in self.layers:
            if type(layer) is nn.Conv2d:
                layer.padding_mode = "circular" if enable else "zeros"

    def clear_comments(self):
        self.comments = []


# ----------------------------------------------------------------------------------- modules.prompt_parser: "a AND b :0.5"


class ScheduledPromptConditioning(NamedTuple):
    end_at_step: int
    cond: Any


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules, weight=1.0):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None):
        super().__init__(prompts)
        self.width, self.height = width, height


class DictWithShape(dict):
    @property
    def shape(self):
        return self["crossattn"].shape


def get_learned_conditioning(model, prompts, steps):
    conds = model.get_learned_conditioning(prompts)
    rows = [
        {key: value[i] for key, value in conds.items()} if isinstance(conds, dict) else conds[i] for i in range(len(prompts))
    ]
    return [[ScheduledPromptConditioning(steps, row)] for row in rows]


def get_multicond_learned_conditioning(model, prompts, steps):
    batch = []
    for prompt in prompts:
        texts, weights = [], []
        for part in prompt.split(" AND "):
            text, _, weight = part.partition(" :")
            texts.append(text)
            weights.append(float(weight or 1))
        texts = SdConditioning(texts, width=prompts.width, height=prompts.height)
        schedules = get_learned_conditioning(model, texts, steps)
        batch.append([ComposableScheduledPromptConditioning(s, w) for s, w in zip(schedules, weights)])
    return MulticondLearnedConditioning((len(prompts),), batch)


def _stacked(schedules):
    conds = [schedule[0].cond for schedule in schedules]
    if isinstance(conds[0], dict):
        return DictWithShape({key: torch.stack([cond[key] for cond in conds]) for key in conds[0]})
    return torch.stack(conds)


# ------------------------------------------------------------------------------------------------- modules.script_callbacks


class CFGDenoiserParams:
    def __init__(self, x, image_cond, sigma, sampling_step, total_sampling_steps, text_cond, text_uncond, denoiser=None):
        self.x, self.image_cond, self.sigma = x, image_cond, sigma
        self.sampling_step, self.total_sampling_steps = sampling_step, total_sampling_steps
        self.text_cond, self.text_uncond, self.denoiser = text_cond, text_uncond, denoiser


_callbacks = {"cfg_denoiser": [], "before_ui": [], "app_started": []}


def on_cfg_denoiser(callback, *, name=None):
    _callbacks["cfg_denoiser"].append(callback)


def on_before_ui(callback, *, name=None):
    _callbacks["before_ui"].append(callback)


def on_app_started(callback, *, name=None):
    _callbacks["app_started"].append(callback)


def cfg_denoiser_callback(params):
    for callback in _callbacks["cfg_denoiser"]:
        callback(params)


def before_ui_callback():
    for callback in _callbacks["before_ui"]:
        callback()


def app_started_callback(demo, app):
    for callback in _callbacks["app_started"]:
        callback(demo, app)


# ----------------------------------------------------------- modules.sd_samplers_common, _cfg_denoiser, _kdiffusion, _timesteps


class InterruptedException(BaseException):
    pass


def apply_refiner(cfg_denoiser, sigma=None):
    """Switch to the refiner when its share of the steps begins; says whether it did."""
    p = cfg_denoiser.p
    info = p.refiner_checkpoint_info
    due = info is not None and cfg_denoiser.step >= (p.refiner_switch_at or 0) * cfg_denoiser.total_steps
    if not due or shared.sd_model.sd_checkpoint_info is info:
        return False
    with SkipWritingToConfig():
        reload_model_weights(info=info)
    p.setup_conds()
    cfg_denoiser.update_inner_model()
    return True


class CFGDenoiser(nn.Module):
    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler
        self.p = self.model_wrap = self.steps = self.total_steps = self.mask = self.nmask = None
        self.step = 0
        self.cond_scale_miltiplier = 1.0

    @property
    def inner_model(self):
        raise NotImplementedError

    def combine_denoised(self, x_out, conds_list, uncond, cond_scale):
        without = x_out[-len(uncond) :]
        result = without.clone()
        for image, conds in enumerate(conds_list):
            for row, weight in conds:
                result[image] += (x_out[row] - without[image]) * (weight * cond_scale)
        return result

    def get_pred_x0(self, x_in, x_out, sigma):
        return x_out

    def update_inner_model(self):
        self.model_wrap = None
        extra = self.sampler.sampler_extra_args
        extra["cond"], extra["uncond"] = self.p.get_conds()

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted or shared.state.skipped:
            raise InterruptedException
        if apply_refiner(self, sigma):
            cond, uncond = (self.sampler.sampler_extra_args[name] for name in ("cond", "uncond"))
        parts = [(image, part) for image, of_image in enumerate(cond.batch) for part in of_image]
        text, negative = _stacked([part.schedules for _, part in parts]), _stacked(uncond)
        rows = torch.tensor([image for image, _ in parts] + list(range(len(x))))
        state = shared.state
        params = CFGDenoiserParams(
            x[rows], image_cond[rows], sigma[rows], state.sampling_step, state.sampling_steps, text, negative, self
        )
        cfg_denoiser_callback(params)

        count = len(rows) if shared.opts.batch_cond_uncond else len(x)
        pieces = []
        for own in (slice(first, first + count) for first in range(0, len(rows), count)):
            if isinstance(text, dict):
                conds = {key: torch.cat([params.text_cond[key], params.text_uncond[key]])[own] for key in text}
            else:
                conds = {"c_crossattn": [torch.cat([params.text_cond, params.text_uncond])[own]]}
            conds["c_concat"] = [params.image_cond[own]]
            pieces.append(self.inner_model(params.x[own], params.sigma[own], cond=conds))
        answers = torch.cat(pieces)

        conds_list = [[(row, part.weight) for row, (own, part) in enumerate(parts) if own == image] for image in range(len(x))]
        result = self.combine_denoised(answers, conds_list, x, cond_scale * self.cond_scale_miltiplier)
        self.sampler.last_latent = self.get_pred_x0(x, result, sigma)
        store_latent(self.sampler.last_latent)
        self.step += 1
        return result


def store_latent(decoded):
    shared.state.current_latent = decoded


def sample_to_image(samples, index=0, approximation=None):
    """The image, without colours, of one of the latents."""
    return Image.fromarray(shared.sd_model.decode_first_stage(samples[index : index + 1])[0, 0].byte().numpy())


def images_tensor_to_samples(image, approximation=None, model=None):
    """[1, 3, H, W] in 0..1 -> latents."""
    model = model or shared.sd_model
    return model.get_first_stage_encoding(model.encode_first_stage(2 * image - 1))


def setup_img2img_steps(p, steps=None):
    """The steps of the whole schedule, and the number of the first that is run, counted from the end and from 0."""
    if steps is not None or shared.opts.img2img_fix_steps:
        steps = steps or p.steps
        return int(steps / min(p.denoising_strength, 0.999)), steps - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)


class Sampler:
    def __init__(self, funcname):
        self.funcname = self.func = funcname
        self.p = self.config = self.eta = self.last_latent = self.model_wrap_cfg = self.sampler_extra_args = None
        self.eta_option_field = "eta_ancestral"
        self.conditioning_key = "hybrid" if shared.sd_model._inpaints else "crossattn"

    def callback_state(self, d):
        shared.state.sampling_step = d["i"]
        shared.total_tqdm.update()

    def launch_sampling(self, steps, func):
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        shared.state.sampling_steps, shared.state.sampling_step = steps, 0
        try:
            return func()
        except InterruptedException:
            return self.last_latent

    def initialize(self, p):
        self.p = self.model_wrap_cfg.p = p
        self.model_wrap_cfg.mask, self.model_wrap_cfg.nmask = getattr(p, "mask", None), getattr(p, "nmask", None)
        self.model_wrap_cfg.step = 0
        self.eta = p.eta if p.eta is not None else getattr(shared.opts, self.eta_option_field)
        return {}

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        raise NotImplementedError

    def sample_img2img(self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        raise NotImplementedError

    def _launch(self, p, x, levels, conditioning, unconditional_conditioning, steps, image_conditioning):
        self.initialize(p)
        self.last_latent = x
        self.sampler_extra_args = dict(
            cond=conditioning,
            uncond=unconditional_conditioning,
            cond_scale=p.cfg_scale,
            s_min_uncond=0.0,
            image_cond=image_conditioning,
        )
        return self.launch_sampling(
            steps,
            lambda: self.func(self.model_wrap_cfg, x, levels, extra_args=self.sampler_extra_args, callback=self.callback_state),
        )


class SamplerData(NamedTuple):
    name: str
    constructor: Any
    aliases: list
    options: dict

    def total_steps(self, steps):
        return steps


class _SigmaModel(nn.Module):
    """Predicts the clean image from x = z + sigma * n."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model
        kept = model.alphas_cumprod.double()
        self.register_buffer("sigmas", ((1 - kept) / kept).sqrt())

    def get_sigmas(self, n):
        levels = np.interp(np.linspace(999, 0, n), np.arange(1000), self.sigmas.log().numpy())
        return torch.tensor([*np.exp(levels), 0.0], dtype=torch.float32)

    def forward(self, input, sigma, cond):
        t = np.interp(sigma.double().log().numpy(), self.sigmas.log().numpy(), np.arange(1000))
        t = t.round() if shared.opts.enable_quantization else t
        sigma = sigma[:, None, None, None]
        scaled = input / (sigma**2 + 1).sqrt()
        return input - sigma * self.inner_model.apply_model(scaled, torch.from_numpy(t).float(), cond)


class _TimestepModel(nn.Module):
    """Predicts the noise in x = sqrt(alphas_cumprod) * z + sqrt(1 - alphas_cumprod) * n."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, input, timesteps, cond):
        return self.inner_model.apply_model(input, timesteps, cond)


class CFGDenoiserKDiffusion(CFGDenoiser):
    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = _SigmaModel(shared.sd_model)
        return self.model_wrap


class CFGDenoiserTimesteps(CFGDenoiser):
    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = _TimestepModel(shared.sd_model)
        return self.model_wrap

    def get_pred_x0(self, x_in, x_out, sigma):
        kept = shared.sd_model.alphas_cumprod[sigma.long()][:, None, None, None]
        return (x_in - (1 - kept).sqrt() * x_out) / kept.sqrt()


def _euler(model, x, sigmas, extra_args, callback):
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
        callback({"i": i, "x": x, "sigma": sigma, "denoised": clean})
        x = x + (after - sigma) * (x - clean) / sigma
    return x


def ddim(model, x, timesteps, extra_args=None, callback=None):
    kept = model.inner_model.inner_model.alphas_cumprod
    levels = timesteps.flip(0).tolist()
    for i, (t, after) in enumerate(zip(levels, levels[1:])):
        noise = model(x, t * x.new_ones(len(x)), **extra_args)
        clean = (x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()
        x = kept[after].sqrt() * clean + (1 - kept[after]).sqrt() * noise
        callback({"i": i, "x": x, "denoised": clean})
    return x


class KDiffusionSampler(Sampler):
    def __init__(self, funcname, sd_model):
        super().__init__(funcname)
        self.func = {"sample_euler": _euler, "sample_lcm": _lcm}[funcname]
        self.model_wrap_cfg = CFGDenoiserKDiffusion(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_sigmas(self, p, steps):
        schedule = schedulers_map.get(p.scheduler or "Automatic") if p is not None else schedulers[0]
        if schedule is schedulers[0]:
            schedule = schedulers_map.get(self.config.options.get("scheduler"), schedule)
        if schedule is schedulers[0]:
            return self.model_wrap.get_sigmas(steps)
        p.extra_generation_params["Schedule type"] = schedule.label
        least, most = (self.model_wrap.sigmas[end].item() ** (1 / 7) for end in (0, -1))
        return torch.cat([torch.linspace(most, least, steps) ** 7, torch.zeros(1)])

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        steps = steps or p.steps
        sigmas = self.get_sigmas(p, steps)
        return self._launch(p, x * sigmas[0], sigmas, conditioning, unconditional_conditioning, steps, image_conditioning)

    def sample_img2img(self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        steps, last = setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)[steps - last - 1 :]
        x = x + noise * sigmas[0]
        return self._launch(p, x, sigmas, conditioning, unconditional_conditioning, last + 1, image_conditioning)


class CompVisSampler(Sampler):
    def __init__(self, funcname, sd_model):
        super().__init__(funcname)
        self.eta_option_field = "eta_ddim"
        self.model_wrap_cfg = CFGDenoiserTimesteps(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_timesteps(self, p, steps):
        return torch.arange(0, 1000, 1000 // steps).add(1).clamp(max=999)

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        steps = steps or p.steps
        timesteps = self.get_timesteps(p, steps)
        return self._launch(p, x, timesteps, conditioning, unconditional_conditioning, steps, image_conditioning)

    def sample_img2img(self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        steps, last = setup_img2img_steps(p, steps)
        timesteps = self.get_timesteps(p, steps)
        kept = shared.sd_model.alphas_cumprod[timesteps[last]]
        x = x * kept.sqrt() + noise * (1 - kept).sqrt()
        return self._launch(p, x, timesteps[:last], conditioning, unconditional_conditioning, last + 1, image_conditioning)


def _lcm(model, x, sigmas, extra_args, callback):
    for i, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        clean = model(x, sigma * x.new_ones(len(x)), **extra_args)
        callback({"i": i, "x": x, "sigma": sigma, "denoised": clean})
        x = clean + after * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) if after else clean
    return x


all_samplers = [
    SamplerData("Euler", lambda model: KDiffusionSampler("sample_euler", model), ["k_euler"], {}),
    SamplerData("DDIM", lambda model: CompVisSampler(ddim, model), ["ddim"], {}),
    SamplerData("UniPC", lambda model: CompVisSampler(ddim, model), ["unipc"], {}),
    SamplerData("DPM++ 2M", lambda model: KDiffusionSampler("sample_euler", model), ["k_dpmpp_2m"], {"scheduler": "karras"}),
    SamplerData("LCM", lambda model: KDiffusionSampler("sample_lcm", model), ["k_lcm"], {}),
]
samplers_map = {name.lower(): data.name for data in all_samplers for name in (data.name, *data.aliases)}


def visible_sampler_names():
    return [data.name for data in all_samplers]


class Scheduler:
    def __init__(self, name, label, aliases=None):
        self.name, self.label, self.aliases = name, label, aliases


schedulers = [
    Scheduler("automatic", "Automatic"),
    Scheduler("karras", "Karras"),
    Scheduler("sgm_uniform", "SGM Uniform", ["SGMUniform"]),
]
schedulers_map = {name: scheduler for scheduler in schedulers for name in (scheduler.name, scheduler.label)}


def find_sampler_config(name):
    return next((data for data in all_samplers if data.name == name), None)


def create_sampler(name, model):
    config = find_sampler_config(name)
    assert config is not None, name
    sampler = config.constructor(model)
    sampler.config = config
    return sampler


# -------------------------------------------------------------------------------------------------------- modules.processing


@dataclass(repr=False)
class StableDiffusionProcessing:
    outpath_samples: str = "outputs"
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 1
    subseed: int = 1
    subseed_strength: float = 0
    seed_resize_from_h: int = 0
    seed_resize_from_w: int = 0
    sampler_name: str = "Euler"
    scheduler: str = "Automatic"
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 4
    cfg_scale: float = 5.0
    width: int = 64
    height: int = 64
    tiling: bool = False
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    eta: float = None
    s_churn: float = 0.0
    refiner_checkpoint: str = None
    refiner_switch_at: float = None
    disable_extra_networks: bool = False
    styles: list = None
    is_api: bool = field(default=False, init=False)
    scripts: Any = field(default=None, init=False)
    script_args: list = field(default=None, init=False)

    def __post_init__(self):
        self.comments, self.extra_generation_params = {}, {}
        self.rng = self.sampler = self.c = self.uc = self.extra_network_data = self.refiner_checkpoint_info = None
        self.prompts = self.negative_prompts = self.seeds = self.subseeds = None
        self.all_prompts = self.all_negative_prompts = self.all_seeds = self.all_subseeds = None
        self.step_multiplier = 1
        self.styles = self.styles or []
        self.cached_c, self.cached_uc = StableDiffusionProcessing.cached_c, StableDiffusionProcessing.cached_uc

    @property
    def sd_model(self):
        return shared.sd_model

    def comment(self, text):
        self.comments[text] = 1

    def save_samples(self):
        state = shared.state
        return shared.opts.samples_save and not (self.do_not_save_samples or state.interrupted or state.skipped)

    def setup_conds(self):
        sizes = dict(width=self.width, height=self.height)
        self.c = self._cached(get_multicond_learned_conditioning, SdConditioning(self.prompts, **sizes), self.cached_c)
        self.uc = self._cached(get_learned_conditioning, SdConditioning(self.negative_prompts, **sizes), self.cached_uc)

    def _cached(self, function, prompts, cache):
        model = shared.sd_model
        key = (prompts, self.steps, model.sd_checkpoint_info, self.extra_network_data, self.width, self.height)
        if cache[0] != key:
            cache[:] = key, function(model, prompts, self.steps)
        return cache[1]

    def parse_extra_network_prompts(self):
        self.prompts, self.extra_network_data = parse_prompts(self.prompts)

    def get_token_merging_ratio(self, for_hr=False):
        return shared.opts.token_merging_ratio

    def get_conds(self):
        return self.c, self.uc

    def txt2img_image_conditioning(self, x, width=None, height=None):
        """With an inpainting model, in every pixel where it lies: 100 * row + column."""
        if not self.sd_model._inpaints:
            return x.new_zeros(len(x), 5, 1, 1)
        h, w = (height or self.height) // FACTOR, (width or self.width) // FACTOR
        return (100.0 * torch.arange(h)[:, None] + torch.arange(w)).expand(len(x), 5, h, w).clone()

    def img2img_image_conditioning(self, source_image, latent_image, image_mask=None, round_image_mask=True):
        """With an inpainting model, the mask and the picture without what is masked."""
        if not self.sd_model._inpaints:
            return latent_image.new_zeros(len(latent_image), 5, 1, 1)
        mask = torch.ones(1, 1, *source_image.shape[-2:])
        if image_mask is not None:
            mask = torch.from_numpy(np.array(image_mask.convert("L"), np.float32))[None, None] / 255
        model = self.sd_model
        seen = model.get_first_stage_encoding(model.encode_first_stage(source_image * (1 - mask)))
        mask = torch.nn.functional.interpolate(mask, size=latent_image.shape[-2:]).expand(len(seen), -1, -1, -1)
        return torch.cat([mask, seen], 1)

    def init(self, all_prompts, all_seeds, all_subseeds):
        pass


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    denoising_strength: float = 0.75
    enable_hr: bool = False
    firstpass_image: Any = None

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        self.sampler = create_sampler(self.sampler_name, self.sd_model)
        x = self.rng.next()
        self.scripts.process_before_every_sampling(self, x=x, noise=x, c=conditioning, uc=unconditional_conditioning)
        return self.sampler.sample(
            self, x, conditioning, unconditional_conditioning, image_conditioning=self.txt2img_image_conditioning(x)
        )


@dataclass(repr=False)
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    init_images: list = None
    resize_mode: int = 0
    denoising_strength: float = 0.75
    mask: Any = None
    mask_blur_x: int = 4
    mask_blur_y: int = 4
    mask_round: bool = True
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpainting_mask_invert: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.image_mask, self.mask, self.nmask = self.mask, None, None
        self.init_latent = self.image_conditioning = self.mask_for_overlay = self.overlay_images = None

    def init(self, all_prompts, all_seeds, all_subseeds):
        """The pictures at the job's size, as latents; a mask is not blurred here."""
        self.sampler = create_sampler(self.sampler_name, self.sd_model)
        size, mask = (self.width, self.height), None
        if self.image_mask is not None:
            mask = self.mask_for_overlay = create_binary_mask(self.image_mask).resize(size)
            self.overlay_images = []
        pixels = []
        for picture in self.init_images:
            picture = flatten(picture, shared.opts.img2img_background_color)
            picture = picture if self.resize_mode == 3 else picture.resize(size)
            if mask is not None:
                overlay = picture.copy()
                overlay.putalpha(mask.point(lambda value: 255 - value))
                self.overlay_images.append(overlay)
                picture = picture if self.inpainting_fill == 1 else fill(picture, mask)
            pixels.append(torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1) / 255)
        pixels = torch.stack(pixels) if len(pixels) > 1 else pixels[0].repeat(self.batch_size, 1, 1, 1)
        self.batch_size = len(pixels)
        self.init_latent = images_tensor_to_samples(pixels, model=self.sd_model)
        if self.resize_mode == 3:
            self.init_latent = nn.functional.interpolate(self.init_latent, size=(self.height // FACTOR, self.width // FACTOR))
        if mask is not None:
            small = mask.resize((self.width // FACTOR, self.height // FACTOR))
            self.nmask = torch.from_numpy(np.around(np.array(small, np.float32) / 255)).expand(CHANNELS, -1, -1)
            self.mask = 1 - self.nmask
            self.overlay_images = (self.overlay_images * self.batch_size)[: self.batch_size]
        self.image_conditioning = self.img2img_image_conditioning(2 * pixels - 1, self.init_latent, mask)

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        x = self.rng.next()
        self.scripts.process_before_every_sampling(
            self, x=self.init_latent, noise=x, c=conditioning, uc=unconditional_conditioning
        )
        samples = self.sampler.sample_img2img(
            self, self.init_latent, x, conditioning, unconditional_conditioning, image_conditioning=self.image_conditioning
        )
        return samples if self.mask is None else samples * self.nmask + self.init_latent * self.mask


StableDiffusionProcessing.cached_c, StableDiffusionProcessing.cached_uc = [None, None], [None, None]


def create_binary_mask(image, round=True):
    return image.convert("L")


class Processed:
    def __init__(self, p, images_list, *, infotexts=None, comments=""):
        self.images, self.infotexts = images_list, infotexts
        self.all_prompts, self.all_seeds, self.all_subseeds = p.all_prompts, p.all_seeds, p.all_subseeds
        self.comments = "\n".join(p.comments)

    def infotext(self, p, index):
        return create_infotext(p, self.all_prompts, self.all_seeds, self.all_subseeds, index=index)


class DecodedSamples(list):
    already_decoded = True


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    if check_for_nans:
        test_for_nans(batch, "unet")
    decoded.append(batch.clone())
    samples = DecodedSamples()
    for latent in batch:
        samples.append(model.decode_first_stage(latent[None])[0])
        if check_for_nans:
            test_for_nans(samples[-1], "vae")
    return samples


def create_infotext(p, all_prompts, all_seeds, all_subseeds, comments=None, *, index=0, all_negative_prompts=None):
    given = {"Steps": p.steps, "Sampler": p.sampler_name, "Schedule type": p.scheduler, "CFG scale": p.cfg_scale}
    given |= {"Seed": all_seeds[index], "Model": p.sd_model_name}
    pairs = {**given, "Size": f"{p.width}x{p.height}", **p.extra_generation_params}
    return f"{all_prompts[index]}\n" + ", ".join(f"{key}: {quote(value)}" for key, value in pairs.items())


def process_images(p):
    p.scripts.before_process(p)
    reload_model_weights()
    apply_token_merging(p.sd_model, p.get_token_merging_ratio())
    try:
        return process_images_inner(p)
    finally:
        apply_token_merging(p.sd_model, 0)


def process_images_inner(p):
    state = shared.state
    prompts = [shared.prompt_styles.apply_styles_to_prompt(p.prompt, p.styles)] * (p.batch_size * p.n_iter)
    negative = shared.prompt_styles.apply_negative_styles_to_prompt(p.negative_prompt, p.styles)
    p.all_prompts, p.all_negative_prompts = prompts, [negative] * len(prompts)
    p.sd_model_name = shared.sd_model.sd_checkpoint_info.name
    model_hijack.clear_comments()
    p.all_seeds, p.all_subseeds = ([first + i for i in range(len(prompts))] for first in (p.seed, p.subseed))
    p.refiner_checkpoint_info = _models[p.refiner_checkpoint].sd_checkpoint_info if p.refiner_checkpoint else None
    model_hijack.apply_circular(p.tiling)
    p.scripts.process(p)
    with torch.no_grad():
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)

    images, infotexts = [], []
    state.job_count = p.n_iter
    for n in range(p.n_iter):
        state.skipped = False
        if state.interrupted or state.stopping_generation:
            break
        reload_model_weights()
        own = range(n * p.batch_size, (n + 1) * p.batch_size)
        p.prompts, p.negative_prompts = [prompts[i] for i in own], [p.all_negative_prompts[i] for i in own]
        p.seeds, p.subseeds = [p.seed + i for i in own], [p.subseed + i for i in own]
        p.rng = ImageRNG((CHANNELS, p.height // FACTOR, p.width // FACTOR), p.seeds)
        p.scripts.before_process_batch(p, batch_number=n, prompts=p.prompts, seeds=p.seeds, subseeds=p.subseeds)
        if len(p.prompts) == 0:
            break
        p.parse_extra_network_prompts()
        if not p.disable_extra_networks:
            activate(p, p.extra_network_data)
        p.setup_conds()
        for comment in model_hijack.comments:
            p.comment(comment)
        with torch.no_grad():
            samples = _sampled(p)
            ps = PostSampleArgs(samples)
            p.scripts.post_sample(p, ps)
            if not getattr(ps.samples, "already_decoded", False):
                ps.samples = decode_latent_batch(p.sd_model, ps.samples, cpu, check_for_nans=True)
        state.nextjob()
        p.prompts, p.negative_prompts = [prompts[i] for i in own], [p.all_negative_prompts[i] for i in own]
        for i, sample in enumerate(ps.samples):
            p.batch_index = i
            images.append(_finished(p, sample, i))
            infotexts.append(create_infotext(p, p.prompts, p.seeds, p.subseeds, index=i))
    if not infotexts:
        infotexts = [create_infotext(p, prompts or [p.prompt], [p.seed], [p.subseed])]
    if not p.disable_extra_networks and p.extra_network_data:
        deactivate(p, p.extra_network_data)
    processed = Processed(p, images, infotexts=infotexts)
    p.scripts.postprocess(p, processed)
    return processed


def _sampled(p):
    return p.sample(p.c, p.uc, p.seeds, p.subseeds, p.subseed_strength, p.prompts)


def _finished(p, sample, i):
    """One decoded image: of txt2img as it is; of img2img as a picture, with what is laid over it."""
    if not hasattr(p, "init_images"):
        return sample
    pixels = (255 * ((sample.float() + 1) / 2).clamp(0, 1)).byte()
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    pp = PostprocessImageArgs(image)
    p.scripts.postprocess_image(p, pp)
    overlay = p.overlay_images[i] if p.overlay_images and shared.opts.overlay_inpaint else None
    args = PostProcessMaskOverlayArgs(i, p.mask_for_overlay, overlay)
    p.scripts.postprocess_maskoverlay(p, args)
    image = pp.image.convert("RGBA")
    if args.overlay_image is not None:
        image.alpha_composite(args.overlay_image)
    return image.convert("RGB")


# ----------------------------------------------------------------------------------- modules.scripts and modules.infotext_utils

AlwaysVisible = object()


class PostSampleArgs:
    def __init__(self, samples):
        self.samples = samples


class PostprocessImageArgs:
    def __init__(self, image):
        self.image = image


class PostProcessMaskOverlayArgs:
    def __init__(self, index, mask_for_overlay, overlay_image):
        self.index, self.mask_for_overlay, self.overlay_image = index, mask_for_overlay, overlay_image


class OnComponent:
    def __init__(self, component):
        self.component = component


class ScriptClassData(NamedTuple):
    script_class: Any
    path: str
    basedir: str
    module: Any


class Script:
    name = filename = section = args_from = args_to = infotext_fields = controls = on_after_component_elem_id = None
    alwayson = is_img2img = False
    create_group = True

    def title(self):
        raise NotImplementedError

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        pass

    def before_process(self, p, *args):
        pass

    def process(self, p, *args):
        pass

    def before_process_batch(self, p, *args, **kwargs):
        pass

    def process_before_every_sampling(self, p, *args, **kwargs):
        pass

    def post_sample(self, p, ps, *args):
        pass

    def postprocess_image(self, p, pp, *args):
        pass

    def postprocess_maskoverlay(self, p, ppmo, *args):
        pass

    def postprocess(self, p, processed, *args):
        pass

    def on_after_component(self, callback, *, elem_id):
        self.on_after_component_elem_id = [*(self.on_after_component_elem_id or []), (elem_id, callback)]

    def elem_id(self, item_id):
        return f"script_{self.title().lower().replace(' ', '_')}_{item_id}"


class ScriptRunner:
    def __init__(self):
        self.alwayson_scripts, self.selectable_scripts = [], []
        self.inputs, self.infotext_fields = [None], []

    def create_script_ui(self, script):
        script.controls = script.ui(script.is_img2img)
        script.name = script.title().lower()
        script.args_from, script.args_to = len(self.inputs), len(self.inputs) + len(script.controls)
        self.inputs += script.controls
        self.infotext_fields += script.infotext_fields or []

    def _own(self, p):
        return [(script, p.script_args[script.args_from : script.args_to]) for script in self.alwayson_scripts]

    def before_process(self, p):
        for script, args in self._own(p):
            script.before_process(p, *args)

    def process(self, p):
        for script, args in self._own(p):
            script.process(p, *args)

    def before_process_batch(self, p, **kwargs):
        for script, args in self._own(p):
            script.before_process_batch(p, *args, **kwargs)

    def process_before_every_sampling(self, p, **kwargs):
        for script, args in self._own(p):
            script.process_before_every_sampling(p, *args, **kwargs)

    def post_sample(self, p, ps):
        for script, args in self._own(p):
            script.post_sample(p, ps, *args)

    def postprocess_image(self, p, pp):
        for script, args in self._own(p):
            script.postprocess_image(p, pp, *args)

    def postprocess_maskoverlay(self, p, ppmo):
        for script, args in self._own(p):
            script.postprocess_maskoverlay(p, ppmo, *args)

    def postprocess(self, p, processed):
        for script, args in self._own(p):
            script.postprocess(p, processed, *args)


def quote(text):
    return json.dumps(text) if any(sign in str(text) for sign in ",:\n") else text


def image_from_url_text(filedata):
    return images_of_the_gallery[filedata["name"]] if filedata.get("is_file") else None


images_of_the_gallery = {}  # what the page may name


def parse_generation_parameters(x, skip_fields=None):
    """The last line of an infotext as a dict."""
    rest, values = x.strip().splitlines()[-1], {}
    while rest:
        key, _, rest = rest.partition(": ")
        quoted = re.match(r'"(?:[^"\\]|\\.)+"(?=, |$)', rest := rest.lstrip())
        values[key], _, rest = (quoted[0], "", rest[quoted.end() + 2 :]) if quoted else rest.partition(", ")
        if values[key][:1] == values[key][-1:] == '"':
            with suppress(ValueError):
                values[key] = json.loads(values[key])
    if "Size" in values:
        values["Size-1"], values["Size-2"] = values["Size"].split("x")
    return {"Hires resize-1": 0, **values}


# ---------------------------------------------------------------------------------------- gradio and modules.ui_components


class _Block:
    def __init__(self, **given):
        self.__dict__.update(given)
        self._events = {}  # name -> its listeners: (script, inputs, outputs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _Control(_Block):
    def change(self, fn, inputs=None, outputs=None, *, _js=None):
        self._events.setdefault("change", []).append((_js, inputs, outputs))

    def input(self, fn, inputs=None, outputs=None, *, _js=None):
        self._events.setdefault("input", []).append((_js, inputs, outputs))


class Row(_Block):
    pass


class Column(_Block):
    pass


class Accordion(_Block):
    def __init__(self, label, *, open=True, elem_id=None):
        super().__init__(label=label, open=open, elem_id=elem_id)


class HTML(_Block):
    def __init__(self, value="", *, elem_id=None, **kwargs):
        super().__init__(value=value, elem_id=elem_id)


class Checkbox(_Control):
    def __init__(self, value=False, *, label=None, elem_id=None, **kwargs):
        super().__init__(value=value, label=label, elem_id=elem_id, **kwargs)


class Slider(_Control):
    def __init__(self, minimum=0, maximum=100, value=None, *, step=None, label=None, elem_id=None, **kwargs):
        assert minimum <= value <= maximum, label
        super().__init__(minimum=minimum, maximum=maximum, value=value, step=step, label=label, elem_id=elem_id, **kwargs)


class Radio(_Control):
    _made = None  # the last one

    def __init__(self, choices=None, *, value=None, label=None, elem_id=None, **kwargs):
        super().__init__(choices=choices, value=value, label=label, elem_id=elem_id, **kwargs)
        Radio._made = self


class Dropdown(_Control):
    def __init__(self, choices=None, *, value=None, allow_custom_value=False, label=None, elem_id=None, **kwargs):
        assert value in choices, label
        given = dict(choices=choices, value=value, allow_custom_value=allow_custom_value, label=label, elem_id=elem_id)
        super().__init__(**given, **kwargs)


class Textbox(_Control):
    def __init__(self, value="", *, lines=1, label=None, placeholder=None, max_lines=20, elem_id=None, visible=True, **kwargs):
        given = dict(value=value, lines=lines, label=label, placeholder=placeholder, max_lines=max_lines, elem_id=elem_id)
        super().__init__(**given, visible=visible, **kwargs)


def update(**kwargs):
    return {**kwargs, "__type__": "generic_update"}


class ToolButton(_Block):
    def __init__(self, *args, **kwargs):
        super().__init__(value=args[0], **kwargs)

    def click(self, fn, inputs=None, outputs=None, *, _js=None):
        self._events.setdefault("click", []).append((_js, inputs, outputs))


class InputAccordion(Checkbox):
    def __init__(self, value, **kwargs):
        super().__init__(value, **kwargs)

    def extra(self):
        return Column()


def create_refresh_button(refresh_component, refresh_method, refreshed_args, elem_id):
    def refresh():
        refresh_method()
        vars(refresh_component).update(refreshed_args())

    refresh_buttons[elem_id] = refresh
    return ToolButton("refresh", elem_id=elem_id)


refresh_buttons = {}  # what a click on them does, by their ids


# ---------------------------------------------------------------------------------------------------------------- all of it

model_hijack = StableDiffusionModelHijack()

# Module -> its names and what they are; what starts with "_" here is the fake's own.
MODULES = {
    "modules": dict(),
    "modules.shared": dict(
        state=None,
        opts=None,
        total_tqdm=None,
        sd_model=None,
        parallel_processing_allowed=True,
        prompt_styles=Styles(),
        latent_upscale_modes={
            "Latent": {"mode": "bilinear", "antialias": False},
            "Latent (nearest-exact)": {"mode": "nearest-exact", "antialias": False},
        },
        sd_upscalers=[UpscalerData("None", None), UpscalerData("Doubled", "doubled.pth", Doubling())],
    ),
    "modules.devices": dict(
        cpu=cpu,
        device=cpu,
        dtype_vae=torch.float32,
        dtype_unet=torch.float32,
        get_device_for=lambda task: cpu,
        unet_needs_upcast=False,
        NansException=NansException,
        autocast=autocast,
        without_autocast=without_autocast,
        torch_gc=torch_gc,
        test_for_nans=test_for_nans,
    ),
    "modules.errors": dict(report=report),
    "modules.images": dict(get_font=get_font, save_image=save_image, flatten=flatten, resize_image=resize_image),
    "modules.masking": dict(fill=fill),
    "modules.rng": dict(ImageRNG=ImageRNG),
    "modules.extra_networks": dict(
        ExtraNetworkParams=ExtraNetworkParams,
        extra_network_registry=extra_network_registry,
        parse_prompt=parse_prompt,
        parse_prompts=parse_prompts,
        activate=activate,
        deactivate=deactivate,
    ),
    "modules.upscaler": dict(Upscaler=Upscaler, UpscalerData=UpscalerData),
    "modules.sd_models": dict(
        CheckpointInfo=CheckpointInfo,
        SkipWritingToConfig=SkipWritingToConfig,
        model_data=model_data,
        checkpoints_list=checkpoints_list,
        list_models=list_models,
        checkpoint_tiles=checkpoint_tiles,
        get_closet_checkpoint_match=get_closet_checkpoint_match,
        select_checkpoint=select_checkpoint,
        reload_model_weights=reload_model_weights,
        apply_alpha_schedule_override=apply_alpha_schedule_override,
        apply_token_merging=apply_token_merging,
    ),
    "modules.sd_schedulers": dict(schedulers=schedulers, schedulers_map=schedulers_map),
    "modules.sd_hijack": dict(StableDiffusionModelHijack=StableDiffusionModelHijack, model_hijack=model_hijack),
    "modules.prompt_parser": dict(
        ScheduledPromptConditioning=ScheduledPromptConditioning,
        ComposableScheduledPromptConditioning=ComposableScheduledPromptConditioning,
        MulticondLearnedConditioning=MulticondLearnedConditioning,
        SdConditioning=SdConditioning,
        DictWithShape=DictWithShape,
        get_learned_conditioning=get_learned_conditioning,
        get_multicond_learned_conditioning=get_multicond_learned_conditioning,
    ),
    "modules.script_callbacks": dict(
        CFGDenoiserParams=CFGDenoiserParams,
        on_cfg_denoiser=on_cfg_denoiser,
        on_before_ui=on_before_ui,
        on_app_started=on_app_started,
        cfg_denoiser_callback=cfg_denoiser_callback,
        before_ui_callback=before_ui_callback,
        app_started_callback=app_started_callback,
    ),
    "modules.sd_samplers_common": dict(
        InterruptedException=InterruptedException,
        apply_refiner=apply_refiner,
        images_tensor_to_samples=images_tensor_to_samples,
        sample_to_image=sample_to_image,
        store_latent=store_latent,
        setup_img2img_steps=setup_img2img_steps,
        Sampler=Sampler,
        SamplerData=SamplerData,
    ),
    "modules.sd_samplers_cfg_denoiser": dict(CFGDenoiser=CFGDenoiser),
    "modules.sd_samplers_kdiffusion": dict(CFGDenoiserKDiffusion=CFGDenoiserKDiffusion, KDiffusionSampler=KDiffusionSampler),
    "modules.sd_samplers_timesteps": dict(CFGDenoiserTimesteps=CFGDenoiserTimesteps, CompVisSampler=CompVisSampler),
    "modules.sd_samplers_timesteps_impl": dict(ddim=ddim),
    "modules.sd_samplers": dict(
        all_samplers=all_samplers,
        samplers_map=samplers_map,
        visible_sampler_names=visible_sampler_names,
        find_sampler_config=find_sampler_config,
        create_sampler=create_sampler,
    ),
    "modules.processing": dict(
        StableDiffusionProcessing=StableDiffusionProcessing,
        StableDiffusionProcessingTxt2Img=StableDiffusionProcessingTxt2Img,
        StableDiffusionProcessingImg2Img=StableDiffusionProcessingImg2Img,
        Processed=Processed,
        DecodedSamples=DecodedSamples,
        decode_latent_batch=decode_latent_batch,
        create_binary_mask=create_binary_mask,
        create_infotext=create_infotext,
        process_images=process_images,
        process_images_inner=process_images_inner,
    ),
    "modules.scripts": dict(
        AlwaysVisible=AlwaysVisible,
        OnComponent=OnComponent,
        PostSampleArgs=PostSampleArgs,
        PostprocessImageArgs=PostprocessImageArgs,
        PostProcessMaskOverlayArgs=PostProcessMaskOverlayArgs,
        Script=Script,
        ScriptClassData=ScriptClassData,
        ScriptRunner=ScriptRunner,
        scripts_data=None,
    ),
    "modules.infotext_utils": dict(
        quote=quote, image_from_url_text=image_from_url_text, parse_generation_parameters=parse_generation_parameters
    ),
    "modules.ui_components": dict(InputAccordion=InputAccordion, ToolButton=ToolButton),
    "modules.ui_common": dict(create_refresh_button=create_refresh_button),
    "gradio": dict(
        Row=Row,
        Column=Column,
        Accordion=Accordion,
        HTML=HTML,
        Checkbox=Checkbox,
        Dropdown=Dropdown,
        Slider=Slider,
        Radio=Radio,
        Textbox=Textbox,
        update=update,
    ),
}


def build():
    """The fake's modules by name, as after a start of the host."""
    made = {name: shared if name == "modules.shared" else ModuleType(name) for name in MODULES}
    for name, module in made.items():
        module.__dict__.update(MODULES[name])
        if name.startswith("modules."):
            setattr(made["modules"], name.partition(".")[2], module)
    made["modules"].__path__ = []
    made["modules.scripts"].scripts_data = []
    for callbacks in _callbacks.values():
        callbacks.clear()
    reset()
    return made


def reset():
    """Forget all jobs and settings; the one model is the toy "main"."""
    model_hijack.apply_circular(False)
    for kept in (decoded, saved, reports, loads, activations, _built, _models, checkpoints_list):
        kept.clear()
    networks.files.clear()
    networks.loaded_networks.clear()
    networks.list_available_networks()
    shared.sd_model = None
    StableDiffusionProcessing.cached_c[:] = StableDiffusionProcessing.cached_uc[:] = None, None
    shared.state, shared.opts, shared.total_tqdm = State(), Options(), TotalTQDM()
    shared.parallel_processing_allowed = True
    add_model(ToyModel())


def add_model(model):
    """Make a model known under its name; the one named "main" is loaded."""
    info = model.sd_checkpoint_info
    _models[info.name], checkpoints_list[info.title] = model, info
    shared.sd_model = None
    reload_model_weights()
    return model


def add_lora(name, alias=None, metadata=None):
    """A LoRA in the host's folder, of which it knows."""
    networks.files.append(Network(name, alias, metadata))
    networks.list_available_networks()
    return networks.files[-1]


@dataclass
class Reply:
    """What came of a job."""

    p: Any
    latents: list  # of each batch, as decoded
    images: list
    infotexts: list
    comments: list

    @property
    def sizes(self):
        """(height, width) in latent pixels of each batch."""
        return [tuple(latents.shape[-2:]) for latents in self.latents]


class Host:
    """The fake as tests use it: its modules by their last name, and the extension on it."""

    def __init__(self, modules, script):
        self.__dict__.update({name.rpartition(".")[2]: module for name, module in modules.items()})
        self.decoded, self.saved, self.reports, self.script = decoded, saved, reports, script
        self.img2img_script = type(script)()
        self.img2img_script.is_img2img = True
        self.reset()

    def reset(self):
        """Forget what a test did, and draw the form anew."""
        reset()
        self.scripts.scripts_data.clear()
        images_of_the_gallery.clear()
        self.runner, self.img2img_runner = ScriptRunner(), ScriptRunner()
        for runner, script in ((self.img2img_runner, self.img2img_script), (self.runner, self.script)):
            runner.create_script_ui(script)
            runner.alwayson_scripts.append(script)

    @property
    def webui(self):
        """lib_demofusion.hosts.webui, as the script has it."""
        return sys.modules["lib_demofusion.hosts.webui"]

    @property
    def unet(self):
        return shared.sd_model.model.diffusion_model

    def add_script(self, name, *args):
        """Another script in the form, with the values of its controls."""
        script = Script()
        script.title, script.ui = lambda: name, lambda is_img2img: [SimpleNamespace(value=arg) for arg in args]
        self.runner.create_script_ui(script)
        self.runner.alwayson_scripts.append(script)

    def processing_for(self, *args, **settings):
        """A job with the extension's arguments; those that are missing stay as in the form, where it is off.

        With init_images it is img2img's.
        """
        img2img = "init_images" in settings
        kind = StableDiffusionProcessingImg2Img if img2img else StableDiffusionProcessingTxt2Img
        p = kind(**{"prompt": "a ring", "negative_prompt": "blue", **settings})
        script = self.img2img_script if img2img else self.script
        p.scripts = self.img2img_runner if img2img else self.runner
        p.script_args = [getattr(control, "value", None) for control in p.scripts.inputs]
        args = script_arguments(self.webui, args) if len(args) > 1 else args
        own = range(script.args_from, script.args_to)
        for i, arg in zip(own, args):  # what is too long for the script the API cuts off
            p.script_args[i] = arg
        return p

    def generate(self, *args, **settings):
        """Run a job and say what came of it."""
        p = self.processing_for(*args, **settings)
        shared.state.begin("txt2img")
        decoded.clear()
        processed = process_images(p)
        shared.state.end()
        return Reply(p, list(decoded), processed.images, processed.infotexts, list(p.comments))


@contextmanager
def installed(extra=(), without=(), broken=None):
    """The fake in place of the WebUI, with the extension loaded on it; afterwards sys.modules is as before.

    extra: modules that another host has. without: modules of the fake that an older host lacks. broken: what the import
    of the extension's own module raises.
    """

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if broken is not None and name == "lib_demofusion.hosts.webui":
                raise broken

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] in ("modules", "gradio", "lib_demofusion", *extra)]

    before = {name: sys.modules.pop(name) for name in ours()}
    callbacks = {name: list(own) for name, own in _callbacks.items()}
    modules = build()
    for name in without:
        delattr(modules["modules"], name.partition(".")[2])
        del modules[name]
    for name in extra:
        modules[name] = ModuleType(name)
        modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules.update(modules)
    finder = Broken()
    sys.meta_path.insert(0, finder)
    try:
        spec = importlib.util.spec_from_file_location("demofusion", ROOT / "scripts" / "demofusion.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield Host(modules, module.DemoFusionScript())
    finally:
        sys.meta_path.remove(finder)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
        _callbacks.update(callbacks)
