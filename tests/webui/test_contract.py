"""What fake_webui.py offers is what the real host has: its names, its parameters, what its objects carry."""

import dataclasses
import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from webui_host import ROOT, only_on_a1111

sys.path.insert(0, str(ROOT / "tests"))
import fake_webui  # noqa: E402
from test_form import TEXTS  # noqa: E402

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def assert_callable_alike(fake, real, where):
    """Whoever may call the fake in some way may call the real thing in the same way."""
    ours, theirs = (list(inspect.signature(thing).parameters.values()) for thing in (fake, real))
    named = {p.name: p for p in theirs if p.kind not in VARIABLE}
    anything = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in theirs)
    for p in ours:
        if p.kind in VARIABLE:
            continue
        assert p.name in named or (anything and p.kind not in POSITIONAL), f"{where} has no parameter {p.name}"
        if p.name in named and p.default is not p.empty:
            assert named[p.name].default is not p.empty, f"{where} must be given {p.name}"
    positions = [p.name for p in ours if p.kind in POSITIONAL]
    assert positions == [p.name for p in theirs if p.kind in POSITIONAL][: len(positions)], f"{where}: another order"
    if not any(p.kind in VARIABLE for p in ours):
        needed = {p.name for p in named.values() if p.default is p.empty}
        assert needed <= {p.name for p in ours}, f"{where} must be given {needed}"


def assert_class_alike(fake, real, where):
    if dataclasses.is_dataclass(fake):  # made by keywords
        assert {f.name for f in dataclasses.fields(fake) if f.init} <= set(inspect.signature(real).parameters), where
    elif hasattr(fake, "_fields"):
        assert fake._fields == real._fields, where
    elif "__init__" in vars(fake) or "__new__" in vars(fake):
        assert_callable_alike(fake, real, where)
    for name, value in vars(fake).items():
        if name.startswith("_") or name in getattr(fake, "_fields", ()) or dataclasses.is_dataclass(fake):
            continue
        if where.startswith(("gradio.", "modules.ui_components.")):
            continue  # events are made with the object: test_objects
        assert hasattr(real, name), f"{where} has no {name}"
        if inspect.isfunction(value):
            assert_callable_alike(value, getattr(real, name), f"{where}.{name}")


of_the_fake = only_on_a1111("fake_webui.py is made after AUTOMATIC1111's WebUI")


@of_the_fake
@pytest.mark.parametrize("module", [name for name in fake_webui.MODULES if name != "modules"])
def test_modules(host, module):
    real = importlib.import_module(module)
    for name, fake in fake_webui.MODULES[module].items():
        where = f"{module}.{name}"
        assert hasattr(real, name), f"there is no {where}"
        if inspect.isclass(fake):
            assert_class_alike(fake, getattr(real, name), where)
        elif inspect.isfunction(fake):
            assert_callable_alike(fake, getattr(real, name), where)


def job(processing, tab="Txt2Img"):
    p = getattr(processing, f"StableDiffusionProcessing{tab}")(prompt="one ring", steps=4, sampler_name="Euler")
    p.prompts, p.negative_prompts = ["one ring"], [""]
    return p


def params(script_callbacks):
    return script_callbacks.CFGDenoiserParams(0, 0, 0, 0, 0, 0, 0)


def control(gradio, kind):
    with getattr(gradio, "Blocks", fake_webui.Row)():
        if kind in ("radio", "dropdown"):
            return {"radio": gradio.Radio, "dropdown": gradio.Dropdown}[kind](["a", "b"], value="a", label="letter")
        if kind == "textbox":
            return gradio.Textbox("a", lines=2, label="text", elem_classes=["prompt"])
        if callable(kind):
            return kind("x", elem_id="button")
        return gradio.Slider(0, 1, 0.5, label="number") if kind == "slider" else gradio.Checkbox(True, label="flag")


