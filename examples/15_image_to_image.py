"""Image to image by a strength that is a noise level: the same start for any solver, grid and number of evaluations.

`strength` is the share of noise in the start, `sigma / (alpha + sigma)`. All evaluations are made below that level.
"""

import torch

import fewstep
from fewstep.sampling.start import level_of

model = fewstep.load_model("digits-edm")
threes = fewstep.sample(model, "unipc-2", nfe=12, seeds=range(16), cond=torch.full((16,), 3))  # the images to begin with
eights = torch.full((16,), 8)  # what they are to become
seeds = range(100, 116)

for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
    images = fewstep.sample(model, "unipc-2", nfe=6, seeds=seeds, cond=eights, x0=threes, strength=strength)
    moved = (images - threes).square().mean().sqrt()
    print(f"strength {strength}: noise level {level_of(strength):.2f}, RMSE to the image before {moved:.3f}")

for solver, grid, nfe in (("ddim", "karras", 12), ("heun", "uniform", 8), ("unipc-2", "optimized", 6), ("fitted", None, 5)):
    seen: list[fewstep.Step] = []
    fewstep.sample(model, solver, nfe=nfe, grid=grid, seeds=seeds, cond=eights, x0=threes, strength=0.3, observe=seen.append)
    print(f"{solver} on {grid or 'its own levels'}: {len(seen)} evaluations from t = {float(seen[0].t):.3f}")
