"""The readout in the browser says what the plan says: javascript/demofusion.js in node, on random forms."""

import math
import random
import re
from types import SimpleNamespace

import fake_webui
import pytest
import torch
from diffusers import AutoencoderKL
from readout import NODE, SAME, in_node, readouts

from lib_demofusion.decode import _features
from lib_demofusion.memory import call_bytes, in_words
from lib_demofusion.phases import clock_time

# The settings that presets have and on which a plan's size depends, as the form and as the page call them.
COSTS = {
    "phase_steps": "phaseSteps",
    "most_phase_steps": "mostPhaseSteps",
    "denoising_strength": "strength",
    "stride": "stride",
    "doubling": "doubling",
    "phase_sampler": "phaseSampler",
    "phase_schedule": "phaseScheduler",
    "phase_cfg_scale": "phaseCfg",
}
PAPER = {"stride": 0.5, "phaseSteps": 0, "doubling": False, "strength": 1, **SAME}
FEW_STEP = {"phase_steps": 8, "denoising_strength": 0.5, "phase_sampler": "LCM", "phase_cfg_scale": 1.0}
FEW_STEP |= {"phase_schedule": "DDIM"}
pytestmark = pytest.mark.skipif(not NODE, reason="needs node, to run javascript/demofusion.js")


SCHEDULES = ["Automatic", "Karras", "KL Optimal", "SGM Uniform", "DDIM"]


@pytest.fixture(scope="module")
def webui():
    """With the real host's names."""
    with fake_webui.installed() as host:
        names = host.webui.samplers.SAMPLERS
        host.sd_samplers.all_samplers = [SimpleNamespace(name=name) for name in (*names, "Sampler of another extension")]
        host.sd_samplers.samplers_map = {name.lower(): name for name in names} | {"k_lcm": "LCM", "other": "Other"}
        names = [label.lower().replace(" ", "_") for label in SCHEDULES]
        schedules = [SimpleNamespace(name=name, label=label, aliases=None) for name, label in zip(names, SCHEDULES)]
        schedules[3].aliases = ["SGMUniform"]
        host.sd_schedulers.schedulers = schedules
        host.shared.latent_upscale_modes = {"Latent": {}}
        host.shared.sd_upscalers = [SimpleNamespace(name=name) for name in ("None", "Lanczos")]
        yield host.webui


def random_resize(rng, own):
    """The sides [height, width] that a form names for what has such sides; most forms name none."""
    kind, times = rng.choice(["", "", "height", "width", "both", "other"]), rng.uniform(0.9, 8.5)
    fitting = [round(side * times / 8) * 8 for side in own]
    if kind == "other":
        return [8 * rng.randint(0, 256) for _ in own]
    return [side if kind in (name, "both") else 0 for name, side in zip(("height", "width"), fitting)]


def random_form(rng, webui, start=""):
    """A form that can be drawn in the browser, with no more windows than Python lists in no time. start: as img2img has it."""
    while True:
        w, h = (8 * rng.choice([rng.randint(8, 32), rng.randint(8, 256)]) for _ in range(2))
        scale = rng.choice([float(rng.randint(2, 8)), rng.randint(21, 160) / 20])
        stride = rng.choice([0.5, rng.randint(1, 20) / 20])
        picture, native = [rng.randint(40, 3000) for _ in range(2)], rng.choice([16, 64, 96, 128])
        window = rng.choice([0, 0, 64 * rng.randint(1, 16)]) if start == "Picture" else 0
        side, resize = window / 8 or native, random_resize(rng, picture if start == "Picture" else [h, w])
        times = max(side / own for side, own in zip(resize, picture if start == "Picture" else [h, w])) or scale
        largest = times if start != "Picture" else math.sqrt(math.prod(picture)) / 8 * times / side
        if ((largest - 1) / stride + 2) ** 2 < 3000:
            break
    return dict(
        start=start,
        picture=picture,
        window=window,
        ownStrength=rng.choice([0.999, 1, rng.randint(1, 20) / 20]),
        fixSteps=False,
        width=w,
        height=h,
        scale=scale,
        stride=stride,
        doubling=rng.random() < 0.5,
        strength=rng.choice([1, rng.randint(1, 20) / 20]),
        steps=rng.randint(1, 150),
        phaseSteps=rng.choice([0, rng.randint(1, 150)]),
        mostPhaseSteps=rng.choice([0, rng.randint(1, 150)]),
        phaseSampler=rng.choice(["", rng.choice(list(webui.samplers.SAMPLERS))]),
        phaseScheduler=rng.choice(["", "Automatic", "Karras", "DDIM", "KL Optimal"]),
        phaseCfg=rng.choice([0, 0, 1, 1.5, 7]),
        upscaler="",
        resize=resize,
        cfg=rng.choice([1, 1.5, 7]),
        sampler=rng.choice(list(webui.samplers.SAMPLERS)),
        scheduler=rng.choice(["Automatic", "Karras", "DDIM", "KL Optimal"]),
        batchSize=rng.randint(1, 4),
        batchCount=rng.randint(1, 4),
        hires=False,
        uniPcOrder=webui.readout.shared.opts.uni_pc_order,
        facts={"native": native},
        table=webui.readout.readout_table(),
    )


