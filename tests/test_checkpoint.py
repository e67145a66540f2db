"""The embedded checkpoint: small, whole, and good enough that the method's effects show in it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, generate, load_pipeline
from training.scenes import Scene, count_objects, vocabulary


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_it_is_at_most_10_mb_of_half_precision_safetensors():
    files = [path for path in EMBEDDED_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).dtype in (torch.float16, torch.int64) for key in file.keys())  # noqa: SIM118


def test_every_word_of_its_captions_is_one_token(pipe):
    words = (EMBEDDED_CHECKPOINT / "vocabulary.txt").read_text().split()
    assert words == vocabulary()
    assert {len(pipe.tokenizer(word).input_ids) for word in words} == {3}


def test_its_latents_have_unit_spread(pipe):
    rng = np.random.default_rng(0)
    from training.scenes import render, shrink

    scenes = np.stack([shrink(render(Scene.draw(rng), rng), 4) for _ in range(16)])
    pixels = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert 0.7 < float(latents.std()) < 1.4
