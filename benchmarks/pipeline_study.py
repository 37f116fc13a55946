"""A Stable Diffusion pipeline at 5 and 8 steps: diffusers' schedulers against this library's, on the same prompts and noises.

python benchmarks/pipeline_study.py --out benchmarks/results/pipeline_study.json --picture docs/pipeline.png

No model hub is needed: the pipeline, a small text-to-image one of digits, is trained first (``runs/pipeline``, a few minutes; it is kept),
saved, and loaded as any other. A row is the RMSE of latents to the same pipeline's at 100 steps of diffusers' UniPC.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

import fewstep
from fewstep.data.images import load_images
from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.runtime.artifact import write_whole

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"the digit {word}" for word in WORDS]
TWO = "dpm-solver-v3:steps=2:predictor=true"
GUIDANCE, NUM, STEPS, REFERENCE = 5.0, 250, (5, 8), 100
VAE_STEPS, UNET_STEPS, BATCH, LR = 1200, 6000, 64, 1e-3


def tokenizer(folder: Path) -> Any:
    """One of CLIP's kind that knows the prompts' words whole."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces, merges = [chr(c) for c in range(ord("a"), ord("z") + 1)], []
    pieces += [f"{letter}</w>" for letter in pieces]
    for word in dict.fromkeys(" ".join(PROMPTS).split()):
        head, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for symbol in rest:
            merges.append(f"{head} {symbol}")
            head += symbol
            pieces.append(head)
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def untrained(folder: Path) -> Any:
    """The parts, with random weights. The text encoder keeps them: ten prompts are told apart by any."""
    words = tokenizer(folder / "words")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=8,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    law = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=words,
        unet=unet,
        scheduler=law,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_vae(vae: Any, pixels: Tensor) -> Tensor:
    """Pictures ``[n, 3, 16, 16]`` to latents and back; the latents ``[n, 4, 8, 8]``, of standard deviation 1."""
    optimizer, draw = torch.optim.AdamW(vae.parameters(), LR), torch.Generator().manual_seed(0)
    for step in range(VAE_STEPS):
        x = pixels[torch.randint(len(pixels), (BATCH,), generator=draw)]
        posterior = vae.encode(x).latent_dist
        loss = (vae.decode(posterior.sample(draw)).sample - x).square().mean() + 1e-4 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"vae {step} of {VAE_STEPS}: {float(loss):.4f}", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(256)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return latents / latents.std()


def train_unet(pipe: Any, latents: Tensor, labels: Tensor) -> None:
    """Noise prediction, with one prompt in ten left empty; the weights are averaged."""
    with torch.no_grad():
        texts, nothing = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    table = torch.cat([texts, nothing[:1]])
    law, unet, draw = pipe.scheduler, pipe.unet, torch.Generator().manual_seed(1)
    optimizer, mean = (
        torch.optim.AdamW(unet.parameters(), LR),
        torch.optim.swa_utils.AveragedModel(unet, avg_fn=lambda a, b, n: a.lerp(b, 0.003)),
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, UNET_STEPS)
    for step in range(UNET_STEPS):
        index = torch.randint(len(latents), (BATCH,), generator=draw)
        noise, t = torch.randn(BATCH, 4, 8, 8, generator=draw), torch.randint(1000, (BATCH,), generator=draw)
        empty = torch.rand(BATCH, generator=draw) < 0.1
        words = table[torch.where(empty, len(PROMPTS), labels[index])]
        loss = (unet(law.add_noise(latents[index], noise, t), t, words).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        mean.update_parameters(unet)
        if step % 500 == 0:
            print(f"unet {step} of {UNET_STEPS}: {float(loss):.4f}", flush=True)
    unet.load_state_dict(mean.module.state_dict())


def pipeline(folder: Path) -> Any:
    """The trained pipeline, loaded from its folder; made first if it is not there."""
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        images = load_images("digits")
        pixels = torch.nn.functional.interpolate(images.x, scale_factor=2, mode="nearest").expand(-1, 3, -1, -1)
        pipe = untrained(folder)
        assert images.labels is not None
        train_unet(pipe, train_vae(pipe.vae, pixels), images.labels)
        pipe.save_pretrained(folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: Any, scheduler: Any, steps: int, num: int = NUM) -> Tensor:
    """``[num, 4, 8, 8]``: prompts in turn, noises by seed."""
    usual, pipe.scheduler = pipe.scheduler, scheduler
    noise = fewstep.seeded_noise(range(num), (4, 8, 8))
    prompts = [PROMPTS[seed % len(PROMPTS)] for seed in range(num)]
    result = pipe(prompt=prompts, latents=noise, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent").images
    pipe.scheduler = usual
    return result


def competitors(config: Any, runs: Path, steps: int) -> dict[str, Any]:
    """Schedulers by name."""
    found: dict[str, Any] = {}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "DDIMScheduler"):
        for label, options in SPACINGS.items():
            if name == "DDIMScheduler" and "use_karras_sigmas" in options:
                continue
            found[f"diffusers {name.removesuffix('Scheduler')}, {label}"] = getattr(diffusers, name).from_config(config, **options)
    for grid in GRIDS:
        for solver in ("unipc-2", "unipc-3"):
            found[f"{solver}, {grid}"] = FewstepScheduler.from_config(config, solver=solver, grid=grid)
        found[f"{TWO}, {grid}"] = FewstepScheduler.from_config(config, solver=TWO, statistics=str(runs / "statistics"), grid=grid)
    found["unipc-2, optimized"] = FewstepScheduler.from_sampler(runs / "optimized" / "unipc-2", config)
    found["fitted"] = FewstepScheduler.from_sampler(runs / "fitted", config)
    return found


GRIDS = ("angle", "karras", "logsnr", "quadratic", "trailing")
SPACINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
}


