"""Two hosts make the same latents: this one, and that in OTHER_WEBUI_DIR, with its Python in OTHER_WEBUI_PYTHON."""

import os
import subprocess

import host_controls
import host_latents
import pytest
import torch
from safetensors.torch import load_file
from webui_host import ROOT

OTHER_DIR, OTHER_PYTHON = (os.environ.get(f"OTHER_WEBUI_{name}") for name in ("DIR", "PYTHON"))

pytestmark = pytest.mark.skipif(
    not (OTHER_DIR and OTHER_PYTHON),
    reason="needs OTHER_WEBUI_DIR, the folder of another host, and OTHER_WEBUI_PYTHON, its Python, to compare with",
)


@pytest.fixture(scope="module")
def others(request, checkpoints, tmp_path_factory):
    """What the other host makes of the jobs that are to be compared."""
    items = [item for item in request.session.items if item.module is request.module]
    folder = tmp_path_factory.mktemp("another host")
    (folder / "data").mkdir()
    out = folder / "latents.safetensors"
    given = map(str, (ROOT / "tests" / "webui" / "host_latents.py", checkpoints, folder / "data", out))
    names = [item.callspec.params["name"] for item in items]
    run = subprocess.run(
        [OTHER_PYTHON, *given, *names], env={**os.environ, "WEBUI_DIR": OTHER_DIR}, capture_output=True, text=True, cwd=folder
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return load_file(out)


def apart(x, y):
    """By how much latents differ, of their spread: the root of the mean square."""
    return ((x - y).square().mean().sqrt() / y.std()).item()


def shaken(base):
    """A base as another rounding could have made it."""
    return base + 1e-5 * base.std() * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", host_latents.JOBS)
def test_the_phases_are_the_same(host, others, options, name):
    """From one base: where the hosts' own differ, this host goes on from the other's.

    Beyond 1e-4 of their spread there must be a reason, which is printed: the hosts' own bases, without anything of ours, are
    as far apart; or this host's phases come out as far apart by themselves, from a base that is rounded in another way.
    """
    sampler = host_latents.JOBS[name][2].get("sampler_name", "Euler")
    options(live_previews_enable=False)
    if "control" in host_latents.JOBS[name][2] and not (f"{name}.base" in others and host_controls.model_of(host)):
        pytest.skip(host_controls.ABSENT)
    if f"{name}.base" not in others or sampler not in {known.name for known in host.sd_samplers.all_samplers}:
        pytest.skip(f"one of the hosts has no sampler {sampler}")
    base, final = host_latents.latents_of(host, name)
    own, base = apart(base, others[f"{name}.base"]), others[f"{name}.base"]
    if own:
        _, final = host_latents.latents_of(host, name, base)
    difference = apart(final, others[f"{name}.final"])
    line = f"{name}: the hosts' own bases differ by {own:.1e} of their std, the phases by {difference:.1e}"
    if difference >= 1e-4 and own < difference / 4:
        alone = apart(host_latents.latents_of(host, name, shaken(base))[1], final)
        print(f"{line}; this host's from a base that is 1e-5 off by {alone:.1e}")
        assert difference < alone
    else:
        print(line)
