"""Checkpoints for the diffusers host: which can be loaded, which pipelines can be used, and why not the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lib_demofusion.config import first_line

EMBEDDED_CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoint"

PIPELINES = tuple(f"StableDiffusion{family}{task}Pipeline" for family in ("", "XL") for task in ("", "Img2Img", "Inpaint"))
# A component's weights as diffusers and transformers name them; a variant is fp16, for one.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.-]+))?(?:-\d+-of-\d+)?(?:\.(?P<last>[^.]+))?"
    r"\.(?:safetensors|bin)"
)
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
# What a single file is, by names in it, where it is no checkpoint.
OTHER_FILES = (
    (
        r"lora_|.*\.(lora_(up|down|A|B)|lora\.(up|down)|lokr_|hada_)",
        "it is a LoRA; load its checkpoint, then this into it",
    ),
    (r"emb_params$|string_to_param$|clip_[gl]$|<[^>]*>$", "it is a textual inversion; load a checkpoint, then this into it"),
    (r"control_model\.|controlnet_|input_hint_block\.|zero_convs\.", "it is a ControlNet; it needs a whole checkpoint"),
    (r"ip_adapter\.|image_proj\.", "it is an IP-Adapter; it needs a whole checkpoint"),
    (
        r"(model\.diffusion_model\.)?(double_blocks|single_blocks|joint_blocks|transformer_blocks)\.",
        "it is of a family without UNet; use a Stable Diffusion 1.x, 2.x or XL checkpoint",
    ),
    (r"text_model\.|text_projection", "it is a text encoder alone; use a whole checkpoint"),
    (r"(down_blocks|up_blocks|mid_block)\.", "it is a UNet in diffusers' names; give the folder that it belongs to"),
)
AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "first_stage_model.", "loss.", "model_ema.")
UNET = "model.diffusion_model."
PLAIN = "use a text-to-image one, which takes a mask too"
# The names of exceptions, of whatever package, that mean that there is no connection.
OFFLINE = ("Connect", "Timeout", "Offline", "LocalEntryNotFound", "Proxy", "gaierror", "MaxRetry")


def load_pipeline(model: str | Path = EMBEDDED_CHECKPOINT, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from a diffusers folder, a single .safetensors or .ckpt file, or a hub name; loading is diffusers' own.

    A folder whose weights are there in half precision alone, as .fp16.safetensors, is loaded from these. Raises ValueError,
    one line, if there is nothing to load, if it is no checkpoint that can be used, or if the device is not there.
    """
    _check_device(device)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be one of torch's floating-point types, got {dtype!r}")
    path = check_place(model, "checkpoint")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(f"{model} is not a diffusers folder: it has no model_index.json")
    try:
        pipe = _load_file(path, dtype) if path.is_file() else _load_folder(path if path.is_dir() else str(model), dtype)
        check_parts(pipe)
    except Exception as error:  # a broken file surfaces as nearly any type
        why = None if path.is_dir() else offline(error, path.is_file())
        why = why or first_line(error)
        raise ValueError(f"{model} cannot be loaded: {why}") from error
    pipe.set_progress_bar_config(disable=True)
    if str(device) == "cpu":
        pipe.unet.to(memory_format=torch.channels_last)  # 1.2 to 1.4 times as fast there
    return pipe.to(device)


def check_place(model: Any, what: str) -> Path:
    """Where a model lies; a path that does not exist may be a hub name. Raises ValueError, one line, if it cannot be one."""
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise ValueError(f"the model must be a folder, a file or a hub name, got {model!r}")
    path = Path(model)
    far = not path.is_absolute() and not str(model).startswith(".") and len(path.parts) == 2
    single = path.suffix.lower() in (".safetensors", ".ckpt") and not path.is_dir()
    if single and not path.is_file() or not path.exists() and not far:
        raise ValueError(f"no such {what}: {model}")
    return path


