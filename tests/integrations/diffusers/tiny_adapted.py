"""Small pipelines that are changed after they are loaded (adapters, LoRAs), or are loaded otherwise, and calls of each."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.integrations.diffusers.tiny_pictures import PICTURE, SIZE
from tests.integrations.diffusers.tiny_pipelines import (
    AFTER,
    latent_law,
    stable_diffusion,
    stable_diffusion_xl,
    text_encoder,
    text_unet,
    tokenizer,
    vae,
)
from tests.integrations.diffusers.tiny_videos import sight

TOKENS = 4  # of a picture, in an IP-adapter


def clean_law(**options: Any) -> Any:
    """A scheduler of Stable Diffusion that starts at the last time and steps to the clean image, as ours do."""
    return diffusers.DDIMScheduler.from_config(latent_law().config, set_alpha_to_one=True, timestep_spacing="trailing", **options)


def with_ip_adapter(folder: Path) -> Any:
    """Stable Diffusion with the encoder of an IP-adapter, whose weights are a file beside it."""
    encoder = transformers.CLIPVisionModelWithProjection(sight(8))
    eye = transformers.CLIPImageProcessorPil(size=16, crop_size=16)
    pipe = stable_diffusion(folder, image_encoder=encoder, feature_extractor=eye)
    pipe.scheduler = clean_law()
    crossed = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    weights = {
        "image_proj.proj.weight": torch.randn(TOKENS * 32, 8),
        "image_proj.proj.bias": torch.zeros(TOKENS * 32),
        "image_proj.norm.weight": torch.ones(32),
        "image_proj.norm.bias": torch.zeros(32),
    }
    for number, name in enumerate(crossed):
        inner = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        weights |= {f"ip_adapter.{2 * number + 1}.{part}.weight": 0.3 * torch.randn(inner) for part in ("to_k_ip", "to_v_ip")}
    save_file(weights, folder / "ip_adapter.safetensors")
    return pipe


def load_ip_adapter(pipe: Any, folder: Path) -> Any:
    parts = folder.parent / "parts"
    pipe.load_ip_adapter(str(parts), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None, low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def with_lora(folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    pipe = stable_diffusion(folder)
    pipe.scheduler = clean_law()
    trained = text_unet()
    trained.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
    for name, weight in trained.named_parameters():
        if "lora_B" in name:  # zero at first: nothing would be seen of it
            torch.nn.init.normal_(weight, std=0.3)
    layers = peft.get_peft_model_state_dict(trained)
    diffusers.StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)
    return pipe


def load_lora(pipe: Any, folder: Path) -> Any:
    pytest.importorskip("peft")
    pipe.load_lora_weights(folder.parent / "parts" / "lora")
    return pipe


def marigold(folder: Path) -> Any:
    words = tokenizer(folder / "words")
    return diffusers.MarigoldDepthPipeline(
        unet=text_unet(channels=8),
        vae=vae(),
        scheduler=clean_law(prediction_type="v_prediction"),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        prediction_type="depth",
        default_denoising_steps=10,
        default_processing_resolution=16,
    )


def for_blocks(folder: Path) -> Any:
    pipe = stable_diffusion_xl(folder)
    pipe.scheduler = clean_law()
    return pipe


def modular(pipe: Any, folder: Path) -> Any:
    """The same files as a modular pipeline, with a guider that rescales."""
    made = diffusers.ModularPipeline.from_pretrained(str(folder))
    made.load_components()
    made.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.5))
    made.set_progress_bar_config(disable=True)
    return made


MAKERS = {"sd-ip-adapter": with_ip_adapter, "sd-lora": with_lora, "marigold": marigold, "sdxl-modular": for_blocks}
AFTER |= {"sd-ip-adapter": load_ip_adapter, "sd-lora": load_lora, "sdxl-modular": modular}
CALLS = {
    "sd-ip-adapter": [
        {"prompt": "a red cat", "ip_adapter_image": PICTURE, "guidance_scale": 3.0, **SIZE},
        {"prompt": "the moon", "ip_adapter_image": PICTURE.rotate(90), **SIZE},
    ],
    "sd-lora": [
        {"prompt": "a red cat", "cross_attention_kwargs": {"scale": 0.7}, "guidance_scale": 3.0, **SIZE},
        {"prompt": "the moon", **SIZE},
    ],
    "marigold": [{"image": PICTURE}, {"image": PICTURE.rotate(90)}],
    "sdxl-modular": [{"prompt": "a red cat", **SIZE}, {"prompt": "the moon", "negative_prompt": "a small cat", **SIZE}],
}