# Name -> how to make one from either host's modules.
OBJECTS = {
    "state": lambda m: m["shared"].state,
    "options": lambda m: m["shared"].opts,
    "console's bar": lambda m: m["shared"].total_tqdm,
    "model": lambda m: m["shared"].sd_model,
    "model's wrapper": lambda m: m["shared"].sd_model.model,
    "checkpoint": lambda m: m["shared"].sd_model.sd_checkpoint_info,
    "hijack": lambda m: m["sd_hijack"].model_hijack,
    "random numbers": lambda m: m["rng"].ImageRNG((4, 8, 8), [1]),
    "sampler data": lambda m: m["sd_samplers"].find_sampler_config("Euler"),
    "Euler": lambda m: m["sd_samplers"].create_sampler("Euler", m["shared"].sd_model),
    "DDIM": lambda m: m["sd_samplers"].create_sampler("DDIM", m["shared"].sd_model),
    "Euler's denoiser": lambda m: m["sd_samplers"].create_sampler("Euler", m["shared"].sd_model).model_wrap_cfg,
    "DDIM's denoiser": lambda m: m["sd_samplers"].create_sampler("DDIM", m["shared"].sd_model).model_wrap_cfg,
    "Euler's model": lambda m: m["sd_samplers"].create_sampler("Euler", m["shared"].sd_model).model_wrap,
    "DDIM's model": lambda m: m["sd_samplers"].create_sampler("DDIM", m["shared"].sd_model).model_wrap,
    "callback's argument": lambda m: params(m["script_callbacks"]),
    "prompts": lambda m: m["prompt_parser"].MulticondLearnedConditioning((1,), [[]]),
    "prompt": lambda m: m["prompt_parser"].ComposableScheduledPromptConditioning([]),
    "job": lambda m: job(m["processing"]),
    "img2img's job": lambda m: job(m["processing"], "Img2Img"),
    "overlay": lambda m: m["scripts"].PostProcessMaskOverlayArgs(0, None, None),
    "tool button": lambda m: control(m["gradio"], m["ui_components"].ToolButton),
    "post_sample's argument": lambda m: m["scripts"].PostSampleArgs(torch.zeros(1)),
    "script": lambda m: m["scripts"].Script(),
    "scripts": lambda m: m["scripts"].ScriptRunner(),
    "radio": lambda m: control(m["gradio"], "radio"),
    "dropdown": lambda m: control(m["gradio"], "dropdown"),
    "textbox": lambda m: control(m["gradio"], "textbox"),
    "slider": lambda m: control(m["gradio"], "slider"),
    "checkbox": lambda m: control(m["gradio"], "checkbox"),
}


def public(thing):
    common = set(dir(torch.nn.Module())) if isinstance(thing, torch.nn.Module) else set()
    return [name for name in dir(thing) if not name.startswith("_") and name not in common]


@of_the_fake
@pytest.mark.parametrize("name", OBJECTS)
def test_objects(host, name):
    fakes = {module.rpartition(".")[2]: made for module, made in fake_webui.build().items()}
    reals = {module.rpartition(".")[2]: importlib.import_module(module) for module in fake_webui.MODULES}
    fake, real = OBJECTS[name](fakes), OBJECTS[name](reals)
    assert public(fake)
    for attribute in public(fake):
        assert hasattr(real, attribute), f"{name} has no {attribute}"
        if inspect.ismethod(getattr(fake, attribute)) and not name.endswith("model"):  # the model's have other names
            where = f"{name}'s {attribute}"
            assert_callable_alike(getattr(fake, attribute), getattr(real, attribute), where)


@of_the_fake
def test_the_chain_from_sampler_to_model(host):
    """The names by which the extension and samplers go from one to the next lead to the same place."""
    for sampler in ("Euler", "DDIM"):
        fake_webui.build()
        for create, model in (
            (host.sd_samplers.create_sampler, host.shared.sd_model),
            (fake_webui.create_sampler, fake_webui.shared.sd_model),
        ):
            made = create(sampler, model)
            assert made.model_wrap_cfg.inner_model.inner_model is model
            assert made.model_wrap_cfg.sampler is made
            assert made.config.name == sampler


