"""Small pipelines of pictures with random weights, and calls of each. Prompts are embeddings where a text encoder would be large."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tests.integrations.diffusers.tiny_pipelines import flow_vae, flux_transformer, latent_law, text_encoder, text_unet, tokenizer, vae

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4))
SIZE = {"height": 16, "width": 16}


def embeds(seed: int, *shape: int) -> Any:
    """Encodings of a prompt, of a batch of one."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def dynamic_flow() -> Any:
    return flow(shift=3.0, use_dynamic_shifting=True)


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}


def flux(kind: str, channels: int = 16, **more: Any) -> Any:
    return getattr(diffusers, kind)(scheduler=dynamic_flow(), vae=flow_vae(), transformer=flux_transformer(channels), **NO_TEXTS, **more)


def flux_controlnet(folder: Path) -> Any:
    controlnet = diffusers.FluxControlNetModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    for block in (controlnet.controlnet_x_embedder, *controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks):
        torch.nn.init.normal_(block.weight, std=0.1)  # zero at first: nothing would be seen of it
    return flux("FluxControlNetPipeline", controlnet=controlnet)


def flux_2(folder: Path) -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    picture_vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return diffusers.Flux2Pipeline(scheduler=dynamic_flow(), vae=picture_vae, transformer=transformer, **NO_TEXT)


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def qwen(folder: Path) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return diffusers.QwenImagePipeline(scheduler=scheduler, vae=qwen_vae(), transformer=transformer, **NO_TEXT)


def z_image(folder: Path) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # memory as it was, at first
        torch.nn.init.normal_(token, std=0.1)
    return diffusers.ZImagePipeline(scheduler=flow(shift=3.0), vae=flow_vae(), transformer=transformer, **NO_TEXT)


def chroma(folder: Path) -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(scheduler=flow(use_beta_sigmas=True), vae=flow_vae(), transformer=transformer, **NO_TEXT)


def sana(folder: Path) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    deep = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return diffusers.SanaPipeline(scheduler=scheduler, vae=deep, transformer=transformer, **NO_TEXT)


def pixart(folder: Path) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2)
    return diffusers.PixArtSigmaPipeline(scheduler=scheduler, vae=vae(), transformer=transformer, **NO_TEXT)


def lumina_2(folder: Path) -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )
    return diffusers.Lumina2Pipeline(scheduler=flow(shift=6.0), vae=flow_vae(), transformer=transformer, **NO_TEXT)


def auraflow(folder: Path) -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(scheduler=flow(shift=1.73), vae=vae(), transformer=transformer, **NO_TEXT)


def instructed(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    scheduler = diffusers.EulerDiscreteScheduler.from_config(latent_law().config, timestep_spacing="leading")
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=text_unet(channels=8),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


MAKERS = {
    "kontext": lambda folder: flux("FluxKontextPipeline"),
    "flux-fill": lambda folder: flux("FluxFillPipeline", 48),
    "flux-controlnet": flux_controlnet,
    "flux-2": flux_2,
    "qwen-image": qwen,
    "z-image": z_image,
    "chroma": chroma,
    "sana": sana,
    "pixart-sigma": pixart,
    "lumina-2": lumina_2,
    "auraflow": auraflow,
    "instruct-pix2pix": instructed,
}


def flux_prompt(seed: int) -> dict[str, Any]:
    return {"prompt_embeds": embeds(seed, 8, 32), "pooled_prompt_embeds": embeds(seed + 9, 32), **SIZE}


def masked_prompt(seed: int, *shape: int, mask: str = "prompt_attention_mask", dtype: Any = torch.long) -> dict[str, Any]:
    """Embeddings of a prompt and of its opposite, with their masks."""
    ones = torch.ones(1, shape[0], dtype=dtype)
    call = {"prompt_embeds": embeds(seed, *shape), "negative_prompt_embeds": embeds(seed + 9, *shape)}
    return {**call, mask: ones, f"negative_{mask}": ones, **SIZE}


KONTEXT = {"image": PICTURE, "max_area": 256, "_auto_resize": False}
CALLS = {
    "kontext": [{**flux_prompt(0), **KONTEXT}, {**flux_prompt(1), **KONTEXT, "guidance_scale": 2.0}],
    "flux-fill": [{**flux_prompt(k), "image": PICTURE, "mask_image": MASK, "guidance_scale": 30.0 * k + 1} for k in range(2)],
    "flux-controlnet": [{**flux_prompt(k), "control_image": PICTURE.rotate(90 * k)} for k in range(2)],
    "flux-2": [
        {"prompt_embeds": embeds(0, 8, 16), "guidance_scale": 2.0, **SIZE},
        {"prompt_embeds": embeds(1, 8, 16), "image": PICTURE.resize((64, 64)), **SIZE},
    ],
    "qwen-image": [
        {
            "prompt_embeds": embeds(k, 7, 16),
            "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
            "negative_prompt_embeds": embeds(k + 9, 7, 16),
            "negative_prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long),
            "true_cfg_scale": 1.0 + 2 * k,
            **SIZE,
        }
        for k in range(2)
    ],
    "z-image": [
        {"prompt_embeds": [embeds(k, 16)[0].expand(5, 16)], "negative_prompt_embeds": [embeds(9, 3, 16)[0]], "guidance_scale": g, **SIZE}
        for k, g in enumerate((0.0, 3.0))
    ],
    "chroma": [{**masked_prompt(k, 7, 32, dtype=torch.bool), "guidance_scale": 1.0 + 2 * k} for k in range(2)],
    "sana": [{**masked_prompt(k, 7, 8), "guidance_scale": 1.0 + 3 * k} for k in range(2)],
    "pixart-sigma": [{**masked_prompt(k, 7, 16), "guidance_scale": 1.0 + 3 * k} for k in range(2)],
    "lumina-2": [{**masked_prompt(k, 7, 8, dtype=torch.bool), "guidance_scale": 1.0 + 3 * k} for k in range(2)],
    "auraflow": [{**masked_prompt(k, 7, 16), "guidance_scale": 1.0 + 3 * k} for k in range(2)],
    "instruct-pix2pix": [{"prompt": "a red cat", "image": PICTURE}, {"prompt": "the moon", "image": PICTURE, "image_guidance_scale": 1.2}],
}
for call in CALLS["sana"] + CALLS["pixart-sigma"]:
    call |= {"negative_prompt": None, "use_resolution_binning": False}
for call in CALLS["sana"]:
    call |= {"height": 32, "width": 32}
