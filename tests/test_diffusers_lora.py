"""LoRAs on the diffusers host: what they add is what they say, in the base and in the phases, and they leave nothing behind."""

import copy
import signal
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import KINDS, photo, tiny_pipeline
from tiny_files import lora_halves, tiny_lora

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import Incomplete, Lora, generate, needs, plan_for
from lib_demofusion.hosts.diffusers_lora import NETWORKS, Adapters

TWICE = DemoFusionConfig(scale=2.0)


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_pipeline(kind) for kind in KINDS}


@pytest.fixture
def sd15(pipes):
    return pipes["sd15"]


@pytest.fixture
def files(sd15, tmp_path):
    """Two LoRAs of the pipeline sd15, one with layers of the text encoder and one without."""
    return tiny_lora(tmp_path / "a.safetensors", sd15), tiny_lora(tmp_path / "b.safetensors", sd15, ("unet",), seed=1)


def state(pipe):
    """All that a LoRA might leave in a pipeline: its modules, weights and attributes, and what the packages say of adapters."""
    networks = {name: network for name in NETWORKS if (network := getattr(pipe, name, None)) is not None}
    return {
        name: (
            {path: (id(module), module.training, sorted(vars(module))) for path, module in network.named_modules()},
            {path: (id(x), x.data_ptr(), x.requires_grad) for path, x in network.named_parameters()},
            {key: repr(value) for key, value in vars(network).items() if "peft" in key or "adapter" in key},
        )
        for name, network in networks.items()
    } | {"pipe": sorted(vars(pipe))}


def latents(pipe, prompt="red fox", **settings):
    result = generate(pipe, prompt, **{"config": TWICE, "steps": 3, "seed": [1, 2], "negative_prompt": "star", **settings})
    return [x for _, x in result.phases]


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b)]


def with_added(pipe, *loras):
    """A pipeline that has LoRAs in its weights: (halves, weight) each."""
    pipe = copy.deepcopy(pipe)
    with torch.no_grad():
        for halves, weight in loras:
            for (part, name), (down, up) in halves.items():
                getattr(pipe, part).get_submodule(name).weight += weight * up @ down
    return pipe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.4, -0.5])
def test_a_lora_adds_its_weights_times_its_weight(pipes, kind, weight, tmp_path):
    pipe = pipes[kind]
    parts = ("unet", "text_encoder", "text_encoder_2") if kind == "sdxl" else ("unet", "text_encoder")
    file = tiny_lora(tmp_path / "a.safetensors", pipe, parts)
    got = latents(pipe, loras=[Lora(file, weight)])
    expected = latents(with_added(pipe, (lora_halves(pipe, parts), weight)))
    for a, b, without in zip(got, expected, latents(pipe)):
        assert (a - b).abs().max() < 1e-3 * b.std()
        assert (a - without).abs().max() > 0.1 * b.std()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_kohyas_names_and_its_alpha(sd15, part, tmp_path):
    file = tiny_lora(tmp_path / "kohya.safetensors", sd15, (part,), kohya=True, alpha=1)
    expected = latents(with_added(sd15, (lora_halves(sd15, (part,)), 0.7 / 2)))
    for a, b in zip(latents(sd15, loras=[Lora(file, 0.7)]), expected):
        assert (a - b).abs().max() < 1e-3 * b.std()


def test_several_add_up_and_those_of_the_phases_are_on_top_there_alone(sd15, files):
    """The base is that of --lora alone; what follows is what a job with both in all phases makes of that base."""
    a, b = (Lora(file, weight) for file, weight in zip(files, (0.8, 0.6)))
    saved = []
    base = latents(sd15, loras=[a], finished=lambda _, phase: saved.append(phase))
    got = latents(sd15, loras=[a], phase_loras=[b])
    assert same(got, base) == [True, False]
    assert same(got, latents(sd15, loras=[a, b], resume=saved[0])) == [True, True]
    added = with_added(sd15, *((lora_halves(sd15, *parts), w) for parts, w in (((), 0.8), ((("unet",), 2, 1), 0.6))))
    expected = latents(added, resume=saved[0])
    assert (got[1] - expected[1]).abs().max() < 1e-3 * expected[1].std()


