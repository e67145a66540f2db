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
        reason = "needs the WebUI: WEBUI_DIR=... make test-webui"
        for item in items:
            if HERE in item.path.parents:
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