def job_of(form, webui):
    """What the host makes of the form: its job, the settings with the host's names, and what it starts from."""
    fields = ("width", "height", "steps", "scheduler")
    p = SimpleNamespace(sampler_name=form["sampler"], cfg_scale=form["cfg"], **{name: form[name] for name in fields})
    given, start = form["start"] == "Picture", None
    if form["start"]:
        p.denoising_strength = form["ownStrength"]
        start = SimpleNamespace(from_picture=given, size=tuple(form["picture"]), window=None)
        webui.a1111.shared.sd_model.image_size = form["facts"]["native"]
        webui.a1111.shared.opts.img2img_fix_steps = form["fixSteps"]
    settings = {name: form[own] for name, own in COSTS.items()}
    height, width = form["resize"]
    settings |= dict(scale=form["scale"], window=form["window"], upscaler=form["upscaler"])
    settings |= dict(resize_height=height, resize_width=width, phase_cfg_scale=float(form["phaseCfg"]))
    if given:
        settings["denoising_strength"] = form["ownStrength"]
    return p, webui.second_pass.resolved(webui.settings.DemoFusionConfig(**settings)), start


def plan_of(form, webui):
    """The form's plan; None if it is refused."""
    return plan_or_refusal(form, webui)[0]


def plan_or_refusal(form, webui):
    """The form's plan and None, or None and the line that refuses it."""
    try:
        return webui.checks.plan_for(*job_of(form, webui)), None
    except ValueError as error:
        return None, str(error)


def is_known(form, webui):
    """Whether it is known how often the model is called: not by every sampler."""
    _, config, start = job_of(form, webui)
    samplers = {config.phase_sampler or form["sampler"], *([] if form["start"] == "Picture" else [form["sampler"]])}
    return all(webui.samplers.SAMPLERS[name].counts != "unknown" for name in samplers)


def expected(form, plan, webui):
    """The line for a plan."""
    base, *phases = plan.phases
    calls = f"{plan.evaluations:,} model calls" if is_known(form, webui) else "as many model calls as it takes"
    first, last = (f"{8 * phase.size[1]}x{8 * phase.size[0]}" for phase in (base, phases[-1]))
    if form["start"] != "Picture":
        return f"from {first} to {last}, {len(plan.phases)} phases, {calls}"
    number = f"{len(phases)} phase{'s' if len(phases) > 1 else ''}"
    return f"from {form['picture'][1]}x{form['picture'][0]} to {last}, windows of {first}, {number}, {calls}"


@pytest.mark.parametrize("start", ["", "Picture", "img2img result"])
def test_the_readout_is_the_plan(webui, start):
    rng = random.Random(0)
    forms = [random_form(rng, webui, start) for _ in range(900)]
    forms = [dict(form, fixSteps=bool(i % 3 == 0)) for i, form in enumerate(forms)]
    forms = [(form, plan) for form in forms if (plan := plan_of(form, webui))]
    assert len(forms) > 300
    assert {form["sampler"] for form, _ in forms} == set(webui.samplers.SAMPLERS)
    assert {plan.phases[-1].branches for _, plan in forms} == {1, 2}
    resized = [plan for form, plan in forms if any(form["resize"])]
    assert len(resized) > 50
    assert any(plan.phases[-1].size != plan.phases[0].size for plan in resized)
    lines = readouts([form for form, _ in forms])
    for (form, plan), line in zip(forms, lines, strict=True):
        assert line == expected(form, plan, webui), {key: value for key, value in form.items() if key != "table"}


