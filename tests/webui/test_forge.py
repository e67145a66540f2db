"""What only hosts of Forge's kind have: models in patchers, a plan for memory, a ControlNet of their own."""

import forge_host
import forge_models
import host_controls
import numpy as np
import pytest
import torch
from PIL import Image
from test_host import at_call, snapshot  # noqa: F401
from webui_host import only_on_forge

pytestmark = only_on_forge("it is about what only hosts of Forge's kind have")

STEPS = 4
PLAIN = {"jitter": False, "view_batch_size": 1}
PROMPT = "two red striped rings on grass"


@pytest.fixture(autouse=True)
def all_as_before(host):
    """Whatever a test does: the checkpoint's parts, their options and its noise levels are the same afterwards."""
    host.generate()
    before = snapshot(host)
    yield
    assert snapshot(host) == before


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_the_form_is_there(host, tab):
    runner = getattr(host.scripts, f"scripts_{tab}")
    controls = host.script_of(runner).controls
    assert len(controls) == len(host.webui.settings.ARGUMENTS) + 3
    texts = [str(getattr(block, "value", "")) for block in host.shared.demo.blocks.values()]
    assert not [text for text in texts if "cannot run here" in text]


JOBS = {
    "plain": {},
    "AND": dict(prompt="one red ring :1.2 AND one blue disc :0.7"),
    "CFG 1": dict(cfg_scale=1, negative_prompt="blue"),
    "batch": dict(batch_size=2),
    "batches": dict(n_iter=2),
    "prompt editing": dict(prompt="one [red:blue:0.5] ring"),
    "two chunks": dict(prompt="one red ring " * 30, negative_prompt="blue"),
    "token merging": dict(override_settings={"token_merging_ratio": 0.3}),
    "zero terminal SNR": dict(override_settings={"sd_noise_schedule": "Zero Terminal SNR"}),
    "less guidance": dict(s_min_uncond=5, override_settings={"s_min_uncond_all": True}),
}


@pytest.mark.parametrize("job", JOBS)
def test_jobs(host, job):
    reply = host.generate(True, 2, **JOBS[job])
    assert host.comments == []
    objects = host.shared.sd_model.forge_objects, host.shared.sd_model.forge_objects_after_applying_lora
    assert vars(objects[0]) == vars(objects[1]) or job == "token merging"
    assert {image.size for image in reply.images[-JOBS[job].get("batch_size", 1) :]} == {(128, 128)}


@pytest.mark.parametrize("sampler", ["DDIM", "UniPC", "Euler a", "DPM++ 2M", "Heun", "LCM", "DPM++ SDE", "PLMS"])
def test_samplers_leave_all_as_it_was(host, sampler):
    assert host.generate(True, 2, sampler_name=sampler, steps=6).images[0].size == (128, 128)
    assert host.comments == []


def test_saved_and_resumed(host):
    whole = host.generate(True, 3, {"save_phases": True}, save_images=True, seed=93).images[0].convert("RGB")
    [saved] = host.outputs.rglob("*93-demofusion-phase2.safetensors")
    again = host.generate(True, 3, {"resume": str(saved)}, seed=93).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(whole))
    saved.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Trouble in a view


def stop(host):
    host.shared.state.interrupt()


def fail(host):
    raise RuntimeError("the model broke")


def run_out_of_memory(host):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("call", [STEPS + 1, STEPS + 3, STEPS * 5 + 2])
@pytest.mark.parametrize("trouble", [stop, fail, run_out_of_memory])
def test_whatever_happens_in_a_view(host, at_call, trouble, call):  # noqa: F811
    clean = host.latents(True, 2)
    at_call(call, lambda: trouble(host))
    reply = host.generate(True, 3)
    at_call.clear()
    assert len(reply.images) == 1
    if trouble is not run_out_of_memory:  # which goes on with fewer views
        assert "DemoFusion incomplete" in reply.infotexts[0]
    assert torch.equal(host.latents(True, 2), clean)


def test_a_script_that_fails_before_a_phase(host, monkeypatch):
    runner = host.scripts.scripts_txt2img
    before = runner.process_before_every_sampling

    def fails(p, **kwargs):
        before(p, **kwargs)
        if kwargs["x"].shape[-1] > 8:
            raise RuntimeError("a script broke")

    monkeypatch.setattr(runner, "process_before_every_sampling", fails)
    assert host.generate(True, 2).images[0].size == (64, 64)
    assert "a script broke" in host.comments[0]


# ---------------------------------------------------------------------------------------------------------------------
# Memory, and other people's patches