def default_device() -> str:
    """The fastest device that is here."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def device_of(pipe: Any, network: Any) -> torch.device:
    """Where a network computes, which is not where it lies if it is offloaded."""
    return torch.device(pipe._execution_device) if offloaded(network) else network.device  # it has no public name


def offloaded(network: Any) -> bool:
    """Whether accelerate or diffusers moves it, or its layers, to where they compute and back."""
    return any(hasattr(module, hook) for module in network.modules() for hook in ("_hf_hook", "_diffusers_hook"))


def _check_device(device: str) -> None:
    try:
        if torch.zeros(1, device=torch.device(device)).device.type != "meta":
            return
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device {device or repr(device)} is not available here; {default_device()} is") from error
    raise ValueError(f"nothing can be computed on device meta; {default_device()} is available here")


def offline(error: BaseException | None, file: bool) -> str | None:
    """What to do about an error that comes from a missing connection; None if it does not."""
    while error is not None:
        text = str(error)
        if any(name in type(error).__name__ for name in OFFLINE) or "offline" in text or "couldn't connect" in text:
            if file:
                return (
                    "a single file needs its kind's configuration from huggingface.co, which cannot be reached; "
                    "load it once with a connection, or give a diffusers folder"
                )
            return "it is not on this machine, and huggingface.co cannot be reached; load it once with a connection"
        error = error.__cause__ or error.__context__
    return None


def _load_folder(model: Path | str, dtype: torch.dtype) -> Any:
    """The pipeline in a diffusers folder (a Path), or of a hub name (a str)."""
    import diffusers

    if isinstance(model, str):
        try:
            return diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
        except (OSError, ValueError):
            with suppress(Exception):  # it may be there in half precision alone
                return diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype, variant="fp16")
            raise
    components = _components(model)
    variant = variant_of_all(components)
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(model), torch_dtype=dtype, variant=variant)
    for name in ("text_encoder", "text_encoder_2"):
        if name in components and (encoder := getattr(pipe, name, None)) is not None:
            _check_read(encoder, [model / name / file for file in components[name] if _variant_of(file) == variant])
    return pipe


def _components(folder: Path) -> dict[str, list[str]]:
    """The files of weights of each component that a diffusers folder names. Raises ValueError for one that lacks them."""
    import diffusers

    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its model_index.json is broken ({first_line(error)})") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise ValueError("its model_index.json names no pipeline")
    if name not in PIPELINES and hasattr(diffusers, name):
        raise ValueError(_not_usable(name))
    components = {}
    for name, kind in index.items():
        absent = not isinstance(kind, list) or len(kind) != 2 or kind[1] is None  # null, or a setting
        if absent or name.startswith("_") or name in WITHOUT_WEIGHTS:
            continue
        part = folder / name
        components[name] = sorted(p.name for p in part.glob("*") if WEIGHTS.fullmatch(p.name)) if part.is_dir() else []
        if not components[name]:
            raise ValueError(f"it has no weights for its {name}, such as {name}/*.safetensors")
        for file in components[name]:
            check_weights_file(part / file, f"{name}/{file}: ")
    return components


def _variant_of(file: str) -> str | None:
    match = WEIGHTS.fullmatch(file)
    return match["variant"] or match["last"]


def variant_of_all(components: Mapping[str, list[str]]) -> str | None:
    """The variant that is to be loaded: none, unless a component has its weights in one alone."""
    variants = {name: set(map(_variant_of, files)) for name, files in components.items()}
    needed = [found for found in variants.values() if None not in found]
    if not needed:
        return None
    common = set.intersection(*needed)
    if not common:
        names = ", ".join(f"{name} {'/'.join(sorted(map(str, found)))}" for name, found in variants.items())
        raise ValueError(f"its components have their weights in different variants: {names}")
    return "fp16" if "fp16" in common else min(common)


def _check_read(encoder: torch.nn.Module, files: list[Path]) -> None:
    """Raises ValueError if a text encoder has not the weights of its files.

    transformers renamed them in version 5; an older one does not find those that a newer one saved, and goes on with random
    numbers. Norms and biases are enough to tell.
    """
    from safetensors import safe_open

    own = {name: value for name, value in encoder.state_dict().items() if value.ndim == 1 and value.is_floating_point()}
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                value = next((v for n, v in own.items() if n == key or n.endswith(f".{key}") or key.endswith(f".{n}")), None)
                if value is None or torch.allclose(file.get_tensor(key).float(), value.cpu().float(), rtol=0.02, atol=1e-3):
                    continue
                version = json.loads((path.parent / "config.json").read_text(encoding="utf-8")).get("transformers_version")
                raise ValueError(
                    f"this transformers does not read the weights of its {path.parent.name}; "
                    f"transformers {version} saved them: install that or a newer one"
                )


def _load_file(path: Path, dtype: torch.dtype) -> Any:
    """The pipeline in a single file."""
    import diffusers

    check_weights_file(path)
    shapes = shapes_in(path)
    _check_kind(shapes)
    family = "XL" if any(key.startswith("conditioner.embedders.") for key in shapes) else ""
    kind = getattr(diffusers, f"StableDiffusion{family}Pipeline")
    with small_suffix(path) as named:
        return kind.from_single_file(str(named), torch_dtype=dtype)


@contextmanager
def small_suffix(path: Path) -> Iterator[Path]:
    """The file under a name that ends in small letters, by which diffusers tells what it is."""
    if path.suffix == path.suffix.lower():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / f"{path.stem}{path.suffix.lower()}"
        try:
            named.symlink_to(path.resolve())
        except OSError:  # not allowed to everybody on Windows
            shutil.copyfile(path, named)
        yield named


def check_weights_file(path: Path, name: str = "") -> None:
    """Raises ValueError, which begins with name, for a file of weights that is none by its first bytes or its suffix."""
    with path.open("rb") as file:
        head = file.read(64)
    text = head.lstrip().lower()
    suffix = path.suffix.lower()
    safetensors = head[8:9] == b"{"  # behind the size of its names, which may begin as a pickled one does
    pickled = head.startswith((b"PK\x03\x04", b"\x80")) and not safetensors
    if not head:
        raise ValueError(f"{name}it is empty")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{name}it is a web page; download the checkpoint again")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name}it only stands for a file that git lfs keeps; run git lfs pull")
    if head.startswith(b"GGUF") or suffix == ".gguf":
        raise ValueError(f"{name}it is a GGUF file, which holds one network; use a whole .safetensors checkpoint")
    if suffix == ".safetensors" and pickled:
        raise ValueError(f"{name}it is a pickled checkpoint by another name; rename it to .ckpt")
    if suffix == ".ckpt" and safetensors:
        raise ValueError(f"{name}it holds safetensors by another name; rename it to .safetensors")
    if suffix not in (".safetensors", ".ckpt", ".bin"):
        raise ValueError(f"{name}a checkpoint in one file is a .safetensors or .ckpt file")


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a file. Raises ValueError, in one line, if it cannot be read."""
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, it is no dict
        except SafetensorError as error:
            raise ValueError(f"it is no whole .safetensors file; download it again ({first_line(error)})") from error
    try:
        tensors = torch.load(str(path), map_location="cpu", weights_only=True, mmap=_zipped(path))
    except Exception as error:
        raise ValueError(
            f"it is broken, or holds more than tensors, which could run anything; use a .safetensors ({first_line(error)})"
        ) from error
    while isinstance(tensors, Mapping) and "state_dict" in tensors:
        tensors = tensors["state_dict"]
    if not isinstance(tensors, Mapping):
        raise ValueError(f"it holds a {type(tensors).__name__} instead of named tensors")
    return {str(key): tuple(getattr(value, "shape", ())) for key, value in tensors.items()}


