"""How much of a phase's time the WebUI extension spends outside the host's UNet: `WEBUI_DIR=... make bench-webui`.

The UNet is random and large enough that its time is an honest yardstick. The host's own share, in the base image, stands
beside it: it holds what the host does around each of its calls.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "webui"))

import pytest
import relatives
import webui_host

STEPS, SIDE, SCALE = 3, 256, 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, data = Path(folder) / "models", Path(folder) / "data"
        checkpoints.mkdir()
        data.mkdir()
        webui_host.export_checkpoints(checkpoints)
        host = webui_host.start(checkpoints, data)
        parameters = relatives.make_large(checkpoints)
        unet, clock, rows = host.load("large.safetensors").model.diffusion_model, [0.0, 0.0], []
        unet.register_forward_pre_hook(lambda *_: clock.__setitem__(0, time.perf_counter()))
        unet.register_forward_hook(lambda *_: clock.__setitem__(1, clock[1] + time.perf_counter() - clock[0]))

        def timed(function, label):
            def run(*args, **kwargs):
                clock[1], start = 0.0, time.perf_counter()
                result = function(*args, **kwargs)
                rows.append((label(*args), time.perf_counter() - start, clock[1]))
                return result

            return run

        with pytest.MonkeyPatch.context() as patch:
            phases, base = host.webui.phases.Phases, host.processing.StableDiffusionProcessingTxt2Img
            patch.setattr(phases, "denoise", timed(phases.denoise, lambda self, phase, *_: f"phase {phase.number}"))
            patch.setattr(base, "sample", timed(base.sample, lambda *_: "base"))
            host.generate(True, SCALE, steps=STEPS, width=SIDE, height=SIDE)
            rows.clear()
            host.generate(True, SCALE, steps=STEPS, width=SIDE, height=SIDE)
    print(f"\nUNet of {parameters / 1e6:.0f} M parameters, base {SIDE}x{SIDE}, {STEPS} steps, view batch size 4")
    for label, total, inside in rows:
        print(f"{label:8}  {total:7.2f} s  outside the UNet {100 * (total - inside) / total:5.2f} %")


if __name__ == "__main__":
    main()
