"""The fused prediction, blur, moments and skip residual, with drawn shapes and toy models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Cancelled, Fusion, gaussian_blur, hann_weights, match_moments, pad_edges, skip_residual_
from lib_demofusion.memory import Meter, OutOfMemory
from lib_demofusion.schedule import cosine_decay, hold_at, weights_at

torch.manual_seed(0)
WEIGHT = torch.randn(4, 4, 3, 3) / 6


def toy(crops, views):
    """A model that looks at its neighbours and knows where its window's border is."""
    return torch.tanh(conv2d(crops, WEIGHT, padding=1))


def fusion_for(x, window=(8, 6), dilation=2, stride=(4, 3), **settings):
    cancelled = settings.pop("cancelled", None)
    config = DemoFusionConfig(scale=float(dilation), **settings)
    return Fusion(x, torch.zeros_like(x), window=window, stride=stride, dilation=dilation, config=config, cancelled=cancelled)


@st.composite
def cases(draw):
    """(x, window, dilation, stride) where size is any up to dilation * window."""
    window = draw(st.integers(3, 10)), draw(st.integers(3, 10))
    dilation = draw(st.integers(2, 4))
    size = tuple(draw(st.integers((dilation - 1) * w + 1, dilation * w)) for w in window)
    stride = tuple(draw(st.integers(1, w)) for w in window)
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return x, window, dilation, stride


@settings(max_examples=40)
@given(cases(), st.floats(1, 999), st.integers(1, 7))
def test_the_view_batch_size_changes_nothing(case, t, size):
    x, window, dilation, stride = case
    want = fusion_for(x, window, dilation, stride, view_batch_size=4096).predict(x, t, toy)
    got = fusion_for(x, window, dilation, stride, view_batch_size=size).predict(x, t, toy)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("since", [1, 2, 3])
@pytest.mark.parametrize("most", [7, 3, 1, 0])
def test_running_out_of_memory_changes_nothing(most, since):
    """From the since-th call on, more than `most` views are too many; 13 views in calls of 5, 5 and 3."""
    x, calls = torch.randn(2, 4, 16, 12), []

    def model(crops, views):
        calls.append(len(views))
        if len(views) > most and len(calls) >= since:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return toy(crops, views)

    fusion = fusion_for(x, view_batch_size=5)
    if most == 0:
        with pytest.raises(OutOfMemory):
            fusion.predict(x, 500.0, model)
        assert calls[-1] == 1
    else:
        torch.testing.assert_close(fusion.predict(x, 500.0, model), fusion_for(x).predict(x, 500.0, toy), atol=1e-5, rtol=0)
        assert (len(calls) > 3) == (most < [5, 5, 3][since - 1])


@settings(max_examples=40)
@given(cases(), st.floats(1, 999))
def test_a_batch_of_n_equals_n_singles(case, t):
    x, window, dilation, stride = case
    together = fusion_for(x, window, dilation, stride).predict(x, t, toy)
    for i in range(len(x)):
        alone = fusion_for(x[i : i + 1], window, dilation, stride).predict(x[i : i + 1], t, toy)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


@settings(max_examples=40)
@given(cases(), st.floats(1, 999))
def test_a_transposed_input_gives_the_transposed_prediction(case, t):
    x, window, dilation, stride = case

    def flipped_toy(crops, views):
        return toy(crops.mT, views).mT

    want = fusion_for(x, window, dilation, stride, jitter=False).predict(x, t, toy)
    turned = x.mT.contiguous()
    got = fusion_for(turned, window[::-1], dilation, stride[::-1], jitter=False).predict(turned, t, flipped_toy)
    torch.testing.assert_close(got.mT, want, atol=1e-5, rtol=0)


def test_local_windows_and_dilated_views_share_batches():
    x = torch.randn(3, 4, 16, 12)
    seen = []

    def model(crops, views):
        seen.append((len(crops), [view.kind for view in views]))
        return toy(crops, views)

    fusion_for(x, view_batch_size=5).predict(x, 500.0, model)
    assert [rows for rows, _ in seen] == [15, 15, 9]
    assert [kind for _, kinds in seen for kind in kinds] == ["local"] * 9 + ["dilated"] * 4
    assert seen[1][1] == ["local"] * 4 + ["dilated"]


def test_the_prediction_is_eq_5():
    """A model that answers 1 for local windows and 2 for dilated views shows the weights."""
    x = torch.randn(1, 4, 16, 12)

    def model(crops, views):
        return torch.stack([torch.full(crops.shape[1:], 1.0 if v.kind == "local" else 2.0) for v in views])

    for t in (1.0, 250.0, 700.0, 999.0):
        c2 = weights_at(t, DemoFusionConfig()).c2
        got = fusion_for(x).predict(x, t, model)
        torch.testing.assert_close(got, torch.full_like(x, c2 * 2 + (1 - c2) * 1))


def test_a_cancelled_prediction_stops_before_the_next_model_call():
    x, calls = torch.randn(1, 4, 16, 12), []

    def model(crops, views):
        calls.append(len(views))
        return crops

    fusion = fusion_for(x, view_batch_size=2, cancelled=lambda: len(calls) == 3)
    with pytest.raises(Cancelled):
        fusion.predict(x, 500.0, model)
    assert calls == [2, 2, 2]


