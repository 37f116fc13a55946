"""Which grid is safe where none is named: networks that predict noise on a table of times, by common solvers on every grid.

python -m benchmarks.default_grid --data runs/cifar10/cifar10-16-train.npz --out benchmarks/results/default_grid.json

The networks are digits-ddpm, the small Stable Diffusion of ``pipeline_study.py`` with and without guidance, and three that are trained
here first (``runs/default-grid``, some minutes each; they are kept): pictures of 16x16 on linear and on cosine betas, and one that
was trained for a tenth of the steps. A row is the RMSE to 200 steps of unipc-3 on uniform times, and the standard deviation of the
samples. For contrast: digits-edm, whose network predicts a preconditioned image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from benchmarks.pipeline_study import GUIDANCE, PROMPTS, pipeline
from torch import Tensor

import fewstep
from fewstep.data.images import load_images
from fewstep.runtime.artifact import write_whole

GRIDS = ("angle", "logsnr", "karras", "quadratic", "uniform", "trailing")
SOLVERS = ("ddim", "unipc-2", "unipc-3", "dpm-solver-pp-2m", "deis-3", "ipndm")
NFE, NUM, REFERENCE = (4, 5, 8, 12, 20), 128, 200
BATCH, LR = 64, 2e-3
TRAINED = {"linear": ("linear", 2000), "cosine": ("squaredcos_cap_v2", 2000), "barely-trained": ("linear", 200)}


def trained(folder: Path, betas: str, steps: int, pictures: Tensor) -> fewstep.Model:
    """A diffusers pipeline of 16x16 pictures, loaded from its folder; trained first if it is not there."""
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        channels = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        unet: Any = diffusers.UNet2DModel(sample_size=16, in_channels=3, out_channels=3, **channels, **blocks)
        law, draw = diffusers.DDPMScheduler(beta_schedule=betas), torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(unet.parameters(), LR)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps)
        for step in range(steps):
            x, t = pictures[torch.randint(len(pictures), (BATCH,), generator=draw)], torch.randint(1000, (BATCH,), generator=draw)
            noise = torch.randn(x.shape, generator=draw)
            loss = (unet(law.add_noise(x, noise, t), t).sample - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            if step % 100 == 0:
                print(f"{folder.name} {step} of {steps}: {loss.item():.4f}", flush=True)
        diffusers.DDPMPipeline(unet, law).save_pretrained(folder)
    return fewstep.load_model(folder)


def rows_of(name: str, model: fewstep.Model, guidance: float | None) -> list[dict[str, Any]]:
    """A row for each solver, grid and number of evaluations."""

    def made(solver: str, grid: str, nfe: int) -> Tensor:
        return fewstep.sample(model, solver, nfe=nfe, grid=grid, seeds=range(NUM), guidance=guidance)

    exact, rows = made("unipc-3", "uniform", REFERENCE), list[dict[str, Any]]()
    about = {"model": name, "reference_std": float(exact.std())}
    for nfe in NFE:
        for solver in SOLVERS:
            for grid in GRIDS:
                if grid == "trailing" and model.schedule.times is None:
                    continue
                row = {**about, "nfe": nfe, "solver": solver, "grid": grid}
                try:
                    x = made(solver, grid, nfe)
                except fewstep.GridError as error:  # two steps on one entry of the table
                    rows.append({**row, "refused": str(error)})
                    continue
                rows.append({**row, "rmse": float((x - exact).square().mean().sqrt()), "std": float(x.std())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    pictures = load_images(args.data).x  # [n, 3, 16, 16]: `python -m benchmarks.cifar10.data` makes them
    models: dict[str, tuple[fewstep.Model, float | None]] = {"digits-ddpm": (fewstep.load_model("digits-ddpm"), None)}
    for name, (betas, steps) in TRAINED.items():
        models[name] = trained(args.runs / "default-grid" / name, betas, steps, pictures), None
    latents = fewstep.from_pipeline(pipeline(args.runs / "pipeline" / "model"), PROMPTS)
    models["text-to-image"] = latents, 1.0
    models[f"text-to-image, guidance {GUIDANCE:g}"] = latents, GUIDANCE
    models["digits-edm"] = fewstep.load_model("digits-edm"), None
    rows = list[dict[str, Any]]()
    for name, (model, guidance) in models.items():
        rows += rows_of(name, model, guidance)
        print(f"{name}: {len(rows)} rows", flush=True)
    about = {"num": NUM, "reference_steps": REFERENCE, "torch": torch.__version__}
    write_whole(args.out, (json.dumps({**about, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
