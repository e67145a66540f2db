"""A stand-in for hosts of Forge's kind: fake_webui, with what such hosts do in another way put in its place.

There a model is a set of patchers, the UNet's is asked by a function of the host's own, and ControlNet is built in. What is
offered here is compared with the real host, name by name, in tests/webui/test_forge_contract.py.
"""

import copy
import math
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import fake_webui
import numpy as np
import pytest
import torch
from fake_webui import CHANNELS, FACTOR, WIDTH, cpu, shared
from torch import nn

SIZE = 256  # numbers that are made of one of SDXL's sizes
POOLED = 1280  # and those of a prompt as a whole

asked = []  # of load_models_gpu, each time: its models, and the memory for them; emptied by `reset`


def _memory():
    return sys.modules["backend.memory_management"]


# ------------------------------------------------------------------------------------------------- backend: the UNet's model


def load_models_gpu(models, memory_required=0):
    asked.append((list(models), memory_required))


def get_free_memory(dev=None, torch_free_too=False):
    return math.inf


def rescale_zero_terminal_snr_sigmas(sigmas):
    kept = (1 / (sigmas**2 + 1)).sqrt()
    kept = ((kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])).square()
    kept[-1] = 5e-8
    return ((1 - kept) / kept).sqrt()


class Prediction(nn.Module):
    """The noise levels; x is z + sigma * n, and what the network answers is noise."""

    def __init__(self, sigmas):
        super().__init__()
        self.prediction_type = "epsilon"
        self.set_sigmas(sigmas)

    def set_sigmas(self, sigmas):
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    def calculate_input(self, sigma, noise):
        return noise / (sigma**2 + 1).sqrt()[:, None, None, None]

    def timestep(self, sigma):
        return (sigma.log() - self.log_sigmas[:, None]).abs().argmin(0)

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * sigma[:, None, None, None]

    def percent_to_sigma(self, percent):
        return self.sigmas[round((1 - percent) * 999)].item()


class UNet(fake_webui.ToyUNet):
    """control: what is added to its answer."""

    input_blocks = ()

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        made = super().forward(x, timesteps, context, y)
        return made + sum(part for parts in (control or {}).values() for part in parts)


class KModel(nn.Module):
    def __init__(self, model, predictor):
        super().__init__()
        self.diffusion_model, self.predictor = model, predictor

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        seen = self.predictor.calculate_input(t, x)
        seen = seen if c_concat is None else torch.cat([seen, c_concat], 1)
        more = dict(control=control, transformer_options=transformer_options or {}, **kwargs)
        made = self.diffusion_model(seen, self.predictor.timestep(t).float(), context=c_crossattn, **more)
        return self.predictor.calculate_denoised(t, made, x)

    def memory_required(self, input_shape):
        rows, _, h, w = input_shape
        return 1000 * rows * h * w


class ModelPatcher:
    def __init__(self, model, load_device=cpu, offload_device=cpu, size=0, current_device=None):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options = {"transformer_options": {}}

    def clone(self):
        made = type(self)(self.model, self.load_device, self.offload_device)
        made.model_options = copy.deepcopy(self.model_options)
        return made

    def memory_required(self, input_shape):
        return self.model.memory_required(input_shape=input_shape)

    def set_model_unet_function_wrapper(self, unet_wrapper_function):
        self.model_options["model_function_wrapper"] = unet_wrapper_function

    def set_model_sampler_cfg_function(self, sampler_cfg_function, disable_cfg1_optimization=False):
        self.model_options["sampler_cfg_function"] = sampler_cfg_function

    def set_model_sampler_post_cfg_function(self, post_cfg_function, disable_cfg1_optimization=False):
        before = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*before, post_cfg_function]


