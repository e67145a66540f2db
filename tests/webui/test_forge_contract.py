"""What fake_forge.py offers is what a real host of Forge's kind has: its names, its parameters, what is handed to whom."""

import importlib
import inspect
import sys

import pytest
import torch
from test_contract import assert_callable_alike, assert_class_alike, public
from webui_host import ROOT, only_on_forge

sys.path.insert(0, str(ROOT / "tests"))
import fake_forge  # noqa: E402
import fake_webui  # noqa: E402

pytestmark = only_on_forge("fake_forge.py is made after hosts of Forge's kind")

# Made here otherwise than there: by weights of their own.
MADE_HERE = ("Prediction", "KModel", "VAE", "ControlNet", "ForgeDiffusionEngine", "ModelPatcher", "UnetPatcher")


@pytest.mark.parametrize("module", fake_forge.OWN)
def test_modules(host, module):
    real = importlib.import_module(module)
    for name, fake in fake_forge.OWN[module].items():
        where, theirs = f"{module}.{name}", getattr(real, name, None)
        assert hasattr(real, name), f"there is no {where}"
        if name in MADE_HERE:
            for method, value in vars(fake).items():
                if inspect.isfunction(value) and not method.startswith("_"):
                    assert hasattr(theirs, method), f"{where} has no {method}"
                    if method != "forward":
                        assert_callable_alike(value, getattr(theirs, method), f"{where}.{method}")
        elif inspect.isclass(fake):
            assert_class_alike(fake, theirs, where)
        elif inspect.isfunction(fake):
            assert_callable_alike(fake, theirs, where)


def test_what_else_the_extension_wants_of_the_host(host):
    """The modules of A1111's that it has, too, have the names that are the fake's."""
    for module in fake_forge.MODULES:
        if module in fake_forge.OWN or module == "gradio":
            continue
        real = importlib.import_module(module)
        assert [name for name in fake_forge.MODULES[module] if not hasattr(real, name)] == [], module


OBJECTS = {
    "model": lambda model: model,
    "parts": lambda model: model.forge_objects,
    "UNet's patcher": lambda model: model.forge_objects.unet,
    "model of the UNet": lambda model: model.forge_objects.unet.model,
    "levels": lambda model: model.forge_objects.unet.model.predictor,
    "UNet": lambda model: model.forge_objects.unet.model.diffusion_model,
    "autoencoder": lambda model: model.forge_objects.vae,
    "autoencoder's patcher": lambda model: model.forge_objects.vae.patcher,
    "autoencoder's network": lambda model: model.forge_objects.vae.first_stage_model,
}
NOT_THERE = {"model": {"embedder"}, "UNet": {"conv", "text"}}  # SDXL's alone; and what the fake is made of


@pytest.fixture(scope="module")
def fake():
    return fake_forge.Engine()


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(host, fake, name):
    ours, theirs = OBJECTS[name](fake), OBJECTS[name](host.shared.sd_model)
    own = set(public(ours)) - NOT_THERE.get(name, set())
    assert own or name == "parts"
    for attribute in own:
        assert hasattr(theirs, attribute), f"{name} has no {attribute}"


def test_what_is_to_be_loaded(host):
    assert set(vars(fake_forge.SdModelData())) <= set(dir(host.sd_models.model_data))
    assert "checkpoint_info" in host.sd_models.model_data.forge_loading_parameters


def test_levels(host, fake):
    ours, theirs = (OBJECTS["levels"](model) for model in (fake, host.shared.sd_model))
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=0)
    sigma = torch.tensor([0.03, 0.5, 7.3])
    assert ours.timestep(sigma).tolist() == theirs.timestep(sigma).tolist()
    x, made = torch.randn(2, 3, 4, 8, 8).unbind()
    torch.testing.assert_close(ours.calculate_input(sigma, x), theirs.calculate_input(sigma, x))
    torch.testing.assert_close(ours.calculate_denoised(sigma, made, x), theirs.calculate_denoised(sigma, made, x))
    from backend.modules.k_prediction import rescale_zero_terminal_snr_sigmas

    rescaled = [function(theirs.sigmas.clone()) for function in (RESCALE, rescale_zero_terminal_snr_sigmas)]
    torch.testing.assert_close(*rescaled, rtol=2e-2, atol=0)
    assert rescaled[1].dtype == theirs.sigmas.dtype


RESCALE = fake_forge.rescale_zero_terminal_snr_sigmas


def test_sizes_of_sdxl(host):
    from backend.nn.unet import Timestep

    assert Timestep(fake_forge.SIZE)(torch.tensor([1.0, 2.0])).shape == fake_forge.Timestep()(torch.tensor([1.0, 2.0])).shape


