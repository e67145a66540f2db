"""The readout in the browser says what the plan says: javascript/demofusion.js in node, on random forms."""

import random
import re
from types import SimpleNamespace

import fake_webui
import pytest
import torch
from diffusers import AutoencoderKL
from readout import NODE, readouts

from lib_demofusion.decode import SMALLEST_TILE, _side, decoding_bytes
from lib_demofusion.memory import latents_bytes

PAPER = {"stride": 0.5, "phaseSteps": 0, "doubling": False, "strength": 1}
pytestmark = pytest.mark.skipif(not NODE, reason="needs node, to run javascript/demofusion.js")


@pytest.fixture(scope="module")
def webui():
    with fake_webui.installed() as host:
        yield host.webui


def random_form(rng, webui):
    """A form that can be drawn in the browser, with no more windows than Python lists in no time."""
    while True:
        w, h = (8 * rng.choice([rng.randint(8, 32), rng.randint(8, 256)]) for _ in range(2))
        scale = rng.choice([float(rng.randint(2, 8)), rng.randint(21, 160) / 20])
        stride = rng.choice([0.5, rng.randint(1, 20) / 20])
        windows = ((scale - 1) / stride + 2) ** 2
        if windows < 3000:
            break
    return dict(
        width=w,
        height=h,
        scale=scale,
        stride=stride,
        doubling=rng.random() < 0.5,
        strength=rng.choice([1, rng.randint(1, 20) / 20]),
        steps=rng.randint(1, 150),
        phaseSteps=rng.choice([0, rng.randint(1, 150)]),
        cfg=rng.choice([1, 1.5, 7]),
        sampler=rng.choice(list(webui.SAMPLERS)),
        scheduler=rng.choice(["Automatic", "Karras", "DDIM", "KL Optimal"]),
        hires=False,
        table=webui.readout_table(),
    )


def plan_of(form, webui):
    """The form's plan; None if it is refused."""
    p = SimpleNamespace(
        sampler_name=form["sampler"], **{name: form[name] for name in ("width", "height", "steps", "scheduler")}
    )
    try:
        config = webui.DemoFusionConfig(
            scale=form["scale"],
            stride=form["stride"],
            phase_steps=form["phaseSteps"],
            doubling=form["doubling"],
            denoising_strength=form["strength"],
        )
        return webui.plan_for(p, config)
    except ValueError:
        return None


def expected(form, plan, webui):
    """The line for a plan; the host always gives the base both prompts."""
    base, *phases = plan.phases
    total = 2 * base.evaluations + (1 if form["cfg"] == 1 else 2) * sum(phase.evaluations for phase in phases)
    calls = (
        f"{total:,} model calls" if webui.SAMPLERS[form["sampler"]].counts != "unknown" else "as many model calls as it takes"
    )
    first, last = (f"{8 * phase.size[1]}x{8 * phase.size[0]}" for phase in (base, phases[-1]))
    return f"from {first} to {last}, {len(plan.phases)} phases, {calls}"


def test_the_readout_is_the_plan(webui):
    rng = random.Random(0)
    forms = [random_form(rng, webui) for _ in range(600)]
    forms = [(form, plan) for form in forms if (plan := plan_of(form, webui))]
    assert len(forms) > 300
    assert {form["sampler"] for form, _ in forms} == set(webui.SAMPLERS)
    lines = readouts([form for form, _ in forms])
    for (form, plan), line in zip(forms, lines, strict=True):
        assert line.rpartition(", +")[0] == expected(form, plan, webui), {
            key: value for key, value in form.items() if key != "table"
        }


def test_every_way_of_counting(webui):
    """Each sampler with each scheduler, at the step counts where they part."""
    form = dict(random_form(random.Random(1), webui), width=64, height=64, scale=2.0, **PAPER, cfg=7)
    forms = [
        dict(form, sampler=sampler, scheduler=scheduler, steps=steps)
        for sampler in webui.SAMPLERS
        for scheduler in ("Automatic", "Karras", "DDIM", "KL Optimal")
        for steps in (1, 2, 7, 30, 149, 150)
    ]
    plans = [(form, plan) for form in forms if (plan := plan_of(form, webui))]
    assert len(forms) - len(plans) <= 8, "refused: DDIM's two kinds in one step, which is none"
    lines = [line.rpartition(", +")[0] for line in readouts([form for form, _ in plans])]
    assert lines == [expected(form, plan, webui) for form, plan in plans]


@pytest.mark.parametrize(("size", "scale"), [((512, 512), 2.0), ((512, 512), 8.0), ((832, 1216), 3.0), ((1024, 1024), 4.0)])
def test_the_memory_is_what_stable_diffusions_autoencoder_takes_by_its_shapes(webui, size, scale):
    """Beyond the base image's: for the latents, or for the decoding."""
    form = dict(random_form(random.Random(4), webui), height=size[0], width=size[1], scale=scale, **PAPER, sampler="Euler")
    [line] = readouts([form])
    number, unit = re.search(r", \+([\d.]+) (.iB) memory$", line).groups()
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
    base, last = (torch.empty(1, 4, *phase.size, device="meta") for phase in (plan_of(form, webui).phases[i] for i in (0, -1)))
    tile = max(_side(base[0, 0].numel()), SMALLEST_TILE)
    before, after = (decoding_bytes(lambda z: vae.decode(z).sample, z, vae.decoder, vae, tile) for z in (base, last))
    more = max(latents_bytes(last.shape[-2:]), after - before)
    assert float(number) * {"MiB": 2**20, "GiB": 2**30}[unit] == pytest.approx(more, rel=0.15)


def test_what_is_refused_is_not_promised(webui):
    rng = random.Random(2)
    form = dict(random_form(rng, webui), width=64, height=64, **PAPER, sampler="Euler")
    forms = [dict(form, scale=1.05), dict(form, scale=2.05)]
    forms += [dict(form, scale=2.0, sampler="DDIM", steps=20, phaseSteps=1)]
    forms += [
        form
        for form in (dict(random_form(rng, webui), sampler="DDIM", strength=0.05) for _ in range(300))
        if plan_of(form, webui) is None
    ]
    assert len(forms) > 10
    assert not any(plan_of(form, webui) for form in forms)
    for form, line in zip(forms, readouts(forms), strict=True):
        promise = "phases" in line
        assert not promise, (line, {key: value for key, value in form.items() if key != "table"})


def test_why_it_is_off(webui):
    form = dict(random_form(random.Random(3), webui), width=512, height=768, scale=2.0)
    lines = readouts([dict(form, hires=True), dict(form, sampler="Euler"), dict(form, sampler="Euler of tomorrow")])
    assert lines[0] == "off: Hires. fix is ticked"
    assert lines[1].startswith("from 512x768 to 1024x1536, 2 phases")
    assert lines[2] == "cannot run with Euler of tomorrow; Euler works"