def test_a_lora_of_the_phases_alone_leaves_the_base_to_the_bit(sd15, files):
    """Also one that changes the text encoder: the base's prompt is encoded without it."""
    without = latents(sd15)
    for file in files:
        assert same(latents(sd15, phase_loras=[Lora(file)]), without) == [True, False]


def test_loras_of_both_pipelines(sd15, files):
    """Where the phases have a pipeline of their own, that has the LoRAs of the base and its own."""
    other = with_added(sd15, (lora_halves(sd15, seed=5), 0.5))
    a, b = map(Lora, files)
    saved = []
    latents(sd15, loras=[a], finished=lambda _, phase: saved.append(phase))
    before = state(sd15), state(other)
    got = latents(sd15, loras=[a], phase_loras=[b], phase_pipe=other)
    assert same(got, latents(other, loras=[a, b], resume=saved[0])) == [True, True]
    assert (state(sd15), state(other)) == before


def test_pipelines_that_share_their_networks(sd15, files):
    other = type(sd15)(**{**sd15.components, "scheduler": diffusers.DDIMScheduler.from_config(sd15.scheduler.config)})
    a, b = map(Lora, files)
    before, expected = state(sd15), latents(sd15, loras=[a], phase_loras=[b])
    assert same(latents(sd15, loras=[a], phase_loras=[b], phase_pipe=other), expected) == [True, True]
    assert state(sd15) == before


# -------------------------------------------------------------------------------------------------- nothing stays behind