class Told:
    """What the host tells those who patch a UNet, call by call, in a form that can be compared."""

    def __init__(self):
        self.calls, self.keys, self.sigmas, self.modified, self.after = [], set(), [], [], set()

    def patch(self, unet):
        unet = unet.clone()
        unet.set_model_unet_function_wrapper(self.wrapper)
        unet.add_conditioning_modifier(self.modifier)
        unet.set_model_sampler_post_cfg_function(self.post)
        return unet

    def wrapper(self, apply_model, args):
        c = args["c"]
        options = c["transformer_options"]
        self.keys |= set(args) | {f"c {key}" for key in c}
        self.options = set(options)
        self.sigmas.append(args["timestep"].tolist())
        seen = {key: options[key] for key in ("cond_or_uncond", "cond_indices", "uncond_indices")}
        seen |= {"cond_mark": options["cond_mark"].tolist(), "sigmas": len(options["sigmas"])}
        rows = len(args["input"]), len(args["timestep"]), len(c["c_crossattn"]), list(args["cond_or_uncond"])
        self.calls.append((rows, seen))
        return apply_model(args["input"], args["timestep"], **c)

    def modifier(self, *args):
        model, x, timestep, uncond, cond, cond_scale, options, seed = args
        parts = [sorted(part["model_conds"]) for part in (*cond, *(uncond or ()))]
        strengths = [part["strength"] for part in cond]
        self.modified.append((len(x), len(timestep), parts, strengths, uncond is None, cond_scale, seed))
        assert "model_function_wrapper" in options
        assert hasattr(model, "apply_model")
        return args

    def post(self, args):
        self.after |= set(args)
        return args["denoised"]


JOBS = {
    "plain": {},
    "DDIM": dict(sampler_name="DDIM"),
    "CFG 1": dict(cfg_scale=1),
    "AND": dict(prompt="one ring AND two discs :0.5", batch_size=2),
}


@pytest.mark.parametrize("job", JOBS)
def test_what_the_sampling_function_tells(host, monkeypatch, job):
    real, made = Told(), Told()
    runner = host.scripts.scripts_txt2img
    before = runner.process_before_every_sampling

    def also(p, **kwargs):
        before(p, **kwargs)
        p.sd_model.forge_objects.unet = real.patch(p.sd_model.forge_objects.unet)

    monkeypatch.setattr(runner, "process_before_every_sampling", also)
    job = dict(seed=3, cfg_scale=7, sampler_name="Euler", steps=4) | JOBS[job]
    host.generate(negative_prompt="blue", **job)
    with fake_forge.installed() as fake:
        script = fake_webui.Script()
        script.title, script.ui = lambda: "other", lambda is_img2img: []

        def patch(p, *args, **given):
            p.sd_model.forge_objects.unet = made.patch(p.sd_model.forge_objects.unet)

        script.process_before_every_sampling = patch
        fake.runner.create_script_ui(script)
        fake.runner.alwayson_scripts.append(script)
        fake.generate(**job)
    assert made.calls == real.calls
    assert made.keys == real.keys
    assert made.options <= real.options
    assert made.after <= real.after
    assert made.modified == real.modified
    for ours, theirs in zip(made.sigmas, real.sigmas):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_hosts_own_controlnet(host):
    """Its script, by which units are told, and what it keeps of each."""
    [script] = [s for s in host.scripts.scripts_txt2img.alwayson_scripts if s.title().lower() == "controlnet"]
    for name in vars(fake_forge.ControlNetForForgeOfficial):
        value = getattr(fake_forge.ControlNetForForgeOfficial, name)
        if inspect.isfunction(value) and not name.startswith("_"):
            assert_callable_alike(value, getattr(type(script), name), f"ControlNet's {name}")
    module = type(script).get_enabled_units.__globals__
    assert_callable_alike(fake_forge.crop_and_resize_image, module["crop_and_resize_image"], "how ControlNet resizes")
    assert hasattr(module["external_code"].ResizeMode, "RESIZE")
    params = module["ControlNetCachedParameters"]()
    assert set(vars(fake_forge.ControlNetCachedParameters())) <= set(vars(params))
    from modules_forge.supported_controlnet import ControlModelPatcher

    assert hasattr(ControlModelPatcher, "process_before_every_sampling")
    net = importlib.import_module("backend.patcher.controlnet").ControlNet(torch.nn.Module(), device="cpu", load_device="cpu")
    ours = {name for name in vars(fake_forge.ControlNet(None)) if name not in ("hints", "masks", "rows")}
    assert {name for name in ours if not hasattr(net, name)} <= {"advanced_mask_weighting"}  # which comes with the image
