"""ControlNets on the diffusers host: each view is shown its own part of the control image. Tiny random networks."""

import inspect
import json
import threading
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from tiny import KINDS, photo, spot, tiny_controlnet, tiny_pipeline, tiny_union

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.control import FEW_COLOURS, few_colours
from lib_demofusion.fusion import pad_edges
from lib_demofusion.hosts.diffusers import (
    SAMPLERS,
    Control,
    generate,
    load_controlnet,
    needs,
    plan_for,
)
from lib_demofusion.hosts.diffusers_controlnet import UNION_TITLES, UNION_TYPES, Controls, check_controls
from lib_demofusion.memory import Meter

UNION = pytest.mark.skipif(
    not hasattr(diffusers, "ControlNetUnionModel"), reason=f"diffusers {diffusers.__version__} has no ControlNetUnionModel"
)
TWICE = DemoFusionConfig(scale=2.0)
DEEP = dict(transformer_layers_per_block=2, down_block_types=("CrossAttnDownBlock2D",) * 2)


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_pipeline(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def nets(pipes):
    return {kind: tiny_controlnet(pipe) for kind, pipe in pipes.items()}


@pytest.fixture
def sd15(pipes):
    return pipes["sd15"]


@pytest.fixture
def net(nets):
    return nets["sd15"]


def ramp(width, height):
    """Red is the row and green the column, from 0 to 255."""
    red, green = np.mgrid[0:height, 0:width] + 0.5
    planes = [red * 255 / height, green * 255 / width, np.zeros((height, width))]
    return Image.fromarray(np.stack(planes, -1).round().astype(np.uint8))


def noise(width=64, height=64):
    """The same one for a size, coarse enough to be seen when it is shrunken."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (9, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def drawing(width=64, height=64):
    """White, with a black cross and a red bar."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("black", (width // 3, 0, width // 3 + 9, height))
    image.paste("red", (0, height // 2, width, height // 2 + 5))
    return image


def spy(monkeypatch, net):
    """(hint, all arguments) of every call of the ControlNet."""
    calls, forward = [], net.forward

    def spied(**arguments):
        hint = arguments["controlnet_cond"]
        calls.append(SimpleNamespace(hint=hint[0] if isinstance(hint, list) else hint, **arguments))
        return forward(**arguments)

    monkeypatch.setattr(net, "forward", spied)
    return calls


def spy_phases(monkeypatch, net):
    """(phase, views, hint) of every call of the ControlNet."""
    calls, seen, residuals, begin, phases = spy(monkeypatch, net), [], Controls.residuals, Controls.begin, []

    def begun(controls, phase):
        phases.append(phase)
        begin(controls, phase)

    def spied(controls, views, *rest):
        before = len(calls)
        added = residuals(controls, views, *rest)
        seen.extend((phases[-1], views, call.hint) for call in calls[before:])
        return added

    monkeypatch.setattr(Controls, "begin", begun)
    monkeypatch.setattr(Controls, "residuals", spied)
    return seen


def spy_unet(monkeypatch, pipe):
    calls, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, t, **more: calls.append(more) or forward(x, t, **more))
    return calls


def last(result):
    return result.phases[-1][1]


def error(a, b):
    """Of random networks, whose answers are far from noise: by its spread."""
    return float((a - b).abs().max() / b.std())


# --- what a view is shown


@pytest.mark.parametrize("scale", [1.5, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_each_view_is_shown_its_own_part(sd15, net, size, scale, monkeypatch):
    """With jitter, and a batch of two: the mean place that a hint shows is that of its view's pixels."""
    seen = spy_phases(monkeypatch, net)
    control = Control(net, ramp(9 * size[1], 9 * size[0]))
    config = DemoFusionConfig(scale=scale, stride=0.6, view_batch_size=3)
    made = dict(height=size[0], width=size[1], steps=1, seed=[1, 2])
    result = generate(sd15, "red", config=config, controls=[control], **made)
    kinds = set()
    for phase, views, hint in seen:
        assert hint.shape == (2 * 2 * len(views), 3, *size), "two images, two branches of guidance"
        h, w = phase.size
        rows, columns = torch.arange(h).float() + 0.5, torch.arange(w).float() + 0.5
        places = torch.stack([rows[:, None].expand(h, w), columns.expand(h, w)])[None]
        for view, shown in zip(views, hint[: len(hint) // 2 : 2]):
            kinds.add((phase.number, view.kind))
            padded = places
            if view.kind == "dilated":
                padded, _ = pad_edges(places, (view.h * view.dilation, view.w * view.dilation))
            expected = view.crop(padded).mean((0, 2, 3))
            place = shown[:2].mean((1, 2)) * torch.tensor([h, w])
            assert (place - expected).abs().max() < 0.25, (phase.number, view)
        assert torch.equal(hint[: len(hint) // 2], hint[len(hint) // 2 :])
        assert torch.equal(hint[::2], hint[1::2])
    assert kinds == {(1, "local"), *((n, kind) for n in range(2, len(result.phases) + 1) for kind in ("local", "dilated"))}


def test_windows_are_cut_from_the_image_at_its_full_resolution(sd15, net, monkeypatch):
    image = noise(300, 300)
    seen = spy_phases(monkeypatch, net)
    generate(sd15, "", config=DemoFusionConfig(scale=3.0, jitter=False), controls=[Control(net, image)], steps=1, cfg_scale=1)
    assert [phase.number for phase, *_ in seen][-1] == 3
    for phase, views, hint in seen:
        at = np.asarray(image.resize([8 * side for side in phase.size[::-1]], Image.Resampling.LANCZOS))
        for view, shown in zip(views, hint):
            if view.kind == "local":
                expected = at[8 * view.top : 8 * (view.top + 8), 8 * view.left : 8 * (view.left + 8)]
                assert (shown.permute(1, 2, 0).mul(255).round().byte().numpy() == expected).all()


def test_the_base_is_shown_the_whole_image(sd15, net, monkeypatch):
    calls, image = spy(monkeypatch, net), noise(200, 133)
    generate(sd15, "", config=TWICE, controls=[Control(net, image)], steps=1, width=96, height=64)
    expected = torch.from_numpy(np.array(image.resize((96, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 255
    assert torch.equal(calls[0].hint, expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("scale", [2.0, 2.5])
def test_colours_of_a_drawing_are_never_mixed(sd15, net, scale, monkeypatch):
    calls = spy(monkeypatch, net)
    config = DemoFusionConfig(scale=scale)
    for image, kept in ((drawing(500, 500), True), (noise(500, 500), False)):
        calls.clear()
        generate(sd15, "", config=config, controls=[Control(net, image)], steps=1)
        own = {tuple(colour) for _, colour in image.getcolors(10**6)}
        shown = {
            tuple(c) for call in calls for c in call.hint.permute(0, 2, 3, 1).mul(255).round().int().reshape(-1, 3).tolist()
        }
        assert (shown <= own) == kept


@pytest.mark.parametrize("count", [FEW_COLOURS - 1, FEW_COLOURS])
def test_a_drawing_is_what_the_core_takes_for_one(sd15, net, count):
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels.reshape(-1, 3)[:count, 0] = np.arange(count)
    controls = Controls([Control(net, Image.fromarray(pixels))], (8, 8), 8)
    controls.begin(plan_for(sd15, TWICE).phases[1])
    assert controls._hints[0].nearest == few_colours(torch.from_numpy(pixels).permute(2, 0, 1)) == (count < FEW_COLOURS)


# --- what becomes of it


PIPELINES = {"sd15": "StableDiffusion", "sd2": "StableDiffusion", "sdxl": "StableDiffusionXL"}


def own_pipeline(pipe, kind, controlnet, images, **more):
    """The base as diffusers' own ControlNet pipeline makes it of seed 1."""
    theirs = getattr(diffusers, f"{PIPELINES[kind]}ControlNetPipeline")(**pipe.components, controlnet=controlnet)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    settings = dict(height=64, width=64, num_inference_steps=4, guidance_scale=7.5, output_type="latent")
    return theirs("a red fox", image=images, latents=latents, **settings, **more).images


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_that_of_diffusers_own_pipeline(pipes, kind, pooled):
    pipe, net, image = pipes[kind], tiny_controlnet(pipes[kind]), noise()
    net.register_to_config(global_pool_conditions=pooled)
    more = dict(scale=0.7, start=0.25, end=0.75)
    theirs = dict(controlnet_conditioning_scale=0.7, control_guidance_start=0.25, control_guidance_end=0.75)
    ours = generate(pipe, "a red fox", config=TWICE, controls=[Control(net, image, **more)], steps=4, seed=1).phases[0][1]
    assert error(ours, own_pipeline(pipe, kind, net, image, **theirs)) < 1e-3
    assert error(ours, generate(pipe, "a red fox", config=TWICE, steps=4, seed=1).phases[0][1]) > 0.1


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_what_several_controls_add_is_summed(pipes, nets, kind):
    pipe, images = pipes[kind], [noise(), drawing()]
    both, scales = [nets[kind], tiny_controlnet(pipe, seed=2)], [0.5, 1.5]
    controls = [Control(net, image, scale) for net, image, scale in zip(both, images, scales)]
    ours = generate(pipe, "a red fox", config=TWICE, controls=controls, steps=4, seed=1).phases[0][1]
    assert error(ours, own_pipeline(pipe, kind, both, images, controlnet_conditioning_scale=scales)) < 1e-3


@pytest.mark.parametrize("cfg_scale", [7.5, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_the_same_in_a_batch_and_at_any_view_batch_size(pipes, nets, kind, cfg_scale):
    def made(seed, size):
        config = DemoFusionConfig(scale=1.5, stride=1.0, view_batch_size=size)
        controls = [Control(nets[kind], noise(300, 300))]
        return last(generate(pipes[kind], "red", config=config, controls=controls, steps=2, cfg_scale=cfg_scale, seed=seed))

    batch = made([5, 6], 4)
    for size in (1, 64):
        for i in range(2):
            assert error(made(5 + i, size), batch[i : i + 1]) < 1e-4


def test_sdxl_size_ids_reach_the_controlnet(pipes, nets, monkeypatch):
    calls, unets = spy(monkeypatch, nets["sdxl"]), spy_unet(monkeypatch, pipes["sdxl"])
    generate(pipes["sdxl"], "red", config=TWICE, controls=[Control(nets["sdxl"], noise())], steps=2)
    assert len(calls) == len(unets) > 2
    for call, of in zip(calls, unets):
        for key in ("text_embeds", "time_ids"):
            assert torch.equal(call.added_cond_kwargs[key], of["added_cond_kwargs"][key])
    assert len({tuple(row) for call in calls for row in call.added_cond_kwargs["time_ids"].tolist()}) > 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_control_is_on_from_its_start_to_its_end_in_each_phase(sd15, net, sampler, monkeypatch):
    """As diffusers counts, whose samplers of second order have two timesteps a step; steps that are not run do not count."""
    calls = spy(monkeypatch, net)
    config = DemoFusionConfig(scale=2.0, denoising_strength=0.75, stride=1.0, view_batch_size=64)
    for start, end in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.7), (0.5, 0.5)):
        calls.clear()
        control = Control(net, noise(), start=start, end=end)
        result = generate(sd15, "", config=config, controls=[control], steps=8, sampler=sampler, cfg_scale=1)
        assert torch.isfinite(last(result)).all()
        counts = [sum(i / n >= start and (i + 1) / n <= end for i in range(n)) for n in (p.calls for p in result.plan.phases)]
        assert len(calls) == sum(counts)
        assert sum(len(call.sample) > 1 for call in calls) == counts[1]


def test_a_control_of_no_scale_and_none_change_nothing(sd15, net, monkeypatch):
    calls, unets = spy(monkeypatch, net), spy_unet(monkeypatch, sd15)
    made = dict(config=TWICE, steps=2, seed=3)
    plain = last(generate(sd15, "red", **made))
    for controls in ((), [Control(net, noise(), scale=0)], [Control(net, noise(), start=0.6, end=0.9)]):
        assert torch.equal(last(generate(sd15, "red", controls=controls, **made)), plain)
    assert not calls
    assert all(set(arguments) == {"encoder_hidden_states", "return_dict"} for arguments in unets)
    assert not torch.equal(last(generate(sd15, "red", controls=[Control(net, noise())], **made)), plain)


def test_a_job_goes_on_from_a_saved_phase(sd15, net):
    controls = [Control(net, noise(), end=0.6), Control(net, noise(64, 64), scale=0.5)]
    config = DemoFusionConfig(scale=3.0, stride=1.0)
    made = dict(config=config, steps=2, seed=[3, 4], sampler="Euler a", controls=controls)
    saved = {}
    whole = generate(sd15, "a", **made, finished=lambda result, phase: saved.update({phase.number: phase}))
    for number in (1, 2):
        assert torch.equal(last(generate(sd15, "a", **made, resume=saved[number])), last(whole))


def test_a_pooled_control_shows_every_view_the_whole(sd15, monkeypatch):
    net, image = tiny_controlnet(sd15), noise(200, 200)
    net.register_to_config(global_pool_conditions=True)
    calls = spy(monkeypatch, net)
    generate(sd15, "", config=TWICE, controls=[Control(net, image)], steps=1)
    expected = torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 255
    assert {len(call.hint) for call in calls} == {1, 4}, "of the prompt's branch alone"
    for call in calls:
        assert torch.equal(call.hint, expected.expand(len(call.hint), -1, -1, -1))


# --- given pictures


@pytest.mark.parametrize("mask", [None, spot()])
def test_a_given_picture_is_enlarged_with_a_control(sd15, net, mask, monkeypatch):
    seen = spy_phases(monkeypatch, net)
    config = DemoFusionConfig(scale=2.0, stride=1.0)
    made = dict(config=config, image=photo(), mask=mask, steps=1)
    result = generate(sd15, "", controls=[Control(net, ramp(600, 408))], **made)
    assert not torch.equal(last(result), last(generate(sd15, "", **made)))
    assert {phase.number for phase, *_ in seen} == {2, 3, 4}
    for phase, views, hint in seen:
        for view, shown in zip(views, hint):
            if view.kind == "local":
                place = shown[:2].mean((1, 2)) * torch.tensor(phase.size)
                assert (place - torch.tensor([view.top + view.h / 2, view.left + view.w / 2])).abs().max() < 0.25


def whole_of(views, hint, size):
    """The local windows' hints put together, [3, 8 * H, 8 * W]; NaN where there are none."""
    whole = torch.full((3, *(8 * side for side in size)), torch.nan)
    for view, shown in zip(views, hint):
        if view.kind == "local":
            whole[:, 8 * view.top : 8 * (view.top + view.h), 8 * view.left : 8 * (view.left + view.w)] = shown
    return whole


def test_a_control_without_image_takes_the_picture(sd15, net, monkeypatch):
    seen, image = spy_phases(monkeypatch, net), photo((160, 160))
    config = DemoFusionConfig(scale=2.0, stride=1.0, view_batch_size=64)
    made = dict(config=config, image=image, steps=1, seed=[1, 2], cfg_scale=1)
    result = generate(sd15, "red", controls=[Control(net)], **made)
    assert [phase.number for phase, *_ in seen] == list(range(2, len(result.phases) + 1))
    assert len(seen) > 1
    for phase, views, hint in seen:
        expected = image.resize([8 * side for side in phase.size[::-1]], Image.Resampling.LANCZOS)
        for row in range(2):
            shown = whole_of(views, hint[row::2], phase.size).permute(1, 2, 0).mul(255).round().numpy()
            assert (shown == np.asarray(expected)).all()
    assert torch.equal(last(result), last(generate(sd15, "red", controls=[Control(net, image)], **made)))


# --- what is refused


def refused(pipe, says, monkeypatch, controls, **settings):
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        monkeypatch.setattr(network, "forward", None)
    for call in (lambda **more: generate(pipe, "red", config=TWICE, **more), lambda **more: plan_for(pipe, TWICE, **more)):
        with pytest.raises(ValueError, match=f"^{says}[^\n]*$"):
            call(steps=2, controls=controls, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(scale=-1), "the ControlNet's scale must be at least 0, got -1"),
        (dict(scale=float("nan")), "the ControlNet's scale must be a number, got nan"),
        (dict(scale=float("inf")), "the ControlNet's scale must be a number, got inf"),
        (dict(scale="1"), "the ControlNet's scale must be a number, got '1'"),
        (dict(scale=True), "the ControlNet's scale must be a number, got True"),
        (dict(start=-0.1), "the ControlNet's start must be from 0 to 1, got -0.1"),
        (dict(end=1.5), "the ControlNet's end must be from 0 to 1, got 1.5"),
        (dict(start=0.6, end=0.4), "the ControlNet's start must not be after its end, got 0.6 and 0.4"),
        (dict(type="depth"), "the ControlNet is no union model and has no types; leave the type out"),
        (dict(image="depth.png"), "the control image must be a PIL image, got a str; Image.open makes one of a file"),
        (dict(image=Image.new("I;16", (64, 64))), "the control image is I;16, more than 8 bits a channel"),
        (dict(image=Image.new("LA", (64, 64))), "the control image has transparency; put it on a background first"),
        (
            dict(image=noise(96, 64)),
            "the ControlNet's image is 96x64, which has not the aspect of the picture, 64x64; crop it to that",
        ),
        (
            dict(model=torch.nn.Linear(2, 2)),
            "the ControlNet must be diffusers' ControlNetModel.*, got a Linear; load_controlnet",
        ),
        (dict(model="canny"), "the ControlNet must be diffusers' ControlNetModel.*, got a str; load_controlnet loads one"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_computed(sd15, net, settings, says, monkeypatch):
    refused(sd15, says, monkeypatch, [Control(**{"model": net, "image": noise(), **settings})])
    numbered = says.replace("the ControlNet", "ControlNet 2", 1).replace("the control image", "the control image 2", 1)
    refused(sd15, numbered, monkeypatch, [Control(net, noise()), Control(**{"model": net, "image": noise(), **settings})])


def test_a_control_without_an_image_needs_a_picture(sd15, net, monkeypatch):
    says = "the ControlNet has no image; give it one, or the job a picture to begin with, which it then takes"
    refused(sd15, says, monkeypatch, [Control(net)])


@pytest.mark.parametrize("controls", [None, 3, "canny", [3], Control(None)])
def test_controls_are_a_list_of_control(sd15, controls, monkeypatch):
    refused(sd15, "controls must be a list of Control, got ", monkeypatch, controls)


def test_the_aspect_may_differ_by_two_parts_in_a_hundred(sd15, net, monkeypatch):
    for size in ((200, 203), (203, 200)):
        assert plan_for(sd15, TWICE, controls=[Control(net, noise(*size))])
    refused(sd15, "the ControlNet's image is 200x210, which has not", monkeypatch, [Control(net, noise(200, 210))])
    image = photo((101, 67))  # enlarged to 200x136
    for size in ((101, 67), (1010, 670), (200, 136)):
        assert plan_for(sd15, TWICE, image=image, controls=[Control(net, noise(*size))])
    says = "the ControlNet's image is 64x64, which has not the aspect of the picture, 101x67; crop it to that"
    refused(sd15, says, monkeypatch, [Control(net, noise())], image=image)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            dict(in_channels=9),
            "does not fit the checkpoint: latent channels 9 instead of 4; use one that was made for this kind",
        ),
        (dict(block_out_channels=(8, 32)), "does not fit the checkpoint: channels of its blocks 8/32 instead of 8/16; use one"),
        (dict(block_out_channels=(8, 16, 16)), "does not fit the checkpoint: channels of its blocks 8/16/16 instead of 8/16"),
        (dict(layers_per_block=2), "does not fit the checkpoint: layers of its blocks 2 instead of 1; use one"),
        (dict(num_class_embeds=10), "asks for more than a prompt and the UNet's own conditions; use another one"),
        (dict(addition_embed_type="text_time"), "asks for more than a prompt and the UNet's own conditions; use another one"),
        (dict(conditioning_channels=6), "takes images of 6 channels; use one that takes RGB"),
        (
            dict(conditioning_embedding_out_channels=(16, 32, 96)),
            "takes 4 pixels for a latent pixel, and the checkpoint has 8; use another one",
        ),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused(sd15, config, says, monkeypatch):
    net = tiny_controlnet(sd15)
    net.register_to_config(**config)
    refused(sd15, f"the ControlNet {says}", monkeypatch, [Control(net, noise())])


def test_a_controlnet_of_another_kind_of_checkpoint_is_refused(pipes, nets, monkeypatch):
    says = "the ControlNet does not fit the checkpoint: numbers a token {} instead of {}; use one that was made for this kind"
    refused(pipes["sd15"], says.format(32, 16), monkeypatch, [Control(nets["sdxl"], noise())])
    refused(pipes["sdxl"], says.format(16, 32), monkeypatch, [Control(nets["sd15"], noise())])


def test_a_controlnet_without_attention_may_be_of_any_width(sd15):
    """As the smallest ones of SDXL are."""
    blocks = dict(down_block_types=("DownBlock2D", "DownBlock2D"), mid_block_type="UNetMidBlock2D", block_out_channels=(8, 16))
    small = ControlNetModel(**blocks, layers_per_block=1, norm_num_groups=4, cross_attention_dim=99)
    net = tiny_controlnet(sd15, kind=lambda: small)
    result = generate(sd15, "red", config=TWICE, controls=[Control(net, noise())], steps=1)
    assert not torch.equal(last(result), last(generate(sd15, "red", config=TWICE, steps=1)))


def test_a_controlnet_that_lies_elsewhere_or_is_of_another_type_is_refused(sd15, monkeypatch):
    net = tiny_controlnet(sd15).half()
    refused(sd15, r"the ControlNet is in float16, and the pipeline in float32; bring it there", monkeypatch, [Control(net)])
    says = r"the ControlNet lies on meta, and the pipeline computes on cpu; move it there with its to\(\)"
    refused(sd15, says, monkeypatch, [Control(tiny_controlnet(sd15).to("meta"))])


# --- union models


@UNION
@pytest.mark.parametrize("kind", ["canny", "Lineart", 3])
def test_a_union_model_is_told_what_its_image_is(pipes, kind, monkeypatch):
    pipe, image = pipes["sdxl"], noise()
    net = tiny_union(pipe)
    theirs = diffusers.StableDiffusionXLControlNetUnionPipeline(**pipe.components, controlnet=net)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    own = dict(height=64, width=64, num_inference_steps=4, guidance_scale=7.5, output_type="latent")
    own.update(controlnet_conditioning_scale=0.7)
    expected = theirs("a red fox", control_image=image, control_mode=3, latents=latents, **own).images
    calls = spy(monkeypatch, net)
    result = generate(pipe, "a red fox", config=TWICE, controls=[Control(net, image, 0.7, type=kind)], steps=4, seed=1)
    assert error(result.phases[0][1], expected) < 1e-3
    for call in calls:
        assert call.control_type_idx == [3]
        assert call.control_type.tolist() == [[0, 0, 0, 1, 0, 0]] * len(call.sample)


@UNION
@pytest.mark.parametrize(
    ("types", "kind", "says"),
    [
        (6, None, "the ControlNet is a union model; give the type of its image: openpose, depth, softedge, .*, segmentation"),
        (6, "tile", "the ControlNet has no type 'tile'; there are: openpose, .*, segmentation, or a number from 0 to 5"),
        (6, 6, "the ControlNet has no type 6; there are: openpose"),
        (8, 8, "the ControlNet has no type 8; there are: openpose, .*, tile, inpaint, or a number from 0 to 7"),
        (6, -1, "the ControlNet has no type -1"),
        (6, True, "the ControlNet has no type True"),
        (6, "edges", "the ControlNet has no type 'edges'"),
        (5, "depth", "the ControlNet has no type 'depth'; there are: numbers from 0 to 4"),
        (5, None, "the ControlNet is a union model; give the type of its image: 0 to 4"),
    ],
)
def test_union_types_that_are_not_there_are_refused(pipes, types, kind, says, monkeypatch):
    refused(pipes["sdxl"], says, monkeypatch, [Control(tiny_union(pipes["sdxl"], types), noise(), type=kind)])


@UNION
def test_union_types_go_by_name(pipes):
    pipe, net = pipes["sdxl"], tiny_union(pipes["sdxl"], 8)
    plan = plan_for(pipe, TWICE)
    for name, number in UNION_TYPES.items():
        for kind in (name, name.upper(), number):
            [control] = check_controls(pipe, [Control(net, noise(), type=kind)], plan, None)
            assert control.type == number
    assert len(UNION_TITLES) == 1 + max(UNION_TYPES.values())


# --- memory, and one job at a time


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_needs_are_what_is_measured(pipes, nets, kind):
    """Of tensors; images are no tensors until they are cut up."""
    pipe, image = pipes[kind], noise(700, 700)
    controls = [Control(nets[kind], image), Control(tiny_controlnet(pipe, 2), image)]
    config = DemoFusionConfig(scale=4.0, view_batch_size=4)
    plan = plan_for(pipe, config, steps=1, controls=controls)
    need, plain = needs(pipe, plan, 4, controls=controls), needs(pipe, plan, 4)
    with Meter() as meter:
        generate(pipe, "a", config=config, steps=1, controls=controls)
    pixels = 256 * 256 + 64 * 64
    assert need.controls == 2 * 3 * (700 * 700 + pixels)
    assert need.sampling + 2 * 3 * pixels == pytest.approx(meter.peak, rel=0.15)
    assert need.sampling > 1.3 * plain.sampling
    own = sum(x.nbytes for control in controls for x in control.model.state_dict().values())
    assert need.weights - plain.weights == pytest.approx(own, rel=0.01)
    assert plain.controls == 0
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert need.peak(cpu) - need.peak(card) >= min(need.controls, need.picture)


def test_a_controlnet_that_is_used_twice_lies_there_once(sd15, net):
    plan = plan_for(sd15, TWICE)
    one, two = (needs(sd15, plan, 4, controls=[Control(net, noise(), type=0)] * count) for count in (1, 2))
    assert one.weights == two.weights
    assert net.device.type == "cpu", "nothing has been computed, nor moved"
    assert two.controls == 2 * one.controls


@UNION
def test_needs_of_a_union_model(pipes):
    controls = [Control(tiny_union(pipes["sdxl"]), noise(), type="depth")]
    plan = plan_for(pipes["sdxl"], TWICE, controls=controls)
    assert needs(pipes["sdxl"], plan, 4, controls=controls).sampling > needs(pipes["sdxl"], plan, 4).sampling


@pytest.mark.parametrize("what", ["pipeline", "ControlNet"])
def test_offloaded_networks_make_the_same_picture(what):
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd15")
    net = tiny_controlnet(pipe)
    made = dict(config=TWICE, steps=1, controls=[Control(net, noise())])
    whole = last(generate(pipe, "red", **made))
    if what == "pipeline":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu_offload(net, torch.device("cpu"))
    for _ in range(2):
        result = generate(pipe, "red", **made)
        assert error(last(result), whole) < 1e-4
    with pytest.raises(RuntimeError, match="offloaded"):
        needs(pipe, result.plan, controls=made["controls"])


def test_jobs_that_share_a_controlnet_wait_for_each_other(net):
    pipe, other = tiny_pipeline("sd15"), tiny_pipeline("sd15")
    inside, go_on, order = threading.Event(), threading.Event(), []
    made = dict(config=DemoFusionConfig(scale=1.5), steps=1)

    def hold(result, saved):
        inside.set()
        assert go_on.wait(60)
        order.append("first")

    controls = [Control(net, noise())]
    first = threading.Thread(target=lambda: generate(pipe, "", controls=controls, finished=hold, **made))
    first.start()
    assert inside.wait(60)
    second = threading.Thread(target=lambda: order.append(generate(other, "", controls=controls, **made) and "second"))
    second.start()
    second.join(0.5)
    assert not order
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert order[-1] == "second"


# --- loading


def test_a_controlnet_is_loaded_from_a_folder_where_and_as_the_pipeline_computes(sd15, net, tmp_path):
    net.save_pretrained(tmp_path / "whole")
    loaded = load_controlnet(tmp_path / "whole", sd15)
    assert (loaded.dtype, loaded.device, loaded.training) == (torch.float32, torch.device("cpu"), False)
    for name, weights in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)
    made = dict(config=TWICE, steps=1, controls=[Control(loaded, noise())])
    assert torch.isfinite(last(generate(sd15, "red", **made))).all()
    tiny_controlnet(sd15).half().save_pretrained(tmp_path / "half", variant="fp16")
    assert load_controlnet(str(tmp_path / "half"), sd15).dtype == torch.float32
    assert load_controlnet(tmp_path / "whole", tiny_pipeline("sd15").to(torch.bfloat16)).dtype == torch.bfloat16


@UNION
def test_a_union_model_is_loaded_from_a_folder_by_what_it_is(pipes, tmp_path):
    tiny_union(pipes["sdxl"], 8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "ControlNetModel_Union"}))
    net = load_controlnet(tmp_path, pipes["sdxl"])
    assert isinstance(net, diffusers.ControlNetUnionModel)
    assert net.config.num_control_type == 8


@pytest.mark.skipif(hasattr(diffusers, "ControlNetUnionModel"), reason="this diffusers knows union ControlNets")
def test_a_union_model_is_refused_by_a_diffusers_that_does_not_know_it(sd15, net, tmp_path):
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_control_type": 6}))
    with pytest.raises(ValueError, match="knows no union ControlNets; 0.32 and newer do$"):
        load_controlnet(tmp_path, sd15)


@pytest.mark.parametrize("name", ["edges.safetensors", "Shuffle_v11.SAFETENSORS"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_controlnet_is_loaded_from_a_file(pipes, nets, kind, name, tmp_path):
    """Without a connection: it is built as the UNet is."""
    save_file(nets[kind].state_dict(), tmp_path / name)
    loaded = load_controlnet(tmp_path / name, pipes[kind])
    for key, weights in nets[kind].state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weights)
    assert loaded.config.global_pool_conditions == name.startswith("Shuffle")
    result = generate(pipes[kind], "", config=TWICE, controls=[Control(loaded, noise())], steps=1)
    assert torch.isfinite(last(result)).all()


def test_a_file_in_the_original_names_is_converted_with_the_unets_configuration(sd15, monkeypatch, tmp_path):
    net = tiny_controlnet(sd15)
    got, path = [], tmp_path / "canny.safetensors"
    save_file({"control_model.input_hint_block.0.weight": torch.zeros(1)}, path)

    def from_single_file(file, torch_dtype, config):
        got.append((file, torch_dtype, ControlNetModel.load_config(config)))
        return net

    monkeypatch.setattr(ControlNetModel, "from_single_file", from_single_file)
    assert load_controlnet(path, sd15) is net
    [(file, dtype, config)] = got
    assert (file, dtype) == (str(path), torch.float32)
    assert {key: config[key] for key in ("cross_attention_dim", "layers_per_block")} == dict(
        cross_attention_dim=16, layers_per_block=1
    )


@pytest.mark.parametrize("blocks", [("DownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")])
@pytest.mark.parametrize("middle", ["UNetMidBlock2D", "UNetMidBlock2DCrossAttn"])
def test_a_file_may_hold_one_with_less_attention_than_the_unet(pipes, blocks, middle, tmp_path):
    """As the middle and small ones of SDXL."""
    unet = UNet2DConditionModel(**{**pipes["sdxl"].unet.config, **DEEP})
    own = {name: unet.config[name] for name in inspect.signature(ControlNetModel.__init__).parameters if name in unet.config}
    net = tiny_controlnet(None, kind=lambda: ControlNetModel(**{**own, "down_block_types": blocks, "mid_block_type": middle}))
    save_file(net.state_dict(), tmp_path / "small.safetensors")
    pipe = type(pipes["sdxl"])(**{**pipes["sdxl"].components, "unet": unet}, add_watermarker=False)
    loaded = load_controlnet(tmp_path / "small.safetensors", pipe)
    arguments = dict(sample=torch.randn(1, 4, 8, 8), timestep=5, encoder_hidden_states=torch.randn(1, 77, 32))
    arguments.update(added_cond_kwargs=dict(text_embeds=torch.randn(1, 16), time_ids=torch.zeros(1, 6)))
    arguments.update(controlnet_cond=torch.rand(1, 3, 64, 64), return_dict=False)
    with torch.inference_mode():
        (down, mid), (expected, last_one) = loaded(**arguments), net(**arguments)
    for a, b in zip((*down, mid), (*expected, last_one)):
        assert error(a, b) < 1e-3


@UNION
def test_a_union_model_is_loaded_from_a_file(pipes, tmp_path):
    pipe, net = pipes["sdxl"], tiny_union(pipes["sdxl"], 8)
    save_file(net.state_dict(), tmp_path / "union.safetensors")
    loaded = load_controlnet(tmp_path / "union.safetensors", pipe)
    a, b = (
        generate(pipe, "", config=TWICE, controls=[Control(n, noise(), type="tile")], steps=1).phases[0][1]
        for n in (net, loaded)
    )
    assert error(a, b) < 1e-4


def test_a_file_whose_tensors_are_of_other_shapes_is_refused(sd15, net, tmp_path):
    for name, weights in (("conv_in.weight", torch.zeros(8, 9, 3, 3)), ("another", torch.zeros(1)), ("conv_in.bias", None)):
        tensors = {key: value for key, value in {**net.state_dict(), name: weights}.items() if value is not None}
        save_file(tensors, tmp_path / "net.safetensors")
        says = f"cannot be loaded: it is no ControlNet for this kind of checkpoint, or broken: {name} does not agree$"
        with pytest.raises(ValueError, match=says):
            load_controlnet(tmp_path / "net.safetensors", sd15)


FILES = [
    ("lora_controlnet", "it is a Control-LoRA; use the whole ControlNet"),
    ("lllite_unet.x", "it is a ControlNet-LLLite; use a whole ControlNet"),
    ("first_stage_model.x", "it is a checkpoint; give the ControlNet alone"),
    ("adapter.conv_in.weight", "it is a T2I-Adapter; use a ControlNet"),
    ("image_proj.x", "it is an IP-Adapter; use a ControlNet"),
    ("control_model.label_emb.0.0.weight", "its SDXL names are not diffusers', which cannot read it"),
    ("down_blocks.0", "it is no ControlNet: none of its tensors has the name of one"),
]


@pytest.mark.parametrize(("key", "says"), FILES)
def test_files_that_are_no_controlnet_are_refused(sd15, key, says, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({key: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"net.safetensors cannot be loaded: {says}$"):
        load_controlnet(path, sd15)


def test_what_is_not_there_or_broken_is_refused_in_one_line(pipes, nets, tmp_path):
    sd15 = pipes["sd15"]
    for name in ("empty", "pipeline", "broken", "weightless", "lacking", "flux"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "empty" / "config.json").unlink()
    (tmp_path / "pipeline" / "config.json").rename(tmp_path / "pipeline" / "model_index.json")
    (tmp_path / "broken" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    nets["sd15"].save_pretrained(tmp_path / "lacking")
    weights = nets["sd15"].state_dict()
    del weights["controlnet_mid_block.weight"]
    save_file(weights, tmp_path / "lacking" / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "flux" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "flux" / "config.json").write_text('{"_class_name": "FluxControlNetModel"}')
    (tmp_path / "pickled.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file(nets["sdxl"].state_dict(), tmp_path / "xl.safetensors")
    for name, says in {
        "nothing": "no such ControlNet: ",
        "nothing.safetensors": "no such ControlNet: ",
        "empty": "empty is no ControlNet's folder: it has no config.json",
        "pipeline": "pipeline is no ControlNet's folder: it is a whole pipeline's; give the folder controlnet in it",
        "broken": "cannot be loaded: diffusion_pytorch_model.safetensors: it only stands for a file that git lfs keeps",
        "weightless": "cannot be loaded: it has no weights, such as diffusion_pytorch_model.safetensors",
        "lacking": "cannot be loaded: .*",
        "flux": "cannot be loaded: it is a FluxControlNetModel; use a ControlNetModel or a ControlNetUnionModel",
        "pickled.ckpt": "cannot be loaded: a ControlNet in one file is a .safetensors file",
        "cut.safetensors": "cannot be loaded: it is no whole .safetensors file; download it again",
        "xl.safetensors": "cannot be loaded: it takes 32 numbers a token, and this checkpoint gives 16; use one made",
    }.items():
        with pytest.raises(ValueError, match=says) as error:
            load_controlnet(tmp_path / name, sd15)
        assert "\n" not in str(error.value)
    for model in ("", None, 3):
        with pytest.raises(ValueError, match="^the model must be a folder, a file or a hub name, got "):
            load_controlnet(model, sd15)


def test_a_hub_name_that_cannot_be_reached_says_so(sd15):
    with pytest.raises(
        ValueError, match="^nobody/no-controlnet cannot be loaded: it is not on this machine, and huggingface.co"
    ):
        load_controlnet("nobody/no-controlnet", sd15)
