"""docs/webui.md says what is true: its numbers are the plan's, its settings the form's; and it keeps to one width."""

import ast
import re
from pathlib import Path

import fake_webui
import pytest

from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.decode import LIVE_FEATURES
from lib_demofusion.phases import make_plan

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "webui.md").read_text(encoding="utf-8")
WIDTH = 120


@pytest.fixture(scope="module")
def host():
    with fake_webui.installed() as host:
        yield host


@pytest.fixture(scope="module")
def webui(host):
    return host.webui


@pytest.fixture(scope="module")
def form(host):
    """The arguments' names by their labels."""
    return {control.label: name for name, control in zip(host.webui.settings.ARGUMENTS, host.script.controls)}


def rows(heading):
    """The cells of the first table below a heading, without its first two rows."""
    section = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = re.search(r"^(\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def model_calls(preset, scale, steps):
    """All of an image's at CFG 7, those of the base among them; a 512x512 base, but its size does not matter."""
    config = DemoFusionConfig.preset(preset, scale=scale)
    return make_plan((64, 64), steps, config, branches=(2, 1 if config.phase_cfg_scale == 1 else 2)).evaluations


def said(pattern):
    """The numbers that a sentence of the guide says."""
    [numbers] = re.findall(pattern.replace(" ", r"\s+"), GUIDE)
    return [int(number.replace(",", "")) for number in numbers]


def test_the_presets_table():
    base = 2 * 50
    assert said(r"with (50) steps and CFG (7); the base image alone takes (\d+)") == [50, 7, base]
    table = rows("Presets")
    assert [row[0] for row in table] == [f"**{name}**" for name in PRESETS]
    for name, (_, calls, times, *_) in zip(PRESETS, table, strict=True):
        assert calls == f"{model_calls(name, 4.0, 50):,}"
        assert times == f"{model_calls(name, 4.0, 50) / base:.0f}"


def test_the_presets_are_described_as_in_the_form(webui):
    for name, (*_, what, when) in zip(PRESETS, rows("Presets"), strict=True):
        assert when.lower() == webui.settings.PRESET_HELP[name][1].lower()
        numbers = re.findall(r"\d+", webui.settings.PRESET_HELP[name][0])
        assert re.findall(r"\d+", what) == numbers


def test_what_an_image_takes():
    pattern = r"of 20 steps at CFG 7 takes (\d+); with Fast it is (\d+) at 2x and ([\d,]+) at 4x, "
    numbers = said(pattern + r"with the paper's settings (\d+) and ([\d,]+)\.")
    assert numbers == [40, *(model_calls(name, scale, 20) for name in ("Fast", "Paper") for scale in (2.0, 4.0))]


def test_what_decoding_takes():
    [[size, *_]] = re.findall(r"([\d.]+) GiB for (4096)x4096 with the VAE of SD", GUIDE)
    assert float(size) == pytest.approx(LIVE_FEATURES * 512 * 512**2 * 4 / 2**30, abs=0.06)


def test_the_settings_table_has_the_papers_values(webui):
    paper = DemoFusionConfig()
    labels = {"steps per phase": "phase_steps", "skip residual α1": "alpha1", "dilated sampling α2": "alpha2"}
    labels |= {"gaussian blur α3": "alpha3", "most steps per phase": "most_phase_steps"}
    labels |= {"hold flat areas": "hold_flat", "unguided flat areas": "unguided_flat"}
    labels |= {"resize width to": "resize_width", "resize height to": "resize_height", "schedule type": "phase_schedule"}
    labels |= {name.replace("_", " "): f"phase_{name}" for name in ("checkpoint", "sampler", "prompt", "negative_prompt")}
    labels["cfg scale"] = "phase_cfg_scale"
    found = {}
    for label, value, _ in rows("Settings"):
        name = labels.get(label.lower(), label.lower().replace(" ", "_"))
        words = {"on": True, "off": False, "as the base": "", webui.settings.SAME["upscaler"]: ""}
        found[name] = words[value] if value in words else float(value or "nan")
    names = [name for name in webui.settings.ARGUMENTS if name in webui.settings.CONFIG_FIELDS]
    assert {name: found[name] for name in names} == {name: getattr(paper, name) for name in names}
    assert set(found) == {*names, "save_intermediate_phases", "resume_from", "start_from"}


def test_the_second_passes_table_has_the_forms_controls(webui, form):
    """Beside those of Hires. fix, which tests/webui/test_contract.py compares with the real host's."""
    table = rows("A second pass of its own")
    ours = [label for _, here, _ in table for label in re.findall(r"\*\*([^*]+)\*\*", here)]
    assert len(ours) == len(set(ours))
    assert set(ours) <= set(form)
    assert {label for label, name in form.items() if name in webui.settings.SECOND_PASS} <= set(ours)
    for theirs, here, what in table:
        assert re.search(r"\*\*|none", here), theirs
        assert what or "**" in here, f"{theirs}: where there is none, the reason"


def test_few_steps_are_what_a_phase_runs():
    [(strength, *steps)] = re.findall(r"at ([\d.]+), (\d+) of (\d+) and (\d+) of (\d+)\.", GUIDE)
    assert float(strength) == DemoFusionConfig.preset("Fast").denoising_strength
    for run, of in zip(steps[::2], steps[1::2]):
        phase = make_plan((64, 64), int(of), DemoFusionConfig.preset("Fast", scale=2.0)).phases[-1]
        assert int(run) == phase.steps - phase.skipped


def test_the_presets_controls_are_said(webui, form):
    """Of the second pass, those that a preset sets."""
    [said] = re.findall(r"controls under \*Advanced\*, and (.+) under \*Second pass\*", GUIDE.replace("\n", " "))
    names = [form[label] for label in re.findall(r"\*([^*]+)\*", said)]
    assert names == [name for name in webui.settings.SECOND_PASS if name in webui.settings.PRESET_SETTINGS]


def test_the_apis_examples(webui):
    order = re.search(r"\n\n    (enabled, scale[^`]+?)\n\n", GUIDE)[1].split()
    assert len(" ".join(order).split(", ")) == len(webui.settings.ARGUMENTS)
    for text, name, scale in re.findall(r"`(\[True[^`]*\])`\s+(?:is\s+)?(\w+)\s+at\s+(\d)x", GUIDE):
        settings = webui.settings.read_settings(ast.literal_eval(text))
        assert settings.config == webui.settings.DemoFusionConfig.preset(name, scale=float(scale)), text
    assert len(re.findall(r"`\[True", GUIDE)) == 5, "and two of img2img"
    assert "which are Fast at scale 2:" in GUIDE


def test_the_hosts_table_says_what_becomes_of_each():
    table = re.search(r"\| Host \| What tells it .*?\n\n", GUIDE, re.DOTALL)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    refused = {tells.strip("`") for _, tells, what, _ in rows if what == "refused"}
    assert refused == {"modules_forge", "modules.processing_diffusers"}
    for package in refused:
        with fake_webui.installed(extra=(package,)) as host:
            assert "calls its UNet in a way of its own" in host.webui.host.host.unsupported()
    with fake_webui.installed() as host:
        assert host.webui.host.host.unsupported() is None
    [tells] = {tells.strip("`") for _, tells, what, _ in rows if what != "refused" and tells.startswith("`")}
    assert f'find_spec("{tells}")' in (ROOT / "lib_demofusion/hosts/webui/host.py").read_text()


def test_lines_are_of_one_width():
    for number, line in enumerate(GUIDE.splitlines(), start=1):
        assert len(line) <= WIDTH or line.startswith("|"), f"line {number} has {len(line)} characters"
