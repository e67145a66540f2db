"""LoRAs on diffusers: which can be used, and how they come into a pipeline for one job and out of it again.

    generate(pipe, "two blue stars", loras=[Lora("ink.safetensors", 0.8)], phase_loras=[Lora("lcm.safetensors")])

diffusers and peft are imported only when something here is called.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from logging import CRITICAL
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from lib_demofusion.config import first_line
from lib_demofusion.files import check_file
from lib_demofusion.hosts.diffusers_arguments import short
from lib_demofusion.hosts.diffusers_checkpoints import check_weights_file, offloaded, shapes_in, small_suffix

# The half of a LoRA's layer that comes first, in the names of kohya's scripts, diffusers' and peft's.
FIRST_HALF = re.compile(r"(\.lora_down\.|[._]lora\.down\.|\.lora_A\.|\.lora_linear_layer\.down\.)")
# What a file is, by names in it, where it is no LoRA that diffusers reads.
OTHER_FILES = (
    (r".*\.(hada_w|lokr_w|oft_|boft_|glora_)", "it is a LyCORIS network that diffusers does not read; use a LoRA"),
    (r"model\.diffusion_model\.|first_stage_model\.|conditioner\.", "it is a whole checkpoint; use it as the model"),
    (r"control_model\.|controlnet_|input_hint_block\.", "it is a ControlNet"),
    (r"emb_params$|string_to_param$|clip_[gl]$|<[^>]*>$", "it is a textual inversion"),
)
LONGEST = 120  # characters of an error that are told
NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # that LoRAs change


@dataclass(frozen=True)
class Lora:
    """A LoRA: a .safetensors file, and how much it counts; below 0 it works the other way."""

    file: str | Path
    weight: float = 1.0

    @property
    def name(self) -> str:
        """As the WebUI calls it."""
        return Path(self.file).stem


def check_loras(loras: Any, name: str = "loras") -> tuple[Lora, ...]:
    """Raises ValueError, one line, for what is no list of LoRAs, or holds one that cannot be used whatever the checkpoint."""
    if not isinstance(loras, (list, tuple)) or not all(isinstance(lora, Lora) for lora in loras):
        raise ValueError(f"{name} must be a list of Lora, got {short(loras)}")
    for lora in loras:
        if not isinstance(lora.file, (str, os.PathLike)) or not str(lora.file):
            raise ValueError(f"a LoRA is a file, got {short(lora.file)}")
        weight = lora.weight
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of the LoRA {lora.file} must be a number, got {short(weight)}")
        _check_lora(Path(lora.file))
    if loras and find_spec("peft") is None:
        raise ValueError("peft is missing, which LoRAs need; pip install peft")
    return tuple(loras)


def check_different(loras: Sequence[Lora]) -> None:
    """Raises ValueError, one line, if a file is there twice, the phases' own among them: nobody could say how much it is to
    count."""
    files = [Path(lora.file).resolve() for lora in loras]
    for lora, file in zip(loras, files):
        if files.count(file) > 1:
            raise ValueError(f"the LoRA {lora.file} is given twice; give it once, with the weight that it is to have")


def check_loras_fit(pipes: Sequence[Any], loras: Sequence[Lora], phase_loras: Sequence[Lora]) -> None:
    """Raises ValueError, one line, unless LoRAs fit the pipelines of the base and of the phases after it, and differ."""
    check_different((*loras, *phase_loras))
    for pipe, own in {pipes[0]: loras, pipes[1]: (*loras, *phase_loras)}.items():
        with Adapters(pipe, own):
            pass


def _check_lora(path: Path) -> None:
    check_file(path, "LoRA")
    try:
        if path.suffix.lower() != ".safetensors":
            raise ValueError("a LoRA is a .safetensors file")
        check_weights_file(path)
        _first_halves(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used as a LoRA: {first_line(error)}") from error


def _first_halves(path: Path) -> list[str]:
    """The names of the layers' first halves in a file. Raises ValueError, one line, for one that is no LoRA."""
    names = list(shapes_in(path))
    for pattern, why in OTHER_FILES:
        if any(re.match(pattern, name) for name in names):
            raise ValueError(why)
    if found := [name for name in names if FIRST_HALF.search(name)]:
        return found
    raise ValueError("it is none: none of its tensors has the name of one")


def lora_bytes(loras: Sequence[Lora]) -> int:
    """What LoRAs take, about."""
    return sum(Path(lora.file).stat().st_size for lora in loras)