@pytest.mark.parametrize("views", [1, 4])
def test_the_host_is_asked_for_the_memory_of_one_call(host, monkeypatch, views):
    """And not for that of the whole phase, for which it might push the UNet off the card."""
    from backend import memory_management
    from backend.patcher.unet import UnetPatcher

    asked, load = [], memory_management.load_models_gpu

    def record(models, *args, **kwargs):
        if any(isinstance(model, UnetPatcher) for model in models):
            asked.append(kwargs.get("memory_required", args[0] if args else 0))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(memory_management, "load_models_gpu", record)
    host.generate(True, 4, {"view_batch_size": views})
    base, *phases = asked
    need = host.shared.sd_model.forge_objects.unet.memory_required
    assert phases
    assert base > 0
    assert phases == pytest.approx([need([2 * views, 4, 8, 8])] * len(phases))
    assert max(phases) < need([2, 4, 32, 32])


@pytest.mark.parametrize("kind", ["float8-e4m3fn", "float8-e5m2", forge_models.GGUF])
def test_weights_in_few_bits(host, options, monkeypatch, kind):
    """To the bit what their values give in single precision."""
    from modules_forge import main_entry

    monkeypatch.setitem(main_entry.forge_unet_storage_dtype_options, forge_models.GGUF, (forge_models.GGUF, False))
    options(forge_unet_storage_dtype=kind)
    try:
        host.load(forge_host.EMBEDDED)
        few = host.latents(True, 2)
        values, count = forge_models.values(host.unet)
        options(forge_unet_storage_dtype="Automatic")
        host.load(forge_host.EMBEDDED)
        whole = host.latents(True, 2)
        with torch.inference_mode():
            host.unet.load_state_dict(values)
        expected = host.latents(True, 2)
    finally:
        options(forge_unet_storage_dtype="Automatic")
        host.sd_models.model_data.forge_hash = ""
        host.load(forge_host.EMBEDDED)
    assert count > 20
    assert torch.equal(few, expected)
    assert not torch.equal(few, whole)


def test_weights_that_the_host_keeps_off_the_card(host, monkeypatch):
    """It brings each to a layer's input when that is called. Here they are of another precision, with which nothing computes.

    The autoencoder's too, which runs at once and in tiles.
    """
    monkeypatch.setattr(host.webui.decoding.tiles, "tile_for", lambda network, device, base: 20)
    expected = [np.asarray(host.generate(True, scale).images[0]) for scale in (2, 4)]
    layers = [layer for network in (host.unet, host.autoencoder) for layer in network.modules()]
    layers = [layer for layer in layers if hasattr(layer, "parameters_manual_cast")]
    assert len(layers) > 100
    for layer in layers:
        monkeypatch.setattr(layer, "parameters_manual_cast", True)
    weights = [(layer, *named) for layer in layers for named in layer.named_parameters(recurse=False)]
    try:
        for layer, name, weight in weights:
            setattr(layer, name, torch.nn.Parameter(weight.double(), requires_grad=False))
        made = [np.asarray(host.generate(True, scale).images[0]) for scale in (2, 4)]
    finally:
        for layer, name, weight in weights:
            setattr(layer, name, weight)
    assert all(map(np.array_equal, made, expected))


def patched(host, monkeypatch, patch):
    """patch(unet) -> unet: what another script does before every sampling."""
    runner = host.scripts.scripts_txt2img
    before = runner.process_before_every_sampling

    def also(p, **kwargs):
        before(p, **kwargs)
        p.sd_model.forge_objects.unet = patch(p.sd_model.forge_objects.unet)

    monkeypatch.setattr(runner, "process_before_every_sampling", also)