def test_from_a_picture_it_refuses_in_the_words_of_the_refusal(webui):
    rng = random.Random(2)
    forms = [random_form(rng, webui, "Picture") for _ in range(300)]
    forms = [dict(form, sampler="Euler", scheduler="Automatic", scale=rng.choice([1.05, 2, 8])) for form in forms]
    forms = [dict(form, window=rng.choice([0, 256, 2048])) for form in forms]
    refused = [(form, line) for form in forms if (line := plan_or_refusal(form, webui)[1])]
    for (_, line), said in zip(refused, readouts([form for form, _ in refused]), strict=True):
        assert said == f"cannot run: {line}"
    for part in ("is the smallest that works", "is the largest that works", "a smaller window works"):
        assert any(part in line for _, line in refused), part


def test_without_a_picture_or_a_checkpoint_it_does_not_guess(webui):
    form = random_form(random.Random(3), webui, "Picture")
    none = dict(form, picture=[0, 0])
    unknown = dict(form, window=0, facts={})
    still = dict(form, ownStrength=0)
    assert readouts([none, unknown, still]) == [
        "cannot run: there is no picture; drop one on the tab",
        "",
        "cannot run: at denoising strength 0 nothing would be drawn; raise it",
    ]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_way_of_counting_and_of_lacking_steps(webui, monkeypatch, order):
    """Each sampler with each scheduler, at the step counts where they part, or fail."""
    monkeypatch.setattr(webui.readout.shared.opts, "uni_pc_order", order)
    form = dict(random_form(random.Random(1), webui), width=64, height=64, scale=2.0, **PAPER, cfg=7)
    forms = [
        dict(form, sampler=sampler, scheduler=scheduler, steps=steps, strength=strength)
        for sampler in webui.samplers.SAMPLERS
        for scheduler in ("Automatic", "Karras", "DDIM", "KL Optimal")
        for steps in (1, 2, 3, 7, 30, 149, 150)
        for strength in (1, 0.3)
    ]
    refused = 0
    for form, line in zip(forms, readouts(forms), strict=True):
        plan, refusal = plan_or_refusal(form, webui)
        assert line == (f"cannot run: {refusal}" if refusal else expected(form, plan, webui))
        refused += refusal is not None
    assert len(webui.samplers.SAMPLERS) < refused < len(forms) / 4


def has_free(webui, monkeypatch, device, main):
    """Let so many bytes be free; returns what the server then says of memory."""

    def free_memory(where):
        return main if where.type == "cpu" else device

    for module in (webui.readout.facts, webui.checks.check_fits):
        monkeypatch.setitem(module.__globals__, "free_memory", free_memory)


@pytest.mark.parametrize("start", ["", "Picture"])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_it_says_that_it_fits_or_what_the_refusal_will_say(webui, monkeypatch, kind, start):
    rng = random.Random(4)
    forms, lines = [], []
    while len(forms) < 200:
        form = random_form(rng, webui, start)
        if (plan := plan_of(form, webui)) is None:
            continue
        p, config, from_ = job_of(form, webui)
        last, of = plan.phases[-1], "picture" if start else "base"
        given = (torch.device(kind), 4, form["batchSize"], webui.a1111.FACTOR, webui.checks.PICTURES, of)
        has_free(webui, monkeypatch, *(int(10 ** rng.uniform(6, 11)) for _ in range(2)))
        forms.append(dict(form, facts={**form["facts"], "memory": webui.readout._memory(torch.device(kind))}))
        try:
            webui.checks.check_fits(last.size, webui.checks._scale_of(p, plan, config, from_), *given)
            lines.append(f"{expected(form, plan, webui)}, fits")
        except ValueError as error:
            lines.append(f"{expected(form, plan, webui)}, does not fit: {error}")
    refused = [line for line in lines if "does not fit" in line]
    assert len([line for line in refused if "; scale " in line]) > 20
    assert len([line for line in refused if "; no scale fits" in line]) > 20
    assert len(lines) - len(refused) > 20
    for line, said in zip(lines, readouts(forms), strict=True):
        assert said.startswith(line) if line.endswith(", fits") else said == line


