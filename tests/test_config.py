import math
from dataclasses import fields

import pytest

from lib_demofusion.config import PRESETS, DemoFusionConfig


def test_defaults_are_the_papers():
    config = DemoFusionConfig()
    assert (config.alpha1, config.alpha2, config.alpha3) == (3, 1, 1)
    assert (config.blur_sigma, config.blur_sigma_end) == (1.0, 0.01)
    assert config.jitter
    assert config.stride == 0.5  # of the window
    assert config.denoising_strength == 1
    assert not config.doubling
    assert DemoFusionConfig.preset("Paper") == config


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("scale", 0, "scale must be above 1 and at most 8, got 0"),
        ("scale", 1.0, "scale must be above 1 and at most 8, got 1"),
        ("scale", 8.5, "got 8.5"),
        ("scale", math.nan, "got nan"),
        ("scale", "4", "scale must be a number, got '4'"),
        ("stride", 16, "stride must be above 0 and at most 1, got 16"),
        ("phase_steps", 2.5, "phase steps must be a whole number, got 2.5"),
        ("denoising_strength", 0, "denoising strength must be above 0 and at most 1, got 0"),
        ("alpha1", math.inf, "alpha1 must be from 0 to 20, got inf"),
        ("blur_sigma", 0, "blur sigma must be above 0"),
        ("view_batch_size", True, "view batch size must be a whole number, got True"),
        ("jitter", 1, "jitter must be true or false, got 1"),
    ],
)
def test_wrong_values_are_refused_in_one_line(setting, value, says):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        DemoFusionConfig(**{setting: value})
    assert says in str(error.value)


def test_every_setting_has_a_label_of_its_own_and_a_tooltip():
    labels = [f.metadata["label"] for f in fields(DemoFusionConfig)]
    assert len(set(labels)) == len(labels)
    assert all(f.metadata["help"] for f in fields(DemoFusionConfig))


def test_infotext_holds_the_scale_always_and_the_rest_where_it_differs():
    assert DemoFusionConfig(hold_steps=0).to_infotext() == {"DemoFusion scale": "4"}
    assert DemoFusionConfig(scale=2.5, stride=0.25, jitter=False, hold_steps=50).to_infotext() == {
        "DemoFusion scale": "2.5",
        "DemoFusion stride": "0.25",
        "DemoFusion jitter": "False",
        "DemoFusion hold steps": "50",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_in_the_infotext_as_the_settings_it_stands_for(name, monkeypatch):
    preset = DemoFusionConfig.preset(name.upper(), scale=2.5)
    infotext = preset.to_infotext()
    written = ("scale", "hold_steps", *PRESETS[name])
    labels = {f.name: f"DemoFusion {f.metadata['label']}" for f in fields(preset)}
    assert set(infotext) == {labels[name] for name in written}
    monkeypatch.setitem(PRESETS, name, {"stride": 0.125})  # a later version has another idea of it
    assert DemoFusionConfig.from_infotext(infotext) == preset


def test_presets_are_called_by_their_names():
    assert DemoFusionConfig.preset("Fast", stride=0.1).stride == 0.1
    with pytest.raises(ValueError, match="^no preset called 'Slow'; there are: Paper, Fast, Faithful, Turbo, Few-step$"):
        DemoFusionConfig.preset("Slow")


def test_infotext_restores_every_setting():
    changed = DemoFusionConfig(
        *(3.7, 20, True, 0.65, True, 0.3, True, 7.5, 9.5, False, 2.5, 0.1, 0.123456789, 0.8, 0.008, 16, 12, 512),
        *(10, "LCM", "Karras", 1.5, "a cat,\n<lora:x:1>", "blur", "other [abc]", "4x: sharp", 2048, 1024),
    )
    assert all(getattr(changed, f.name) != f.default for f in fields(changed))
    assert DemoFusionConfig.from_infotext(changed.to_infotext()) == changed
    assert DemoFusionConfig.from_infotext({"Steps": "20"}) is None


def test_pictures_from_before_there_were_hold_steps_were_blended_once_a_step():
    assert DemoFusionConfig.from_infotext({"DemoFusion scale": "2"}) == DemoFusionConfig(scale=2.0, hold_steps=0)
    assert DemoFusionConfig().hold_steps == 50


@pytest.mark.parametrize(("label", "text"), [("scale", "four"), ("scale", "80"), ("jitter", "yes"), ("phase steps", "1.5")])
def test_infotext_that_cannot_be_read_is_refused(label, text):
    with pytest.raises(ValueError, match=label):
        DemoFusionConfig.from_infotext({"DemoFusion scale": "2", f"DemoFusion {label}": text})


@pytest.mark.parametrize("text", ["1" + "0" * 400, "-" + "9" * 400])
def test_whole_numbers_beyond_all_bounds_are_refused(text):
    with pytest.raises(ValueError, match=r"^phase steps must be from 0 to 1000, got -?\d+$"):
        DemoFusionConfig(phase_steps=int(text))


JUNK = ["", " ", "x", "nan", "inf", "1e999", "-1", "9" * 400, "9" * 5000, "1,5", "True ", "none", "\0", "[1]", [], {}]


@pytest.mark.parametrize("f", fields(DemoFusionConfig), ids=lambda f: f.name)
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:12])
def test_what_cannot_be_read_is_one_line_that_names_it(f, junk):
    parameters = {"DemoFusion scale": "2", f"DemoFusion {f.metadata['label']}": junk}
    if isinstance(f.default, str) and isinstance(junk, str):  # a text may be any
        assert getattr(DemoFusionConfig.from_infotext(parameters), f.name) == junk
        return
    with pytest.raises(ValueError, match=rf"^{f.metadata['label']} .+$"):
        DemoFusionConfig.from_infotext(parameters)
