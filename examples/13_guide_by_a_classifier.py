"""Guide a model by the gradient of a classifier, split from it: kicks between the sampler's steps.

The model knows no classes. The classifier was trained on noisy digits.
"""

import torch

import fewstep
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.models.classifier import load_classifier

model = fewstep.load_model("digits-ddpm")
sampler = fewstep.Sampler.build("dpm-solver-pp-2m", "uniform", model.schedule, nfe=8)
log_prob = load_classifier().log_prob(model.schedule)
x = fewstep.start_noise(sampler.tableau.nodes, range(32), model.shape)
wanted = torch.arange(32) % 10

for scale in (0.0, 1.0, 4.0):
    images = fewstep.sample_split(model, sampler, x, log_prob, scale, guide=wanted)
    right = (load_digits_features().labels(images) == wanted).float().mean()
    print(f"scale {scale:g}: {right:.0%} are the digit that was asked for")