@pytest.mark.parametrize(("free", "scale"), [(100_000, ""), (500_000, ": scale 1.15"), (1_000_000, None)])
def test_where_tiles_would_not_see_one_another_it_says_what_decoding_takes(webui, monkeypatch, free, scale):
    """The condition is the decoder's own: it runs here, and makes the whole image's features or does not."""
    form = dict(random_form(random.Random(5), webui), height=64 * 8, width=64 * 8, scale=1.25, **PAPER, sampler="Euler")
    has_free(webui, monkeypatch, free, 10**12)
    memory = webui.readout._memory(torch.device("cuda"))
    assert memory["device"] == ["cuda memory", free]
    made = []
    tiles, model = webui.decoding.tiles, webui.a1111.loaded_model()
    monkeypatch.setattr(tiles, "free_memory", lambda device: free)
    monkeypatch.setattr(tiles, "_features", lambda *args: made.append(args) or torch.zeros(1, 16, 80, 80))
    monkeypatch.setattr(tiles, "_in_passes", lambda *args: torch.zeros(1, 3, 640, 640))
    tiles.decode(model.decode_first_stage, torch.zeros(1, 4, 80, 80), model.first_stage_model.decoder, tile=64)
    memory["latents"] = memory["pictures"] = 0
    [line] = readouts([dict(form, facts={"memory": memory})])
    if scale is None:
        assert made
        assert line.endswith(", fits in memory")
    else:
        assert not made
        need, there = in_words(memory["features"] * 80 * 80), in_words(free)
        assert line.endswith(f", fits, but decoding at its best takes {need} of cuda memory, and {there} are free{scale}")


