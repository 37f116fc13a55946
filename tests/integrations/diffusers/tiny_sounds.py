"""Small pipelines of sounds with random weights, and calls of each. Their prompts are embeddings, or words of a few letters."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from tests.integrations.diffusers.tiny_pictures import NO_TEXT, embeds, flow
from tests.integrations.diffusers.tiny_pipelines import tokenizer


def oobleck(channels: int) -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=2 * channels,
        decoder_input_channels=channels,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        channel_multiples=[1, 2],
        audio_channels=2,
        sampling_rate=16,
    )


def stable_audio(folder: Path) -> Any:
    pytest.importorskip("torchsde")  # without which diffusers has not its scheduler
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        time_proj_dim=8,
        cross_attention_input_dim=16,
        cross_attention_dim=16,
        global_states_input_dim=32,
    )
    return diffusers.StableAudioPipeline(
        vae=oobleck(3),
        projection_model=StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32),
        transformer=transformer,
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        **NO_TEXT,
    )


def ace_step(folder: Path) -> Any:
    ace = pytest.importorskip("diffusers.pipelines.ace_step", reason="this diffusers has no ACE-Step")
    words = tokenizer(folder / "words")
    layers = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16}
    encoder = transformers.Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = diffusers.AceStepTransformer1DModel(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, **layers
    )
    condition = ace.AceStepConditionEncoder(
        hidden_size=16,
        intermediate_size=16,
        text_hidden_dim=16,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **layers,
    )
    return diffusers.AceStepPipeline(
        vae=oobleck(4),
        text_encoder=transformers.Qwen3Model(encoder),
        tokenizer=words,
        transformer=transformer,
        condition_encoder=condition,
        scheduler=flow(num_train_timesteps=1, shift=1.0),
    )


MAKERS = {"stable-audio": stable_audio, "ace-step": ace_step}
SOUND = {"prompt_embeds": embeds(0, 4, 16), "attention_mask": torch.ones(1, 4), "audio_end_in_s": 0.5}
AGAINST = {"negative_prompt_embeds": embeds(9, 4, 16), "negative_attention_mask": torch.ones(1, 4)}
CALLS = {
    "stable-audio": [
        {**SOUND, "guidance_scale": 1.0},
        {
            **SOUND,
            "prompt_embeds": embeds(1, 4, 16),
            "negative_prompt_embeds": embeds(9, 4, 16),
            "negative_attention_mask": torch.ones(1, 4),
        },
    ],
    "ace-step": [
        {"prompt": "a cat", "lyrics": "a red cat on the moon", "audio_duration": 1.0, "guidance_scale": 1.0, "max_text_length": 16},
        {"prompt": "the moon", "audio_duration": 1.0, "guidance_scale": 1.0, "max_text_length": 16, "shift": 2.0},
    ],
}