def test_without_loras_peft_is_not_asked(sd15, monkeypatch):
    monkeypatch.setattr(type(sd15), "load_lora_weights", None)
    monkeypatch.setattr("lib_demofusion.hosts.diffusers_lora._Network", None)
    assert len(latents(sd15)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_afterwards_the_pipeline_is_as_it_was(pipes, kind, tmp_path):
    pipe = pipes[kind]
    file, more = tiny_lora(tmp_path / "a.safetensors", pipe), tiny_lora(tmp_path / "b.safetensors", pipe, seed=1)
    before, without = state(pipe), latents(pipe)
    latents(pipe, loras=[Lora(file)], phase_loras=[Lora(more)])
    assert state(pipe) == before
    assert same(latents(pipe), without) == [True, True]


ENDS = {
    "cancelled": lambda calls: dict(cancelled=lambda: len(calls) > 4),
    "failed": lambda calls: dict(progress=lambda phase, _: calls.append(1) if len(calls) < 5 else 1 / 0),
    "interrupted": lambda calls: dict(
        progress=lambda phase, _: calls.append(1) if len(calls) < 5 else signal.raise_signal(signal.SIGINT)
    ),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_however_a_job_ends_the_adapters_are_those_from_before(sd15, files, end, own):
    calls = []
    pipe = copy.deepcopy(sd15)
    if own:
        pipe.load_lora_weights(str(files[1].parent), weight_name=files[1].name, adapter_name="mine")
        pipe.set_adapters(["mine"], [0.3])
    before, without = state(pipe), latents(pipe)
    made = {"progress": lambda phase, _: calls.append(1), **ENDS[end](calls)}
    with pytest.raises(Incomplete) as stop:
        latents(pipe, loras=[Lora(files[0])], phase_loras=[Lora(files[1], 0.5)] if not own else [], **made)
    assert [phase.number for phase, _ in stop.value.result.phases] == [1]
    assert state(pipe) == before
    assert same(latents(pipe), without) == [True, True]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft, of the second one that is loaded here
def test_a_pipelines_own_adapters_stay_on_and_stay_its_own(sd15, files):
    """Their weights, which of them are on, and whether they are at all."""
    pipe = copy.deepcopy(sd15)
    for file, name in zip(files, ("mine", "yours")):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    more = tiny_lora(files[0].with_name("c.safetensors"), sd15, seed=3)
    for adapters, weights in ((["mine"], [0.3]), (["mine", "yours"], [0.5, 2.0])):
        pipe.set_adapters(adapters, weights)
        before, without = state(pipe), latents(pipe)
        expected = latents(sd15, loras=[*map(Lora, files, weights)][: len(weights)])
        assert max((a - b).abs().max() / b.std() for a, b in zip(without, expected)) < 1e-3
        got = latents(pipe, loras=[Lora(more, 0.5)])
        expected = latents(sd15, loras=[*map(Lora, files, weights)][: len(weights)] + [Lora(more, 0.5)])
        assert max((a - b).abs().max() / b.std() for a, b in zip(got, expected)) < 1e-3
        assert (state(pipe), pipe.get_active_adapters()) == (before, adapters)
        assert same(latents(pipe), without) == [True, True]
    pipe.disable_lora()
    before = state(pipe)
    for a, b in zip(latents(pipe, loras=[Lora(more)]), latents(sd15, loras=[Lora(more)])):
        assert (a - b).abs().max() < 1e-3 * b.std()
    assert state(pipe) == before
    assert same(latents(pipe), latents(sd15)) == [True, True]


def test_fused_adapters_are_refused(sd15, files):
    pipe = copy.deepcopy(sd15)
    pipe.load_lora_weights(str(files[1].parent), weight_name=files[1].name, adapter_name="mine")
    pipe.fuse_lora()
    before = state(pipe)
    with pytest.raises(ValueError, match="the pipeline's own LoRAs are fused; call pipe.unload_lora_weights") as error:
        latents(pipe, loras=[Lora(files[0])])
    assert "\n" not in str(error.value)
    assert state(pipe) == before


def test_an_offloaded_pipeline_is_refused(sd15, files):
    pipe = copy.deepcopy(sd15)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(
        ValueError, match="the pipeline is offloaded; load LoRAs into it by pipe.load_lora_weights.. before that"
    ):
        latents(pipe, phase_loras=[Lora(files[0])])


def test_the_packages_speak_as_before_and_say_nothing(sd15, files, capfd):
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        latents(sd15, loras=[*map(Lora, files)])
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs] == before
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------- what is refused


def checked(tmp_path, weights, name="x.safetensors"):
    save_file({key: x.clone() for key, x in weights.items()}, tmp_path / name)
    return tmp_path / name


X = torch.zeros(2, 2)
REFUSED = {
    "a list": (lambda tmp, files: files[0], "loras must be a list of Lora, got a .*Path"),
    "not one": (lambda tmp, files: [files[0]], "loras must be a list of Lora, got a list"),
    "no file": (lambda tmp, files: [Lora(3)], "a LoRA is a file, got 3"),
    "no name": (lambda tmp, files: [Lora("")], "a LoRA is a file, got ''"),
    "gone": (lambda tmp, files: [Lora(tmp / "gone.safetensors")], "no such LoRA: .*gone.safetensors"),
    "a folder": (lambda tmp, files: [Lora(tmp)], "cannot be read: it is a folder"),
    "weight": (lambda tmp, files: [Lora(files[0], "1")], "the weight of the LoRA .*a.safetensors must be a number, got '1'"),
    "nan": (lambda tmp, files: [Lora(files[0], float("nan"))], "the weight of the LoRA .* must be a number, got nan"),
    "twice": (
        lambda tmp, files: [Lora(files[0]), Lora(str(files[0]), 0.5)],
        "the LoRA .*a.safetensors is given twice; give it once, with the weight that it is to have",
    ),
    "suffix": (
        lambda tmp, files: [Lora(files[0].rename(tmp / "a.pt"))],
        "a.pt cannot be used as a LoRA: a LoRA is a .saf",
    ),
    "none": (
        lambda tmp, files: [Lora(checked(tmp, {"x": X}))],
        "x.safetensors cannot be used as a LoRA: it is none: none",
    ),
    "checkpoint": (
        lambda tmp, files: [Lora(checked(tmp, {"model.diffusion_model.x": X}))],
        "it is a whole checkpoint; use it as the model",
    ),
    "lycoris": (
        lambda tmp, files: [Lora(checked(tmp, {"lora_unet_x.hada_w1_a": X}))],
        "it is a LyCORIS network that diffusers does not read; use a LoRA",
    ),
    "embedding": (lambda tmp, files: [Lora(checked(tmp, {"emb_params": X}))], "it is a textual inversion"),
    "controlnet": (lambda tmp, files: [Lora(checked(tmp, {"control_model.x": X}))], "it is a ControlNet"),
    "elsewhere": (
        lambda tmp, files: [Lora(checked(tmp, {"unet.nowhere.lora_A.weight": X, "unet.nowhere.lora_B.weight": X}))],
        "the LoRA .*x.safetensors does not fit this checkpoint: .*; use one made for its kind",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line_before_anything_is_computed(sd15, files, tmp_path, name, monkeypatch):
    loras, says = REFUSED[name]
    loras, before = loras(tmp_path, files), state(sd15)
    for network in (sd15.unet, sd15.text_encoder):
        monkeypatch.setattr(network, "forward", None)
    for more in (dict(loras=loras), dict(phase_loras=loras)):
        with pytest.raises(ValueError, match=says.replace("loras must", "(phase_)?loras must")) as error:
            generate(sd15, "red", config=TWICE, steps=2, **more)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400
    monkeypatch.undo()
    assert state(sd15) == before


def test_a_lora_for_another_kind_of_checkpoint_is_refused(pipes, tmp_path):
    for own, other in (("sd15", "sdxl"), ("sdxl", "sd15")):
        file, before = tiny_lora(tmp_path / "x.safetensors", pipes[other], ("unet",)), state(pipes[own])
        good = tiny_lora(tmp_path / "good.safetensors", pipes[own])
        with pytest.raises(
            ValueError, match="the LoRA .*x.safetensors does not fit this checkpoint: its layers are of other"
        ) as e:
            generate(pipes[own], "red", config=TWICE, steps=2, loras=[Lora(good)], phase_loras=[Lora(file)])
        assert "\n" not in str(e.value)
        assert state(pipes[own]) == before


def test_layers_that_have_no_place_are_told(sd15, files):
    weights = {key: x.clone() for key, x in load_file(files[1]).items()}  # older ones lie in the file itself
    more = {f"unet.nowhere.to_q.lora_{half}.weight": x for half, x in (("A", torch.ones(2, 16)), ("B", torch.ones(16, 2)))}
    save_file({**weights, **more}, files[1])
    with pytest.warns(UserWarning, match="1 layers of the LoRA .*b.safetensors have no place in this checkpoint"):
        got = latents(sd15, loras=[Lora(files[1])])
    save_file(weights, files[1])
    assert same(got, latents(sd15, loras=[Lora(files[1])])) == [True, True]


def test_a_missing_package_is_named(sd15, files, monkeypatch):
    monkeypatch.setattr("lib_demofusion.hosts.diffusers_lora.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="peft is missing, which LoRAs need; pip install peft"):
        generate(sd15, "red", config=TWICE, steps=2, loras=[Lora(files[0])])
    assert len(latents(sd15)) == 2


def test_a_name_in_capitals_is_one_too(sd15, files):
    expected = latents(sd15, loras=[Lora(files[0])])
    assert same(latents(sd15, loras=[Lora(files[0].rename(files[0].with_suffix(".SAFETENSORS")))]), expected) == [True, True]


# ------------------------------------------------------------------------------------------------------------- the rest


def test_a_given_picture_has_them_all(sd15, files):
    a, b = map(Lora, files)
    made = dict(image=photo(), steps=2, config=TWICE)
    assert same(latents(sd15, loras=[a], phase_loras=[b], **made), latents(sd15, loras=[a, b], **made)) == [True] * 4


def test_they_count_for_the_memory(sd15, files):
    plan = plan_for(sd15, TWICE, steps=2)
    more = needs(sd15, plan, loras=[*map(Lora, files)]).weights - needs(sd15, plan).weights
    assert more == sum(Path(file).stat().st_size for file in files)


def test_the_webuis_name_of_a_lora(files):
    assert Lora(files[0]).name == "a"
    assert Lora("/x/4-step.v1.safetensors").name == "4-step.v1"


def test_none_is_nothing(sd15):
    before = state(sd15)
    with Adapters(sd15, ()) as adapters:
        adapters.use(0)
        assert state(sd15) == before