def _zipped(path: Path) -> bool:
    """Whether torch has saved the file as it does since version 1.6."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_kind(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for tensors that are no text-to-image checkpoint of Stable Diffusion's kind."""
    if not shapes:
        raise ValueError("there is no tensor in it")
    for pattern, why in OTHER_FILES:
        if any(re.match(pattern, key) for key in shapes):
            raise ValueError(why)
    if all(key.startswith(AUTOENCODER) for key in shapes):
        raise ValueError("it is an autoencoder (VAE) alone; give the checkpoint, and set this as its pipe.vae")
    if all(key.startswith(UNET) for key in shapes):
        raise ValueError("it is a UNet alone, without text encoder and autoencoder; use a whole checkpoint")
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise ValueError("it is a refiner, which goes on from another checkpoint's images; use the base checkpoint")
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None and first[1:2] != (4,):
        raise ValueError(f"its UNet takes {first[1]} channels instead of 4 (inpainting, for one); {PLAIN}")


def _not_usable(name: str) -> str:
    return f"{name} is not supported; use a Stable Diffusion 1.x, 2.x or XL checkpoint for text to image"


def check_parts(pipe: Any) -> None:
    """Raises ValueError, one line, for a pipeline that lacks a part, has one too many, or whose parts do not fit together."""
    import diffusers

    name = type(pipe).__name__
    unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    if unet is None:
        raise ValueError(f"{name} has no UNet; use a Stable Diffusion 1.x, 2.x or XL checkpoint")
    if not isinstance(pipe, tuple(getattr(diffusers, kind) for kind in PIPELINES)):
        raise ValueError(_not_usable(name))
    if vae is None:
        raise ValueError("this pipeline has no autoencoder (VAE); load its checkpoint with it")
    xl = "XL" in next(kind for kind in PIPELINES[::-1] if isinstance(pipe, getattr(diffusers, kind)))
    if xl and pipe.config.get("requires_aesthetics_score", False):
        raise ValueError("this is a refiner, which goes on from another checkpoint's images; use the base checkpoint")
    encoders = ["text_encoder", "text_encoder_2"] if xl else ["text_encoder"]
    for part in (*encoders, *(encoder.replace("text_encoder", "tokenizer") for encoder in encoders), "scheduler"):
        if getattr(pipe, part, None) is None:
            raise ValueError(f"this pipeline has no {part}; load its checkpoint with it")
    _check_unet(unet, vae)
    _check_vae(vae, xl)
    _check_conditions(pipe, [getattr(pipe, encoder) for encoder in encoders], xl)


