"""Tests on the real WebUI: `WEBUI_DIR=... make test-webui` runs them with its own Python; without it they are skipped.

The host is started once, with the embedded checkpoint exported into a folder of the tests' own.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import webui_host  # noqa: E402


def pytest_collection_modifyitems(items):
    if not webui_host.WEBUI_DIR:
        _skip(items, HERE, "needs the WebUI: WEBUI_DIR=... make test-webui")
    elif webui_host.IS_FORGE:
        _skip(items, HERE / "control", "Forge has a ControlNet of its own instead of the extension: test_forge.py")


def _skip(items, folder, reason):
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with the embedded checkpoint in the host's format, and with relatives of it for other kinds of model."""
    folder = tmp_path_factory.mktemp("models")
    webui_host.export_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def host(checkpoints, tmp_path_factory):
    return webui_host.start(checkpoints, tmp_path_factory.mktemp("a host's data"))  # spaces, as user folders have them


@pytest.fixture(autouse=True)
def known_sampler(request):
    """A test of a sampler that the host lacks is skipped: each has some that others have not; and one has another UniPC."""
    sampler = getattr(request.node, "callspec", SimpleNamespace(params={})).params.get("sampler")
    if sampler and sampler not in {known.name for known in request.getfixturevalue("host").sd_samplers.all_samplers}:
        pytest.skip(f"this host has no sampler {sampler}")
    if sampler == "UniPC" and "UniPC" not in request.getfixturevalue("host").webui.samplers.SAMPLERS:
        pytest.skip("this host's UniPC is another one, which is refused")


@pytest.fixture
def options(host):
    """Settings of the host, put back after the test: options(name=value)."""
    before = dict(host.shared.opts.data)

    def set_them(**values):
        host.shared.opts.data.update(values)

    yield set_them
    host.shared.opts.data.clear()
    host.shared.opts.data.update(before)


@pytest.fixture
def calls(host):
    """Counts what the host's UNet sees: calls.rows latents in calls.calls calls."""
    seen = SimpleNamespace(rows=0, calls=0)

    def count(module, args):
        seen.rows += len(args[0])
        seen.calls += 1

    handle = host.unet.register_forward_pre_hook(count)
    yield seen
    handle.remove()


@pytest.fixture
def checkpoint(host):
    """Switch to another checkpoint for a test: checkpoint(name)."""
    yield host.load
    host.load("demofusion-embedded.safetensors")
