"""The form's second pass on the fake host: its lists, what it shows for "as the base", and how pictures and plots set it."""

import re
import sys
from types import ModuleType, SimpleNamespace

import fake_webui
import pytest
from readout import NODE, in_node

from lib_demofusion.config import PRESETS, DemoFusionConfig

SECOND = {
    "phase_sampler": "LCM",
    "phase_schedule": "Karras",
    "phase_cfg_scale": 1.5,
    "phase_prompt": 'a "cat", drawn:\n<lora:sharp:0.8>',
    "phase_negative_prompt": "blur",
    "phase_checkpoint": "sub/other, v2 [0123456789]",
    "upscaler": "4x: sharp",
    "resize_width": 1024,
    "resize_height": 512,
}
# How the host's parameters write a text depends on its signs; it takes the second of these for a size.
TEXTS = ["a cat", "512x512", "a, b", "a: b", "a\nb", " a ", "True", "ü", '"a"', '"a", "b"', '"a" or "b"', '"']
TEXTS += ["a\\b", '\\"', "\\"]
FEW_STEP = {"phase_sampler": "LCM", "phase_schedule": "Karras", "phase_cfg_scale": 1.0, "phase_steps": 8}


@pytest.fixture
def lists(host, monkeypatch):
    """The host with lists of its own; the checkpoints, of which one more is there when it looks again."""
    schedules = ModuleType("modules.sd_schedulers")
    schedules.schedulers = [SimpleNamespace(name="karras", label="Karras"), SimpleNamespace(name="beta", label="Beta")]
    monkeypatch.setitem(sys.modules, schedules.__name__, schedules)
    there = ["main", "other [0123456789]"]
    for module, name, value in [
        (host.modules, "sd_schedulers", schedules),
        (host.shared, "latent_upscale_modes", {"Latent": {}, "Latent (bicubic)": {}}),
        (host.shared, "sd_upscalers", [SimpleNamespace(name="None"), SimpleNamespace(name="Lanczos")]),
        (host.sd_samplers, "visible_sampler_names", lambda: ["Euler", "LCM"]),
        (host.sd_models, "checkpoint_tiles", lambda use_short: list(there)),
        (host.sd_models, "list_models", lambda: there.append("just come")),
    ]:
        monkeypatch.setattr(module, name, value, raising=False)
    host.reset()
    return there


def controls(host, tab="txt2img"):
    """The form's controls by the arguments' names."""
    script = host.img2img_script if tab == "img2img" else host.script
    return dict(zip(host.webui.settings.ARGUMENTS, script.controls))


def index(host, name):
    return host.webui.settings.ARGUMENTS.index(name)


def pasted(host, parameters):
    """What pasted parameters make of the form, by the arguments' names; and what of its part with the second pass."""
    values = {id(component): function(parameters) for component, function in host.runner.infotext_fields}
    form = {name: values.get(id(control)) for name, control in controls(host).items()}
    [part] = [component for component, _ in host.runner.infotext_fields if getattr(component, "label", "") == "Second pass"]
    return form, values[id(part)]


def written(host, **settings):
    """A picture's parameters with such settings, as the host writes and reads them."""
    p = SimpleNamespace(extra_generation_params={})
    host.webui.settings.describe(p, DemoFusionConfig(scale=2.0, **settings), 2.0)
    quote = host.infotext_utils.quote
    text = ", ".join(f"{label}: {quote(value)}" for label, value in p.extra_generation_params.items())
    return host.infotext_utils.parse_generation_parameters(f"a prompt\n{text}, Version: 1")


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_what_is_a_choice_of_a_list_offers_as_the_base_and_the_hosts_list(host, lists, tab):
    form, same = controls(host, tab), host.webui.settings.SAME
    offered = {
        "phase_sampler": ["Euler", "LCM"],
        "phase_schedule": ["Karras", "Beta"],
        "phase_checkpoint": ["main", "other [0123456789]"],
        "upscaler": ["Latent", "Latent (bicubic)", "None", "Lanczos"],
    }
    assert set(offered) == set(same)
    for name, names in offered.items():
        assert form[name].choices == [same[name], *names]
        assert form[name].value == same[name]
        assert form[name].allow_custom_value, "or gradio makes None of what is no choice"


def test_checkpoints_are_looked_for_again(host, lists):
    fake_webui.refresh_buttons["script_demofusion_phase_checkpoint_refresh"]()
    assert controls(host)["phase_checkpoint"].choices[1:] == ["main", "other [0123456789]", "just come"]
    assert set(fake_webui.refresh_buttons) == {f"script_demofusion_{tab}phase_checkpoint_refresh" for tab in ("", "img2img_")}


def broken():
    raise TypeError("of another version")


