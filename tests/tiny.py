"""Tiny random pipelines of each kind that the diffusers host takes, built from configs: nothing is downloaded; and pictures."""

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib_demofusion.hosts.diffusers import EMBEDDED_CHECKPOINT

KINDS = ("sd15", "sd2", "sdxl")
WIDTH = 16


def tiny_pipeline(kind, sample_size=8):
    """A random pipeline with latents of sample_size: "sd15" predicts noise, "sd2" v, "sdxl" takes size conditions."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_CHECKPOINT / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    xl = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH * (2 if kind == "sdxl" else 1),
        attention_head_dim=2,
        norm_num_groups=4,
        **(xl if kind == "sdxl" else {}),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if kind == "sd2" else "epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
    parts = dict(vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=CLIPTextModel(text))
    if kind == "sdxl":
        parts.update(text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=tokenizer)
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_controlnet(pipe, seed=1, kind=None):
    """A random ControlNet for a tiny pipeline. What it adds can be seen, and depends on its image: it begins with no zeros."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(pipe.unet) if kind is None else kind()
    with torch.no_grad():
        for weights in net.parameters():
            if not weights.any():
                weights.normal_(0, 0.2)
        for name, weights in net.controlnet_cond_embedding.named_parameters():
            if name.endswith("weight"):
                weights.mul_(3)
    return net.eval()


def tiny_union(pipe, types=6, seed=1):
    """A random union ControlNet for the tiny pipeline "sdxl"."""
    unet = pipe.unet.config
    keys = ("down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim")
    keys += ("norm_num_groups", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    own = dict(num_control_type=types, num_trans_channel=8, num_trans_head=2, num_proj_channel=8)
    own["conditioning_embedding_out_channels"] = (8, 8, 8, 8)
    return tiny_controlnet(pipe, seed, lambda: diffusers.ControlNetUnionModel(**{key: unet[key] for key in keys}, **own))


def photo(size=(200, 136)):
    """A picture of many colours."""
    return Image.merge("RGB", [Image.radial_gradient("L").resize(size).rotate(90 * turn) for turn in range(3)])


def spot(size=(200, 136), box=(60, 40, 140, 100), grey=255):
    """A mask of that size, grey in a box and black elsewhere."""
    mask = Image.new("L", size)
    mask.paste(grey, box)
    return mask


def checkered(contrast, side=24):
    """A plain image [1, 3, 96, 96] that gets gradually lighter, with a square in its middle, checkered over 2 pixels."""
    image = torch.linspace(-0.1, 0.1, 96).expand(1, 3, 96, 96).clone()
    row = torch.arange(side) // 2 % 2
    checkers = (row[:, None] ^ row) * 2 - 1
    begin = (96 - side) // 2
    image[..., begin : begin + side, begin : begin + side] += checkers * contrast / 127.5
    return image