def check_pair(pipe: Any, phase_pipe: Any) -> None:
    """Raises ValueError, one line, unless one pipeline can go on with the other's latents, where it computes."""

    def told(pipe: Any) -> dict[str, Any]:
        unet, vae = pipe.unet.config, pipe.vae.config
        return {
            "number of latent channels": unet.in_channels,
            "number of pixels for a latent pixel": pipe.vae_scale_factor,
            "scaling_factor of the latents": vae.scaling_factor,
            "latents_mean": vae.get("latents_mean"),
            "latents_std": vae.get("latents_std"),
            "UNet's addition_embed_type": unet.addition_embed_type,
        }

    for (what, own), other in zip(told(pipe).items(), told(phase_pipe).values()):
        if own != other:
            raise ValueError(
                f"the phases' checkpoint is of another kind than the base's: its {what} is {other} instead of {own}; "
                "use one whose latents are the same (SD 1.x and 2.x, or XL)"
            )
    own, other = (device_of(each, each.unet) for each in (pipe, phase_pipe))
    if (own.type, own.index or 0) != (other.type, other.index or 0):
        raise ValueError(f"the phases' checkpoint lies on {other}, and the base's on {own}; move it there with its to()")


def _check_unet(unet: Any, vae: Any) -> None:
    config = unet.config
    if config.in_channels != vae.config.latent_channels:
        raise ValueError(f"this checkpoint's UNet takes more than latents (inpainting, for one); {PLAIN}")
    if config.out_channels != config.in_channels:
        raise ValueError("this checkpoint's UNet predicts more than noise (its variance, for one); use another checkpoint")
    if config.time_cond_proj_dim is not None:
        raise ValueError("this checkpoint has its guidance distilled into it; use it as a LoRA, or another checkpoint")
    if config.encoder_hid_dim_type == "ip_image_proj":
        raise ValueError("an IP-Adapter is loaded, which needs an image of its own; call pipe.unload_ip_adapter() first")
    more = (config.class_embed_type, config.num_class_embeds, config.encoder_hid_dim_type)
    if any(kind is not None for kind in more) or config.addition_embed_type not in (None, "text", "text_time"):
        raise ValueError("this checkpoint's UNet asks for more than a prompt (an image or a class); use a text-to-image one")


def _check_vae(vae: Any, xl: bool) -> None:
    kind, config = type(vae).__name__, vae.config
    if getattr(vae, "encoder", None) is None or getattr(vae, "decoder", None) is None or not config.get("scaling_factor"):
        raise ValueError(f"a {kind} cannot be used as the autoencoder; use an AutoencoderKL or an AutoencoderTiny")
    if config.get("shift_factor"):
        raise ValueError(
            f"this {kind} shifts its latents (shift_factor), which Stable Diffusion's pipelines do not; use another"
        )
    if not xl and (config.get("latents_mean") is not None or config.get("latents_std") is not None):
        raise ValueError(f"this {kind} moves its latents (latents_mean), which only SDXL's pipelines do; use another")


def _check_conditions(pipe: Any, encoders: list, xl: bool) -> None:
    """Do the text encoders give what the UNet takes?"""
    config = pipe.unet.config
    width = config.cross_attention_dim
    width = {width} if isinstance(width, int) else set(width)
    given = sum(encoder.config.hidden_size for encoder in encoders)
    if width != {given}:
        takes = "/".join(str(w) for w in sorted(width))
        raise ValueError(
            f"the UNet takes {takes} numbers a token, the text encoders give {given}; load parts that belong together"
        )
    if not xl and config.addition_embed_type == "text_time":
        raise ValueError("this is SDXL's UNet in a Stable Diffusion 1.x or 2.x pipeline; use StableDiffusionXLPipeline")
    if xl and config.addition_embed_type == "text_time":
        pooled = encoders[-1].config.projection_dim
        takes = config.projection_class_embeddings_input_dim
        if takes != pooled + 6 * config.addition_time_embed_dim:
            raise ValueError(
                f"the UNet takes {takes} numbers beside the prompt instead of {pooled + 6 * config.addition_time_embed_dim}, "
                "as a refiner does; use the base checkpoint"
            )
    for encoder, tokenizer in zip(encoders, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
        if tokenizer.model_max_length > encoder.config.max_position_embeddings:
            most = encoder.config.max_position_embeddings
            raise ValueError(f"the tokenizer does not know that prompts have {most} tokens at most (its model_max_length)")
