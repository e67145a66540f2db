"""What a checkpoint's configuration says is obeyed as diffusers' own pipeline obeys it, or refused before all else."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny import tiny_pipeline

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import (
    SAMPLERS,
    Incomplete,
    check_prompt,
    decode_latents,
    generate,
    load_pipeline,
    needs,
    plan_for,
)
from lib_demofusion.hosts.diffusers_schedules import settings_for
from lib_demofusion.memory import Meter

SMALL = DemoFusionConfig(scale=1.5)
LDM = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


class Enough(Exception):
    pass


def base_result(pipe, **settings):
    """What `generate` has when the base is there."""

    def stop(*finished):
        raise Enough

    with pytest.raises(Incomplete) as stopped:
        generate(pipe, "red fox", **{"config": SMALL, "seed": 3, "cfg_scale": 4.0, "finished": stop, **settings})
    assert isinstance(stopped.value.__cause__, Enough)
    return stopped.value.result


def own(pipe, output_type="latent", **settings):
    """The pipeline's own picture of the same settings, or its latents."""
    kind = dict(guidance_scale=4.0, height=64, width=64, output_type=output_type, generator=torch.Generator().manual_seed(3))
    return pipe("red fox", **{**kind, **settings}).images


def assert_close(ours, theirs):
    assert float((ours - theirs).abs().max() / theirs.std()) < 1e-3


