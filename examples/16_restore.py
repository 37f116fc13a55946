"""Fill in a hole, enlarge, and deblur with one model, in ten network evaluations a sample and without back-propagation."""

import torch

import fewstep
from fewstep.inverse.measurements import Average, CircularBlur, Mask

model = fewstep.load_model("digits-edm")
picture = fewstep.sample(model, "unipc-2", nfe=8, seeds=[7])

hole = torch.ones(1, 8, 8)
hole[:, 2:6, 2:5] = 0
kernel = torch.tensor([1.0, 2.0, 1.0])
kernel = kernel[:, None] * kernel / 16

for name, operator, noise in (("a hole", Mask(hole), 0.0), ("half the size", Average(2), 0.05), ("blurred", CircularBlur(kernel), 0.05)):
    clean = operator(picture)[0]
    y = clean + noise * fewstep.seeded_noise([1], clean.shape)[0]
    found = fewstep.restore(model, operator, y, noise, nfe=10, seeds=range(8))
    error = (found.mean - picture[0]).square().mean().sqrt()
    print(f"{name}: RMSE of the mean {error:.3f}, mean spread of the samples {found.spread.mean():.3f}")

print(f"evaluations a sample: {found.card['evaluations']}, backward passes: {found.card['backward passes']}")