def test_another_ones_wrapper_sees_every_call(host, monkeypatch, calls):
    seen = []

    def wrapper(apply_model, args):
        seen.append(tuple(args["input"].shape[-2:]))
        options = args["c"]["transformer_options"]
        assert options["cond_or_uncond"] == args["cond_or_uncond"]
        assert len(args["input"]) % len(args["cond_or_uncond"]) == 0
        assert len(options["cond_mark"]) == len(args["input"]) == len(args["timestep"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    def wrap(unet):
        unet = unet.clone()
        unet.set_model_unet_function_wrapper(wrapper)
        return unet

    plain = host.latents(True, 2, {"view_batch_size": 3})
    patched(host, monkeypatch, wrap)
    calls.calls = 0
    assert torch.equal(host.latents(True, 2, {"view_batch_size": 3}), plain)
    assert len(seen) == calls.calls
    assert set(seen) == {(8, 8)}


@pytest.mark.parametrize("post", [False, True])
def test_another_ones_guidance_is_that_of_the_whole_latents(host, monkeypatch, post):
    """A function of the guided prediction, which for its part may be of the whole picture."""
    sizes = []

    def after(args):
        sizes.append(tuple(args["denoised"].shape[-2:]))
        return args["denoised"]

    def combine(args):
        sizes.append(tuple(args["input"].shape[-2:]))
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]

    def patch(unet):
        unet = unet.clone()
        unet.set_model_sampler_post_cfg_function(after) if post else unet.set_model_sampler_cfg_function(combine)
        return unet

    plain = host.latents(True, 2)
    patched(host, monkeypatch, patch)
    assert torch.allclose(host.latents(True, 2), plain, atol=1e-3)
    assert sizes == [(8, 8)] * STEPS + [(16, 16)] * STEPS


# ---------------------------------------------------------------------------------------------------------------------
# ControlNet


class Network(torch.nn.Module):
    """In a ControlNet's place: it writes down the hints that it is given, and adds them, made small, to the UNet's layers."""

    dtype = torch.float32
    strength = 0.02

    def __init__(self, unet):
        super().__init__()
        self.hints, self.sizes = [], []
        self.layers = []  # (channels, by how much smaller) of what the UNet keeps for its way up, and of its middle

        def keep(module, args, out):
            self.layers.append((out.shape[1], 8 // out.shape[-1]))

        handles = [block.register_forward_hook(keep) for block in [*unet.input_blocks, unet.middle_block]]
        with torch.no_grad():
            unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), context=torch.zeros(1, 77, 64))
        for handle in handles:
            handle.remove()

    def forward(self, x, hint, timesteps, context, y=None, **more):
        assert len(x) == len(timesteps) == len(context)
        hint = hint.expand(len(x), -1, -1, -1)  # one for all rows, or one for each
        self.hints.append(hint.clone())
        self.sizes.append(tuple(x.shape[-2:]))
        grey = hint.mean(1, keepdim=True) * self.strength
        return [
            torch.nn.functional.interpolate(grey, size=[side // times for side in x.shape[-2:]], mode="area").repeat(
                1, channels, 1, 1
            )
            for channels, times in self.layers
        ]


@pytest.fixture
def controlled(host, monkeypatch):
    """controlled(hint, **more): the hint [1, 3, H, W] steers what follows; returns the network."""
    from backend.patcher.controlnet import ControlNet, apply_controlnet_advanced

    def arrange(hint, strength=1.0, end=1.0, **more):
        network = Network(host.unet)
        device = torch.device("cpu")
        net = ControlNet(network, load_device=device, device=device)
        patched(host, monkeypatch, lambda unet: apply_controlnet_advanced(unet, net, hint, strength, 0.0, end, **more))
        return network

    return arrange


def ramp(height, width):
    """Each pixel says how far down and how far right its middle lies, in 0..1."""
    rows, columns = ((torch.arange(side) + 0.5) / side for side in (height, width))
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width), torch.zeros(height, width)])[None]


@pytest.mark.parametrize("side", [128, 64, 200])
def test_the_hint_lies_where_the_view_does(host, controlled, side):
    """To one pixel of the phase's, whatever the size of the image is; a local view of an image of the phase's has its part."""
    hint = ramp(side, side)
    network = controlled(hint)
    host.generate(True, 2, PLAIN)
    assert host.comments == []
    assert set(network.sizes) == {(8, 8)}
    base, phase = network.hints[:STEPS], network.hints[STEPS:]
    assert all(hints.mean((0, 2, 3))[:2].tolist() == pytest.approx([0.5, 0.5], abs=1 / 128) for hints in base)
    assert len(phase) == STEPS * (9 + 4)
    local = [((y + 4) / 16, (x + 4) / 16) for y in (0, 4, 8) for x in (0, 4, 8)]  # where their middles lie
    dilated = [((y + 7.5) / 16, (x + 7.5) / 16) for y in (0, 1) for x in (0, 1)]
    for number, (hints, middle) in enumerate(zip(phase, (local + dilated) * STEPS, strict=True)):
        assert all(torch.equal(row, hints[0]) for row in hints)
        assert hints.shape[-2:] == (64, 64)
        assert hints[0].mean((1, 2))[:2].tolist() == pytest.approx(middle, abs=1 / 128)
        if side == 128 and number % 13 < 9:
            y, x = (round(128 * place) - 32 for place in middle)
            assert torch.equal(hints[:1], hint[:, :, y : y + 64, x : x + 64])


