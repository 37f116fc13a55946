"""Find the noise levels at which a solver should evaluate a model, for each number of evaluations.

The solver keeps its formulas; only its grid is the model's own. The search here is a quick one.
"""

import torch

import fewstep

model = fewstep.load_model("digits-edm")
config = fewstep.OptimizeConfig(levels=16, num=8, noises=24, held_out=24, iterations=1)  # by default 128 levels and 1024 held out
samplers = fewstep.optimize(model, "unipc-2", nfe=6, config=config, out="grids")

for nfe, sampler in samplers.items():
    levels = torch.exp(-sampler.tableau.nodes.lam)
    print(f"{nfe} evaluations at noise levels", ", ".join(f"{level:.3g}" for level in levels))
images = fewstep.sample(model, samplers[6], seeds=range(4))
print(f"{len(images)} images of {tuple(images.shape[1:])}")
print(fewstep.compare(model, ["unipc-2", samplers], nfe=6, num=64))