def test_a_host_that_lacks_lists_has_a_form_without_them(host, lists, monkeypatch):
    monkeypatch.delattr(host.shared, "latent_upscale_modes")
    monkeypatch.setattr(host.sd_models, "checkpoint_tiles", lambda: broken())
    monkeypatch.delattr(host.sd_samplers, "visible_sampler_names")
    monkeypatch.delattr(host.modules, "sd_schedulers")
    monkeypatch.setitem(sys.modules, "modules.sd_schedulers", None)
    host.reset()
    for name, same in host.webui.settings.SAME.items():
        assert controls(host)[name].choices == [same]


def test_a_host_without_the_refresh_button_has_a_form_without_it():
    with fake_webui.installed(without=("modules.ui_common",)) as host:
        assert "phase_checkpoint" in controls(host)
        assert host.webui.settings.END in [control.value for control in host.script.controls]


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_every_control_has_a_label_of_its_own_and_a_hint(host, tab):
    """By its label the host keeps what is set in its ui-config.json; and gives it a hint of its own, where it has none."""
    script = host.img2img_script if tab == "img2img" else host.script
    labels = [control.label for control in script.controls]
    assert len(set(labels)) == len(labels)
    form = {name: control for name, control in controls(host, tab).items() if name != "enabled"}
    for name, control in form.items():
        if getattr(control, "visible", True):
            assert control.tooltip, name
            field = host.webui.settings.CONFIG_FIELDS.get(name)
            assert field is None or control.tooltip == field.metadata["help"]


# --------------------------------------------------------------------------------------------------------------- the arguments


def test_in_arguments_the_forms_words_nothing_and_spaces_mean_as_the_base(host):
    settings = host.webui.settings
    assert settings.read_settings([True]).config == settings.FORM
    for name in settings.TEXTS:
        args = [True, *(control.value for control in host.script.controls[1 : index(host, name)])]
        for same in ("", " \n", settings.SAME.get(name, "")):
            assert settings.read_settings([*args, same]).config == settings.FORM
        assert getattr(settings.read_settings([*args, " LCM"]).config, name) == " LCM", "nothing is guessed"


@pytest.mark.parametrize("name", ["resume", "start_from", "phase_prompt", "upscaler"])
def test_a_field_without_a_text_is_empty(host, name):
    """As gradio 4 has it, in the form and in what a request leaves to it."""
    args = [True, *(control.value for control in host.script.controls[1 : index(host, name)])]
    settings = host.webui.settings
    assert settings.read_settings([*args, None]) == settings.read_settings([*args, ""])


@pytest.mark.parametrize("wrong", [1, 1.5, True, ["a"], {}])
def test_what_is_no_text_is_refused_in_one_line(host, wrong):
    settings = host.webui.settings
    for name in settings.TEXTS:
        args = [True, *(control.value for control in host.script.controls[1 : index(host, name)]), wrong]
        label = settings.CONFIG_FIELDS[name].metadata["label"]
        with pytest.raises(ValueError, match=f"^{re.escape(f'{label} must be a text, got {wrong!r}')}$"):
            settings.read_settings(args)


@pytest.mark.parametrize("name", ["scale", "phase_steps", "phase_cfg_scale", "resize_width"])
def test_no_text_is_a_number(host, name):
    args = [True, *(control.value for control in host.script.controls[1 : index(host, name)]), ""]
    label = host.webui.settings.CONFIG_FIELDS[name].metadata["label"]
    with pytest.raises(ValueError, match=rf"^{label} must be a (whole )?number, got ''$"):
        host.webui.settings.read_settings(args)


# ------------------------------------------------------------------------------------------------------------- pasted pictures


def test_pasting_restores_the_second_pass_and_opens_it(host):
    form, part = pasted(host, written(host, **SECOND))
    assert {name: form[name] for name in SECOND} == SECOND
    assert part == {"__type__": "generic_update", "open": True}
    args = [form[name] if form[name] is not None else "" for name in host.webui.settings.ARGUMENTS]
    args[index(host, "save_phases")] = False
    config = host.webui.settings.read_settings(args).config
    assert {name: getattr(config, name) for name in SECOND} == SECOND


def test_pasting_shows_as_the_base_in_the_forms_words(host):
    form, part = pasted(host, written(host))
    same = host.webui.settings.SAME
    assert {name: form[name] for name in SECOND} == {name: same.get(name, getattr(DemoFusionConfig(), name)) for name in SECOND}
    assert part == {"__type__": "generic_update"}, "left as it is"
    for preset in host.webui.settings.PRESETS.values():
        form, part = pasted(host, written(host, **preset))
        assert part == {"__type__": "generic_update"}, "the preset says it"
    assert pasted(host, written(host, phase_schedule="Karras"))[1]["open"]
    form, part = pasted(host, {"Steps": "20"})
    assert {form[name] for name in SECOND} == {None}
    assert part == {"__type__": "generic_update"}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_from_a_pictures_parameters(host, text):
    for name in host.webui.settings.TEXTS:
        parameters = written(host, **{name: text})
        assert pasted(host, parameters)[0][name] == text
        assert parameters["Version"] == "1"