class UnetPatcher(ModelPatcher):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.controlnet_linked_list = None

    def clone(self):
        made = super().clone()
        made.controlnet_linked_list = self.controlnet_linked_list
        return made

    def add_conditioning_modifier(self, modifier, ensure_uniqueness=False):
        self.model_options.setdefault("conditioning_modifiers", []).append(modifier)

    def add_patched_controlnet(self, cnet):
        cnet.set_previous_controlnet(self.controlnet_linked_list)
        self.controlnet_linked_list = cnet

    def list_controlnets(self):
        found, net = [], self.controlnet_linked_list
        while net is not None:
            found.append(net)
            net = net.previous_controlnet
        return found


# ----------------------------------------------------------------------------------------------------- backend: asking the UNet


def _conditions(conds):
    if isinstance(conds, dict):
        return {"model_conds": {"c_crossattn": conds["crossattn"], "y": conds["vector"]}}
    return {"model_conds": {"c_crossattn": conds}}


def _rows(conds, rows):
    return {key: value[rows] for key, value in conds.items()} if isinstance(conds, dict) else conds[rows]


def calc_cond_uncond_batch(model, cond, uncond, x_in, timestep, model_options):
    """The means of what the model answers to the prompts, and to the negative ones; these go first, as far as memory lasts."""
    waiting = [(0, part) for part in cond] + [(1, part) for part in uncond or ()]
    made, weights = [torch.zeros_like(x_in), torch.zeros_like(x_in)], [1e-37, 1e-37]
    while waiting:
        for parts in range(1, len(waiting) + 1):
            batch = waiting[::-1][: len(waiting) // parts]
            if model.memory_required([len(batch) * len(x_in), *x_in.shape[1:]]) < _memory().get_free_memory(x_in.device):
                break
        waiting = waiting[: -len(batch)]
        kinds, of = [kind for kind, _ in batch], [part["model_conds"] for _, part in batch]
        x, sigma = torch.cat([x_in] * len(batch)), torch.cat([timestep] * len(batch))
        c = {key: torch.cat([conds[key] for conds in of]) for key in of[0]}
        marks = [kind for kind in kinds for _ in timestep]
        c["transformer_options"] = {
            **model_options["transformer_options"],
            "cond_or_uncond": list(kinds),
            "sigmas": timestep,
            "cond_mark": torch.tensor(marks).to(timestep),
            "cond_indices": [row for row, kind in enumerate(marks) if kind == 0],
            "uncond_indices": [row for row, kind in enumerate(marks) if kind == 1],
        }
        net = last = batch[-1][1].get("control")
        while net is not None:
            net.transformer_options = c["transformer_options"]
            net = net.previous_controlnet
        if last is not None:
            c["control"], c["control_model"] = last.get_control(x, sigma, dict(c), len(kinds)), last
        if "model_function_wrapper" in model_options:
            args = {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": kinds}
            answers = model_options["model_function_wrapper"](model.apply_model, args)
        else:
            answers = model.apply_model(x, sigma, **c)
        for (kind, part), answer in zip(batch, answers.chunk(len(batch))):
            weight = part.get("strength", 1.0)
            made[kind] += answer * weight
            weights[kind] += weight
    return made[0] / weights[0], made[1] / weights[1]


def sampling_function_inner(model, x, timestep, uncond, cond, cond_scale, model_options):
    leave_out = math.isclose(cond_scale, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    asked_for = None if leave_out else uncond
    with_prompt, without = calc_cond_uncond_batch(model, cond, asked_for, x, timestep, model_options)
    seen = {"input": x, "sigma": timestep, "model": model, "model_options": model_options}
    seen |= {"cond_denoised": with_prompt, "uncond_denoised": without}
    if "sampler_cfg_function" in model_options:
        args = {**seen, "cond": x - with_prompt, "uncond": x - without, "cond_scale": cond_scale, "timestep": timestep}
        made = x - model_options["sampler_cfg_function"](args)
    else:
        made = without + (with_prompt - without) * cond_scale * sum(part.get("strength", 1) for part in cond)
    for function in model_options.get("sampler_post_cfg_function", []):
        made = function({**seen, "denoised": made, "cond": cond, "uncond": uncond})
    return made, with_prompt, without


def sampling_function(self, denoiser_params, cond_scale, cond_composition):
    """self: the denoiser. What is loaded now is asked, whatever was when the sampler was made."""
    patcher = self.inner_model.inner_model.forge_objects.unet
    model, model_options, x, timestep = patcher.model, patcher.model_options, denoiser_params.x, denoiser_params.sigma
    uncond = None if denoiser_params.text_uncond is None else [_conditions(denoiser_params.text_uncond)]
    cond = []
    for parts in zip(*cond_composition):  # of all images
        made = _conditions(_rows(denoiser_params.text_cond, [row for row, _ in parts]))
        cond.append({**made, "strength": parts[-1][1]})
    for part in (*cond, *(uncond or ())):
        image_cond = denoiser_params.image_cond
        if (len(image_cond), *image_cond.shape[-2:]) == (len(x), *x.shape[-2:]):
            part["model_conds"]["c_concat"] = image_cond
        if patcher.controlnet_linked_list is not None:
            part["control"] = patcher.controlnet_linked_list
    args, seed = (model, x, timestep, uncond, cond, cond_scale, model_options), self.p.seeds[0]
    for modifier in model_options.get("conditioning_modifiers", []):
        *args, seed = modifier(*args, seed)
    return sampling_function_inner(*args)


def sampling_prepare(unet, x):
    estimate = unet.model_options.get("memory_peak_estimation_modifier", unet.memory_required)
    nets = unet.list_controlnets()
    _memory().load_models_gpu(models=[unet], memory_required=estimate([len(x) * 2, *x.shape[1:]]))
    for net in nets:
        net.pre_run(unet.model, unet.model.predictor.percent_to_sigma)


def sampling_cleanup(unet):
    for net in unet.list_controlnets():
        net.cleanup()


# -------------------------------------------------------------------------------------------------------- backend: control nets


class ControlNet:
    """Its part in the UNet's answer is its image, made small. hints: what it was shown, call by call; masks: likewise."""

    def __init__(self, control_model):
        self.control_model = control_model  # of which only the type of numbers matters here
        self.manual_cast_dtype = self.cond_hint_original = self.cond_hint = self.previous_controlnet = None
        self.advanced_mask_weighting = self.model_sampling_current = None
        self.strength, self.transformer_options = 1.0, {}
        self.hints, self.masks, self.rows = [], [], []

    def set_cond_hint(self, cond_hint, strength=1.0, timestep_percent_range=(0.0, 1.0)):
        self.cond_hint_original, self.strength = cond_hint, strength
        return self

    def set_previous_controlnet(self, controlnet):
        self.previous_controlnet = controlnet
        return self

    def copy(self):
        made = copy.copy(self)
        made.cond_hint = made.previous_controlnet = None
        return made

    def pre_run(self, model, percent_to_timestep_function):
        self.model_sampling_current = model.predictor

    def cleanup(self):
        self.model_sampling_current = self.cond_hint = None

    def get_control(self, x_noisy, t, cond, batched_number):
        before = self.previous_controlnet
        before = None if before is None else before.get_control(x_noisy, t, cond, batched_number)
        assert self.model_sampling_current is not None, "it is asked while nothing is sampled"
        options = self.transformer_options
        assert len(options["cond_or_uncond"]) == batched_number
        assert len(options["cond_mark"]) == len(x_noisy) == len(t) == len(cond["c_crossattn"])
        size = [FACTOR * side for side in x_noisy.shape[-2:]]
        if self.cond_hint is None or list(self.cond_hint.shape[-2:]) != size:
            self.cond_hint = nn.functional.interpolate(self.cond_hint_original, size=size, mode="nearest-exact")
        if 1 < len(self.cond_hint) < len(x_noisy):  # one for each image, for each kind of prompt
            self.cond_hint = torch.cat([self.cond_hint] * batched_number)
        assert len(self.cond_hint) in (1, len(x_noisy))
        mask = self.advanced_mask_weighting
        self.hints.append(self.cond_hint.clone())
        self.masks.append(None if mask is None else mask.clone())
        self.rows.append([float(mark) for mark in options["cond_mark"]])
        seen = nn.functional.interpolate(self.cond_hint, size=x_noisy.shape[-2:], mode="area").mean(1, keepdim=True)
        seen = self.strength * seen * torch.ones(len(x_noisy), CHANNELS, 1, 1)
        if mask is not None:
            if len(mask) > 1:
                mask = mask.repeat(len(x_noisy) // len(mask), 1, 1, 1)
            seen = seen * nn.functional.interpolate(mask, size=x_noisy.shape[-2:], mode="bilinear")
        return {"middle": [seen, *(before or {"middle": []})["middle"]]}


def apply_controlnet_advanced(
    unet, controlnet, image_bchw, strength, start_percent, end_percent, *, advanced_mask_weighting=None
):
    net = controlnet.copy().set_cond_hint(image_bchw, strength, (start_percent, end_percent))
    net.advanced_mask_weighting = advanced_mask_weighting
    made = unet.clone()
    made.add_patched_controlnet(net)
    return made


class ControlNetCachedParameters:
    def __init__(self):
        self.model = self.control_cond = self.control_mask = None


class ControlNetPatcher:
    def __init__(self, net):
        self.net = net

    def process_before_every_sampling(self, process, cond, mask, *args, **kwargs):
        objects = process.sd_model.forge_objects
        objects.unet = apply_controlnet_advanced(objects.unet, self.net, cond, 1.0, 0.0, 1.0, advanced_mask_weighting=mask)


external_code = SimpleNamespace(ResizeMode=SimpleNamespace(RESIZE="Just Resize"))


def crop_and_resize_image(detected_map, resize_mode, h, w, fill_border_with_255=False):
    """uint8 [H, W, 3]; resized by areas."""
    assert resize_mode == external_code.ResizeMode.RESIZE
    pixels = torch.from_numpy(detected_map).movedim(-1, 0)[None].float()
    return nn.functional.interpolate(pixels, size=(h, w), mode="area")[0].round().byte().movedim(0, -1).numpy()


class ControlNetForForgeOfficial(fake_webui.Script):
    """The host's own script. Its units are arguments: objects as `unit` makes them, or the API's, dicts, which become new ones
    each time that the script looks at them. asked: what each image was made for, (height, width), and from what: the image's
    (height, width), "Resize mode", the preprocessor's resolution.
    """

    def __init__(self):
        self.current_params, self.asked = {}, []

    def title(self):
        return "ControlNet"

    def get_enabled_units(self, units):
        made = [SimpleNamespace(**unit) if isinstance(unit, dict) else unit for unit in units]
        return [unit for unit in made if unit.enabled]

    @staticmethod
    def bound_check_params(unit):
        if unit.processor_res < 0:
            unit.processor_res = 512

    def process_unit_after_click_generate(self, p, unit, params, *args, **kwargs):
        image, mode = unit.image, None
        if image is None:
            pixels, mode = np.asarray(p.init_images[0].convert("RGB"), np.float32) / 255, p.resize_mode
            image = torch.from_numpy(pixels).movedim(-1, 0)[None]
        if unit.pixel_perfect:
            unit.processor_res = min(p.height, p.width)
        self.asked.append(((p.height, p.width), (*image.shape[-2:],), mode, unit.processor_res))
        params.control_cond = nn.functional.interpolate(image, size=(p.height, p.width), mode="nearest-exact")
        params.control_mask, params.model = unit.mask, ControlNetPatcher(unit.net)
        p.extra_result_images.append(params.control_cond)

    def process(self, p, *args, **kwargs):
        self.current_params = {}
        p.extra_result_images = []
        for number, unit in enumerate(self.get_enabled_units(args)):
            self.bound_check_params(unit)
            self.current_params[number] = ControlNetCachedParameters()
            self.process_unit_after_click_generate(p, unit, self.current_params[number], *args, **kwargs)

    def process_before_every_sampling(self, p, *args, **kwargs):
        for params in self.current_params.values():
            params.model.process_before_every_sampling(p, params.control_cond, params.control_mask, *args, **kwargs)


# ------------------------------------------------------------------------------------------------ backend: a whole checkpoint


class Autoencoder(nn.Module):
    """Its latents are half of those that are sampled."""

    def __init__(self, decoder, encoder):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder

    def process_in(self, latent):
        return latent * 2

    def process_out(self, latent):
        return latent / 2

    def decode(self, z):
        return torch.tanh(self.decoder(z * 2))

    def encode(self, x, regulation=None):
        made = self.encoder(x)
        return (made + 0.01 * torch.randn(made.shape)) / 2


class VAE:
    def __init__(self, model):
        self.first_stage_model, self.patcher = model, ModelPatcher(model)
        self.device, self.vae_dtype, self.latent_channels = cpu, torch.float32, CHANNELS
        self.memory_used_decode = lambda shape, dtype: 100 * shape[2] * shape[3]
        self.memory_used_encode = lambda shape, dtype: shape[2] * shape[3]

    def decode(self, samples_in):
        wrapper = self.patcher.model_options.get("model_vae_decode_wrapper")
        return self._decode(samples_in) if wrapper is None else wrapper(self._decode, samples_in)

    def _decode(self, samples_in):
        """[B, H, W, 3] in 0..1. Not in tiles here, whatever the setting."""
        needed = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        _memory().load_models_gpu([self.patcher], memory_required=needed)
        return ((self.first_stage_model.decode(samples_in) + 1) / 2).clamp(0, 1).movedim(1, -1)

    def encode(self, pixel_samples):
        pixels = pixel_samples.movedim(-1, 1)
        needed = self.memory_used_encode(pixels.shape, self.vae_dtype)
        _memory().load_models_gpu([self.patcher], memory_required=needed)
        return self.first_stage_model.encode(2 * pixels - 1)


class ForgeObjects:
    def __init__(self, unet, clip, vae, clipvision):
        self.unet, self.clip, self.vae, self.clipvision = unet, clip, vae, clipvision

    def shallow_copy(self):
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)


class Timestep:
    def __call__(self, numbers):
        """Numbers [n] -> [n, SIZE], each of them readable in what comes out."""
        return numbers[:, None] / 1000 * torch.arange(1, SIZE + 1) / SIZE


class Engine:
    """A checkpoint, with the weights of fake_webui's ToyModel. sdxl: how many sizes it is told; 5 with an aesthetic score."""

    def __init__(self, name="main", kernel=3, seed=0, inpainting=False, sdxl=0):
        self._toy, self._inpaints, self._sizes = ToyModel(name, kernel, seed), inpainting, sdxl
        self.sd_checkpoint_info = self._toy.sd_checkpoint_info
        self.is_sdxl = bool(sdxl)
        self.is_inpaint, self.model_config, self.tiling_enabled = inpainting, None, False
        self.embedder, self.current_lora_hash = Timestep(), "[]"
        kept = self._toy.alphas_cumprod.double()
        model = KModel(UNet(kernel, CHANNELS + 5 * inpainting, seed), Prediction(((1 - kept) / kept).sqrt()))
        first_stage = self._toy.first_stage_model
        vae = VAE(Autoencoder(first_stage.decoder, first_stage.encoder).requires_grad_(False))
        self._made = ForgeObjects(UnetPatcher(model.requires_grad_(False)), None, vae, None)
        self._begin()

    def _begin(self):
        """As it is when it has just been loaded."""
        self.forge_objects, self.forge_objects_original = self._made, self._made.shallow_copy()
        self.forge_objects_after_applying_lora, self.current_lora_hash = self._made.shallow_copy(), "[]"
        vars(self).pop("alphas_cumprod", None)

    def get_learned_conditioning(self, prompt):
        text = self._toy.get_learned_conditioning(prompt)
        if not self._sizes:
            return text
        top, left = shared.opts.sdxl_crop_top, shared.opts.sdxl_crop_left
        h, w = prompt.height, prompt.width
        numbers = [h, w, top, left, *([h, w] if self._sizes == 6 else [6.0])]
        sizes = self.embedder(torch.tensor(numbers)).flatten()
        return {"crossattn": text, "vector": torch.cat([text[:, 0].repeat(1, POOLED // WIDTH), sizes.expand(len(text), -1)], 1)}

    def encode_first_stage(self, x):
        vae = self.forge_objects.vae
        return vae.first_stage_model.process_in(vae.encode(x.movedim(1, -1) * 0.5 + 0.5))

    def get_first_stage_encoding(self, x):
        return x

    def decode_first_stage(self, x):
        vae = self.forge_objects.vae
        return vae.decode(vae.first_stage_model.process_out(x)).movedim(-1, 1) * 2 - 1

    def is_webui_legacy_model(self):
        return True


ToyModel = fake_webui.ToyModel

# ------------------------------------------------------------------------------------------------- modules, and modules_forge


class Options(fake_webui.Options):
    def __init__(self):
        super().__init__()
        self.sd_noise_schedule = "Default"


class SdModelData:
    def __init__(self):
        self.sd_model, self.forge_loading_parameters, self.forge_hash = None, {}, ""


model_data = SdModelData()


def forge_model_reload():
    """Load what is to be loaded, if it is not."""
    wanted = str(model_data.forge_loading_parameters)
    if model_data.forge_hash == wanted:
        return model_data.sd_model, False
    model_data.sd_model = shared.sd_model = None
    info = model_data.forge_loading_parameters["checkpoint_info"]
    fake_webui.loads.append(info.name)
    model = fake_webui._models[info.name]
    model._begin()
    fake_webui.networks.loaded_networks.clear()
    model_data.sd_model = shared.sd_model = model
    shared.opts.sd_checkpoint_hash = info.sha256
    model_data.forge_hash = wanted
    return model, True


def _load(sd_model=None, info=None, forced_reload=False):
    """A job or a batch begins, or the refiner takes over: then its checkpoint, and the chosen one the next time."""
    chosen = {"checkpoint_info": fake_webui.select_checkpoint()}
    if model_data.sd_model is None or shared.sd_model is None:
        model_data.forge_hash = ""
    model_data.forge_loading_parameters = chosen if info is None else {"checkpoint_info": info}
    model, _ = forge_model_reload()
    model_data.forge_loading_parameters = chosen
    model.forge_objects = model.forge_objects_original.shallow_copy()


def apply_token_merging(sd_model, token_merging_ratio):
    if token_merging_ratio > 0:
        unet = sd_model.forge_objects.unet = sd_model.forge_objects.unet.clone()
        unet.model_options["transformer_options"]["merged"] = token_merging_ratio


def apply_circular_forge(model, tiling_enabled=False):
    """The setting alone."""
    model.tiling_enabled = tiling_enabled


def wrapping(model, tiling_enabled=False):
    """`apply_circular_forge` of another of the family, which does what it says."""
    if model.tiling_enabled != tiling_enabled:
        model.tiling_enabled = tiling_enabled
        for layer in model.forge_objects.unet.model.diffusion_model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular" if tiling_enabled else "zeros"


def activate(p, extra_network_data):
    """The networks hang on a clone of the UNet's patcher; other ones on another."""
    activate_networks(p, extra_network_data)
    model, wanted = shared.sd_model, str([params.positional for params in extra_network_data.get("lora", [])])
    if model.current_lora_hash != wanted:
        model.current_lora_hash = wanted
        original = model.forge_objects_original.unet
        model.forge_objects.unet = original.clone() if fake_webui.networks.loaded_networks else original
        model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()


activate_networks = fake_webui.activate


def setup_conds(p):
    whole_setup(p)
    if p.cfg_scale == 1:
        p.uc = None


whole_setup = fake_webui.StableDiffusionProcessing.setup_conds


def _sampled(p):
    """The base; noise levels that end without signal are the model's meanwhile alone."""
    model = shared.sd_model
    model.forge_objects = model.forge_objects_after_applying_lora.shallow_copy()
    apply_token_merging(model, p.get_token_merging_ratio())
    before, predictor = None, model.forge_objects.unet.model.predictor
    if shared.opts.sd_noise_schedule == "Zero Terminal SNR":
        before = predictor.sigmas
        predictor.set_sigmas(rescale_zero_terminal_snr_sigmas(before))
    samples = p.sample(p.c, p.uc, p.seeds, p.subseeds, p.subseed_strength, p.prompts)
    if before is not None:
        predictor = shared.sd_model.forge_objects.unet.model.predictor
        predictor.set_sigmas(before)
    return samples


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    """All images at once, and no look at what comes out."""
    fake_webui.decoded.append(batch.clone())
    return fake_webui.DecodedSamples(model.decode_first_stage(batch))


class ScheduleLinker(fake_webui._SigmaModel):
    """What samplers know of the model: its levels."""

    forward = None

    def __init__(self, model):
        nn.Module.__init__(self)
        self.predictor, self.inner_model = model.forge_objects.unet.model.predictor, model

    @property
    def sigmas(self):
        return self.predictor.sigmas


class CompVisTimestepsDenoiser(fake_webui._TimestepModel):
    forward = None

    def __init__(self, model):
        nn.Module.__init__(self)
        self.inner_model = model
        model.alphas_cumprod = 1 / (model.forge_objects.unet.model.predictor.sigmas**2 + 1)


def _denoise(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
    """The denoiser's forward. Where sigma is a timestep, x becomes z + sigma * n, and noise is answered."""
    state, timesteps = shared.state, isinstance(self, fake_webui.CFGDenoiserTimesteps)
    if state.interrupted or state.skipped:
        raise fake_webui.InterruptedException
    if timesteps:
        kept = self.inner_model.inner_model.alphas_cumprod[sigma.round().long()]
        sigma = ((1 - kept) / kept).sqrt()
        x = x * (sigma**2 + 1).sqrt()[:, None, None, None]
    if fake_webui.apply_refiner(self, sigma):
        fake_webui.activate(self.p, self.p.extra_network_data)
        cond, uncond = (self.sampler.sampler_extra_args[name] for name in ("cond", "uncond"))
        sampling_prepare(shared.sd_model.forge_objects.unet, x)
    parts = [part for of_image in cond.batch for part in of_image]
    numbers = iter(range(len(parts)))
    composition = [[(next(numbers), part.weight) for part in of_image] for of_image in cond.batch]
    text = fake_webui._stacked([part.schedules for part in parts])
    negative = None if uncond is None else fake_webui._stacked(uncond)
    given = (x, image_cond, sigma, state.sampling_step, state.sampling_steps, text, negative, self)
    params = fake_webui.CFGDenoiserParams(*given)
    fake_webui.cfg_denoiser_callback(params)
    made, _, _ = sampling_function(self, denoiser_params=params, cond_scale=cond_scale, cond_composition=composition)
    self.sampler.last_latent = made
    fake_webui.store_latent(made)
    self.step += 1
    return (x - made) / sigma[:, None, None, None] if timesteps else made


def _launch(self, p, x, *args):
    unet = self.model_wrap.inner_model.forge_objects.unet
    sampling_prepare(unet, x)
    made = whole_launch(self, p, x, *args)
    sampling_cleanup(unet)
    return made


whole_launch = fake_webui.Sampler._launch

# Module -> its names, as in fake_webui: all of its modules, but for one that some of the family lack.
MODULES = {name: dict(own) for name, own in fake_webui.MODULES.items() if name != "modules.sd_hijack"}
for _name in ("unet_needs_upcast", "without_autocast", "dtype_unet"):
    del MODULES["modules.devices"][_name]
del MODULES["modules.sd_models"]["reload_model_weights"]  # on others of the family it does nothing
OWN = {
    "backend.memory_management": dict(VAE_ALWAYS_TILED=False, load_models_gpu=load_models_gpu, get_free_memory=get_free_memory),
    "backend.modules.k_prediction": dict(
        Prediction=Prediction, rescale_zero_terminal_snr_sigmas=rescale_zero_terminal_snr_sigmas
    ),
    "backend.modules.k_model": dict(KModel=KModel),
    "backend.patcher.base": dict(ModelPatcher=ModelPatcher),
    "backend.patcher.unet": dict(UnetPatcher=UnetPatcher),
    "backend.patcher.vae": dict(VAE=VAE),
    "backend.patcher.controlnet": dict(ControlNet=ControlNet, apply_controlnet_advanced=apply_controlnet_advanced),
    "backend.sampling.sampling_function": dict(
        calc_cond_uncond_batch=calc_cond_uncond_batch,
        sampling_function_inner=sampling_function_inner,
        sampling_function=sampling_function,
        sampling_prepare=sampling_prepare,
        sampling_cleanup=sampling_cleanup,
    ),
    "backend.diffusion_engine.base": dict(ForgeObjects=ForgeObjects, ForgeDiffusionEngine=Engine),
    "modules_forge.utils": dict(apply_circular_forge=apply_circular_forge),
    "modules.sd_models": dict(
        SdModelData=SdModelData,
        model_data=model_data,
        forge_model_reload=forge_model_reload,
        apply_token_merging=apply_token_merging,
    ),
    "modules.extra_networks": dict(activate=activate),
    "modules.processing": dict(decode_latent_batch=decode_latent_batch),
}
for _name, _own in OWN.items():
    MODULES.setdefault(_name, {}).update(_own)


class Host(fake_webui.Host):
    @property
    def unet(self):
        return shared.sd_model.forge_objects.unet.model.diffusion_model

    def add_control(self, *units, img2img=False):
        """The host's ControlNet in a tab's form, with these units."""
        script = ControlNetForForgeOfficial()
        script.ui = lambda is_img2img: [fake_webui._Block(value=unit) for unit in units]
        runner = self.img2img_runner if img2img else self.runner
        runner.create_script_ui(script)
        runner.alwayson_scripts.append(script)
        return script


def _reset():
    asked.clear()
    model_data.__init__()
    shared.sd_model = None
    whole_reset()


whole_reset = fake_webui.reset


def _tile(enable):
    """As a job begins. The host has its function, whatever its module offers to extensions."""
    if shared.sd_model is not None:
        MODULES["modules_forge.utils"].get("apply_circular_forge", apply_circular_forge)(shared.sd_model, enable)


@contextmanager
def installed(**given):
    """As fake_webui's, in whose module the names below are these meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MODULES": MODULES,
            "Host": Host,
            "Options": Options,
            "ToyModel": Engine,
            "_SigmaModel": ScheduleLinker,
            "_TimestepModel": CompVisTimestepsDenoiser,
            "_sampled": _sampled,
            "model_data": model_data,
            "reload_model_weights": _load,
            "apply_token_merging": lambda sd_model, ratio: None,
            "activate": activate,
            "decode_latent_batch": decode_latent_batch,
            "reset": _reset,
        }.items():
            patch.setattr(fake_webui, name, value)
        patch.setattr(fake_webui.CFGDenoiser, "forward", _denoise)
        patch.setattr(fake_webui.Sampler, "_launch", _launch)
        patch.setattr(fake_webui.StableDiffusionProcessing, "setup_conds", setup_conds)
        patch.setattr(fake_webui.model_hijack, "apply_circular", _tile)
        with fake_webui.installed(extra=("backend", "backend.patcher", "modules_forge"), **given) as host:
            yield host