@pytest.mark.parametrize("job", [{}, dict(batch_size=2), dict(cfg_scale=1), dict(prompt="one ring AND two discs :0.5")])
def test_steered_views_do_not_depend_on_how_many_are_made_at_once(host, controlled, job):
    plain = host.latents(True, 2, **job)
    controlled(ramp(128, 128))
    one, many = (host.latents(True, 2, {"view_batch_size": views}, **job) for views in (1, 5))
    assert torch.allclose(one, many, atol=1e-3)
    assert not torch.allclose(one, plain, atol=0.05)


def test_a_mask_of_the_control_is_of_the_whole_picture(host, controlled):
    """Where it is 0 the views are as without."""
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    network = controlled(torch.ones(1, 3, 128, 128), advanced_mask_weighting=mask)
    network.strength = 0.2
    seen = []
    kind = type(host.unet)
    with pytest.MonkeyPatch.context() as patch:
        whole = kind.forward

        def forward(unet, x, *args, control=None, **kwargs):
            if control is not None:
                seen.append([part.clone() for part in control["output"][:1]])
            return whole(unet, x, *args, control=control, **kwargs)

        patch.setattr(kind, "forward", forward)
        host.generate(True, 2, PLAIN)
    phase = [part for [part] in seen[STEPS : STEPS + 9]]
    means = [float(part.mean()) for part in phase]
    left, middle, right = (np.mean(means[column::3]) for column in range(3))
    assert left > middle > right
    assert right == pytest.approx(0, abs=1e-6)


def test_control_ends_where_it_is_told_to(host, controlled):
    network = controlled(ramp(128, 128), end=0.5)
    host.generate(True, 2, PLAIN, steps=8)
    assert 8 <= len(network.hints) < 8 * 14
    assert len(network.hints) % 1 == 0


def test_two_of_them_add_up(host, controlled):
    first, second = controlled(ramp(128, 128)), controlled(1 - ramp(128, 128))
    host.generate(True, 2, PLAIN)
    assert len(first.hints) == len(second.hints) == STEPS * 14
    for one, other in zip(first.hints, second.hints):
        assert torch.allclose(one + other, torch.ones_like(one), atol=1e-6)


def test_control_after_an_interrupt_is_as_before(host, controlled, at_call):  # noqa: F811
    controlled(ramp(128, 128))
    clean = host.latents(True, 2)
    at_call(STEPS + 2, host.shared.state.interrupt)
    host.generate(True, 2)
    at_call.clear()
    assert torch.equal(host.latents(True, 2), clean)


@pytest.mark.parametrize("fields", [{}, {"module": "canny"}, {"module": "canny", "pixel_perfect": True}])
@pytest.mark.parametrize("scale", [2, 2.5])
def test_a_unit_of_the_hosts_own_script(host, fields, scale):
    """As the API gives it; its images are made for the base, and for each phase."""
    picture = Image.fromarray((255 * ramp(150, 200)[0]).byte().movedim(0, -1).numpy())
    scripts = host_controls.scripts(host_controls.model_of(host), picture, **fields)
    plain, steered = (host.latents(True, scale, **more) for more in ({}, {"alwayson_scripts": scripts}))
    assert host.comments == []
    assert steered.shape == plain.shape
    assert not torch.allclose(steered, plain, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Scripts that the host brings along


def beginning(host, title):
    """The host's script whose title begins so; hosts go on in ways of their own."""
    scripts = host.scripts.scripts_txt2img.alwayson_scripts
    found = [script for script in scripts if script.title().lower().replace(" ", "").startswith(title)]
    return found[0] if found else pytest.skip(f"this host has no script {title}")


@pytest.mark.parametrize("title", ["freeu", "kohyahrfix", "perturbedattention"])
def test_beside_a_script_of_the_host(host, title):
    script = beginning(host, title)
    values = [
        getattr(control, "value", None) for control in host.scripts.scripts_txt2img.inputs[script.args_from : script.args_to]
    ]
    arguments = [True, *values[1:]]
    plain = host.latents(True, 2)
    reply = host.generate(True, 2, alwayson_scripts={script.title(): {"args": arguments}})
    assert reply.images[0].size == (128, 128)
    assert host.comments == []
    assert torch.equal(host.latents(True, 2), plain)


@pytest.mark.parametrize("title", ["stylealign", "multidiffusion", "selfattention"])
def test_a_script_of_the_host_that_cannot_work_is_refused(host, calls, title):
    script = beginning(host, title)
    calls.calls = 0
    reply = host.generate(True, 2, alwayson_scripts={script.title(): {"args": [True]}})
    assert reply.images == []
    assert calls.calls == 0
    assert len(host.comments) == 1
