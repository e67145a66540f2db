"""What load_pipeline loads, and what it refuses in one line."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT, generate, load_pipeline
from lib_demofusion.hosts.diffusers_checkpoints import check_weights_file


@pytest.fixture(scope="module")
def sdxl():
    return tiny_pipeline("sdxl")


@pytest.fixture
def folder(sdxl, tmp_path):
    sdxl.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def weights(folder):
    return sorted(path for path in folder.rglob("*.safetensors"))


def refused(model, says, **settings):
    with pytest.raises(ValueError, match=says) as error:
        load_pipeline(model, **settings)
    assert "\n" not in str(error.value)


def same_picture(a, b):
    a, b = (generate(pipe, "red", config=DemoFusionConfig(scale=1.5), steps=2).phases[-1][1] for pipe in (a, b))
    assert float((a - b).abs().max() / b.std()) < 1e-2


# --- folders


def variant(path, name):
    return path.rename(path.with_name(f"{path.stem}.{name}{path.suffix}"))


def test_a_folder_with_half_precision_alone_is_loaded(folder, sdxl):
    for path in weights(folder):
        variant(path, "fp16")
    same_picture(load_pipeline(folder), sdxl)


def test_one_component_in_half_precision_alone_is_enough(folder, sdxl):
    (path,) = weights(folder / "unet")
    variant(path, "fp16")
    same_picture(load_pipeline(folder), sdxl)


def test_plain_weights_are_preferred_and_others_not_looked_at(folder, sdxl):
    for path in weights(folder):
        other = path.with_name(f"{path.stem}.fp16{path.suffix}")
        save_file({key: torch.zeros_like(value) for key, value in load_file(path).items()}, other)
    same_picture(load_pipeline(folder), sdxl)


def test_components_of_different_variants_are_refused(folder):
    variant(weights(folder / "unet")[0], "fp16")
    variant(weights(folder / "vae")[0], "ema")
    refused(folder, "in different variants: .*unet fp16")


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def set_class(folder, name):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / UNET).unlink(), "it has no weights for its unet"),
        (lambda f: shutil.rmtree(f / "vae"), "it has no weights for its vae"),
        (lambda f: [path.unlink() for path in weights(f)], "it has no weights for its"),
        (lambda f: write(f, UNET, b""), f"{UNET}: it is empty"),
        (lambda f: write(f, UNET, LFS), f"{UNET}: .*run git lfs pull"),
        (lambda f: write(f, UNET, b"<!DOCTYPE html><html>"), f"{UNET}: it is a web page"),
        (lambda f: write(f, UNET, (f / UNET).read_bytes()[:-9]), "folder cannot be loaded: "),
        (lambda f: write(f, "unet/config.json", "{"), "folder cannot be loaded: "),
        (lambda f: (f / "unet/config.json").unlink(), "folder cannot be loaded: "),
        (lambda f: shutil.rmtree(f / "tokenizer"), "folder cannot be loaded: "),
        (lambda f: write(f, "model_index.json", "{"), "its model_index.json is broken"),
        (lambda f: write(f, "model_index.json", b"\xff\xfe\x00"), "its model_index.json is broken"),
        (lambda f: write(f, "model_index.json", "[]"), "its model_index.json names no pipeline"),
        (lambda f: write(f, "model_index.json", "{}"), "its model_index.json names no pipeline"),
        (lambda f: (f / "model_index.json").unlink(), "is not a diffusers folder: it has no model_index.json"),
        (lambda f: set_class(f, "StableDiffusion3Pipeline"), "StableDiffusion3Pipeline is not supported"),
        (lambda f: set_class(f, "FluxPipeline"), "FluxPipeline is not supported"),
        (lambda f: set_class(f, "NoSuchPipeline"), "folder cannot be loaded: "),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, says):
    damage(folder)
    refused(folder, says)


def test_text_encoders_whose_weights_were_not_read_are_refused(folder):
    """As where transformers 4 reads what 5 saved; here by names that no version has."""
    for name in ("text_encoder", "text_encoder_2"):
        (path,) = weights(folder / name)
        renamed = {f"odd.{key}": value + 0.5 for key, value in load_file(path).items()}
        save_file(renamed, path, {"format": "pt"})
    refused(folder, "folder cannot be loaded: ")


def test_weights_that_only_transformers_5_reads_are_refused_by_older_ones(tmp_path):
    """Version 5 leaves the prefix out; version 4 then goes on with random numbers."""
    path = shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "new") / "text_encoder" / "model.safetensors"
    save_file({key.removeprefix("text_model."): value for key, value in load_file(path).items()}, path, {"format": "pt"})
    if int(transformers.__version__.partition(".")[0]) >= 5:
        own, other = (load_pipeline(model).text_encoder.state_dict() for model in (EMBEDDED_CHECKPOINT, tmp_path / "new"))
        assert all(torch.equal(own[name], other[name]) for name in own)
    else:
        refused(tmp_path / "new", "this transformers does not read the weights of its text_encoder; transformers 5")


def test_the_embedded_checkpoints_text_encoder_is_read_by_every_version():
    """Names with the prefix are read by transformers 4 and 5, those without by 5 alone."""
    saved = load_file(EMBEDDED_CHECKPOINT / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in saved)
    own = load_pipeline().text_encoder.state_dict()
    for name, value in saved.items():
        found = own.get(name, own.get(name.removeprefix("text_model.")))
        assert torch.equal(found, value.float())


# --- single files


def single(tmp_path, name, keys):
    path = tmp_path / name
    save_file({key: torch.zeros(2, *shape) for key, shape in keys.items()}, path)
    return path


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CHECKPOINT = {
    FIRST: (4, 3, 3),
    "first_stage_model.encoder.x": (),
    "cond_stage_model.x": (),
}


@pytest.mark.parametrize("suffix", ["safetensors", "SAFETENSORS", "Safetensors", "ckpt", "CKPT"])
def test_a_suffix_in_capitals_is_one_too(tmp_path, monkeypatch, suffix):
    """diffusers tells by the suffix, in small letters, how to read a file."""
    got, path = [], tmp_path / f"model.{suffix}"
    tensors = {key: torch.ones(2, *shape) for key, shape in CHECKPOINT.items()}
    save_file(tensors, path) if suffix.lower() == "safetensors" else torch.save({"state_dict": tensors}, path)

    def from_single_file(file, torch_dtype):
        got.append((file, load_file(file) if suffix.lower() == "safetensors" else torch.load(file)["state_dict"]))
        return tiny_pipeline("sd15")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_single_file", from_single_file)
    load_pipeline(path)
    ((file, read),) = got
    assert file.endswith(f"model.{suffix.lower()}")
    assert read.keys() == CHECKPOINT.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": ()}, "it is a LoRA"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": ()}, "it is a LoRA"),
        ({"lora_te_text_model.hada_w1_a": ()}, "it is a LoRA"),
        ({"encoder.conv_in.weight": (), "decoder.conv_in.weight": (), "quant_conv.weight": ()}, "it is an autoencoder"),
        ({"first_stage_model.encoder.conv_in.weight": ()}, "it is an autoencoder"),
        ({"emb_params": ()}, "it is a textual inversion"),
        ({"clip_l": (), "clip_g": ()}, "it is a textual inversion"),
        ({"<token>": ()}, "it is a textual inversion"),
        ({"control_model.input_blocks.0.0.weight": ()}, "it is a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (), "down_blocks.0.x": ()}, "it is a ControlNet"),
        ({"image_proj.proj.weight": (), "ip_adapter.1.to_k_ip.weight": ()}, "it is an IP-Adapter"),
        ({"text_model.embeddings.x": ()}, "it is a text encoder"),
        ({"down_blocks.0.resnets.0.conv1.weight": ()}, "it is a UNet in diffusers' names"),
        ({FIRST: (4, 3, 3)}, "it is a UNet alone"),
        ({"model.diffusion_model.double_blocks.0.x": ()}, "a family without UNet"),
        ({"model.diffusion_model.joint_blocks.0.x": ()}, "a family without UNet"),
        ({**CHECKPOINT, "conditioner.embedders.0.model.x": ()}, "it is a refiner"),
        ({**CHECKPOINT, FIRST: (9, 3, 3)}, "takes 9 channels instead of 4"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path, keys, says):
    refused(single(tmp_path, "model.safetensors", keys), f"model.safetensors cannot be loaded: .*{says}")


class Odd:
    """What a pickle may hold besides tensors."""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.safetensors", b"", "it is empty"),
        ("a.ckpt", b"", "it is empty"),
        ("a.safetensors", b"<!DOCTYPE html>\n<html>", "it is a web page"),
        ("a.ckpt", b"\n<html><body>404", "it is a web page"),
        ("a.safetensors", LFS, "run git lfs pull"),
        ("a.safetensors", b"no tensors", "it is no whole .safetensors file"),
        ("a.safetensors", b'{"error": "not found"}' * 9, "it is no whole .safetensors file"),
        ("a.safetensors", b"PK\x03\x04" + b"\0" * 99, "rename it to .ckpt"),
        ("a.ckpt", b"\x10\0\0\0\0\0\0\0{}", "rename it to .safetensors"),
        ("a.ckpt", b"no pickle", "it is broken, or holds more than tensors"),
        ("a.gguf", b"GGUF\x03\0\0\0", "it is a GGUF file"),
        ("a.safetensors", b"GGUF\x03\0\0\0", "it is a GGUF file"),
        ("a.txt", b"text", "a checkpoint in one file is a .safetensors or .ckpt file"),
        ("a.bin", b"PK\x03\x04", "cannot be loaded: "),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_with_what_it_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{name} cannot be loaded: .*{says}" if "cannot" not in says else says)


@pytest.mark.parametrize(
    ("holds", "says"),
    [({"state_dict": {}, "odd": Odd()}, "holds more than tensors"), ([1], "it holds a list"), ({}, "no tensor in it")],
)
def test_a_pickle_that_holds_something_else_is_refused(tmp_path, holds, says):
    torch.save(holds, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", f"a.ckpt cannot be loaded: .*{says}")


def test_tensors_whose_names_take_as_many_bytes_as_a_pickle_begins_with_are_no_pickle(tmp_path):
    """One file in thirty-two begins with the byte 128."""
    for length in range(200):
        path = tmp_path / "model.safetensors"
        save_file({"x" * (length + 1): torch.zeros(1)}, path)
        if path.read_bytes()[0] == 0x80:
            break
    check_weights_file(path)
    assert path.read_bytes()[0] == 0x80


def test_a_cut_off_download_is_refused(tmp_path):
    path = single(tmp_path, "model.safetensors", CHECKPOINT)
    path.write_bytes(path.read_bytes()[:-4])
    refused(path, "it is no whole .safetensors file; download it again")


def test_a_hub_name_with_half_precision_alone_is_loaded(monkeypatch):
    asked, pipe = [], tiny_pipeline("sdxl")

    def from_pretrained(name, torch_dtype, variant=None):
        asked.append((name, variant))
        if variant is None:
            raise OSError("Error no file named diffusion_pytorch_model.bin found in directory")
        return pipe

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", from_pretrained)
    assert load_pipeline("somebody/model") is pipe
    assert asked == [("somebody/model", None), ("somebody/model", "fp16")]


class ConnectError(Exception):
    """Named as one of httpx's."""


