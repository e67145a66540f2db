"""The skip residual as a rate: what is left of x depends on how far the schedule has gone, not in how many steps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.schedule import cosine_decay, hold_at

ALPHAS = (0.01, 0.5, 1.0, 3.0, 8.0, 20.0)


def exponent(levels, config):
    """Of what is left of x, exp(-exponent), after the steps from each of these timesteps to the next."""
    return sum(-math.log(1 - hold_at(t, since, config)) for since, t in zip(levels, levels[1:]))


def rate(t, alpha1):
    return -math.log1p(-(cosine_decay(t) ** alpha1))


@given(
    alpha1=st.sampled_from(ALPHAS),
    hold_steps=st.integers(5, 200),
    ends=st.tuples(st.floats(0, 999.9), st.floats(0, 999.9)),
    inner=st.lists(st.floats(0, 1), max_size=60),
)
def test_the_total_hold_depends_on_where_a_schedule_begins_and_ends_alone(alpha1, hold_steps, ends, inner):
    low, high = sorted(ends)
    config = DemoFusionConfig(alpha1=alpha1, hold_steps=hold_steps)
    levels = [high, *sorted((low + share * (high - low) for share in inner), reverse=True), low]
    at_once = hold_at(low, high, config)
    left = math.prod(1 - hold_at(t, since, config) for since, t in zip(levels, levels[1:]))
    assert left == pytest.approx(1 - at_once, rel=0.01, abs=1e-9)


@pytest.mark.parametrize("alpha1", ALPHAS)
def test_a_hold_is_the_integral_of_the_papers_rate(alpha1):
    config, half = DemoFusionConfig(alpha1=alpha1), 10
    for since, t in [(990, 970), (900, 880), (520, 480), (300, 30), (40, 20)]:
        middles = np.linspace(t - half, since - half, 20001)[:-1] + (since - t) / 40000
        wanted = np.mean([rate(u, alpha1) for u in middles]) * (since - t) / 20
        assert hold_at(t, since, config) == pytest.approx(-math.expm1(-wanted), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(("steps", "first"), [(50, 981), (50, 999)])
def test_at_fifty_even_steps_it_is_eq_4(steps, first):
    config, once = DemoFusionConfig(), DemoFusionConfig(hold_steps=0)
    levels = [first - 20 * i for i in range(steps)]
    for since, t in zip(levels, levels[1:]):
        assert hold_at(t, since, config) == pytest.approx(hold_at(t, since, once), abs=0.002)
    assert exponent(levels, config) == pytest.approx(exponent(levels, once), rel=0.01)


def test_hold_steps_of_none_is_the_papers_c1_whatever_the_steps():
    config = DemoFusionConfig(hold_steps=0, alpha1=2.0)
    for since in (None, 700.0, 601.0, 600.0):
        assert hold_at(600.0, since, config) == pytest.approx(cosine_decay(600.0) ** 2)


@given(alpha1=st.sampled_from((0.0, *ALPHAS)), t=st.floats(-5, 1010), since=st.none() | st.floats(-5, 1010))
def test_a_hold_is_a_share_both_ways_and_at_the_ends(alpha1, t, since):
    for config in (DemoFusionConfig(alpha1=alpha1), DemoFusionConfig(alpha1=alpha1, hold_steps=0)):
        assert 0 <= hold_at(t, since, config) <= 1
        held = hold_at(t, since, config, torch.linspace(0, 1, 11))
        assert ((held >= 0) & (held <= 1)).all()
        if since is not None and max(t, since) < 1000 and config.hold_steps:
            assert hold_at(t, since, config) == hold_at(since, t, config)


def test_what_has_not_moved_is_not_held_again_and_a_beginning_is_the_reference():
    config = DemoFusionConfig()
    assert hold_at(600.0, 600.0, config) == 0
    assert hold_at(600.0, None, config) == 1
    assert hold_at(999.0, 999.0, config, torch.ones(1)) == 0
    assert hold_at(1000.0, 1000.0, config) == 1
    assert hold_at(100.0, 120.0, config, torch.ones(1)) == 1
    assert hold_at(100.0, 120.0, DemoFusionConfig(alpha1=0.0)) == 1
    assert hold_at(999.0, 999.0, config, torch.ones(1).half()) == 0
    assert hold_at(100.0, 120.0, config, torch.ones(1).half()).dtype == torch.float16


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.sampled_from(ALPHAS), st.floats(0.01, 0.95))
def test_where_the_reference_is_held_that_is_a_rate_too(levels, alpha1, least):
    """It is c1's or the given one's, whichever is more, wherever one takes over from the other within a step."""
    config = DemoFusionConfig(alpha1=alpha1)
    levels = [999 * share for share in sorted(levels, reverse=True)]
    held = torch.full((1, 1, 2, 2), least)
    in_steps = sum(-torch.log1p(-hold_at(t, since, config, held).double()) for since, t in zip(levels, levels[1:]))
    low, high = (min(max(end - 10, 0), 1000) for end in (levels[-1], levels[0]))
    middles = low + (np.arange(4000) + 0.5) / 4000 * (high - low)
    wanted = np.mean([max(rate(u, alpha1), -math.log1p(-least)) for u in middles]) * (high - low) / 20
    left = float(torch.exp(-in_steps).mean())
    assert left == pytest.approx(math.exp(-wanted), rel=0.01, abs=1e-4)


def test_the_state_of_a_phase_is_held_since_its_last_call_or_since_the_given_level():
    x, reference, noise = torch.randn(3, 1, 4, 8, 8)
    config = DemoFusionConfig(scale=2.0)

    def share(*calls):
        fusion = Fusion(reference, noise, window=(4, 4), stride=(2, 2), dilation=2, config=config)
        for t, since in calls:
            state = x.clone()
            fusion.skip_residual_(state, t, 2.5, since=since)
        target = reference + 2.5 * noise
        return float(((state - x) / (target - x)).median())

    assert share((900.0, None)) == pytest.approx(1, abs=1e-5)
    assert share((900.0, None), (700.0, None)) == pytest.approx(hold_at(700.0, 900.0, config), abs=1e-5)
    assert share((900.0, None), (800.0, None), (700.0, 900.0)) == pytest.approx(hold_at(700.0, 900.0, config), abs=1e-5)
