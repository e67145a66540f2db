"""UNet and ControlNet by OpenVINO, in bfloat16: on a CPU that has it, evaluated more than twice as fast as by torch.

Latents, guidance, schedules, text encoder and autoencoder stay torch's, in float32. Three parts are said in another way
than diffusers', the same to rounding: the text's keys and values once for all views of a call, the two halves of GEGLU by
a matrix each, and GroupNorm from means over rows and columns, which no layout of the memory has to be changed for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import openvino
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn


def compile_unet(unet: nn.Module, precision: str = "bf16") -> None:
    """From now on the UNet, called as diffusers' pipelines call it, runs by OpenVINO on one thread.

    It is compiled anew for each shape of its inputs and each dilation of its convolutions, which takes seconds.
    precision: "bf16", which a CPU without it takes as "f32", or "f32". Of what conditions a UNet the text is known, and what
    ControlNets add: ValueError for an SDXL UNet. Its batches are those of guidance: one text for each branch, repeated for
    all views.
    """
    if unet.config.addition_embed_type is not None:
        raise ValueError("only a UNet that is conditioned by text alone runs by OpenVINO; leave --openvino out for this model")
    original, convolutions = unet.forward, [module for module in unet.modules() if isinstance(module, nn.Conv2d)]

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet  # whose weights the tracer is to know as such

        def forward(self, sample: Tensor, t: Tensor, text: Tensor, *residuals: Tensor) -> Tensor:
            *down, mid = residuals or [None]
            added = dict(down_block_additional_residuals=down or None, mid_block_additional_residual=mid)
            return original(sample, t, text, return_dict=False, **added)[0]

    compiled = _Compiled(unet, Traced(), precision)

    def forward(
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        **others: Any,
    ) -> Any:
        _refuse(others)
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise ValueError("not by OpenVINO: residuals of an adapter")
        told = down_block_additional_residuals is not None
        residuals = (*down_block_additional_residuals, mid_block_additional_residual) if told else ()
        inputs = sample, _number(timestep), _texts(encoder_hidden_states), *residuals
        [output] = compiled(inputs, [module.dilation for module in convolutions])
        return SimpleNamespace(sample=output) if return_dict else (output,)

    unet.forward = forward


def compile_controlnet(controlnet: nn.Module, precision: str = "bf16") -> None:
    """The same for a ControlNet, if it has no attention, as the embedded one: ValueError if it has. It runs beside a UNet."""
    if any("CrossAttn" in kind for kind in (*controlnet.config.down_block_types, controlnet.config.mid_block_type)):
        raise ValueError("only a ControlNet without attention runs by OpenVINO")
    original = controlnet.forward

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.controlnet = controlnet

        def forward(self, sample: Tensor, t: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
            down, mid = original(sample, t, None, hint, return_dict=False)
            return (*down, mid)

    compiled = _Compiled(controlnet, Traced(), precision)

    def forward(
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        _refuse({**others, "guess_mode": guess_mode or None, "return_dict": return_dict or None})
        *down, mid = (conditioning_scale * x for x in compiled((sample, _number(timestep), controlnet_cond)))
        return down, mid

    controlnet.forward = forward


class _Compiled:
    """A traced module of a network's by OpenVINO: tensors -> tensors."""

    def __init__(self, network: nn.Module, traced: nn.Module, precision: str):
        self.traced, self.core, self.requests = traced, openvino.Core(), {}
        self.settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
        if hasattr(network, "set_attn_processor"):
            network.set_attn_processor(_one_text_a_branch)
        for module in network.modules():
            if isinstance(module, GEGLU):
                module.forward = MethodType(_geglu, module)
            elif isinstance(module, nn.GroupNorm):
                module.forward = MethodType(_group_norm, module)

    def __call__(self, inputs: Sequence[Tensor], state: Sequence[Any] = ()) -> list[Tensor]:
        """state: what else a compiled network holds for."""
        inputs = tuple(x.contiguous() for x in inputs)
        key = (*(x.shape for x in inputs), *state)
        if key not in self.requests:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes, which stay what they are
                model = openvino.convert_model(self.traced, example_input=inputs)
            model.reshape({index: list(x.shape) for index, x in enumerate(inputs)})
            self.requests[key] = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        results = self.requests[key].infer([x.numpy() for x in inputs], share_inputs=True)
        # Copies: the next call writes into the same memory.
        return [torch.from_numpy(np.array(results[index])) for index in range(len(results))]


def _refuse(others: dict[str, Any]) -> None:
    if any(value is not None for value in others.values()):
        raise ValueError(f"not by OpenVINO: {', '.join(others)}")


def _number(timestep: Any) -> Tensor:
    return torch.as_tensor(timestep, dtype=torch.float32).reshape(())


def _texts(rows: Tensor) -> Tensor:
    """The texts [branches, tokens, C] of guidance, each once, of a batch [branches * views, tokens, C]: one or two."""
    for branches in (1, 2):
        own = rows[:: max(len(rows) // branches, 1)]
        if len(rows) % branches == 0 and torch.equal(own.repeat_interleave(len(rows) // branches, 0), rows):
            return own.contiguous()
    raise ValueError("the views of one call have different texts")


def _one_text_a_branch(attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Attention of x [B, N, C] to itself, or to texts [branches, M, C], of which each is B / branches rows' own."""
    seen = x if encoder_hidden_states is None else encoder_hidden_states

    def heads(y: Tensor) -> Tensor:
        return y.reshape(seen.shape[0], -1, attn.heads, y.shape[-1] // attn.heads).transpose(1, 2)

    y = F.scaled_dot_product_attention(heads(attn.to_q(x)), heads(attn.to_k(seen)), heads(attn.to_v(seen)))
    return attn.to_out[0](y.transpose(1, 2).reshape(*x.shape[:2], -1))


def _geglu(module: GEGLU, x: Tensor) -> Tensor:
    (weight, gate), (bias, gate_bias) = (p.chunk(2) for p in (module.proj.weight, module.proj.bias))
    return F.linear(x, weight, bias) * F.gelu(F.linear(x, gate, gate_bias))


def _group_norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    if x.ndim != 4:
        return F.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
    rows, channels, groups = *x.shape[:2], module.num_groups
    mean, square = (y.mean((2, 3)).reshape(rows, groups, -1).mean(-1, keepdim=True) for y in (x, x * x))
    scale = torch.rsqrt(square - mean * mean + module.eps) * module.weight.reshape(groups, -1)
    shift = module.bias.reshape(groups, -1) - mean * scale
    return x * scale.reshape(rows, channels, 1, 1) + shift.reshape(rows, channels, 1, 1)