@pytest.mark.parametrize("size", [(192, 192), (208, 304), (512, 512)])
@pytest.mark.parametrize("channels", [(128, 256, 512, 512), (64, 128, 256, 256)])
def test_what_decoding_takes_is_of_the_checkpoints_own_autoencoder(webui, monkeypatch, channels, size):
    """By the shapes of its features, in Stable Diffusion's widths and in others."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=channels,
            layers_per_block=2,
        )
    monkeypatch.setattr(webui.a1111.sd_models.model_data, "sd_model", SimpleNamespace(first_stage_model=vae))
    features = webui.readout._memory(torch.device("cpu"))["features"]
    latents = torch.empty(1, 4, *size, device="meta")
    takes = call_bytes(vae, lambda z: _features(lambda z: vae.decode(z).sample, z, vae.decoder), latents)
    assert features * size[0] * size[1] == pytest.approx(takes, rel=0.15)


def test_of_memory_it_says_nothing_where_nothing_is_known_and_of_decoding_where_others_decode(webui, monkeypatch):
    form = dict(random_form(random.Random(6), webui), height=512, width=512, scale=2.0, **PAPER, sampler="Euler")
    has_free(webui, monkeypatch, 10**9, 10**12)
    monkeypatch.setattr(webui.readout.shared.opts, "sd_vae_decode_method", "TAESD")
    memory = webui.readout._memory(torch.device("cuda"))
    assert memory["features"] is None
    known, unknown = readouts([dict(form, facts={"memory": memory}), dict(form, facts={"memory": None})])
    assert known == f"{unknown}, fits in memory"
    monkeypatch.setattr(webui.a1111.sd_models.model_data, "sd_model", None)  # none is loaded yet
    assert webui.readout._memory(torch.device("cuda"))["features"] is None


def test_the_time_goes_with_the_calls_the_images_and_the_pixels_of_a_view(webui):
    form = dict(random_form(random.Random(7), webui), height=512, width=512, scale=2.0, **PAPER, sampler="Euler")
    form = dict(form, steps=20, cfg=7, batchSize=1, batchCount=1, facts={"paces": {"4096": 0.5, "1024": 3}})
    forms = [form, dict(form, batchSize=2, batchCount=3), dict(form, height=640), dict(form, width=256, height=240)]
    forms += [dict(form, facts={"paces": {}}), dict(form, sampler="DPM adaptive")]
    one, six, larger, smaller, unknown, adaptive = readouts(forms)
    assert one.endswith(f"560 model calls, about {clock_time(560 * 0.5)}")
    assert six.endswith(f"560 model calls, about {clock_time(6 * 560 * 0.5)} for 6 images")
    assert larger.endswith(f"560 model calls, about {clock_time(560 * 0.5 * 640 / 512)}")
    assert smaller.endswith(f"560 model calls, about {clock_time(560 * 3 * 30 / 32)}"), "by the pace of the nearest size"
    assert unknown.endswith("560 model calls")
    assert adaptive.endswith("as many model calls as it takes")


def test_times_are_written_as_in_the_command(webui):
    form = dict(random_form(random.Random(8), webui), height=512, width=512, scale=2.0, **PAPER, sampler="Euler")
    form = dict(form, steps=20, cfg=7, batchSize=1, batchCount=1)
    seconds = [0.2, 0.5, 1.5, 59.4, 59.6, 60, 3599.4, 3599.6, 36000, 200000]
    lines = readouts([dict(form, facts={"paces": {"4096": s / 560}}) for s in seconds])
    assert [line.rpartition("about ")[2] for line in lines] == [clock_time(s) for s in seconds]


def test_what_the_server_said_before_its_restart_is_kept(webui):
    now = {"paces": {"64": 1.5}, "memory": None}
    told = in_node("demofusionTold", now, {"memory": {"free": 1}}, '{"64": 3, "256": 2}')
    assert told == {"paces": {"64": 1.5, "256": 2}, "memory": {"free": 1}}
    for stored in (None, "", "no JSON"):
        assert in_node("demofusionTold", now, {}, stored) == {"paces": {"64": 1.5}}


def test_each_preset_says_what_it_is_what_it_costs_and_when_to_take_it(webui, monkeypatch):
    monkeypatch.setitem(webui.settings.PRESETS, "Few-step", FEW_STEP)
    monkeypatch.setitem(webui.settings.PRESET_HELP, "Few-step", ("what it is", "When to take it"))
    rng = random.Random(9)
    checked = 0
    while checked < 20:
        form = random_form(rng, webui)
        said = in_node("demofusionPresets", form)
        assert list(said) == ["", *webui.settings.PRESETS]
        for name, text in said.items():
            costs = webui.readout._costs(webui.settings.DemoFusionConfig.preset(name)) if name else {}
            chosen = {**form, **{COSTS[setting]: value for setting, value in costs.items()}}
            assert not name or set(costs) == set(COSTS)
            plan = plan_of(chosen, webui)
            what, when = webui.settings.PRESET_HELP.get(name, ("Your own settings", None))
            assert text.startswith(f"{name}: {what}" if name else what)
            assert text.endswith(f". {when}." if name else ".")
            cost = re.search(r"([\d.]+) times the base image's model calls", text)
            assert bool(cost) == (plan is not None and is_known(chosen, webui))
            if cost:
                times = plan.evaluations / (2 * plan.phases[0].evaluations)
                assert float(cost[1]) == pytest.approx(times, abs=0.0501 if times < 10 else 0.5)
                checked += 1


def test_the_presets_texts_say_the_presets_settings(webui):
    fast = webui.settings.DemoFusionConfig.preset("Fast")
    assert f"the last {fast.denoising_strength:.0%}".replace("%", " %") in webui.settings.PRESET_HELP["Fast"][0]
    for name in ("Faithful", "Turbo", "Few-step"):
        preset = webui.settings.DemoFusionConfig.preset(name)
        phase = webui.checks.make_plan((64, 64), 50, preset).phases[-1]
        said = f"the last {preset.denoising_strength:.0%} of at most {phase.steps} steps".replace("%", " %")
        assert said in webui.settings.PRESET_HELP[name][0]
    assert set(webui.settings.PRESET_HELP) == set(webui.settings.PRESETS)


def test_what_is_refused_is_said_in_the_words_of_the_refusal(webui):
    rng = random.Random(2)
    form = dict(random_form(rng, webui), width=64, height=64, **PAPER, sampler="Euler")
    forms = [dict(form, scale=1.05), dict(form, scale=2.05)]
    forms += [dict(form, scale=2.0, sampler="DDIM", steps=20, phaseSteps=1)]
    more = (dict(random_form(rng, webui), sampler="DDIM", strength=0.05) for _ in range(300))
    forms += [form for form in more if plan_of(form, webui) is None]
    assert len(forms) > 10
    refusals = [plan_or_refusal(form, webui)[1] for form in forms]
    assert readouts(forms) == [f"cannot run: {refusal}" for refusal in refusals]
    assert in_node("demofusionPresets", forms[0])["Turbo"].startswith("Turbo: "), "at a scale that adds nothing, without a cost"


@pytest.mark.parametrize("start", ["", "Picture"])
def test_sides_that_cannot_be_are_refused_in_the_words_of_the_refusal(webui, start):
    rng = random.Random(10)
    refused = []
    while len(refused) < 300:
        form = dict(random_form(rng, webui, start), sampler="Euler", steps=50, phaseSteps=0, phaseSampler="")
        line = plan_or_refusal(form, webui)[1] if any(form["resize"]) else None
        if line and "resize to" in line:
            refused.append((form, line))
    for part in ("has not the aspect of", "resize to more than once and at most 8 times that"):
        assert any(part in line for _, line in refused)
    for (_, line), said in zip(refused, readouts([form for form, _ in refused]), strict=True):
        assert said == f"cannot run: {line}"


def test_how_many_times_is_written_as_python_writes_it(webui):
    times = [n / 1000 for n in range(8001, 9999, 7)] + [n / 16 for n in range(129, 3000)] + [0.0625, 0.5, 0.9375, 1.0, 999.4]
    assert in_node("(...all) => all.map(demofusionThreeDigits)", *times) == [float(f"{x:.3g}") for x in times]


NAMES = ["euler", " LCM", "k_lcm", "Other", "LCM SGMUniform", "DPM++ 2M karras", "dpm++ 2m kl_optimal"]
NAMES += ["Karras", "Euler of tomorrow", "a 'b'", "a\n\"b'", "x\\y"]


@pytest.mark.parametrize("schedule", ["", "karras", "kl_optimal", "Karras of tomorrow", "DDIM"])
def test_names_are_read_as_the_host_reads_them(webui, schedule):
    """From a picture's parameters, or from someone who types: by any name that they have, or refused."""
    form = dict(random_form(random.Random(11), webui), width=64, height=64, scale=2.0, **PAPER)
    form |= dict(sampler="Euler", steps=20, phaseScheduler=schedule)
    forms = [dict(form, phaseSampler=name) for name in ["", *webui.samplers.SAMPLERS, *map(str.upper, NAMES), *NAMES]]
    forms += [dict(form, upscaler=name) for name in ("lanczos", "sharp as never", "Latent")]
    for form, line in zip(forms, readouts(forms), strict=True):
        plan, refusal = plan_or_refusal(form, webui)
        assert line == (f"cannot run: {refusal}" if refusal else expected(form, plan, webui))


def test_guidance_that_cannot_be_is_refused_in_the_words_of_the_refusal(webui):
    form = dict(random_form(random.Random(12), webui), phaseCfg=0.5)
    refusal = plan_or_refusal(form, webui)[1]
    assert readouts([form]) == [f"cannot run: {refusal}"]
    assert "at least 1, got 0.5" in refusal


def test_what_is_refused_whatever_the_plan(webui):
    form = dict(random_form(random.Random(3), webui), width=512, height=768, scale=2.0, **SAME)
    lines = readouts([dict(form, hires=True), dict(form, sampler="Euler"), dict(form, sampler="Euler of tomorrow")])
    both = SimpleNamespace(enable_hr=True, sampler_name="Euler", scripts=None, script_args=[])
    unknown = SimpleNamespace(sampler_name="Euler of tomorrow", scheduler="Automatic", scripts=None, script_args=[])
    for line, refuse in (
        (lines[0], lambda: webui.checks.prepare(both, [True])),
        (lines[2], lambda: webui.checks.plan_for(unknown, webui.settings.FORM)),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(line.removeprefix('cannot run: '))}$"):
            refuse()
    assert lines[1].startswith("from 512x768 to 1024x1536, 2 phases")
