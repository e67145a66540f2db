"""A stand-in for the ControlNet extension on the fake host: what of it DemoFusion deals with, and no more.

It hooks the UNet as the real one does: at every call each unit adds something of its hint to the answer, row by row, keeps
what it has made of a hint until it is told of another, and tells prompts from negative ones by a token put before them.
The real one is tested in tests/webui.
"""

import enum
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import fake_webui
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MARK = 1024.0


class ControlModelType(enum.Enum):
    ControlNet = 1
    ControlNetUnion = 2
    T2I_Adapter = 3
    T2I_StyleAdapter = 4
    AttentionInjection = 5
    IPAdapter = 6
    Controlllite = 7
    StableSR = 8


class ResizeMode(enum.Enum):
    RESIZE = 0
    INNER_FIT = 1


@dataclass
class ControlNetUnit:
    """image: uint8 [H, W, 3 or 4]; kind: a ControlModelType's name, which the real one finds in the model's file."""

    enabled: bool = True
    module: str = "none"
    image: np.ndarray = None
    kind: str = "ControlNet"
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    control: bool = False  # "ControlNet is more important"
    pooled: bool = False
    mask: np.ndarray = None
    pixel_perfect: bool = False
    is_animate_diff_batch: bool = False

    def copy(self):
        return replace(self)


def get_pytorch_control(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None].clone()


class Preprocessor:
    """asked: how often any of them was."""

    asked = 0
    returns_image = True

    def __init__(self, name):
        self.name = name

    @staticmethod
    def get_preprocessor(name):
        return Preprocessor(name)

    def cached_call(self, pixels, resolution=None):
        Preprocessor.asked += 1
        return SimpleNamespace(value=255 - pixels if self.name == "invert" else pixels)