def test_the_prediction_keeps_the_dtype_and_leaves_x_alone():
    x = torch.randn(1, 4, 16, 12, dtype=torch.bfloat16)
    before = x.clone()
    assert fusion_for(x).predict(x, 500.0, lambda crops, views: crops).dtype == torch.bfloat16
    assert torch.equal(x, before)


def test_cosine_decay_falls_from_one_to_zero():
    assert cosine_decay(1000) == 1
    assert cosine_decay(0) == 0
    assert cosine_decay(500) == pytest.approx(0.5)
    values = [cosine_decay(t) for t in range(0, 1001, 10)]
    assert values == sorted(values)


def test_extra_memory_is_a_handful_of_latents_however_many_views_there_are():
    handfuls = []
    for dilation in (2, 6):  # 13 and 157 views
        x = torch.randn(1, 4, 16 * dilation, 16 * dilation)
        fusion = fusion_for(x, (16, 16), dilation, (8, 8), view_batch_size=1)
        with Meter() as memory:
            fusion.predict(x, 500.0, lambda crops, views: crops)
        handfuls.append(memory.peak / x.untyped_storage().nbytes())
    assert handfuls[1] <= handfuls[0] <= 12
    assert handfuls[1] > 1  # it did measure something


def test_blur_is_a_normalised_gaussian():
    x = torch.zeros(1, 2, 15, 15)
    x[:, :, 7, 7] = 1
    blurred = gaussian_blur(x, 5, 1.0)
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), torch.ones(1, 2))
    assert float(blurred[0, 0, 7, 8] / blurred[0, 0, 7, 7]) == pytest.approx(math.exp(-0.5))
    assert float(blurred[0, 0, 7, 10]) == 0
    torch.testing.assert_close(gaussian_blur(x, 5, 0.01), x)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 6), st.integers(0, 6))
def test_padding_repeats_the_edges_and_says_where_the_latent_is(h, w, more_h, more_w):
    x = torch.randn(1, 1, h, w)
    grown, (top, left) = pad_edges(x, (h + more_h, w + more_w))
    assert grown.shape[-2:] == (h + more_h, w + more_w)
    assert torch.equal(grown[..., top : top + h, left : left + w], x)
    assert grown[0, 0, 0, 0] == x[0, 0, 0, 0]
    assert grown[0, 0, -1, -1] == x[0, 0, -1, -1]


def test_matched_moments_are_those_of_the_other():
    x, like = torch.randn(3, 4, 8, 8) * 5 + 2, torch.randn(3, 4, 6, 6) * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
    got = match_moments(x, like)
    torch.testing.assert_close(got.std(dim=(1, 2, 3)), like.std(dim=(1, 2, 3)))
    torch.testing.assert_close(got.mean(dim=(1, 2, 3)), like.mean(dim=(1, 2, 3)))


def test_the_skip_residual_is_eq_4_and_in_place():
    x, reference, noise = torch.randn(3, 1, 4, 8, 8)
    want = 0.3 * (reference + 2.5 * noise) + 0.7 * x
    got = skip_residual_(x, reference, noise, 0.3, 2.5)
    assert got is x
    torch.testing.assert_close(x, want)


def test_where_the_reference_is_held_the_skip_residual_is_at_least_that():
    x, reference, noise = torch.randn(3, 1, 4, 8, 8)
    held = torch.rand(1, 1, 8, 8)
    config = DemoFusionConfig(scale=2.0, hold_steps=0)
    fusion = Fusion(reference, noise, window=(4, 4), stride=(2, 2), dilation=2, config=config, held=held)
    c1 = hold_at(600.0, None, config)
    assert (held < c1).any()
    assert (held > c1).any()
    weight = held.where(held > c1, c1)
    want = weight * (reference + 2.5 * noise) + (1 - weight) * x
    torch.testing.assert_close(fusion.skip_residual_(x, 600.0, 2.5), want)


@settings(max_examples=40)
@given(cases())
def test_feathered_windows_that_agree_give_what_they_agree_on(case):
    x, window, dilation, stride = case
    prediction = fusion_for(x, window, dilation, stride, feather=True).predict(x, 1.0, lambda crops, views: crops + 3)
    torch.testing.assert_close(prediction, x + 3, atol=1e-3, rtol=0)  # what is left of the dilated views at t = 1


@pytest.mark.parametrize("feather", [False, True])
def test_feathered_windows_that_differ_pass_into_each_other(feather):
    """Each window answers with its column; between two neighbours the step is then spread over what they share."""
    x = torch.zeros(1, 4, 8, 28)
    fusion = fusion_for(x, window=(8, 12), dilation=3, stride=(8, 8), feather=feather, jitter=False)

    def columns(crops, views):
        return torch.stack([torch.full((4, 8, 12), float(view.left if view.kind == "local" else 0)) for view in views])

    row = fusion.predict(x, 0.0, columns)[0, 0, 4]
    steps = row.diff()
    assert row[0] == 0
    assert row[-1] == 16
    assert (steps >= 0).all()
    assert steps[7] < 0.5 if feather else steps[7] == 4, "where the second window begins"


def test_feather_weights_are_hanns():
    weights = hann_weights((8, 4))
    assert weights.shape == (8, 4)
    torch.testing.assert_close(weights, weights.flip(0, 1))
    halves = weights[:4] + weights[4:]  # at half a window's stride they sum to one
    torch.testing.assert_close(halves[:, :2] + halves[:, 2:], torch.ones(4, 2))
    assert weights.min() > 0
