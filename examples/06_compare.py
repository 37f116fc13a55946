"""Compare anything with anything: names, solvers with options, samplers, and functions of k-diffusion's signature.

All start from the same noises, and are measured against the exact solution of the sampling ODE.
"""

import fewstep


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler in k-diffusion's convention: ``x = image + sigma * noise``, and ``model(x, sigma)`` is the denoised image."""
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    return x


model = fewstep.load_model("digits-edm")
mine = fewstep.Sampler.build("deis-3", fewstep.make_grid("karras:rho=5", model.schedule, 5), model.schedule, card={"name": "mine"})

table = fewstep.compare(
    model,
    ["unipc-2", "DPM++ 2M", fewstep.make_solver("unipc-2", weights="bh1"), "fitted", mine, euler],
    nfe=[5, 8],
    grid="angle",
    num=64,
    out="bench",  # rows that are there already are not run again
)
print(table)
best = table.best(5)
print(f"least error with 5 evaluations: {best.solver}, {best.rmse:.4f}, 95 % interval {best.rmse_ci[0]:.4f} to {best.rmse_ci[1]:.4f}")
print("the whole report:", table.to_html("bench/report.html"), "and for a spreadsheet:", table.to_csv("bench/results.csv"))
