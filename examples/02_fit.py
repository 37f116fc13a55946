"""Fit a sampler of its own to a model: less error than any hand-made solver with as many evaluations.

A fit needs no data and trains no network. The configuration here is a quick one; leave it out for your own model.
"""

import fewstep

model = fewstep.load_model("digits-edm")
config = fewstep.FitConfig(num=64, held_out=64, noises=32, levels=20, iterations=1)  # by default 1024 trajectories and 512 held out
samplers = fewstep.fit(model, nfe=5, config=config, out="fitted-digits")

for nfe, sampler in samplers.items():
    ours, by_hand = sampler.card["rmse"]
    print(f"{nfe} evaluations: error {ours:.4f}; of {sampler.card['best_hand_made']}, the best by hand, {by_hand:.4f}")

images = fewstep.sample(model, samplers[5], seeds=range(4))
again = fewstep.sample(model, fewstep.Sampler.load("fitted-digits/nfe-05"), seeds=range(4))  # as saved: JSON and safetensors
print(f"{len(images)} images of {tuple(images.shape[1:])}, the same from disk: {bool((images == again).all())}")
print(fewstep.compare(model, ["ddim", "unipc-2", samplers], nfe=5, num=64))
