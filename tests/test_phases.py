"""The plan, as a value, and the loop over the phases."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import checkered

from lib_demofusion.areas import Areas
from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.original import Original
from lib_demofusion.phases import (
    FITTING,
    LARGEST,
    Pace,
    clock_time,
    enlarge,
    enlarge_latents,
    enlarged_size,
    make_plan,
    phase_scales,
    plan_from_picture,
    resize_target,
    upscale,
    window_for,
)


@pytest.mark.parametrize(("scale", "evaluations"), [(2, 700), (3, 2400), (4, 5650)])
def test_the_papers_setting_takes_as_many_evaluations_as_the_paper_says(scale, evaluations):
    plan = make_plan((128, 128), 50, DemoFusionConfig(scale=float(scale)), branches=(1, 1))
    assert plan.evaluations == evaluations
    assert [phase.views for phase in plan.phases[1:]] == [13, 34, 65][: scale - 1]
    assert make_plan((128, 128), 50, DemoFusionConfig(scale=float(scale))).evaluations == 2 * evaluations
    assert plan.stride == (64, 64)


@pytest.mark.parametrize(
    ("scale", "scales"), [(2, [2]), (4, [2, 3, 4]), (2.5, [2, 2.5]), (1.5, [1.5]), (8, [2, 3, 4, 5, 6, 7, 8])]
)
def test_phases_go_up_by_one_and_end_at_the_scale(scale, scales):
    assert phase_scales(scale) == scales


@pytest.mark.parametrize(
    ("scale", "scales"), [(2, [2]), (3, [2, 3]), (4, [2, 4]), (2.5, [2, 2.5]), (1.5, [1.5]), (8, [2, 4, 8]), (7.5, [2, 4, 7.5])]
)
def test_phases_may_double(scale, scales):
    assert phase_scales(scale, doubling=True) == scales


@pytest.mark.parametrize(
    ("window", "share", "stride"),
    [((16, 24), 0.75, (12, 18)), ((10, 10), 0.7, (7, 7)), ((9, 5), 0.5, (4, 2)), ((3, 1), 0.1, (1, 1))],
)
def test_the_stride_is_a_share_of_the_window(window, share, stride):
    assert make_plan(window, 1, DemoFusionConfig(stride=share)).stride == stride


@pytest.mark.parametrize(("steps", "strength", "run"), [(50, 0.6, 30), (20, 0.4, 8), (5, 0.5, 2), (1, 0.1, 1), (7, 1, 7)])
def test_a_phase_may_be_entered_late(steps, strength, run):
    config = DemoFusionConfig(denoising_strength=strength, phase_steps=steps)
    base, *phases = make_plan((16, 16), 9, config).phases
    assert (base.steps, base.skipped, base.calls) == (9, 0, 9)
    assert [(p.steps, p.skipped, p.calls) for p in phases] == [(steps, steps - run, run)] * 3


def test_the_plan_prints_as_a_table():
    table = make_plan((16, 24), 10, DemoFusionConfig(scale=2.5)).table().splitlines()
    assert [line.split() for line in table] == [
        ["phase", "image", "steps", "views", "a", "step", "model", "calls"],
        ["1", "192x128", "10", "1", "20"],
        ["2", "384x256", "10", "9", "+", "4", "260"],
        ["3", "480x320", "10", "16", "+", "9", "500"],
        ["all", "780"],
    ]
    assert len({len(line) for line in table}) == 1


def test_phases_can_have_steps_of_their_own():
    plan = make_plan((16, 16), 30, DemoFusionConfig(scale=2.0, phase_steps=10), calls=lambda steps, skipped: 2 * steps - 1)
    assert [(p.steps, p.calls) for p in plan.phases] == [(30, 59), (10, 19)]


@pytest.mark.parametrize(
    ("window", "steps", "settings", "says"),
    [
        ((16, 16), 0, {}, "steps must be at least 1"),
        ((4, 4), 10, {"scale": 1.05}, "scale 1.05 adds no latent pixel to a base of 4x4"),
        ((4, 4), 10, {"scale": 1.05, "resize_width": 34}, "the size to resize to adds no latent pixel to a base of 4x4"),
        ((0, 4), 10, {}, "at least one latent pixel"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_in_one_line(window, steps, settings, says):
    with pytest.raises(ValueError, match=says):
        make_plan(window, steps, DemoFusionConfig(**settings))


def run(plan, base, config, model=lambda crops, views: crops * 0.1, sigmas=(8.0, 2.0, 0.5, 0.0)):
    """The whole loop with Euler and a model; the noise is seeded by the phase."""
    seen = []

    def noise(phase):
        return torch.randn(1, 4, *phase.size, generator=torch.Generator().manual_seed(phase.number)).expand(
            len(base), -1, -1, -1
        )

    def denoise(phase, reference, n, areas):
        fusion = Fusion(
            reference, n, window=plan.window, stride=plan.stride, dilation=phase.dilation, config=config, phase=phase.number
        )
        x = fusion.noised_reference(sigmas[0])
        for sigma, following in zip(sigmas, sigmas[1:]):
            t = 1000 * sigma / sigmas[0]
            fusion.skip_residual_(x, t, sigma)

            def counted(crops, views):
                seen.append(len(crops) // len(base))
                return model(crops, views)

            x = x + (following - sigma) * fusion.predict(x, t, counted)
        return x

    return list(upscale(plan, base, noise, denoise)), sum(seen)


@given(st.integers(2, 12), st.integers(2, 12), st.floats(1.2, 4.5), st.integers(0, 5))
def test_any_size_and_scale_gives_the_plans_sizes_and_evaluations(h, w, scale, view_batch_size):
    config = DemoFusionConfig(scale=scale, view_batch_size=view_batch_size)
    if (round(h * scale), round(w * scale)) == (h * int(scale), w * int(scale)) and scale != int(scale):
        return  # refused: see above
    plan = make_plan((h, w), 3, config, branches=(1, 1), from_image=True)
    done, evaluations = run(plan, torch.randn(1, 4, h, w), config)
    assert [latents.shape[-2:] for _, latents in done] == [phase.size for phase in plan.phases[1:]]
    assert done[-1][1].shape[-2:] == (round(h * scale), round(w * scale))
    assert len(done) + 1 == math.ceil(scale) == len(plan.phases)
    assert evaluations == plan.evaluations


def test_the_same_input_gives_the_same_picture_twice():
    config, base = DemoFusionConfig(scale=3.0), torch.randn(2, 4, 8, 8)
    plan = make_plan((8, 8), 3, config)
    first, second = (run(plan, base, config)[0] for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second))


def test_what_is_finished_stays_when_a_later_phase_fails():
    plan = make_plan((8, 8), 3, DemoFusionConfig(scale=3.0))

    def denoise(phase, reference, noise, areas):
        if phase.number == 3:
            raise RuntimeError("out of memory")
        return reference

    phases = upscale(plan, torch.randn(1, 4, 8, 8), lambda phase: torch.zeros(1), denoise)
    phase, latents = next(phases)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(phases)
    assert (phase.number, tuple(latents.shape)) == (2, (1, 4, 16, 16))


def test_images_are_made_only_where_the_settings_ask_for_them():
    latents, called = torch.randn(2, 4, 12, 12), []

    def decode(z):
        called.append("decode")
        return checkered(24)

    def encode(image):
        called.append("encode")
        return image.mean(1, keepdim=True).expand(1, 4, *image.shape[2:])[..., ::8, ::8]

    for settings, calls in (
        ({}, []),
        ({"hold_flat": 6.0}, ["decode"]),
        ({"unguided_flat": 6.0}, ["decode"]),
        ({"pixel_upsampling": True}, ["decode", "encode"]),
        ({"pixel_upsampling": True, "hold_flat": 6.0, "unguided_flat": 12.0}, ["decode", "encode"]),
    ):
        called.clear()
        reference, areas = enlarge(latents, (18, 24), DemoFusionConfig(scale=2.0, **settings), decode, encode)
        assert called == 2 * calls
        assert reference.shape == (2, 4, 18, 24)
        assert torch.equal(reference, enlarge_latents(latents, (18, 24))) == ("pixel_upsampling" not in settings)
        for area, name in zip(areas, ("hold_flat", "unguided_flat")):
            if name not in settings:
                assert area is None
                continue
            assert area.shape == (2, 1, 18, 24)
            assert area[..., 9, 12].max() == 0
            assert area[..., 0, 0].min() > 0.9


@pytest.mark.parametrize("size", [(24, 36), (48, 30), (13, 17), (16, 36)])
@pytest.mark.parametrize("settings", [{}, {"pixel_upsampling": True, "hold_flat": 20.0, "unguided_flat": 9.0}])
def test_an_image_that_tiles_is_enlarged_as_one(size, settings):
    """Where it begins makes no difference, also to what is held and to what the autoencoder sees at its borders."""
    latents, config = torch.randn(2, 4, 12, 18), DemoFusionConfig(scale=2.0, **settings)

    def decode(z):
        z = F.avg_pool2d(z, 3, stride=1, padding=1)
        return F.interpolate(z[:, :3], scale_factor=8, mode="bicubic", align_corners=False).clamp(-1, 1)

    def encode(image):
        return F.avg_pool2d(F.pad(image, (0, 0, 0, 0, 0, 1)), 8)

    def enlarged(z):
        reference, areas = enlarge(z, size, config, decode, encode, tiling=True)
        return [x for x in (reference, *areas) if x is not None]

    here, plain = enlarged(latents), enlarge(latents, size, config, decode, encode)[0]
    steps = [12 // math.gcd(12, size[0]), 18 // math.gcd(18, size[1])]
    there = enlarged(latents.roll(steps, (-2, -1)))
    assert [x.shape[-2:] for x in here] == [size] * (3 if settings else 1)
    for x, moved in zip(here, there):
        by = [step * side // of for step, side, of in zip(steps, size, (12, 18))]
        torch.testing.assert_close(moved, x.roll(by, (-2, -1)), atol=1e-5, rtol=0)
    assert not torch.allclose(here[0][..., 0, :], plain[..., 0, :], atol=1e-2)


def test_each_phase_gets_the_areas_of_the_one_before():
    seen = []
    plan = make_plan((8, 8), 3, DemoFusionConfig(scale=3.0))

    def denoise(phase, reference, noise, areas):
        seen.append(areas.held)
        return reference

    def enlarged(latents, size):
        return torch.zeros(1, 4, *size), Areas(torch.full((1, 1, *size), float(latents.shape[-1])))

    list(upscale(plan, torch.randn(1, 4, 8, 8), lambda phase: torch.zeros(1), denoise, enlarge=enlarged))
    assert [(tuple(held.shape), float(held.mean())) for held in seen] == [((1, 1, 16, 16), 8), ((1, 1, 24, 24), 16)]


def test_the_pace_foresees_the_phases_from_the_one_before():
    """Base: four calls, of which the first warms up and takes 100 s, the rest 2 s each; phase 2: 3 s for each of its views."""
    plan, clock = make_plan((8, 8), 4, DemoFusionConfig(scale=3.0)), [0.0]
    pace = Pace(plan, now=lambda: clock[0])
    assert (pace.seconds(2), pace.to_come(1)) == (None, None)
    for seconds in (100, 2, 2, 2):
        clock[0] += seconds
        pace.count(1, 1)
    assert [pace.seconds(number) for number in (1, 2, 3)] == [2 * 4, 2 * 4 * 13, 2 * 4 * 34]
    assert pace.to_come(1) == "to come: about 6:16 (phase 2 1:44, phase 3 4:32)"
    for seconds, views in ((50, 4), (12, 4), (12, 4), (3, 1)):
        clock[0] += seconds
        pace.count(2, views)
    assert pace.seconds(3) == 3 * 4 * 34
    assert pace.to_come(2) == "to come: about 6:48"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (59.7, "1:00"), (8105, "2:15:05")])
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text


# ------------------------------------------------------------------------------------------------- a picture that is given


def planned(picture, side, scale=2.0, steps=1, **settings):
    final = settings.pop("final", None)
    return plan_from_picture(picture, side, steps, DemoFusionConfig(scale=scale, **settings), final=final)


@pytest.mark.parametrize(
    ("picture", "side", "settings", "window", "scales", "last"),
    [
        ((1280, 1920), 128, {}, (107, 160), [2, 3], (320, 480)),
        ((1280, 1920), 64, {"doubling": True}, (54, 80), [4, 6], (320, 480)),
        ((3000, 4000), 128, {"doubling": True}, (108, 143), [4, 1000 / 143], (750, 1000)),
        ((512, 512), 128, {"scale": 4.0}, (128, 128), [2], (256, 256)),
        ((1280, 1920), 16, {}, (14, 20), list(range(13, 25)), (320, 480)),
    ],
)
def test_a_given_picture_is_made_in_windows_of_the_models_size(picture, side, settings, window, scales, last):
    """Of latent pixels; 1280x856, 640x432, 1144x864 and 1024x1024 pixels, and of the embedded checkpoint 160x112."""
    plan = planned(picture, side, **settings)
    base, *phases = plan.phases
    assert (plan.window, base.size, base.evaluations, plan.from_picture) == (window, window, 0, True)
    assert [phase.scale for phase in phases] == pytest.approx(scales)
    assert phases[-1].size == last
    assert [phase.dilation for phase in phases] == [math.ceil(scale) for scale in scales]
    assert [phase.number for phase in plan.phases] == list(range(1, len(scales) + 2))


def test_the_window_can_be_asked_for():
    assert planned((1280, 1920), 64, window=1024) == planned((1280, 1920), 128)
    assert planned((1280, 1920), 0, window=1024) == planned((1280, 1920), 128)


def test_a_given_pictures_plan_prints_without_it():
    plan = planned((128, 192), 16, scale=3.0, steps=10)
    assert [line.split() for line in plan.table().splitlines()] == [
        ["phase", "image", "steps", "views", "a", "step", "model", "calls"],
        ["2", "288x192", "10", "9", "+", "4", "260"],
        ["3", "432x288", "10", "25", "+", "9", "680"],
        ["4", "576x384", "10", "49", "+", "16", "1,300"],
        ["all", "2,240"],
    ]


def planned_or_refused(*args, **settings):
    """The plan, or what is said instead."""
    try:
        return planned(*args, **settings), None
    except ValueError as error:
        return None, str(error)


PICTURES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(PICTURES, st.floats(1.001, 8), st.floats(16, 160), st.booleans())
@example((4606, 1587), 2.0, 185.398740483641, False)  # its own size, rounded, is no phase
@example((2716, 1609), 2.0, 64, True)
@example((77, 36), 1.5, 32, False)
@example((1788, 992), 7.45, 16, False)
@example((1, 1), 8.0, 16, False)
@example((205, 701), 4.9, 16, False)
def test_any_picture_is_planned_or_refused_in_one_line_that_says_what_works(picture, scale, side, doubling):
    plan, line = planned_or_refused(picture, side, scale, doubling=doubling)
    if plan is None:
        named = re.fullmatch(r".*; (?:choose a|a|scale ([\d.]+) is the) (larger|smaller|largest|smallest)[a-z ]+", line)
        assert named, line
        if named[1]:
            beyond = float(named[1]) + (0.05 if named[2] == "largest" else -0.05)
            assert planned(picture, side, float(named[1]))
            assert not 1 < beyond <= 8 or planned_or_refused(picture, side, beyond)[0] is None
        return
    window, (base, *phases) = plan.window, plan.phases
    assert phases[-1].size == enlarged_size(picture, scale)
    assert base.size == window
    assert base.evaluations == 0
    assert math.sqrt(math.prod(side - 1 for side in window)) <= FITTING[1] * side
    assert math.sqrt(math.prod(window)) >= FITTING[0] * side
    assert phases[-1].scale <= LARGEST
    for before, phase in zip(plan.phases, phases):
        assert phase.size > before.size
        assert all(a >= b for a, b in zip(phase.size, before.size))
        assert math.prod(phase.size) * 64 > math.prod(picture), "each is larger than the picture"
        assert all(length * phase.dilation >= whole for length, whole in zip(window, phase.size))
        assert all(length <= whole for length, whole in zip(window, phase.size))


@given(st.tuples(st.integers(2, 600), st.integers(2, 600)), st.floats(4, 160))
def test_a_window_has_the_aspect_and_about_the_models_size(final, side):
    window = window_for(final, side)
    whole = max(int(math.sqrt(math.prod(final)) / side + 0.5), 1)
    assert all(length <= of for length, of in zip(window, final))
    assert abs(window[0] / final[0] - window[1] / final[1]) <= 1 / min(final)
    if FITTING[0] <= math.sqrt(math.prod(final)) / side / whole <= FITTING[1]:
        assert window == tuple(math.ceil(length / whole) for length in final), "whole windows, so that nothing is padded"
    else:
        assert math.sqrt(math.prod(window)) >= min(side, math.sqrt(math.prod(final))) - 1e-6


def test_a_plan_may_end_at_any_size():
    plan = make_plan((10, 6), 1, DemoFusionConfig(), final=(37, 21))
    assert [(phase.scale, phase.size) for phase in plan.phases] == [(1, (10, 6)), (2, (20, 11)), (3, (30, 17)), (3.7, (37, 21))]
    assert [phase.number for phase in make_plan((10, 6), 1, DemoFusionConfig(), final=(37, 21), begin=220).phases] == [1, 2, 3]


@pytest.mark.parametrize(
    ("picture", "side", "settings", "says"),
    [
        ((512, 512), 128, {}, "1024x1024 is no larger than what the checkpoint draws at once; scale 2.55 is the smallest that"),
        ((64, 64), 128, {}, "128x128 is no larger than what the checkpoint draws at once; a smaller window works"),
        ((1280, 1920), 16, {"scale": 6.0}, "11520x7680 is more than 64 times .* of 128; scale 5.2 is the largest that works"),
        ((12800, 19200), 16, {}, "more than 64 times as long and wide as a window of 128; a larger window works"),
        ((1280, 1920), 64, {"final": (160, 240)}, "1920x1280 is not larger than the picture, 1920x1280; choose a larger size"),
        ((1280, 1920), 64, {"window": 4}, "a window of 4 pixels is too small; a latent pixel is 8 pixels"),
        ((0, 1920), 64, {}, "a picture of 1920x0 is too small; a latent pixel is 8 pixels"),
        ((1280, 1920), 64, {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_a_picture_that_cannot_be_enlarged_is_refused_in_one_line(picture, side, settings, says):
    with pytest.raises(ValueError, match=says) as error:
        planned(picture, side, **settings)
    assert "\n" not in str(error.value)


def loop(plan, original, finished=None, fail=None):
    """The references that the phases get, and what they yield, with a sampler that adds 1 to the reference."""
    seen = []

    def denoise(phase, reference, noise, areas):
        seen.append((phase.number, reference.clone(), areas.held))
        return reference + 1

    base = torch.randn(1, 4, *plan.window)
    return seen, list(upscale(plan, base, lambda phase: torch.zeros(1), denoise, finished, original=original))


def encoded(size):
    """A picture of which every size has latents of its own."""
    return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(size[0]))


def test_the_first_phase_begins_with_the_picture_itself_and_the_next_with_that_phase():
    plan = planned((64, 64), 8, scale=3.0)
    seen, done = loop(plan, Original(encoded))
    assert [number for number, *_ in seen] == [phase.number for phase in plan.phases[1:]] == [2, 3]
    assert torch.equal(seen[0][1], encoded(plan.phases[1].size))
    assert torch.equal(seen[1][1], enlarge_latents(done[0][1], plan.phases[2].size))
    again, rest = loop(plan, Original(encoded), finished=(2, done[0][1]))
    assert torch.equal(again[0][1], seen[1][1])
    assert len(rest) == 1


def test_around_a_mask_each_phase_keeps_the_picture_to_the_bit():
    plan = planned((64, 96), 8, scale=3.0)

    def mask(size):
        half = torch.zeros(1, 1, *size)
        half[..., : size[1] // 2] = 1
        return half

    seen, done = loop(plan, Original(encoded, mask=mask))
    for (_, reference, held), (phase, latents) in zip(seen, done):
        outside = (mask(phase.size) == 0).expand(1, 4, -1, -1)
        for x in (reference, latents):
            assert torch.equal(x[outside], encoded(phase.size)[outside])
        assert torch.equal(held, 1 - mask(phase.size))
        assert not torch.isclose(latents, encoded(phase.size))[~outside].any()


@given(
    st.tuples(st.integers(4, 24), st.integers(4, 24)),
    st.integers(1, 80),
    st.floats(1.3, 8),
    st.sampled_from([(2, 2), (1, 1), (2, 1)]),
    st.sampled_from([lambda steps, skipped: steps - skipped, lambda steps, skipped: 2 * (steps - skipped) - 1]),
    st.booleans(),
)
def test_presets_ask_the_model_in_their_order_whatever_the_steps_and_the_sampler(window, steps, scale, branches, calls, given):
    costs = []
    for name in PRESETS:
        config = DemoFusionConfig.preset(name, scale=scale)
        own = config.phase_cfg_scale
        try:
            guided = (branches[0], 1 if own == 1 else branches[1])
            costs.append(make_plan(window, steps, config, branches=guided, calls=calls, from_image=given).evaluations)
        except ValueError:  # a scale that adds no latent pixel
            return
    assert costs == sorted(costs, reverse=True)


def test_few_steps_of_the_base_are_the_presets_most():
    """Below its own steps a phase of Turbo had more than one of Fast: 406 evaluations against 926 at 8 steps and 4x."""
    fast, turbo = (DemoFusionConfig.preset(name) for name in ("Fast", "Turbo"))
    assert turbo.phase_steps_of(8) == fast.phase_steps_of(8) == 8
    assert turbo.phase_steps_of(50) == turbo.most_phase_steps == 10 < fast.phase_steps_of(50) == 50
    assert DemoFusionConfig(phase_steps=30, most_phase_steps=10).phase_steps_of(8) == 30


@pytest.mark.parametrize(
    ("own", "asked", "target"),
    [
        ((512, 512), (0, 0), None),
        ((512, 768), (0, 1536), (128, 192)),
        ((512, 768), (1024, 0), (128, 192)),
        ((512, 768), (1000, 1500), (125, 188)),
        ((1216, 832), (4384, 3000), (548, 375)),
        ((683, 1024), (0, 4096), (342, 512)),
    ],
)
def test_a_size_to_resize_to_says_the_last_phases(own, asked, target):
    config = DemoFusionConfig(resize_height=asked[0], resize_width=asked[1])
    assert resize_target(own, config) == target


@pytest.mark.parametrize(
    ("own", "asked", "line"),
    [
        ((512, 512), (1024, 1536), "1536x1024 has not the aspect of 512x512; resize to 1024x1024 or 1536x1536, or change"),
        ((512, 512), (512, 0), "512x512 is 1 times 512x512; resize to more than once and at most 8 times that"),
        ((512, 512), (5000, 0), "5000x5000 is 9.77 times 512x512; resize to more than once and at most 8 times that"),
    ],
)
def test_sizes_that_cannot_be_resized_to_are_refused(own, asked, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        resize_target(own, DemoFusionConfig(resize_height=asked[0], resize_width=asked[1]))
