"""Drive the steps yourself: watch them, change the state between two evaluations, stop and go on later.

`fewstep.steps` is the loop that `fewstep.sample` runs. It yields after each evaluation.
"""

import torch

import fewstep

model = fewstep.load_model("digits-edm")
sampler = fewstep.Sampler.build("dpm-solver-pp-2m", "angle", model.schedule, nfe=10)
seeds, labels = range(4), torch.tensor([3, 3, 8, 8])
nodes = sampler.tableau.nodes
x_T = fewstep.start_noise(nodes, seeds, model.shape)

with torch.no_grad():
    for step in fewstep.steps(model, sampler.tableau, x_T, labels):
        print(f"evaluation {step.i} at noise level {step.t:.4g}: the estimate has standard deviation {step.x0.std():.3f}")
    images = step.x_next

    # Stop after the fourth evaluation and go on from there, twice: as before, and with other labels.
    for step in fewstep.steps(model, sampler.tableau, x_T, labels):
        if step.i == 3:
            break
    point = (step.i + 1, step.state)
    *_, same = fewstep.steps(model, sampler.tableau, x_T, labels, resume=point)
    *_, other = fewstep.steps(model, sampler.tableau, x_T, labels.flip(0), resume=point)
    print("resumed, to the bit:", bool((same.x_next == images).all()))
    print(f"with other labels from there on: RMSE {(other.x_next - images).square().mean().sqrt():.3f}")

    # Inpainting: the upper half of each image is given. After each evaluation it is put back, with the noise of the next level.
    given, noise = images[[0, 0, 2, 2]], fewstep.seeded_noise(range(100, 104), model.shape)

    def upper_half(step):
        x = step.x_next.clone()
        level = float(nodes.sigma[step.i + 1]) if step.i + 1 < sampler.nfe else 0.0
        x[..., :4, :] = (given + level * noise)[..., :4, :]
        return x

    *_, last = fewstep.steps(model, sampler.tableau, x_T, labels, edit=upper_half)
    painted = last.x_next
for half, part in {
    "upper, given": painted[..., :4, :] - given[..., :4, :],
    "lower, painted": painted[..., 4:, :] - given[..., 4:, :],
}.items():
    print(f"{half}: RMSE to the image that the upper half is from {part.square().mean().sqrt():.3f}")
