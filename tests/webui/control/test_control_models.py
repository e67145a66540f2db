"""The tiny control models do what the extension's real ones do, without DemoFusion: it knows them, and they change pictures."""

import control_host
import control_models
import numpy as np
import pytest
import torch
from PIL import ImageOps

host = control_host.host


def difference(one, other):
    return np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean()


@pytest.fixture
def types(host):
    """What the extension calls the models of the units while the host samples."""
    seen = []

    def look(module, args):
        network = control_host.script(host).latest_network
        seen.append(network and [param.control_model_type.name for param in network.control_params])

    handle = host.shared.sd_model.model.diffusion_model.register_forward_pre_hook(look)
    yield seen
    handle.remove()


def assert_sane(host, blocks):
    """It has as many blocks each way as the extension can hook, and its latents are no wilder than a trained model's."""
    unet = host.shared.sd_model.model.diffusion_model
    assert (len(unet.input_blocks), len(unet.output_blocks)) == (blocks, blocks)
    for steps in (4, 10):
        latents = host.latents(steps=steps, width=128, height=128)
        assert torch.isfinite(latents).all()
        assert 0.3 < latents.std() < 3
    one, other = (host.generate(prompt=prompt).images[0] for prompt in ("two red rings", "one blue disc"))
    assert difference(one, other) > 1


def test_the_relative_is_sane(host):
    assert_sane(host, 12)


@pytest.mark.parametrize("kind", control_models.MODELS)
def test_a_control_model_of_this_kind(kind, host, types):
    plain = host.generate().images[0]
    assert set(types) == {None}
    types.clear()
    picture = control_host.ramp(64, 64)

    def controlled(image=picture, **fields):
        return host.generate(alwayson_scripts=control_host.scripts(control_host.units(kind, image, **fields))).images

    images = controlled()
    assert types
    assert all(names and names[-1] == control_host.CONTROL_TYPES[kind] for names in types)
    assert len(images) == 1
    assert difference(images[0], plain) > 2
    assert controlled()[0].tobytes() == images[0].tobytes()
    if kind == "ip_adapter":
        other = controlled(ipadapter_input=control_models.ip_adapter_input(1))
    else:
        other = controlled(ImageOps.invert(picture))
    if kind == "style_adapter":
        assert other[0].tobytes() == images[0].tobytes()
    else:
        assert difference(other[0], images[0]) > 1
    assert host.generate().images[0].tobytes() == plain.tobytes(), "something of the extension stayed behind"