class Adapters:
    """LoRAs in a pipeline, on top of those that it has, for the time of a context: peft's adapters, by diffusers' own loading.

    However it is left, the pipeline is as it was. Without LoRAs nothing is done. Raises ValueError, one line, on entering, for
    a LoRA that does not fit the checkpoint.
    """

    def __init__(self, pipe: Any, loras: Sequence[Lora]):
        self.pipe = pipe
        self.loras = loras
        self._names: list[str] = []
        self._before: list[_Network] = []

    def __enter__(self) -> Adapters:
        if not self.loras:
            return self
        networks = [getattr(self.pipe, name, None) for name in NETWORKS]
        self._before = [_Network(network) for network in networks if network is not None]
        taken = {name for network in self._before for name in network.adapters}
        free = (name for n in range(10**6) if (name := f"demofusion_{n}") not in taken)
        for network in self._before:
            network.check()
        try:
            for lora, name in zip(self.loras, free):
                self._names.append(name)
                self._load(lora, name)
            self.use(0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for network in self._before:
            network.restore(self._names)
        self._before = []

    def use(self, number: int) -> None:
        """The first so many of the LoRAs are on, and those that the pipeline has of its own."""
        for network in self._before:
            network.use(self._names[:number])

    def _load(self, lora: Lora, name: str) -> None:
        path = Path(lora.file)
        try:
            with small_suffix(path) as file, _quietly():
                self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            layers = [layer for network in self._before for layer in _layers(network.network) if name in _adapters_in(layer)]
            if not layers:
                raise ValueError("none of its layers has a place there")
        except Exception as error:  # of peft's many
            raise ValueError(
                f"the LoRA {path} does not fit this checkpoint: {_why(error)}; use one made for its kind"
            ) from error
        finally:
            for network in self._before:
                network.loaded()
        for layer in layers:
            layer.scaling[name] *= float(lora.weight)
        left_out = len(_first_halves(path)) - len(layers)
        if left_out > 0:
            line = f"{left_out} layers of the LoRA {path} have no place in this checkpoint, and are left out"
            warnings.warn(line, stacklevel=2)


def _why(error: Exception) -> str:
    """What is wrong with a LoRA, from an error that may name each of its layers."""
    line = " ".join(first_line(error).split())
    if "size mismatch" in str(error):
        return "its layers are of other sizes"
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


class _Network:
    """A UNet or a text encoder as it was before LoRAs came into it."""

    def __init__(self, network: Any):
        self.network = network
        self.layers = {
            layer: (list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters) for layer in _layers(network)
        }
        self.attributes = {key: dict(x) if key == "peft_config" else x for key, x in vars(network).items()}
        self.came: list[str] = []
        self.training = {module: module.training for module in network.modules()}
        self.trained = {x: x.requires_grad for x in network.parameters()}

    @property
    def adapters(self) -> set[str]:
        """The names of those that it had."""
        return {name for layer in self.layers for name in _adapters_in(layer)}

    def loaded(self) -> None:
        """To be called after loading: what attributes came with it, the packages' own records. Others may come later."""
        self.came = [key for key, x in vars(self.network).items() if x is not self.attributes.get(key)]

    def check(self) -> None:
        """Raises ValueError, one line, for a network into which no LoRA could come and out of it again."""
        if any(layer.merged for layer in self.layers):
            raise ValueError("the pipeline's own LoRAs are fused; call pipe.unload_lora_weights() or pipe.unfuse_lora() first")
        if offloaded(self.network):
            raise ValueError("the pipeline is offloaded; load LoRAs into it by pipe.load_lora_weights() before that")

    def use(self, names: Sequence[str]) -> None:
        for layer in _layers(self.network):
            active, _, disabled = self.layers.get(layer, ([], {}, False))
            _activate(layer, [*([] if disabled else active), *names], disabled and not names)

    def restore(self, names: Sequence[str]) -> None:
        """Takes out the adapters of these names, and the layers that came with them."""
        there = set(_layers(self.network))
        for path, layer in [(path, module) for path, module in self.network.named_modules() if module in there]:
            if layer not in self.layers:
                parent, _, child = path.rpartition(".")
                setattr(self.network.get_submodule(parent), child, layer.get_base_layer())
                continue
            active, scaling, disabled = self.layers[layer]
            _activate(layer, active, disabled)
            for name in names:
                layer.delete_adapter(name)
            layer.scaling.clear()
            layer.scaling.update(scaling)
        for key in self.came:
            del vars(self.network)[key]
            if key in self.attributes:
                vars(self.network)[key] = self.attributes[key]
        for module, training in self.training.items():
            module.training = training
        for x, trained in self.trained.items():
            x.requires_grad_(trained)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the packages say of a LoRA that changes a part of the networks alone, and without their progress bars."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity(CRITICAL)
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, verbosity, bar in before:
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


def _layers(network: Any) -> Iterator[Any]:
    """peft's layers in a network."""
    if find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def _adapters_in(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part)}


def _activate(layer: Any, names: Sequence[str], disabled: bool) -> None:
    with torch.inference_mode(False):  # it marks what is trained, which must not become tensors of that mode
        if layer.disable_adapters != disabled:
            layer.enable_adapters(not disabled)
        layer.set_adapter(list(names))
