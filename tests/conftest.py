import platform
from importlib.metadata import version

import hypothesis

VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def pytest_terminal_summary(terminalreporter):
    """What the tests ran on."""
    packages = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    terminalreporter.write_line(f"Python {platform.python_version()}, {packages}")


# Examples are drawn from a fixed seed, so that a run fails or passes twice alike; a timing is never a failure.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("default")
