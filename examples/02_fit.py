"""Fit a sampler of its own to a model: less error than any hand-made solver with as many evaluations.

A fit needs no data and trains no network. What it costs is a number of network evaluations that you name.
"""

import fewstep

model = fewstep.load_model("digits-edm")
config = fewstep.FitConfig(budget=3000)  # network evaluations in all; by default 30,000 for a network as small as this one
samplers = fewstep.fit(model, nfe=5, config=config, out="fitted-digits")

for nfe, sampler in samplers.items():
    ours, by_hand = sampler.card["rmse"]
    print(f"{nfe} evaluations: error {ours:.4f}; of {sampler.card['best_hand_made']}, the best by hand, {by_hand:.4f}")

images = fewstep.sample(model, samplers[5], seeds=range(4))
again = fewstep.sample(model, fewstep.Sampler.load("fitted-digits/nfe-05"), seeds=range(4))  # as saved: JSON and safetensors
print(f"{len(images)} images of {tuple(images.shape[1:])}, the same from disk: {bool((images == again).all())}")
print(fewstep.compare(model, ["ddim", "unipc-2", samplers], nfe=5, num=64))