def get_control(p, unit, idx, control_model_type, preprocessor):
    image = unit.image
    if image is None:
        given = getattr(p, "init_images", [None])[0]
        if given is None:
            raise ValueError("controlnet is enabled but no input image is given")
        image = np.asarray(given.convert("RGB"))
    np.random.seed(p.seed)
    found = preprocessor.cached_call(image, resolution=64)
    assert preprocessor.returns_image
    control, _ = Script.detectmap_proc(found.value, unit.module, ResizeMode.RESIZE, p.height // 8 * 8, p.width // 8 * 8)
    return [control], [None], []


def marked(x, positive):
    """Conditions with a first token that says which they are; those that have one stay as they are."""
    if isinstance(x, list):
        x[:] = [marked(item, positive) for item in x]
    elif hasattr(x, "batch"):
        x.batch = marked(x.batch, positive)
    elif hasattr(x, "schedules"):
        x.schedules = marked(x.schedules, positive)
    else:
        tokens = x.cond["crossattn"] if isinstance(x.cond, dict) else x.cond
        if float(tokens[0].abs().mean()) != MARK:
            tokens = torch.cat([torch.full_like(tokens[:1], MARK if positive else -MARK), tokens])
            cond = fake_webui.DictWithShape({**x.cond, "crossattn": tokens}) if isinstance(x.cond, dict) else tokens
            return x._replace(cond=cond)
    return x


def mark_prompt_context(x, positive):
    return marked(x, positive)


class LLLite:
    def __init__(self):
        self.cond_image = self.cond_emb = None


class Model(torch.nn.Module):
    """Of one unit. What the kinds keep: T2I what it has made, LLLite the image in its modules, IP-Adapter by rows."""

    def __init__(self, kind, mask):
        super().__init__()
        self.kind = kind
        self.hint_cond = self.control = None
        self.cache, self.latent_width, self.latent_height, self.effective_region_mask = {}, 0, 0, mask
        if kind == "Controlllite":
            self.modules = {"first": LLLite(), "second": LLLite()}


@dataclass
class ControlParams:
    control_model: Model
    preprocessor: dict
    hint_cond: torch.Tensor
    weight: float
    start_guidance_percent: float
    stop_guidance_percent: float
    control_model_type: ControlModelType
    global_average_pooling: bool
    cfg_injection: bool
    effective_region_mask: torch.Tensor
    used_hint_cond: torch.Tensor = None
    used_hint_cond_latent: torch.Tensor = None
    used_hint_inpaint_hijack: torch.Tensor = None
    guidance_stopped: bool = False
    vision_hint_count: int = None
    seen: list = field(default_factory=list)  # the hints of all calls


class UnetHook:
    def __init__(self, model, control_params, process):
        self.model, self.control_params, self.sd_model = model, control_params, process.sd_model
        self.current_uc_indices = self.current_c_indices = ()

    def hook(self, model, process):
        if not hasattr(process, "sample_before_CN_hack"):
            process.sample_before_CN_hack = process.sample

        def process_sample(*args, **kwargs):
            marked(process.c, positive=True)
            marked(process.uc, positive=False)
            return process.sample_before_CN_hack(*args, **kwargs)

        process.sample = process_sample
        self.hooked, model._original_forward = model, model.forward

        def forward(x, timesteps, context, y=None):
            mark = context[:, 0].mean(1)
            is_marked = torch.isclose(mark.abs(), torch.tensor(MARK))
            assert is_marked.all() or not is_marked.any()
            cond = (mark > 0).to(x.dtype) if is_marked.all() else torch.ones(len(x))
            self.current_c_indices = [i for i, row in enumerate(cond.tolist()) if row]
            model.cond_mark = cond[:, None, None, None]
            out = model._original_forward(x, timesteps, context[:, 1:] if is_marked.all() else context, y)
            for param in self.control_params:
                if not param.guidance_stopped:
                    out = out + param.weight * self._added(param, x, model.cond_mark)
            return out

        model.forward = forward
        fake_webui.on_cfg_denoiser(self.guidance_schedule_handler)

    def guidance_schedule_handler(self, params):
        share = params.sampling_step / params.total_sampling_steps
        for param in self.control_params:
            param.guidance_stopped = not param.start_guidance_percent <= share <= param.stop_guidance_percent

    def _added(self, param, x, cond):
        model, rows = param.control_model, len(x)
        if param.used_hint_cond is None:
            param.used_hint_cond = param.hint_cond
        hint = param.used_hint_cond
        param.seen.append(hint)
        if model.kind == "IPAdapter":
            if "key" not in model.cache:
                model.cache["key"] = 0.2 * cond + 0.1 * (1 - cond)
            added = model.cache["key"].expand(rows, *x.shape[1:])
            if model.effective_region_mask is not None:
                assert (model.latent_height, model.latent_width) == x.shape[-2:]
                added = added * F.interpolate(model.effective_region_mask, x.shape[-2:], mode="bilinear")
            return added
        if model.kind == "Controlllite":
            for module in model.modules.values():
                if module.cond_emb is None:
                    module.cond_emb = _pooled((module.cond_image + 1) / 2)
            added = sum(module.cond_emb for module in model.modules.values()).repeat(rows // len(module.cond_emb), 1, 1, 1)
        elif model.kind == "T2I_Adapter":
            if model.control is None:
                model.hint_cond, model.control = hint, _pooled(hint)
            added = model.control.clone()
        else:
            added = _pooled(hint[:, :3] * (1 - hint[:, 3:]) if hint.shape[1] == 4 else hint)
        if "colorfix" in param.preprocessor["name"]:
            if param.used_hint_cond_latent is None:
                with torch.random.fork_rng():  # the real one draws with all programs' noise
                    torch.manual_seed(0)
                    coded = self.sd_model.get_first_stage_encoding(self.sd_model.encode_first_stage(2 * hint[:, :3] - 1))
                param.used_hint_cond_latent = coded.expand(rows, -1, -1, -1)
            assert param.used_hint_cond_latent.shape == x.shape
            added = added + param.used_hint_cond_latent.mean(1, keepdim=True)
        if param.cfg_injection or param.global_average_pooling:
            if model.kind == "T2I_Adapter":
                added = torch.cat([added] * rows)
            added = added * cond
        if param.effective_region_mask is not None:
            added = added * F.interpolate(param.effective_region_mask, x.shape[-2:], mode="bilinear")
        if param.global_average_pooling:
            added = added.mean((2, 3), keepdim=True)
        assert len(added) in (1, rows)
        assert added.shape[-2:] in ((1, 1), x.shape[-2:])
        return added

    def restore(self):
        fake_webui._callbacks["cfg_denoiser"].remove(self.guidance_schedule_handler)
        del self.hooked.forward, self.hooked._original_forward


def _pooled(image):
    return F.avg_pool2d(image.mean(1, keepdim=True), 8)


class Script(fake_webui.Script):
    """title: "ControlNet"; its arguments are units, as many as `units` says."""

    def __init__(self, units=2):
        super().__init__()
        self.count = units
        self.latest_network = None
        self.enabled_units = []
        self.ui_batch_option_state = ["All ControlNet units for all images in a batch", False]
        self.failed = None
        self.then = lambda network: None  # when it has hooked the model

    def title(self):
        return "ControlNet"

    def ui(self, is_img2img):
        return [SimpleNamespace(value=ControlNetUnit(enabled=False)) for _ in range(self.count)]

    @staticmethod
    def detectmap_proc(detected_map, module, resize_mode, h, w):
        pixels = np.stack([_resized(detected_map[..., i], h, w) for i in range(detected_map.shape[2])], 2)
        return get_pytorch_control(pixels), pixels

    def controlnet_main_entry(self, p, units):
        if self.latest_network is not None:
            self.latest_network.restore()
            self.latest_network = None
        self.enabled_units = [unit for unit in units if unit.enabled]
        if not self.enabled_units:
            return
        params = []
        for index, unit in enumerate(self.enabled_units):
            kind = ControlModelType[unit.kind]
            if unit.kind in ("IPAdapter", "T2I_StyleAdapter"):
                hint = {"embeds": torch.zeros(1, 4)}
            else:
                [hint], _, _ = get_control(p, unit, index, kind, Preprocessor.get_preprocessor(unit.module))
            mask = None if unit.mask is None else get_pytorch_control(unit.mask)[:, :1]
            model = Model(unit.kind, mask)
            model.latent_width, model.latent_height = p.width // 8, p.height // 8
            for module in model.modules.values() if unit.kind == "Controlllite" else ():
                module.cond_image = 2 * hint - 1
            named = dict(name=unit.module)
            params.append(
                ControlParams(model, named, hint, unit.weight, unit.start, unit.end, kind, unit.pooled, unit.control, mask)
            )
        unet = p.sd_model.model.diffusion_model
        self.latest_network = UnetHook(unet, params, p)
        self.latest_network.hook(unet, p)
        self.then(self.latest_network)

    def process(self, p, *units):
        try:
            self.controlnet_main_entry(p, units)
        except Exception as error:  # the host says so in its console and goes on
            self.failed = error

    def postprocess(self, p, processed, *units):
        self.enabled_units = []
        if self.latest_network is not None:
            self.latest_network.restore()
            self.latest_network = None


def _resized(channel, h, w):
    return np.asarray(Image.fromarray(channel.astype(np.uint8)).resize((w, h), Image.Resampling.BICUBIC))


def install(host, first=False, units=2, img2img=False):
    """The extension's script on the fake host, before or after ours; returns it."""
    script = Script(units)
    script.is_img2img = img2img
    runner = host.img2img_runner if img2img else host.runner
    runner.create_script_ui(script)
    runner.alwayson_scripts.insert(0 if first else len(runner.alwayson_scripts), script)
    return script