OWN = {
    "trailing": EulerDiscreteScheduler(**LDM, timestep_spacing="trailing"),
    "linspace": EulerDiscreteScheduler(**LDM, timestep_spacing="linspace"),
    "no betas": EulerDiscreteScheduler(),
    "trained betas": EulerDiscreteScheduler(trained_betas=torch.linspace(0.001, 0.02, 1000).tolist()),
    "500 timesteps": EulerDiscreteScheduler(beta_start=0.001, beta_end=0.03, num_train_timesteps=500),
    "karras": EulerDiscreteScheduler(**LDM, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    "log linear": EulerDiscreteScheduler(**LDM, interpolation_type="log_linear"),
    "last level": EulerDiscreteScheduler(**LDM, final_sigmas_type="sigma_min"),
    "zero terminal SNR": EulerDiscreteScheduler(**LDM, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "v": EulerAncestralDiscreteScheduler(**LDM, prediction_type="v_prediction"),
    "continuous": EulerDiscreteScheduler(**LDM, timestep_type="continuous"),
    "DDIM, clipped by default": DDIMScheduler(**LDM),
    "DDIM, clipped": DDIMScheduler(**LDM, clip_sample=True, clip_sample_range=2.0),
    "DDIM": DDIMScheduler(**LDM, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "DDIM, thresholding": DDIMScheduler(**LDM, clip_sample=False, thresholding=True, sample_max_value=2.0),
    "DDIM, other betas": DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    "SDE": DPMSolverMultistepScheduler(**LDM, algorithm_type="sde-dpmsolver++"),
    "dpmsolver": DPMSolverMultistepScheduler(**LDM, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "third order": DPMSolverMultistepScheduler(**LDM, solver_order=3, lower_order_final=False),
    "first order": DPMSolverMultistepScheduler(**LDM, solver_order=1, euler_at_final=True, use_lu_lambdas=True),
    "heun": HeunDiscreteScheduler(**LDM, clip_sample=True),
    "LCM": LCMScheduler(original_inference_steps=20, timestep_scaling=5.0),
    "UniPC": UniPCMultistepScheduler(**LDM, disable_corrector=[0], solver_order=3),
}
OF_CLASS = {sampler.scheduler: label for label, sampler in SAMPLERS.items()}


@pytest.mark.parametrize("name", OWN)
def test_the_base_is_the_pipelines_own_with_the_scheduler_that_it_has(name):
    pipe = tiny_pipeline("sdxl")  # its constructor leaves schedulers as they are
    pipe.scheduler = OWN[name]
    ours = base_result(pipe, steps=4, sampler=OF_CLASS[type(pipe.scheduler).__name__]).phases[0][1]
    assert_close(ours, own(pipe, num_inference_steps=4))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**LDM, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        DDPMScheduler(**LDM),  # clips samples if nothing is said
        LMSDiscreteScheduler(**LDM, use_karras_sigmas=True, prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(**LDM, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_base_is_the_pipelines_own_with_its_scheduler_switched(scheduler, sampler):
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = scheduler
    ours = base_result(pipe, steps=3, sampler=sampler).phases[0][1]
    kind = getattr(diffusers, SAMPLERS[sampler].scheduler)
    if type(scheduler) is not kind:  # latents are not clipped, whatever the class does if nothing is said
        pipe.scheduler = kind.from_config({**scheduler.config, "clip_sample": False, "_use_default_values": []})
        unset = [key for key in scheduler.config["_use_default_values"] if key != "clip_sample"]
        pipe.scheduler = kind.from_config({**scheduler.config, "clip_sample": False, "_use_default_values": unset})
    assert_close(ours, own(pipe, num_inference_steps=3))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), LCMScheduler()], ids=["linear", "scaled"])
def test_noise_levels_that_are_not_said_are_those_of_the_checkpoints_own_class(scheduler, sampler):
    kind = getattr(diffusers, SAMPLERS[sampler].scheduler)
    made = kind.from_config(settings_for(kind, scheduler))
    torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)


def test_what_a_pipeline_has_put_right_in_a_scheduler_stays_so():
    """Stable Diffusion's own pipeline sets these in a scheduler that did not say them."""
    pipe = tiny_pipeline("sd15")
    parts = {**pipe.components, "scheduler": DDIMScheduler(**LDM)}
    config = StableDiffusionPipeline(**parts, requires_safety_checker=False).scheduler.config
    assert (config.clip_sample, config.steps_offset) == (False, 1)
    for name in ("DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler"):
        kind = getattr(diffusers, name)
        scheduler = DDIMScheduler(**LDM)
        scheduler.register_to_config(clip_sample=False, steps_offset=1)
        made = kind.from_config(settings_for(kind, scheduler)).config
        assert (made.clip_sample, made.steps_offset) == (False, 1)


@pytest.fixture(scope="module")
def embedded():
    return load_pipeline()


@pytest.fixture(scope="module")
def by_euler(embedded):
    return drawn(embedded, "Euler")


def drawn(pipe, sampler):
    result = base_result(pipe, sampler=sampler, steps=25, seed=1, cfg_scale=3.0, progress=None)
    return np.asarray(result.images()[0], dtype=float)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_the_embedded_checkpoint_all_samplers_draw_the_same(embedded, by_euler, sampler, said):
    """Those without fresh noise; the others a picture of the same colours. With and without clip_sample in its config."""
    before = embedded.scheduler
    if not said:
        embedded.scheduler = EulerDiscreteScheduler(**LDM, timestep_spacing="leading", steps_offset=1)
    assert ("clip_sample" in embedded.scheduler.config) == said
    try:
        picture = drawn(embedded, sampler)
    finally:
        embedded.scheduler = before
    if SAMPLERS[sampler].fresh_noise:
        assert abs(picture.mean() - by_euler.mean()) < 60
        assert 0.4 < picture.std() / by_euler.std() < 2.5
    else:
        assert abs(picture - by_euler).mean() < 12


FOREIGN = {
    "EDMEulerScheduler": "noise levels of this checkpoint's EDMEulerScheduler are not of",
    "EDMDPMSolverMultistepScheduler": "noise levels of this checkpoint's EDMDPM",
    "FlowMatchEulerDiscreteScheduler": "noise levels of this checkpoint's FlowMatchEuler",
    "FlowMatchHeunDiscreteScheduler": "noise levels of this checkpoint's FlowMatchHeun",
    "IPNDMScheduler": "noise levels of this checkpoint's IPNDM",
    "CMStochasticIterativeScheduler": "noise levels of this checkpoint's CMStochastic",
    "ScoreSdeVeScheduler": "noise levels of this checkpoint's ScoreSdeVe",
    "CogVideoXDDIMScheduler": "cannot take over the noise levels of this checkpoint's CogVideoX",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_noise_levels_of_another_kind_are_refused(name):
    refused(lambda pipe: setattr(pipe, "scheduler", getattr(diffusers, name)()), FOREIGN[name])


@pytest.mark.parametrize(
    ("scheduler", "sampler", "says"),
    [
        (DDIMScheduler(**LDM, prediction_type="sample"), "Euler", "prediction type sample is not known"),
        (
            EulerDiscreteScheduler(**LDM, timestep_type="continuous", prediction_type="v_prediction"),
            "DDIM",
            "noise levels of this checkpoint's EulerDiscreteScheduler are not of",
        ),
        (
            EulerDiscreteScheduler(**LDM, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "Heun",
            "HeunDiscreteScheduler cannot take over the noise levels .*; use another sampler, Euler for one",
        ),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "Heun", "starts at infinite noise.*; use Euler"),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "Euler", "starts at infinite noise.*; use another checkpoint"),
        (UniPCMultistepScheduler(**LDM, solver_type="bh1"), "UniPC", "it would end in NaN"),
        (DPMSolverMultistepScheduler(**LDM, variance_type="learned_range"), "DPM\\+\\+ 2M", "cannot make 2 steps"),
    ],
)
def test_what_a_sampler_cannot_obey_is_refused(scheduler, sampler, says):
    refused(lambda pipe: setattr(pipe, "scheduler", scheduler), says, sampler=sampler.replace("\\", ""))


def test_flow_sigmas_are_refused():
    if "use_flow_sigmas" not in DPMSolverMultistepScheduler().config:
        pytest.skip("this diffusers has no flow sigmas")
    scheduler = DPMSolverMultistepScheduler(**LDM, use_flow_sigmas=True)
    refused(lambda pipe: setattr(pipe, "scheduler", scheduler), "are not of Stable Diffusion's kind")


@pytest.mark.parametrize("key", ["use_exponential_sigmas", "use_beta_sigmas"])
def test_sigmas_of_newer_versions_are_obeyed(key):
    if key not in EulerDiscreteScheduler().config:
        pytest.skip(f"this diffusers has no {key}")
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = EulerDiscreteScheduler(**LDM, **{key: True})
    assert_close(base_result(pipe, steps=4).phases[0][1], own(pipe, num_inference_steps=4))


def refused(change, says, kind="sdxl", **settings):
    """One line, by the plan as by the job, and nothing is computed."""
    pipe = tiny_pipeline(kind)
    pipe = change(pipe) or pipe
    calls = []
    for job in (plan_for, lambda *args, **more: generate(pipe, "", config=SMALL, progress=calls.append, **more)):
        with pytest.raises(ValueError, match=says) as error:
            job(pipe, SMALL, **{"steps": 2, **settings})
        assert "\n" not in str(error.value)
    assert not calls


# --- the number of steps


@pytest.mark.parametrize(
    ("sampler", "steps", "works"),
    [
        ("Euler", 1001, 999),
        ("Euler a", 10**9, 999),
        ("DDIM", 1000, 999),
        ("DPM++ 2M", 1500, 998),
        ("Heun", 1001, 999),
        ("LCM", 51, 50),
        ("UniPC", 1001, 998),
    ],
)
def test_steps_that_the_scheduler_cannot_make_are_refused_with_a_number_that_works(sampler, steps, works):
    refused(lambda pipe: None, rf"cannot make {steps} steps .*; {works} works$", "sd15", sampler=sampler, steps=steps)
    plan_for(tiny_pipeline("sd15"), SMALL, sampler=sampler, steps=works)


@pytest.mark.parametrize(("sampler", "steps"), [("LCM", 51), ("DPM++ 2M", 1000)])
def test_so_are_steps_of_the_phases_alone(sampler, steps):
    pipe = tiny_pipeline("sd15")
    config = DemoFusionConfig(scale=2.0, phase_steps=steps)
    for image in (None, Image.new("RGB", (64, 64))):
        with pytest.raises(ValueError, match=rf"cannot make {steps} phase steps"):
            plan_for(pipe, config, steps=4, sampler=sampler, image=image)


def test_an_image_needs_no_steps_of_a_base():
    plan = plan_for(tiny_pipeline("sd15"), DemoFusionConfig(scale=2.0, phase_steps=4), steps=51, sampler="LCM", image=picture())
    assert plan.phases[0].steps == 0


# --- the negative prompt


@pytest.mark.parametrize("negative", [{}, {"negative_prompt": None}, {"negative_prompt": ""}])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sdxl, no zeros"])
def test_no_negative_prompt_is_what_the_pipeline_makes_of_none(kind, negative):
    pipe = tiny_pipeline(kind.partition(",")[0])
    if kind != "sd15":
        pipe.register_to_config(force_zeros_for_empty_prompt="no zeros" not in kind)
    assert_close(base_result(pipe, steps=3, **negative).phases[0][1], own(pipe, num_inference_steps=3))


def test_a_negative_prompt_is_the_pipelines():
    pipe = tiny_pipeline("sdxl")
    ours = base_result(pipe, steps=3, negative_prompt="blue").phases[0][1]
    assert_close(ours, own(pipe, num_inference_steps=3, negative_prompt="blue"))


# --- textual inversions


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_textual_inversion_counts_as_many_tokens_as_it_has_vectors(kind):
    pipe = tiny_pipeline(kind)
    pipe.load_textual_inversion({"<ten>": torch.randn(10, 16)}, token="<ten>")
    fits, long = " ".join(["<ten>"] * 7), " ".join(["<ten>"] * 8)
    check_prompt(pipe, fits, "prompt")
    with pytest.raises(ValueError, match="the negative prompt is too long: 80 tokens, 75 at most"):
        generate(pipe, fits, negative_prompt=long, config=SMALL)
    if kind == "sdxl":  # the second tokenizer alone
        pipe = tiny_pipeline(kind)
        pipe.load_textual_inversion(
            {"<ten>": torch.randn(10, 16)}, token="<ten>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
        with pytest.raises(ValueError, match="too long"):
            check_prompt(pipe, long, "prompt")


# --- autoencoders

MOMENTS = dict(latents_mean=[-1.6, 2.3, 2.5, 0.15], latents_std=[8.4, 5.9, 6.3, 5.2], scaling_factor=0.5)


@pytest.mark.parametrize("moments", [MOMENTS, {**MOMENTS, "latents_std": None}, dict(scaling_factor=0.3)])
def test_latents_are_moved_as_the_pipeline_moves_them(moments):
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(**moments)
    ours = np.asarray(base_result(pipe, steps=3).images()[0], dtype=float)
    assert abs(ours - 255 * own(pipe, "np", num_inference_steps=3)[0]).max() <= 1


def test_encoding_is_the_inverse_of_decoding_then(monkeypatch):
    """An autoencoder that changes nothing but the sizes: an image comes back."""
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(**MOMENTS)
    seen = []
    monkeypatch.setattr(
        type(pipe.vae),
        "decode",
        lambda self, z, **more: seen.append(z.clone()) or diffusers.models.autoencoders.vae.DecoderOutput(z),
    )
    result = generate(pipe, "", config=SMALL, steps=2, image=picture())
    decode_latents(pipe, result.phases[0][1], result.plan.window)
    with torch.inference_mode():
        x = pipe.image_processor.preprocess(picture())
        torch.testing.assert_close(seen[-1], pipe.vae.encode(x).latent_dist.mode(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("sd15", dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "moves its latents"),
        ("sd15", dict(shift_factor=0.1), "shift_factor"),
        ("sdxl", dict(shift_factor=0.1), "shift_factor"),
    ],
)
def test_latents_that_the_pipeline_would_not_move_are_refused(kind, change, says):
    refused(lambda pipe: pipe.vae.register_to_config(**change), says, kind)


def picture(mode="RGB", size=(64, 64)):
    return Image.radial_gradient("L").resize(size).convert(mode)


def tiny_autoencoder():
    torch.manual_seed(0)
    widths, blocks = (4,) * 4, (1,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


def asymmetric_autoencoder():
    torch.manual_seed(0)
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        down_block_out_channels=(4, 4, 8, 8),
        up_block_types=("UpDecoderBlock2D",) * 4,
        up_block_out_channels=(4, 4, 8, 8),
        norm_num_groups=4,
    )


@pytest.mark.parametrize("settings", [{}, {"pixel_upsampling": True}, {"hold_flat": 5.0}])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("make", [tiny_autoencoder, asymmetric_autoencoder])
def test_other_autoencoders_work(make, image, settings):
    pipe = tiny_pipeline("sd15")
    pipe.vae = make()
    config = DemoFusionConfig(scale=2.0, **settings)
    result = generate(pipe, "red", config=config, steps=2, image=picture() if image else None)
    assert [i.size for i in result.images()] == [(128, 128)]
    assert needs(pipe, result.plan).decoding > 0


@pytest.mark.parametrize("make", [tiny_autoencoder, asymmetric_autoencoder])
def test_their_base_is_the_pipelines_own(make):
    pipe = tiny_pipeline("sd15")
    pipe.vae = make()
    ours = np.asarray(base_result(pipe, steps=3).images()[0], dtype=float)
    assert abs(ours - 255 * own(pipe, "np", num_inference_steps=3)[0]).max() <= 1


def test_what_a_tiny_autoencoder_needs_follows_the_tile(monkeypatch):
    pipe = tiny_pipeline("sd15")
    pipe.vae = tiny_autoencoder()
    monkeypatch.setattr("lib_demofusion.decode.tile_for", lambda *args: 32)
    plan = plan_for(pipe, DemoFusionConfig(scale=8.0), steps=1)
    with Meter() as meter:
        decode_latents(pipe, torch.randn(1, 4, 64, 64), (8, 8))
    need = needs(pipe, plan)
    assert need.decoding < meter.peak < need.decoding + 2.5 * need.picture


def test_a_decoder_of_unknown_layout_is_run_whole(monkeypatch):
    pipe = tiny_pipeline("sd15")
    latents = torch.randn(1, 4, 26, 40)
    whole = np.asarray(decode_latents(pipe, latents, (40, 40))[0])
    monkeypatch.setattr("lib_demofusion.decode.tile_for", lambda *args: 24)

    def unknown(network):
        raise ValueError("neither layout")

    monkeypatch.setattr("lib_demofusion.decode.resamplers", unknown)
    assert np.array_equal(np.asarray(decode_latents(pipe, latents, (8, 8))[0]), whole)
    assert needs(pipe, plan_for(pipe, DemoFusionConfig(scale=4.0), steps=1)).decoding > 0


def test_an_autoencoder_that_draws_noise_is_refused():
    def change(pipe):
        del pipe.vae.decoder
        pipe.vae.decoder_unet = pipe.unet

    refused(change, "an? AutoencoderKL cannot be used as the autoencoder")


# --- what the pipeline does to its pictures


def test_the_safety_checker_sees_every_picture_as_in_the_pipelines_own_call():
    pipe, seen = tiny_pipeline("sd15"), []

    class Features:
        def __call__(self, images, return_tensors):
            seen.extend(image.size for image in images)
            return Batch(pixel_values=torch.zeros(1, 3, 8, 8))

    class Batch(dict):
        __getattr__ = dict.__getitem__

        def to(self, device):
            return self

    def checker(images, clip_input):
        return np.zeros_like(images), [True]

    result = generate(pipe, "red", config=SMALL, steps=2)
    passed = result.images()[0]
    pipe.feature_extractor, pipe.safety_checker = Features(), checker
    with pytest.warns(UserWarning, match="safety checker did not let a picture pass"):
        assert result.images()[0].getextrema() == ((0, 0),) * 3
    assert seen == [(96, 96)]
    pipe.safety_checker = lambda images, clip_input: (images, False)  # how people switch it off
    assert result.images()[0].tobytes() == passed.tobytes()


def test_the_watermark_is_put_on_as_in_the_pipelines_own_call():
    pipe = tiny_pipeline("sdxl")

    class Mark:
        def apply_watermark(self, images):
            return images.flip(-1)

    plain = base_result(pipe, steps=2).images()[0]
    pipe.watermark = Mark()
    ours = np.asarray(base_result(pipe, steps=2).images()[0], dtype=float)
    assert abs(ours - 255 * own(pipe, "np", num_inference_steps=2)[0]).max() <= 1
    assert np.array_equal(ours, np.asarray(plain)[:, ::-1])


def test_what_is_enabled_on_the_pipeline_is_in_the_base():
    pipe = tiny_pipeline("sd15")
    plain = base_result(pipe, steps=3).phases[0][1]
    pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.6)
    for stage in range(2):  # FreeU goes by Stable Diffusion's own widths, the tiny UNet has others
        pipe.unet.up_blocks[stage].resnets[0].register_forward_hook(lambda module, args, output: 1.1 * output)
    ours = base_result(pipe, steps=3).phases[0][1]
    assert_close(ours, own(pipe, num_inference_steps=3))
    assert not torch.allclose(ours, plain)


@pytest.mark.parametrize("name", ["enable_slicing", "enable_tiling"])
def test_slicing_and_tiling_of_the_autoencoder(name):
    pipe = tiny_pipeline("sd15")
    getattr(pipe.vae, name)()
    ours = np.asarray(base_result(pipe, steps=2).images()[0], dtype=float)
    assert abs(ours - 255 * own(pipe, "np", num_inference_steps=2)[0]).max() <= 1


def test_a_lora_is_in_the_base():
    pytest.importorskip("peft", reason="diffusers loads LoRAs with peft only")
    pipe = tiny_pipeline("sd15")
    plain = base_result(pipe, steps=3).phases[0][1]
    layer, torch_state = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", {}
    for side, shape in (("A", (2, 16)), ("B", (16, 2))):
        torch_state[f"{layer}.lora_{side}.weight"] = torch.randn(shape)
    pipe.load_lora_weights(torch_state, adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    ours = base_result(pipe, steps=3).phases[0][1]
    assert_close(ours, own(pipe, num_inference_steps=3))
    assert not torch.allclose(ours, plain)


# --- offloading


def sequential(pipe):
    """As enable_sequential_cpu_offload does, which asks for a GPU; to the CPU, since there may be none."""
    from accelerate import cpu_offload

    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)


def by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("offload", [sequential, by_model])
@pytest.mark.parametrize("tile", [None, 24])
def test_an_offloaded_pipeline_makes_the_same_picture(offload, tile, monkeypatch):
    config = DemoFusionConfig(scale=4.0, doubling=True, pixel_upsampling=True, view_batch_size=8)
    pipe = tiny_pipeline("sd15")
    if tile and offload is by_model:  # layer by layer our tiles are not used
        monkeypatch.setattr("lib_demofusion.decode.tile_for", lambda *args: tile)
    whole = [np.asarray(i, dtype=float) for i in generate(pipe, "red", config=config, steps=1, seed=[1, 2]).images()]
    monkeypatch.setattr("lib_demofusion.decode.tile_for", lambda *args: tile or 64)
    offload(pipe)
    for _ in range(2):  # and it stays as it was
        result = generate(pipe, "red", config=config, steps=1, seed=[1, 2])
        for a, b in zip(result.images(), whole):
            assert abs(np.asarray(a, dtype=float) - b).max() <= 2
    with pytest.raises(RuntimeError, match="offloaded"):
        needs(pipe, result.plan)


def test_offloaded_networks_get_their_inputs_on_the_device_where_they_run(monkeypatch):
    """No GPU is needed to see it: the CPU by its number is another name than where the weights lie."""
    pipe = tiny_pipeline("sd15")
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda pipe: torch.device("cpu:0")))
    devices, encode = [], pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda **given: devices.append(given["device"]) or encode(**given))
    generate(pipe, "red", config=SMALL, steps=1)
    pipe.unet._hf_hook = object()
    generate(pipe, "red", config=SMALL, steps=1)
    assert devices == [torch.device("cpu"), torch.device("cpu:0")]


