import faulthandler
import platform
from importlib.metadata import version

import hypothesis
import pytest

pytest.register_assert_rewrite("webui_fixtures")

from webui_fixtures import at_call, calls, host, loaded  # noqa: E402, F401

VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def pytest_terminal_summary(terminalreporter):
    """What the tests ran on."""
    packages = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    terminalreporter.write_line(f"Python {platform.python_version()}, {packages}")


def pytest_unconfigure():
    """A thread that never ends must not keep the run from ending: it is shown, and the run fails."""
    faulthandler.dump_traceback_later(60, exit=True)


# Examples are drawn from a fixed seed, so that a run fails or passes twice alike; a timing is never a failure.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("default")
