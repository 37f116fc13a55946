"""Image to image: start from a noised image instead of from noise, with the rest of a sampler.

How noisy decides how much stays. `Sampler.after(level)` puts the solver on the part of its grid below that noise level.
"""

import torch

import fewstep

model = fewstep.load_model("digits-edm")
sampler = fewstep.Sampler.build("unipc-2", "angle", model.schedule, nfe=12)
threes = fewstep.sample(model, sampler, seeds=range(16), cond=torch.full((16,), 3))  # the images to begin with
eights = torch.full((16,), 8)  # what they are to become

for level in (0.2, 0.5, 1.0, 2.0, 5.0):
    rest = sampler.after(level)
    nodes = rest.tableau.nodes
    noise = fewstep.seeded_noise(range(100, 116), model.shape)
    x = nodes.alpha[0] * threes + nodes.sigma[0] * noise
    images = fewstep.sample(model, rest, x.float(), cond=eights)
    moved = (images - threes).square().mean().sqrt()
    print(f"from noise level {nodes.sigma[0] / nodes.alpha[0]:.2f}, {rest.nfe} evaluations: RMSE to the image before {moved:.3f}")
