"""Small pipelines of videos with random weights, and calls of each. Their prompts are embeddings."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tests.integrations.diffusers.tiny_pictures import NO_TEXT, NO_TEXTS, PICTURE, embeds, flow
from tests.integrations.diffusers.tiny_pipelines import latent_law, ltx_parts, text_encoder, text_unet, tokenizer, vae

CLIP = {"height": 16, "width": 16, "num_frames": 5}


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan_transformer(channels: int = 16, **options: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        **options,
    )


def wan_law(shift: float = 3.0) -> Any:
    """The scheduler in the repositories of Wan."""
    return diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")


def wan(folder: Path) -> Any:
    return diffusers.WanPipeline(vae=wan_vae(), scheduler=flow(shift=3.0), transformer=wan_transformer(), **NO_TEXT)


def wan_two_experts(folder: Path) -> Any:
    experts = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    return diffusers.WanPipeline(vae=wan_vae(), scheduler=wan_law(12.0), **experts, boundary_ratio=0.875, **NO_TEXT)


def wan_tokens(folder: Path) -> Any:
    """Wan 2.2 TI2V: tokens are told times of their own."""
    return diffusers.WanPipeline(vae=wan_vae(), scheduler=wan_law(5.0), transformer=wan_transformer(), expand_timesteps=True, **NO_TEXT)


def wan_picture(folder: Path) -> Any:
    parts = {
        "transformer": wan_transformer(36, image_dim=8, added_kv_proj_dim=24),
        "image_processor": transformers.CLIPImageProcessorPil(size=16, crop_size=16),
        "image_encoder": transformers.CLIPVisionModel(sight(8)),
    }
    return diffusers.WanImageToVideoPipeline(vae=wan_vae(), scheduler=flow(shift=5.0), **parts, **NO_TEXT)


def sight(width: int) -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        intermediate_size=16,
        patch_size=8,
    )


def wan_picture_two_experts(folder: Path) -> Any:
    experts = {"transformer": wan_transformer(36), "transformer_2": wan_transformer(36)}
    none = {"image_processor": None, "image_encoder": None, **NO_TEXT}
    return diffusers.WanImageToVideoPipeline(vae=wan_vae(), scheduler=wan_law(5.0), **experts, boundary_ratio=0.9, **none)


def wan_picture_tokens(folder: Path) -> Any:
    none = {"image_processor": None, "image_encoder": None, **NO_TEXT}
    return diffusers.WanImageToVideoPipeline(
        vae=wan_vae(), scheduler=wan_law(5.0), transformer=wan_transformer(), expand_timesteps=True, **none
    )


def cogvideox(folder: Path) -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
        max_text_seq_length=8,
    )
    video_vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    )
    return diffusers.CogVideoXPipeline(vae=video_vae, scheduler=scheduler, transformer=transformer, **NO_TEXT)


def ltx(folder: Path) -> Any:
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1)
    return diffusers.LTXPipeline(scheduler=scheduler, **ltx_parts(), **NO_TEXT)


def hunyuan(folder: Path) -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    video_vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoPipeline(vae=video_vae, scheduler=flow(shift=7.0), transformer=transformer, **NO_TEXTS)


def mochi(folder: Path) -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    video_vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return diffusers.MochiPipeline(vae=video_vae, scheduler=flow(invert_sigmas=True), transformer=transformer, **NO_TEXT)


def sana_video(folder: Path) -> Any:
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=2,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=8.0, prediction_type="flow_prediction")
    return diffusers.SanaVideoPipeline(vae=wan_vae(), scheduler=scheduler, transformer=transformer, **NO_TEXT)


def animated(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return diffusers.AnimateDiffPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=text_unet(),
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler.from_config(latent_law().config, set_alpha_to_one=True, timestep_spacing="trailing"),
    )


MAKERS = {
    "wan": wan,
    "wan-2.2": wan_two_experts,
    "wan-2.2-ti2v": wan_tokens,
    "wan-i2v": wan_picture,
    "wan-2.2-i2v": wan_picture_two_experts,
    "wan-2.2-ti2v-picture": wan_picture_tokens,
    "cogvideox": cogvideox,
    "ltx": ltx,
    "hunyuan-video": hunyuan,
    "mochi": mochi,
    "sana-video": sana_video,
    "animatediff": animated,
}


def prompted(seed: int, *shape: int, masks: bool = False, **more: Any) -> dict[str, Any]:
    """Embeddings of a prompt and of its opposite, and the rest of a call; the second call has guidance."""
    call = {"prompt_embeds": embeds(seed, *shape), "negative_prompt_embeds": embeds(seed + 9, *shape)}
    ones = torch.ones(1, shape[0], dtype=torch.bool)
    return call | ({"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones} if masks else {}) | {**CLIP, **more}


CALLS = {
    **{
        name: [prompted(k, 8, 32, guidance_scale=1.0 + 3 * k) for k in range(2)] for name in ("wan", "wan-2.2", "wan-2.2-ti2v", "cogvideox")
    },
    "wan-i2v": [prompted(k, 8, 32, image=PICTURE.rotate(90 * k), guidance_scale=2.0) for k in range(2)],
    **{name: [prompted(k, 8, 32, image=PICTURE.rotate(90 * k)) for k in range(2)] for name in ("wan-2.2-i2v", "wan-2.2-ti2v-picture")},
    "ltx": [prompted(k, 8, 32, masks=True, height=64, width=64, num_frames=9, guidance_scale=1.0 + 2 * k) for k in range(2)],
    "hunyuan-video": [
        {
            "prompt_embeds": embeds(k, 8, 16),
            "pooled_prompt_embeds": embeds(k + 9, 8),
            "prompt_attention_mask": torch.ones(1, 8, dtype=torch.bool),
            "guidance_scale": 2.0 + k,
            **CLIP,
        }
        for k in range(2)
    ],
    "mochi": [prompted(k, 16, 32, masks=True, num_frames=7, guidance_scale=1.0 + 2 * k) for k in range(2)],
    "sana-video": [
        prompted(k, 8, 8, masks=True, height=32, width=32, guidance_scale=1.0 + 3 * k, use_resolution_binning=False) for k in range(2)
    ],
    "animatediff": [
        {"prompt": "a red cat", "num_frames": 2, "height": 16, "width": 16},
        {"prompt": "the moon", "num_frames": 2, "height": 16, "width": 16, "guidance_scale": 2.0},
    ],
}
for call in CALLS["sana-video"]:
    call |= {"frames": call.pop("num_frames"), "negative_prompt": None}