def prepare(pipe: Any, runs: Path) -> None:
    """Statistics, optimised schedules and fitted samplers of the pipeline's own network at its guidance; what is there stays."""
    model = fewstep.from_pipeline(pipe, PROMPTS)
    say = {"command": "python benchmarks/pipeline_study.py"}
    fewstep.calibrate(model, out=runs / "statistics", guidance=GUIDANCE, **say)
    fewstep.optimize(model, "unipc-2", STEPS, out=runs / "optimized", guidance=GUIDANCE, **say)
    note = lambda done, text: print(text, flush=True)  # noqa: E731
    fewstep.fit(model, STEPS, out=runs / "fitted", guidance=GUIDANCE, on_progress=note, **say)


def draw(pipe: Any, chosen: dict[str, Tensor], path: Path) -> None:
    """Ten prompts along, schedulers down."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(chosen), 10, figsize=(9, 0.98 * len(chosen)), gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for row, (name, latents) in zip(axes, chosen.items(), strict=True):
        with torch.no_grad():
            pictures = pipe.vae.decode(latents[:10] / pipe.vae.config.scaling_factor).sample
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow((picture.mean(0) / 2 + 0.5).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/pipeline"))
    args = parser.parse_args()
    pipe = pipeline(args.runs / "model")
    prepare(pipe, args.runs)
    config = pipe.scheduler.config
    exact = latents_of(pipe, diffusers.UniPCMultistepScheduler.from_config(config, timestep_spacing="linspace"), REFERENCE)
    rows, shown = [], {}
    for steps in STEPS:
        for name, scheduler in competitors(config, args.runs, steps).items():
            made = latents_of(pipe, scheduler, steps)
            rows.append({"scheduler": name, "steps": steps, "rmse": float((made - exact).square().mean().sqrt())})
            shown[name, steps] = made
            print(rows[-1], flush=True)
    about = {"num": NUM, "guidance": GUIDANCE, "reference_steps": REFERENCE, "latent_std": float(exact.std()), "torch": torch.__version__}
    write_whole(args.out, (json.dumps({**about, "diffusers": diffusers.__version__, "rows": rows}, indent=1) + "\n").encode())
    best = {key: min((r for r in rows if key in r["scheduler"] and r["steps"] == 5), key=lambda r: r["rmse"])["scheduler"] for key in BEST}
    draw(pipe, {f"{REFERENCE} steps": exact} | {f"{name}\n5 steps": shown[name, 5] for name in best.values()}, args.picture)


BEST = ("DDIM", "DPMSolverMultistep", "UniPCMultistep", "fitted")  # the rows of the picture: each on its best spacing

if __name__ == "__main__":
    main()
