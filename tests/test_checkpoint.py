"""The embedded checkpoint: small, whole, and good enough that the method's effects show in it."""

import numpy as np
import pytest
import torch
from PIL import ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_demofusion.areas import areas_of
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Fusion
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, generate, load_pipeline
from lib_demofusion.phases import enlarge_latents
from training.scenes import Scene, count_objects, object_mask, render, shrink, vocabulary
from training.train import RECIPES, name_as_published, unet_stage


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_it_is_at_most_10_mb_of_half_precision_safetensors():
    files = [path for path in EMBEDDED_CHECKPOINT.rglob("*") if path.is_file()]
    files = [
        path for path in files if path.relative_to(EMBEDDED_CHECKPOINT).parts[0] not in ("controlnet", "lcm_lora.safetensors")
    ]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).dtype in (torch.float16, torch.int64) for key in file.keys())  # noqa: SIM118


def test_every_weight_in_its_files_is_read_by_this_version_and_no_other_is_made_up(pipe):
    """transformers 4 and 5 name a text encoder's weights otherwise, and a name that is not known is a random weight."""
    for part in ("text_encoder", "unet", "vae"):
        [path] = (EMBEDDED_CHECKPOINT / part).glob("*.safetensors")
        kept = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
        used = {name.removeprefix("text_model."): value for name, value in getattr(pipe, part).state_dict().items()}
        used.pop("embeddings.position_ids", None)  # a count, which some versions keep
        assert used.keys() == kept.keys()
        assert all(torch.equal(value, kept[name].float()) for name, value in used.items())


def test_its_text_encoder_has_the_names_that_all_versions_read(tmp_path):
    [path] = (EMBEDDED_CHECKPOINT / "text_encoder").glob("*.safetensors")
    weights = load_file(path)
    assert all(name.startswith("text_model.") for name in weights)
    newer = tmp_path / "model.safetensors"
    save_file({name.removeprefix("text_model."): value for name, value in weights.items()}, newer)
    name_as_published(newer)
    again = load_file(newer)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_it_is_of_its_recipe_and_the_second_one_of_another(pipe):
    first, second = RECIPES["embedded"], RECIPES["second"]
    assert tuple(pipe.unet.config.block_out_channels) == first.channels
    for index in range(3):
        scene, rng = second.scene_at(index)
        assert first.scene_at(index)[0] != scene
        whole = second.scene_crops(index)[0]
        assert np.array_equal(whole, shrink(render(scene, rng, "row"), 4).round().astype(np.uint8))
    for recipe in (first, second):
        steps = sum(stage[0] for stage in recipe.stages)
        assert not unet_stage(recipe, 0)[1]
        assert unet_stage(recipe, steps - 1)[1], "close-ups reach high noise in the end"
        with pytest.raises(IndexError):
            unet_stage(recipe, steps)


def test_every_word_of_its_captions_is_one_token(pipe):
    words = (EMBEDDED_CHECKPOINT / "vocabulary.txt").read_text().split()
    assert words == vocabulary()
    assert {len(pipe.tokenizer(word).input_ids) for word in words} == {3}


def test_its_latents_have_unit_spread(pipe):
    rng = np.random.default_rng(0)
    scenes = np.stack([shrink(render(Scene.draw(rng), rng), 4) for _ in range(16)])
    pixels = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert 0.7 < float(latents.std()) < 1.4


def test_at_1x_it_draws_as_many_as_the_prompt_says(pipe):
    """More often than not, on scenes that were not chosen; python -m training.evaluate counts more of them."""
    rng = np.random.default_rng(5)
    scenes = [Scene.draw(rng) for _ in range(16)]
    generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
    prompts = [scene.caption for scene in scenes]
    images = pipe(prompts, num_inference_steps=20, generator=generators, output_type="np").images
    right = sum(count_objects((image * 255).astype(np.uint8), scene) == scene.count for image, scene in zip(images, scenes))
    assert right >= 9


def detail(image):
    """Mean difference between neighbouring pixels after all that is coarser than 2 pixels is taken away."""
    grey = image.convert("L")
    return float(np.abs(np.asarray(grey, np.float32) - np.asarray(grey.filter(ImageFilter.GaussianBlur(2)), np.float32)).mean())


def test_demofusion_keeps_the_layout_and_adds_detail_where_direct_sampling_repeats_objects(pipe):
    scene, seed, steps = Scene(1, "red", "striped", "disc", "snow"), 2, 6
    result = generate(pipe, scene.caption, config=DemoFusionConfig(scale=4.0), seed=seed, steps=steps)
    base, large = result.images(0)[0], result.images()[0]
    generator = torch.Generator().manual_seed(seed)
    direct = pipe(scene.caption, height=512, width=512, num_inference_steps=steps, generator=generator).images[0]

    masks = [object_mask(np.asarray(image), scene) for image in (base, large)]
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > 0.6
    assert count_objects(np.asarray(base), scene) == 1
    assert count_objects(np.asarray(direct), scene) > 3
    assert detail(large) > 1.5 * detail(base.resize(large.size))


@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
def test_flat_areas_are_held_and_the_rest_is_drawn(pipe, sampler, monkeypatch):
    held, predict = [], Fusion.predict
    monkeypatch.setattr(Fusion, "predict", lambda self, *args: held.append(self.held) or predict(self, *args))
    off = {}
    for contrast in (0.0, 6.0):
        config = DemoFusionConfig(scale=2.0, hold_flat=contrast)
        result = generate(pipe, "one red striped disc on night", config=config, seed=2, steps=12, sampler=sampler)
        base, latents = (latents for _, latents in result.phases)
        off[contrast] = (latents - enlarge_latents(base, (32, 32))).square().mean(1)[0].sqrt()
    assert held[0] is None
    image = torch.from_numpy(np.array(result.images(0)[0])).permute(2, 0, 1)[None] / 127.5 - 1
    want = areas_of(image, config).at((32, 32)).held
    assert (held[-1] - want).abs().max() < 0.2, "but for the whole numbers of the picture"
    flat, drawn = want[0, 0] > 0.5, want[0, 0] == 0
    assert min(flat.sum(), drawn.sum()) > 50
    assert off[6.0][flat].mean() < 0.6 * off[0.0][flat].mean()
    assert off[6.0][drawn].mean() > 0.85 * off[0.0][drawn].mean()


def test_few_steps_give_the_picture_of_many(pipe):
    """The paper's formula, once a step, loses it: the less steps, the less it holds."""
    images = {}
    for steps, hold in [(20, 50), (8, 50), (8, 0)]:
        config = DemoFusionConfig(scale=2.0, phase_steps=steps, hold_steps=hold)
        result = generate(pipe, "one purple dotted heart on night", config=config, seed=3, steps=12)
        images[steps, hold] = np.asarray(result.images()[0], float)
    off = [np.sqrt(np.square(images[8, hold] - images[20, 50]).mean()) for hold in (50, 0)]
    assert off[0] < 0.4 * off[1]