# --- pipelines


def as_refiner(pipe, **config):
    unet = UNet2DConditionModel(
        **{**pipe.unet.config, "cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 8 + 16}
    )
    parts = dict(text_encoder=None, tokenizer=None, text_encoder_2=pipe.text_encoder_2, tokenizer_2=pipe.tokenizer_2)
    return StableDiffusionXLImg2ImgPipeline(
        vae=pipe.vae, unet=unet, scheduler=pipe.scheduler, add_watermarker=False, **parts, **config
    )


def without(part):
    def change(pipe):
        setattr(pipe, part, None)

    return change


def in_unet(**config):
    return lambda pipe: pipe.unet.register_to_config(**config)


def with_ip_adapter(pipe):
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def as_controlnet(pipe):
    net = diffusers.ControlNetModel.from_unet(pipe.unet)
    return diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)


def as_pix2pix(pipe):
    return diffusers.StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False)


def as_panorama(pipe):
    return diffusers.StableDiffusionPanoramaPipeline(**pipe.components, requires_safety_checker=False)


def as_dit(pipe):
    return diffusers.DDPMPipeline(unet=pipe.unet, scheduler=DDPMScheduler())


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("sdxl", lambda pipe: as_refiner(pipe, requires_aesthetics_score=True), "this is a refiner"),
        ("sdxl", as_refiner, "has no text_encoder"),
        ("sdxl", in_unet(projection_class_embeddings_input_dim=56), "takes 56 numbers beside the prompt instead of 64, as a"),
        ("sdxl", in_unet(cross_attention_dim=48), "the UNet takes 48 numbers a token, the text encoders give 32"),
        ("sd15", in_unet(cross_attention_dim=[16, 8]), "the UNet takes 8/16 numbers a token, the text encoders give 16"),
        ("sd15", in_unet(addition_embed_type="text_time"), "SDXL's UNet in a Stable Diffusion 1.x or 2.x pipeline"),
        ("sd15", in_unet(addition_embed_type="image"), "asks for more than a prompt"),
        ("sd15", in_unet(num_class_embeds=1000), "asks for more than a prompt"),
        ("sd15", in_unet(class_embed_type="timestep"), "asks for more than a prompt"),
        ("sd15", in_unet(encoder_hid_dim_type="text_image_proj"), "asks for more than a prompt"),
        ("sd15", in_unet(out_channels=8), "predicts more than noise"),
        ("sd15", in_unet(in_channels=8), "takes more than latents"),
        ("sd15", in_unet(sample_size=None), "does not say its own size; give height and width"),
        ("sd15", with_ip_adapter, r"an IP-Adapter is loaded.*pipe.unload_ip_adapter\(\)"),
        ("sd15", without("vae"), "no autoencoder"),
        ("sd15", without("unet"), "has no UNet"),
        ("sd15", without("text_encoder"), "has no text_encoder"),
        ("sd15", without("tokenizer"), "has no tokenizer"),
        ("sd15", without("scheduler"), "has no scheduler"),
        ("sdxl", without("text_encoder_2"), "has no text_encoder_2"),
        ("sd15", as_controlnet, "StableDiffusionControlNetPipeline is not supported"),
        ("sd15", as_pix2pix, "StableDiffusionInstructPix2PixPipeline is not supported"),
        ("sd15", as_panorama, "StableDiffusionPanoramaPipeline is not supported"),
        ("sd15", as_dit, "DDPMPipeline is not supported"),
        ("sd15", lambda pipe: setattr(pipe.tokenizer, "model_max_length", 10**30), "does not know that prompts have 77 tokens"),
        ("sd15", lambda pipe: "a name", "str has no UNet"),
    ],
)
def test_pipelines_that_cannot_work_are_refused(kind, change, says):
    refused(change, says, kind)


@pytest.mark.parametrize(
    ("window", "given"), [(0, dict(width=64, height=64)), (64, dict(image=Image.new("RGB", (64, 64))))], ids=["base", "image"]
)
def test_a_unet_that_does_not_say_its_size_takes_the_one_that_is_given(window, given):
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(sample_size=None)
    assert plan_for(pipe, replace(SMALL, window=window), steps=2, **given).window == (8, 8)


def test_a_sample_size_may_be_two_numbers():
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(sample_size=[8, 12])
    assert plan_for(pipe, SMALL, steps=2).window == (8, 12)


def test_pipelines_of_the_same_parts_make_the_same_picture():
    pipe = tiny_pipeline("sd15")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    a, b = (generate(p, "red", config=SMALL, steps=2).phases[-1][1] for p in (pipe, other))
    assert torch.equal(a, b)
