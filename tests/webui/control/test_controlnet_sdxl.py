"""The same with SDXL: its own control models, and size ids that each view has for itself, in the ControlNet too."""

import control_host
import control_models
import pytest
import test_control_models
import test_controlled_views
import torch
from webui_host import same_but_for_rounding

host = control_host.host
types = test_control_models.types
shown = test_controlled_views.shown
controlled = test_controlled_views.controlled

KINDS = list(control_models.XL_MODELS)


@pytest.fixture(scope="module", autouse=True)
def sdxl(host):
    with control_host.sdxl(host):
        yield


def test_the_relative_is_sane(host):
    assert host.shared.sd_model.is_sdxl
    test_control_models.assert_sane(host, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_model_of_this_kind(kind, host, types):
    test_control_models.test_a_control_model_of_this_kind(kind, host, types)


@pytest.mark.parametrize("kind", ["controlnet", "t2i_adapter", "lllite"])
def test_the_hint_lies_where_the_view_does(host, shown, kind):
    test_controlled_views.test_the_hint_lies_where_the_view_does(host, shown, kind, "batch")


@pytest.fixture(scope="module")
def uncontrolled(host, sdxl):
    return host.latents(True, 2, {"phase_steps": 2}, batch_size=2, steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_any_view_batch_makes_the_same_picture(host, uncontrolled, kind):
    one, four, every = (
        controlled(host, kind, True, 2, {"phase_steps": 2, "view_batch_size": size}, batch_size=2, steps=2)
        for size in (1, 4, 0)
    )
    assert same_but_for_rounding(one, four)
    assert same_but_for_rounding(one, every)
    assert (one - uncontrolled).std() > 0.05


@pytest.fixture
def vectors(host, monkeypatch):
    """(the y's that the UNet gets, those that ControlNets get) of every call."""
    from scripts.cldm import ControlNet

    whole, controls, forward = [], [], ControlNet.forward

    def look(self, x, hint, timesteps, context, y=None, **more):
        controls.append(y.clone())
        return forward(self, x, hint, timesteps, context, y=y, **more)

    monkeypatch.setattr(ControlNet, "forward", look)
    label = host.shared.sd_model.model.diffusion_model.label_emb
    handle = label.register_forward_pre_hook(lambda module, args: whole.append(args[0].clone()))
    yield whole, controls
    handle.remove()


def sizes(host, view, size):
    """What the end of y says of a view: the phase's size, where in it the view lies, and the size again, in pixels."""
    embedder = host.shared.sd_model.conditioner.embedders[-1]
    corner = (view.top, view.left) if view.kind == "local" else (0, 0)
    numbers = 8 * torch.tensor([[*size, *corner, *size]])
    return embedder(numbers.float()).flatten()


@pytest.mark.parametrize("more", ["", "revision"])
def test_the_controlnet_gets_the_sizes_that_the_unet_gets(host, shown, vectors, more):
    """Row by row, each view's own; what comes before them is the prompt's, and the same for every view, or ReVision's."""
    whole, controls = vectors
    units = control_host.units(more, control_host.ramp(64, 64)) if more else []
    settings = {"steps": 3, "batch_size": 2, "negative_prompt": "one blue disc"}  # the host makes that of none zero
    controlled(host, "controlnet", True, 2, {"phase_steps": 3, "view_batch_size": 5}, more=units, **settings)
    assert len(shown) > 3
    assert len(whole) == len(controls) == 3 + len(shown)
    assert all(torch.equal(one, other) for one, other in zip(whole, controls))
    pooled = control_models.XL_POOLED
    first = whole[0][:, :pooled]
    corners = set()
    for (views, rows, _, size, _), y in zip(shown, whole[3:]):
        for view, part in zip(views, y.split(rows), strict=True):
            expected = sizes(host, view, size)
            assert torch.allclose(part[:, pooled:], expected.expand(rows, -1), atol=1e-4)
            assert torch.equal(part[:, :pooled], first)
            corners.add((view.kind, view.top, view.left))
    assert len(corners) > 9
    assert (first == 0).all(1).tolist() == ([False, False, True, True] if more else [False] * 4)


@pytest.mark.parametrize("seed", range(4))
def test_all_of_the_extension_is_as_it_was(host, monkeypatch, seed):
    monkeypatch.setattr(test_controlled_views, "KINDS", KINDS[:-1])  # ReVision has no model to look at
    test_controlled_views.test_all_of_the_extension_is_as_it_was(host, monkeypatch, seed)
