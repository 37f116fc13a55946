"""Small pipelines with random weights, saved to disk and loaded as a user does. They are made once in a session."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

SEED = 0
WORDS = ("a", "red", "blue", "small", "large", "circle", "square", "cat", "on", "the", "moon")


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows a few words, and letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), *(f"{w}</w>" for w in WORDS if len(w) > 1), "<|startoftext|>", "<|endoftext|>"]
    merges = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:  # join from the left
            merges.append(f"{symbols[0]} {symbols[1]}")
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
            if symbols[0] not in pieces:
                pieces.append(symbols[0])
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_encoder(count: int, *, projected: bool = False, width: int = 32) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=count,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def vae(channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def flow_vae(channels: int = 4) -> Any:
    return vae(channels, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def text_unet(width: int = 32, *, channels: int = 4, **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def latent_law() -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def stable_diffusion(folder: Path, kind: str = "StableDiffusionPipeline", feature_extractor: Any = None, **more: Any) -> Any:
    words = tokenizer(folder / "words")
    channels = 9 if more.pop("nine_channels", False) else 4
    return getattr(diffusers, kind)(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=text_unet(channels=channels),
        scheduler=latent_law(),
        safety_checker=None,
        feature_extractor=feature_extractor,
        requires_safety_checker=False,
        **more,
    )


def controlled(folder: Path) -> Any:
    controlnet = diffusers.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):  # zero at first: nothing would be seen of it
        torch.nn.init.normal_(block.weight, std=0.1)
    return stable_diffusion(folder, "StableDiffusionControlNetPipeline", controlnet=controlnet)


def stable_diffusion_xl(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    unet = text_unet(
        64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        text_encoder_2=text_encoder(len(words), projected=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=latent_law(),
        add_watermarker=False,
    )


def stable_diffusion_3(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_vae(),
        text_encoder=text_encoder(len(words), projected=True),
        tokenizer=words,
        text_encoder_2=text_encoder(len(words), projected=True),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux_transformer(channels: int = 16, **options: Any) -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
        **options,
    )


def flux(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    t5 = transformers.T5Config(vocab_size=len(words), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=1, decoder_start_token_id=0)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flow_vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        text_encoder_2=transformers.T5EncoderModel(t5),
        tokenizer_2=words,
        transformer=flux_transformer(),
    )


def dit(folder: Path) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )
    for block in transformer.transformer_blocks:  # they begin as the identity
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=latent_law(), id2label={0: "a", 1: "b"})


def ltx_parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=32,
    )
    video_vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return {"transformer": transformer, "vae": video_vae}


def ltx_with_conditions(folder: Path) -> Any:  # noqa: ARG001 - its prompts are given as embeddings
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXConditionPipeline(scheduler=scheduler, **ltx_parts(), text_encoder=None, tokenizer=None)


def cogview4(folder: Path) -> Any:  # noqa: ARG001 - its prompts are given as embeddings
    transformer = diffusers.CogView4Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        rope_axes_dim=(16, 16),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return diffusers.CogView4Pipeline(scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer)


def latent_upscaler(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=5,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        time_cond_proj_dim=128 + 32,
    )
    return diffusers.StableDiffusionLatentUpscalePipeline(
        vae=vae(),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="original_sample"),
    )


OTHERS = {"ltx-condition": ltx_with_conditions, "cogview4": cogview4, "latent-upscaler": latent_upscaler}
MAKERS = {
    "sd": stable_diffusion,
    "sd-inpaint": lambda folder: stable_diffusion(folder, "StableDiffusionInpaintPipeline", nine_channels=True),
    "sd-controlnet": controlled,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "dit": dit,
}


AFTER: dict[str, Any] = {}  # pipelines that are changed once they are loaded -> how, a function of the pipeline and its folder


def make(name: str, folder: Path, makers: Any = None) -> Path:
    """A pipeline's folder."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        pipe = (makers or MAKERS | OTHERS)[name](folder / "parts")
    pipe.save_pretrained(folder / name)
    return folder / name


def load(folder: Path, **options: Any) -> Any:
    """As a user loads one; without the text encoders that were not saved."""
    index = json.loads((folder / "model_index.json").read_text())
    options |= {name: None for name, what in index.items() if what == [None, None]}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return AFTER[folder.name](pipe, folder) if folder.name in AFTER else pipe
