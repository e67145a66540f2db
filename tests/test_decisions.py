"""Where the paper is silent, or the authors' code differs from it: one test for each decision, named after it."""

import math

import pytest
import torch
import torch.nn.functional as F

from lib_demofusion import fusion as fusion_module
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion, gaussian_blur, match_moments, skip_residual_
from lib_demofusion.original import Original
from lib_demofusion.phases import make_plan, plan_from_picture, upscale
from lib_demofusion.schedule import cosine_decay, weights_at


def fusion_for(reference, noise=None, dilation=2, window=(8, 8), stride=(4, 4), **more):
    config = more.pop("config", DemoFusionConfig(scale=float(dilation)))
    noise = torch.zeros_like(reference) if noise is None else noise
    return Fusion(reference, noise, window=window, stride=stride, dilation=dilation, config=config, **more)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_blur_taps_are_the_papers_4s_minus_3(scale, monkeypatch):
    sizes = []

    def spy(x, size, std):
        sizes.append(size)
        return gaussian_blur(x, size, std)

    monkeypatch.setattr(fusion_module, "gaussian_blur", spy)
    x = torch.randn(1, 4, 8 * scale, 8 * scale)
    fusion_for(x, dilation=scale).predict(x, 500.0, lambda crops, views: crops)
    fusion_for(x, dilation=scale, blur_taps=2 * scale - 1).predict(x, 500.0, lambda crops, views: crops)
    assert sizes == [4 * scale - 3, 2 * scale - 1]


def test_blur_sigma_goes_from_sigma1_to_sigma2_which_are_free():
    config = DemoFusionConfig(blur_sigma=2.0, blur_sigma_end=0.5, alpha3=2.0)
    assert weights_at(1000, config).blur_sigma == 2.0
    assert weights_at(0, config).blur_sigma == 0.5
    assert weights_at(500, config).blur_sigma == pytest.approx(0.25 * 1.5 + 0.5)


def test_after_the_blur_moments_are_restored_per_image():
    """What the model sees of the dilated views has each image's own mean and spread, whatever its batch mates."""
    x = (
        torch.randn(2, 4, 16, 16) * torch.tensor([1.0, 9.0])[:, None, None, None]
        + torch.tensor([0.0, 5.0])[:, None, None, None]
    )
    seen = {}

    def model(crops, views):
        dilated = torch.stack([c for c, v in zip(crops.split(2), views) if v.kind == "dilated"])
        seen["std"], seen["mean"] = torch.std_mean(dilated, dim=(0, 2, 3, 4))
        return crops

    fusion_for(x, config=DemoFusionConfig(scale=2.0, view_batch_size=64)).predict(x, 900.0, model)
    torch.testing.assert_close(seen["std"], x.std(dim=(1, 2, 3)), rtol=1e-3, atol=0)
    torch.testing.assert_close(seen["mean"], x.mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_global_step_predicts_from_the_blurred_latent_and_steps_from_the_sharp_one():
    x = torch.randn(1, 4, 16, 16)
    blurred = match_moments(gaussian_blur(x, 5, weights_at(999.0, DemoFusionConfig()).blur_sigma), x)
    before = x.clone()
    got = fusion_for(x).predict(x, 999.0, lambda crops, views: crops)
    torch.testing.assert_close(got, blurred, atol=1e-4, rtol=0)  # at t = 999 the dilated views' share is all but 1
    assert torch.equal(x, before)


def test_between_phases_latents_get_the_base_latents_moments_per_image():
    base = torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 3.0])[:, None, None, None] + 1
    plan = make_plan((8, 8), 1, DemoFusionConfig(scale=3.0))
    for _, latents in upscale(plan, base, lambda phase: torch.zeros(1), lambda p, reference, n, areas: 7 * reference - 4):
        torch.testing.assert_close(latents.std(dim=(1, 2, 3)), base.std(dim=(1, 2, 3)))
        torch.testing.assert_close(latents.mean(dim=(1, 2, 3)), base.mean(dim=(1, 2, 3)))


