"""The extension on the host and the command on diffusers give the same latents."""

import pytest
from command import assert_same

LATE = {"denoising_strength": 0.6, "stride": 0.75, "feather": True}
FLAT = {"hold_flat": 10.0}
UNGUIDED = {"unguided_flat": 20.0}


@pytest.mark.parametrize(
    ("scale", "h", "w", "settings"),
    [(2, 16, 16, {}), (3, 16, 16, {}), (2, 16, 24, {}), (2, 16, 24, LATE), (2, 16, 16, FLAT), (2, 16, 24, UNGUIDED)],
)
def test_same_latents_as_the_command(host, options, monkeypatch, tmp_path, scale, h, w, settings):
    assert_same(host, options, monkeypatch, tmp_path, scale, h, w, settings)
