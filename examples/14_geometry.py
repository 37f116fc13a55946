"""Look at a model's trajectories: where along the noise levels the image is decided, and what the last evaluations of a sampler buy.

`fewstep inspect MODEL --out DIR` makes a page of this.
"""

import fewstep
from fewstep.evaluate.diagnostics import geometry, stopping_error
from fewstep.evaluate.inspection import reference_of

model = fewstep.load_model("digits-edm")
reference = reference_of(model.schedule)
x, labels = fewstep.start_noise(reference.tableau.nodes, range(8), model.shape), model.labels(range(8))
found = geometry(model, reference, x, labels)
denoised, sampled = found.arrival(0.05)
print(f"the denoised image is within 0.05 of its end below noise level {denoised:.2f}, the state only below {sampled:.2f}")
print(f"on its way the denoised image goes {found.turning.mean():.2f} times the straight way")

exact = fewstep.sample(model, reference, x, labels)
for grid in ("karras", "angle"):
    sampler = fewstep.Sampler.build("unipc-2", grid, model.schedule, nfe=10)
    errors = stopping_error(model, sampler, x, exact, labels)
    print(f"unipc-2 on {grid}: RMSE after 8, 9 and 10 evaluations {errors[7]:.3f}, {errors[8]:.3f}, {errors[-1]:.3f}")
