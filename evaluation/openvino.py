"""The UNet by OpenVINO, in bfloat16: on a CPU that has it, evaluated more than twice as fast as by torch.

Latents, guidance, schedules, text encoder and autoencoder stay torch's, in float32. Three parts are said in another way
than diffusers', the same to rounding: the text's keys and values once for all views of a call, the two halves of GEGLU by
a matrix each, and GroupNorm from means over rows and columns, which no layout of the memory has to be changed for.
"""

from __future__ import annotations

import warnings
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
    precision: "bf16", which a CPU without it takes as "f32", or "f32". Of what conditions a UNet only the text is known:
    ValueError for an SDXL UNet. Its batches are those of guidance: one text for each branch, repeated for all views.
    """
    if unet.config.addition_embed_type is not None:
        raise ValueError("only a UNet that is conditioned by text alone runs by OpenVINO; leave --openvino out for this model")
    original, core, requests = unet.forward, openvino.Core(), {}
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
    unet.set_attn_processor(_one_text_a_branch)
    for module in unet.modules():
        if isinstance(module, GEGLU):
            module.forward = MethodType(_geglu, module)
        elif isinstance(module, nn.GroupNorm):
            module.forward = MethodType(_group_norm, module)

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet  # whose weights the tracer is to know as such

        def forward(self, sample: Tensor, t: Tensor, text: Tensor) -> Tensor:
            return original(sample, t, text, return_dict=False)[0]

    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True, **others: Any) -> Any:
        if any(value is not None for value in others.values()):
            raise ValueError(f"not by OpenVINO: {', '.join(others)}")
        inputs = sample.contiguous(), torch.as_tensor(timestep, dtype=torch.float32).reshape(()), _texts(encoder_hidden_states)
        key = (*(x.shape for x in inputs), *(module.dilation for module in convolutions))
        if key not in requests:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes, which stay what they are
                model = openvino.convert_model(Traced(), example_input=inputs)
            model.reshape({index: list(x.shape) for index, x in enumerate(inputs)})
            requests[key] = core.compile_model(model, "CPU", settings).create_infer_request()
        result = requests[key].infer([x.numpy() for x in inputs], share_inputs=True)
        output = torch.from_numpy(np.array(result[0]))  # a copy: the next call writes into the same memory
        return SimpleNamespace(sample=output) if return_dict else (output,)

    unet.forward = forward


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