@pytest.mark.parametrize(
    "error",
    [
        ConnectError("[Errno -2] Name or service not known"),
        OSError("We couldn't connect to 'https://huggingface.co'"),
        ConnectionError(),
    ],
)
def test_without_a_connection_the_way_out_is_told(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("Cannot send a request.\nGot: ConnectError") from cause

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_single_file", fail)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)
    refused(
        single(tmp_path, "model.safetensors", CHECKPOINT),
        "needs its kind's configuration from huggingface.co.*load it once with a connection, or give a diffusers folder",
    )
    refused("nobody/nothing", "it is not on this machine, and huggingface.co cannot be reached")


def test_offline_diffusers_itself_says_so(tmp_path):
    """HF_HUB_OFFLINE, under which the tests run; nothing is patched."""
    refused(
        "nobody/nothing", "nobody/nothing cannot be loaded: it is not on this machine, and huggingface.co cannot be reached"
    )
    path = single(tmp_path, "model.safetensors", CHECKPOINT)
    refused(path, "needs its kind's configuration from huggingface.co, which cannot be reached")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("", "must be a folder, a file or a hub name, got ''"),
        (None, "must be a folder, a file or a hub name, got None"),
        (7, "must be a folder, a file or a hub name, got 7"),
        ("./nobody/nothing", "no such checkpoint"),
        ("nothing", "no such checkpoint"),
        ("nothing.SAFETENSORS", "no such checkpoint"),
    ],
)
def test_what_names_no_checkpoint_is_refused(model, says):
    refused(model, says)


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cuda:77", "cpu:x", "warp:1", None, 3.5])
def test_devices_that_are_not_here_are_refused(device):
    refused(EMBEDDED_CHECKPOINT, "here", device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16", None])
def test_types_that_cannot_be_computed_with_are_refused(dtype):
    refused(EMBEDDED_CHECKPOINT, "dtype must be one of torch's floating-point types", dtype=dtype)


def test_a_folder_with_a_dot_in_its_name_is_a_folder(folder, sdxl):
    named = folder.rename(folder.with_name("model.safetensors"))
    same_picture(load_pipeline(str(named)), sdxl)


def test_a_pipeline_that_cannot_be_used_is_refused_when_it_is_loaded(tmp_path, sdxl):
    settings = dict(requires_aesthetics_score=True, add_watermarker=False)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**sdxl.components, **settings)
    refiner.save_pretrained(tmp_path)
    refused(tmp_path, "this is a refiner")