def test_a_picture_of_the_turbo_of_before_says_what_it_was(host):
    """Turbo set the phases' steps, and now sets the most of them, which is the same at 18 steps or more."""
    text = "Steps: 30, DemoFusion scale: 4, DemoFusion phase steps: 18, DemoFusion doubling: True, DemoFusion stride: 0.625"
    form, _ = pasted(host, host.infotext_utils.parse_generation_parameters(text))
    assert (form["phase_steps"], form["most_phase_steps"], form["doubling"], form["stride"]) == (18, 0, True, 0.625)


# ----------------------------------------------------------------------------------------------------------- presets and plots


@pytest.mark.skipif(not NODE, reason="needs node, to run the form's scripts")
def test_a_preset_may_set_the_second_pass(host, monkeypatch):
    monkeypatch.setitem(host.webui.settings.PRESETS, "Few-step", FEW_STEP)
    monkeypatch.setitem(host.webui.settings.PRESET_HELP, "Few-step", ("what it is", "When to take it"))
    host.reset()
    radio = host.gradio.Radio._made
    assert "Few-step" in radio.choices
    [(script, _, outputs)] = radio._events["input"]
    names = host.webui.settings.PRESET_SETTINGS
    assert outputs == [controls(host)[name] for name in names]
    chosen, fast = (dict(zip(names, in_node(script, name))) for name in ("Few-step", "Fast"))
    assert {name: chosen[name] for name in FEW_STEP} == FEW_STEP
    assert (fast["phase_sampler"], fast["phase_cfg_scale"]) == ("Use same sampler", 0)
    [(script, _, _)] = controls(host)["phase_sampler"]._events["change"]
    assert in_node(script, *chosen.values()) == "Few-step"
    assert in_node(script, *fast.values()) == "Fast"
    assert in_node(script, *{**fast, "phase_sampler": "LCM"}.values()) is None


@pytest.fixture
def axes(host):
    """The axes of the host's plot, by what follows our name in their labels."""
    plot = ModuleType("xyz_grid.py")
    plot.axis_options = []
    plot.AxisOption = plot.AxisOptionImg2Img = lambda label, type, apply, choices=None: SimpleNamespace(**locals())
    plot.Script = type("Script", (host.scripts.Script,), {"__module__": "xyz_grid.py"})
    host.scripts.scripts_data.append(host.scripts.ScriptClassData(plot.Script, "", "", plot))
    host.script_callbacks.before_ui_callback()
    return {axis.label.removeprefix("[DemoFusion] "): axis for axis in plot.axis_options}


def test_the_second_pass_has_axes_with_the_hosts_lists(host, lists, axes, monkeypatch):
    settings = host.webui.settings
    for name in settings.SECOND_PASS:
        axis = axes[settings.CONFIG_FIELDS[name].metadata["label"]]
        p = host.processing_for()
        axis.apply(p, axis.type(str(SECOND[name])), [])
        args = p.script_args[host.script.args_from : host.script.args_to]
        assert getattr(settings.read_settings(args).config, name) == SECOND[name]
        assert (axis.choices is not None) == (name in settings.SAME)
        if axis.choices:
            assert axis.choices() == controls(host)[name].choices
    p = host.processing_for()
    axes["phase prompt"].apply(p, "True", [])
    assert p.script_args[host.script.args_from + index(host, "phase_prompt")] == "True", "a prompt, and no flag"


def test_a_preset_on_an_axis_sets_all_that_presets_set(host, axes, monkeypatch):
    settings = host.webui.settings
    monkeypatch.setitem(settings.PRESETS, "Few-step", FEW_STEP)
    p = host.processing_for()
    for name in ("Few-step", "Turbo"):
        axes["preset"].apply(p, name, [])
        args = p.script_args[host.script.args_from : host.script.args_to]
        assert settings.read_settings(args).config == settings.DemoFusionConfig.preset(name, scale=2.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_sliders_reach_what_the_presets_set(host, preset):
    config, controls = DemoFusionConfig.preset(preset), dict(zip(host.webui.settings.ARGUMENTS, host.script.controls))
    ranges = {name: controls[name] for name in host.webui.settings.PRESET_SETTINGS if hasattr(controls[name], "maximum")}
    assert "unguided_flat" in ranges
    for name, slider in ranges.items():
        assert slider.minimum <= getattr(config, name) <= slider.maximum, name