def test_noise_over_t_is_one_noise():
    reference, noise = torch.zeros(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    fusion = fusion_for(reference, noise)
    for sigma in (14.0, 3.0, 0.5):
        x = torch.zeros_like(noise)
        fusion.skip_residual_(x, 1000.0, sigma)  # c1 = 1: x becomes the noised reference
        torch.testing.assert_close(x, sigma * noise)


def test_jitter_is_seeded_by_phase_and_noise_level_and_windows_stay_inside():
    def tops(phase, t, batch):
        x = torch.zeros(batch, 4, 32, 32)
        return [(v.top, v.left) for v in fusion_for(x, phase=phase, window=(16, 16), stride=(8, 8)).views(t)]

    assert tops(2, 500.0, 1) == tops(2, 500.0, 3)
    assert tops(2, 500.0, 1) != tops(2, 480.0, 1)
    assert tops(2, 500.0, 1) != tops(3, 500.0, 1)
    assert all(0 <= top <= 16 and 0 <= left <= 16 for top, left in tops(2, 500.0, 1))


def test_the_last_window_is_clamped():
    views = [v for v in fusion_for(torch.zeros(1, 4, 15, 13)).views(1.0) if v.kind == "local"]
    assert max(v.top for v in views) == 7
    assert max(v.left for v in views) == 5


def test_schedule_weights_come_from_t():
    config = DemoFusionConfig()
    d = cosine_decay(300)
    assert d == pytest.approx((1 + math.cos(math.pi * 0.7)) / 2)
    weights = weights_at(300, config)
    assert weights.c2 == pytest.approx(d)
    assert weights.blur_sigma == pytest.approx(d * 0.99 + 0.01)
    assert weights_at(300, config) == weights  # however often it is asked


@pytest.mark.parametrize(("scale", "size", "dilation"), [(1.5, (15, 9), 2), (2.5, (25, 15), 3), (3.0, (30, 18), 3)])
def test_sizes_may_be_fractional_and_are_padded_by_edges_not_zeros(scale, size, dilation):
    config = DemoFusionConfig(scale=scale, view_batch_size=64)
    phase = make_plan((10, 6), 1, config).phases[-1]
    assert (phase.size, phase.dilation) == (size, dilation)
    x = torch.full((1, 4, *size), 5.0) + 0.01 * torch.randn(1, 4, *size)
    smallest = []

    def model(crops, views):
        smallest.append(float(torch.stack([c for c, v in zip(crops, views) if v.kind == "dilated"]).min()))
        return crops

    # A narrow filter: what the blur itself does at the border is another matter.
    narrow = DemoFusionConfig(scale=scale, view_batch_size=64, blur_sigma=0.01)
    fusion = fusion_for(x, dilation=dilation, window=(10, 6), stride=(5, 3), config=narrow)
    assert fusion.predict(x, 500.0, model).shape == x.shape
    assert smallest[0] > 4.9


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("c1", [0.05, 0.3, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("signal", [1.0, 0.4])
def test_samplers_that_add_fresh_noise_keep_the_states_noise_level(rho, c1, signal):
    """The noise in x has correlation rho with the phase's noise; what x shows differs from the reference."""
    g = torch.Generator().manual_seed(1)
    reference, shown, noise, fresh = torch.randn(4, 2, 4, 64, 64, generator=g)
    reference, shown = (F.avg_pool2d(z, 5, 1, 2) * 5 for z in (reference, shown))
    sigma = 3.0
    x = signal * shown + sigma * (rho * noise + math.sqrt(1 - rho**2) * fresh)
    skip_residual_(x, reference, noise, c1, sigma, signal, fresh_noise=True)
    kept = (x - signal * (c1 * reference + (1 - c1) * shown)) / sigma
    assert kept.std(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.02)
    if rho == 0 and c1 == 0.5:  # and Eq. 4 as it stands would not have done it
        x = signal * shown + sigma * fresh
        skip_residual_(x, reference, noise, c1, sigma, signal)
        assert float(((x - signal * (c1 * reference + (1 - c1) * shown)) / sigma).std()) == pytest.approx(0.71, abs=0.02)


def test_held_areas_leave_the_noise_level_of_the_rest_alone():
    """A sampler's fresh noise in one half, the phase's own in the other, which is held."""
    reference, noise, fresh = torch.randn(3, 1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    held = torch.zeros(1, 1, 64, 64)
    held[..., :32] = 1
    c1 = held.clamp_min(0.5)
    x = reference + 3 * fresh.where(held == 0, noise)
    skip_residual_(x, reference, noise, c1, 3.0, fresh_noise=True)
    kept = (x - reference) / 3
    torch.testing.assert_close(kept[..., :32], noise[..., :32])
    assert float(kept[..., 32:].std()) == pytest.approx(1, abs=0.02)


def test_samplers_that_add_fresh_noise_get_the_denoised_images_fused():
    """A model for which all is noise leaves nothing of x, though the dilated views have seen it blurred."""
    x = 3 * torch.randn(1, 4, 16, 16)
    for fresh_noise in (True, False):
        fusion = fusion_for(x, fresh_noise=fresh_noise)
        denoised = x - 3 * fusion.predict(x, 700.0, lambda crops, views: crops / 3, 3.0)
        assert (float(denoised.std()) < 1e-5) == fresh_noise


def test_real_images_start_at_the_second_phase():
    plan = make_plan((16, 16), 50, DemoFusionConfig(scale=2.0), from_image=True)
    assert [phase.evaluations for phase in plan.phases] == [0, 50 * 13]


def test_a_real_image_is_seen_in_windows_of_the_models_size_and_begins_as_itself_in_the_first_phase_that_is_larger():
    plan = plan_from_picture((1024, 1536), 64, 1, DemoFusionConfig(scale=2.0, doubling=True))
    assert (plan.window, [phase.scale for phase in plan.phases]) == ((52, 77), [1, 4, 192 * 2 / 77])
    begun = []

    def denoise(phase, reference, noise, areas):
        begun.append(float(reference.mean()))
        return torch.randn(reference.shape)

    original = Original(lambda size: torch.full((1, 4, *size), 7.0))
    list(upscale(plan, torch.randn(1, 4, 52, 77), lambda phase: torch.zeros(1), denoise, original=original))
    assert begun == pytest.approx([7.0, 0.0], abs=0.1)
