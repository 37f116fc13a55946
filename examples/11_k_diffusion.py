"""Sample in k-diffusion's convention: ``model(x, sigma)`` is the denoised image, ``x`` the image with noise of level ``sigma``.

`sample_fewstep` goes where `sample_dpmpp_2m` was, with any solver of this library or a saved sampler.
"""

import torch

import fewstep
from fewstep.integrations.kdiffusion import sample_fewstep, sigmas_for

digits = fewstep.load_model("digits-edm")
labels = torch.arange(8)


def model(x, sigma, labels):
    """Yours. The noise law of EDM's models is k-diffusion's, so this one is called as it is."""
    return digits(x, sigma.double(), labels)


start = fewstep.seeded_noise(range(8), (1, 8, 8))
with torch.no_grad():
    sigmas = sigmas_for("karras", 64, sigma_min=0.002, sigma_max=80)
    exact = sample_fewstep(model, sigmas[0] * start, sigmas, extra_args={"labels": labels}, solver="unipc-3")
    for solver in ("euler", "dpm-solver-pp-2m", "unipc-2"):
        sigmas = sigmas_for("angle", 6, schedule=digits.schedule)
        images = sample_fewstep(model, sigmas[0] * start, sigmas, extra_args={"labels": labels}, solver=solver)
        print(f"{solver}, 6 evaluations: error {(images - exact).square().mean().sqrt():.4f}")

    digits.fitted(6).save("my-sampler")  # a fitted sampler brings its own noise levels
    levels = sigmas_for(fewstep.Sampler.load("my-sampler"))
    images = sample_fewstep(model, levels[0] * start, levels, extra_args={"labels": labels}, sampler="my-sampler")
    print(f"fitted, 6 evaluations: error {(images - exact).square().mean().sqrt():.4f}")