@of_the_fake
def test_the_fakes_noise_levels_are_the_hosts(host):
    fake_webui.build()
    p = job(host.processing)
    theirs = host.sd_samplers.create_sampler("Euler", host.shared.sd_model).get_sigmas(p, 4)
    ours = fake_webui.create_sampler("Euler", fake_webui.shared.sd_model).get_sigmas(None, 4)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-4)
    theirs = host.sd_samplers.create_sampler("DDIM", host.shared.sd_model).get_timesteps(p, 7)
    ours = fake_webui.create_sampler("DDIM", fake_webui.shared.sd_model).get_timesteps(None, 7)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_from_the_hosts_parameters(host, text):
    p = job(host.processing)
    p.setup_prompts()
    p.all_seeds = p.all_subseeds = [1]
    settings = host.webui.settings
    config = settings.DemoFusionConfig(scale=2.0, **dict.fromkeys(settings.TEXTS, text))
    settings.describe(p, config, 2.0)
    written = host.processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds)
    values, unread = settings.read_pasted(host.infotext_utils.parse_generation_parameters(written))
    assert unread == ""
    assert {name: values[name] for name in settings.TEXTS} == dict.fromkeys(settings.TEXTS, text)


def guide(heading):
    """A section of docs/webui.md."""
    return (ROOT / "docs" / "webui.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@only_on_a1111("the guide names what is in its form, and Forge's has some more, of which phases have their own")
def test_the_guide_has_all_that_hires_fix_lets_one_choose(host):
    blocks = {block.elem_id: block for block in host.shared.demo.blocks.values() if block.elem_id}

    def labels(block):
        own = getattr(block, "label", None) if not hasattr(block, "children") else None
        return {own} | {label for child in getattr(block, "children", ()) for label in labels(child)}

    theirs = labels(blocks["txt2img_hr"]) - {None, "Upscaled resolution", "Hires. fix"}
    said = guide("A second pass of its own")
    assert {label for label in theirs if not re.search(rf"[|,] {re.escape(label)}( \||,)", said)} == set()
    assert "Hires sampling method" in theirs


def chosen(choice):
    """What a choice of a list is: gradio 4 has its name, too."""
    return choice[1] if isinstance(choice, tuple) else choice


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_the_forms_lists_are_those_of_hires_fix(host, tab):
    """But for the first, which is as the base; and the plot's axes have them, too."""
    blocks = {block.elem_id: block for block in host.shared.demo.blocks.values() if block.elem_id}
    theirs = {"phase_sampler": "hr_sampler", "phase_schedule": "hr_scheduler", "phase_checkpoint": "hr_checkpoint"}
    theirs["upscaler"] = "txt2img_hr_upscaler"
    script = {"txt2img": host.script, "img2img": host.img2img_script}[tab]
    form = dict(zip(host.webui.settings.ARGUMENTS, script.controls))
    plot = getattr(host.scripts, f"scripts_{tab}").script("x/y/z plot")
    axes = {option.label: option for option in plot.current_axis_options}
    assert set(theirs) == set(host.webui.settings.SAME)
    for name, element in theirs.items():
        choices, (first, *more) = (list(map(chosen, control.choices)) for control in (blocks[element], form[name]))
        assert first == form[name].value == host.webui.settings.SAME[name]
        assert more == [choice for choice in choices if choice != first]
        assert first in choices or name == "upscaler", "in the host's words"
        label = host.webui.settings.CONFIG_FIELDS[name].metadata["label"]
        now = axes[f"[DemoFusion] {label}"].choices()
        assert [choice for choice in now if choice in [first, *more]] == [first, *more], "and what has come since"


def test_the_arguments_can_be_made_by_the_forms_labels(host):
    """As the guide does it, in its own lines."""
    [code] = re.findall(r"form's labels:\s+```python\n(.+?)```", guide("API"), re.DOTALL)
    requests = SimpleNamespace(get=lambda address: host.client.get(address.removeprefix("http://127.0.0.1:7860")))
    payload = {"alwayson_scripts": {"DemoFusion Upscale": {}}}
    exec(code, {"requests": requests, "payload": payload})
    config = host.webui.settings.read_settings(payload["alwayson_scripts"]["DemoFusion Upscale"]["args"]).config
    changed = dict(most_phase_steps=8, phase_sampler="LCM", phase_cfg_scale=1)
    assert config == host.webui.settings.DemoFusionConfig.preset("Fast", scale=2.0, **changed)
