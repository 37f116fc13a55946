"""Add a solver: its update in the paper's notation is all there is to write.

This one is Adams-Bashforth of second order in the log-SNR, for the clean image.
"""

from dataclasses import dataclass

import torch

import fewstep


@dataclass(frozen=True)
class TwoStep(fewstep.Solver):
    """x_t = sigma_t/sigma_s x_s + alpha_t (1 - e^{-h}) (D_0 + (D_0 - D_1) / (2 r)), r = h_previous / h."""

    order = 2  # the test suite holds a solver of the library to it
    memory = 2  # how many past evaluations it reads

    def update(self, nodes, i, anchor, x, history):
        s, t = i, i + 1
        h = nodes.lam[t] - nodes.lam[s]
        D = history[0]  # evaluation i; history[1] is the one before
        if i > 0:
            r = (nodes.lam[s] - nodes.lam[s - 1]) / h
            D = D + (history[0] - history[1]) / (2 * r)
        x_t = nodes.sigma[t] / nodes.sigma[s] * x - nodes.alpha[t] * torch.expm1(-h) * D
        return x_t, x_t  # the state to step from later, and where to evaluate next


# Its order, on Gaussian data: of second order, half the step leaves a quarter of the error.
schedule = fewstep.VPLinear()
data = fewstep.GaussianDenoiser(schedule, torch.tensor([1.0, -0.5]), torch.tensor(0.3))
x_T = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
exact = fewstep.sample(data, "unipc-3", x_T, nfe=2000, grid="logsnr")
for nfe in (20, 40, 80):
    error = (fewstep.sample(data, TwoStep(), x_T, nfe=nfe, grid="logsnr") - exact).square().mean().sqrt()
    print(f"{nfe} evaluations: error {error:.2e}")

# It goes wherever a solver goes: sample, optimize, compare.
model = fewstep.load_model("digits-edm")
print(fewstep.compare(model, ["ddim", "dpm-solver-pp-2m", TwoStep()], nfe=[5, 8], grid="karras", num=64))
