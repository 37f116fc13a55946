"""Sample in parallel: evaluate several steps at once, for the sequential sample in a quarter of the calls.

It pays where one call leaves the device idle. The plan says whether that is so here.
"""

import fewstep
from fewstep.models.parallel_plan import plan_parallel

model = fewstep.load_model("digits-edm")
sampler = fewstep.Sampler.build("ddim", "karras", model.schedule, nfe=64)
x, labels = fewstep.start_noise(sampler.tableau.nodes, range(4), model.shape), model.labels(range(4))
print(f"expected on this device: {plan_parallel(model, sampler, x, labels)}")

rounds = []
images = fewstep.sample(model, sampler, x, labels, parallel=fewstep.ParallelConfig(window=8), observe=rounds.append)
exact = fewstep.sample(model, sampler, x, labels)
for one in rounds[::5]:
    print(f"round {one.i}: {one.accepted} of 64 evaluations have settled, RMSE {(one.x - exact).square().mean().sqrt():.4f}")
print(f"{len(rounds)} calls instead of 64, RMSE to the sequential sample {(images - exact).square().mean().sqrt():.4f}")
