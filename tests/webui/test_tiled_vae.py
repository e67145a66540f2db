"""Beside the Tiled VAE extension (multidiffusion-upscaler-for-automatic1111), installed from the folder TILED_VAE_DIR."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from webui_host import ROOT, only_on_a1111

TILED_VAE_DIR = os.environ.get("TILED_VAE_DIR")

BESIDE_TILED_VAE = """
import sys
from pathlib import Path
import numpy as np
tests, checkpoints, data = sys.argv[1:]
sys.path[:0] = [tests, str(Path(tests).parent)]
import relatives
import webui_host

host = webui_host.start(Path(checkpoints), Path(data))
host.shared.opts.data.update(live_previews_enable=False)
model = host.load(relatives.make_sdxl(Path(checkpoints)))
decoder = model.first_stage_model.decoder
own = decoder.forward
tilevae = next(script for script in host.scripts.scripts_txt2img.alwayson_scripts if script.title() == "Tiled VAE")
VAEHook = type(tilevae).process.__globals__["VAEHook"]

theirs, ours, sizes = [], [], []
tiles = host.webui.decoding.tiles
run, tiled = VAEHook.vae_tile_forward, tiles.decode
VAEHook.vae_tile_forward = lambda self, z: theirs.append(tuple(z.shape[-2:])) or run(self, z)
tiles.decode = lambda function, z, decoder, tile: ours.append(tile) or tiled(function, z, decoder, tile=tile)
tiles.tile_for = lambda network, device, base: 64

def generate(enabled):
    theirs.clear(), ours.clear()
    paper = [True, 4, 0, 1, False, False, 0.5, False]
    scripts = {"DemoFusion Upscale": {"args": paper}, "Tiled VAE": {"args": [enabled, 512, 48, True, True, True, False]}}
    reply = host.post(steps=2, width=160, height=160, alwayson_scripts=scripts)
    assert reply.status_code == 200, reply.text
    assert "decode_first_stage" not in vars(model)
    assert decoder.forward == own  # the very method; Tiled VAE leaves it as an attribute
    picture = webui_host._image(reply.json()["images"][0])
    assert picture.size == (640, 640)
    return np.asarray(picture, float)

ours_first = generate(False)
assert (theirs, ours) == ([], [64])
with_tiled_vae = generate(True)
assert (theirs, ours) == ([(80, 80)], [])
assert np.array_equal(generate(False), ours_first)
assert (theirs, ours) == ([], [64])
error = np.sqrt(np.square(with_tiled_vae - ours_first).mean()) / ours_first.std()
print(f"difference of the two pictures, in standard deviations: {error:.3f}")
assert error < 0.5
"""


@only_on_a1111("the extension takes the place of parts that Forge has not; Forge decodes in tiles by itself")
@pytest.mark.skipif(not TILED_VAE_DIR, reason="needs TILED_VAE_DIR, a folder with the Tiled VAE extension")
def test_where_tiled_vae_is_active_it_decodes(checkpoints, tmp_path):
    """In a host of its own; enabled or not, the decoder is as it was afterwards."""
    shutil.copytree(TILED_VAE_DIR, tmp_path / "data" / "extensions" / "multidiffusion")
    given = map(str, (ROOT / "tests" / "webui", checkpoints, tmp_path / "data"))
    run = subprocess.run([sys.executable, "-c", BESIDE_TILED_VAE, *given], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    print(Path(TILED_VAE_DIR).name, run.stdout.splitlines()[-1])
