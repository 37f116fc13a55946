"""Train the noise-conditional classifier of the digits that ships with the package; about a minute.

    python benchmarks/train_digits_classifier.py

Four fifths of scikit-learn's digits train it, the rest measure it; the card beside the weights says how well it does at a few levels.
"""

from __future__ import annotations

import math

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from fewstep.data.images import load_images
from fewstep.models.classifier import CLASSIFIERS, NoisyClassifier
from fewstep.runtime.artifact import write_whole

STEPS, BATCH, SEED = 4000, 256, 0
LOW, HIGH = 0.02, 100.0  # noise levels sigma/alpha
LEVELS = (0.05, 0.5, 1.0, 2.0, 5.0)
PLACE = CLASSIFIERS["digits"]

CARD = """# digits-classifier

A classifier of scikit-learn's digits (8x8) under Gaussian noise, told its level, with {size:,} parameters: for guidance. Trained on
{train} images at levels sigma/alpha from {low:g} to {high:g}; accuracy on the other {held} (drawn with seed {seed}):

| sigma/alpha | accuracy |
|---|---|
{rows}

Made by

```
python benchmarks/train_digits_classifier.py
```
"""


def main() -> None:
    torch.manual_seed(SEED)
    digits = load_images("digits")
    assert digits.labels is not None
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(digits.x), generator=generator)
    train, held = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    network = NoisyClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    for step in range(STEPS):
        index = train[torch.randint(len(train), (BATCH,), generator=generator)]
        x = digits.dequantised(index, generator)
        s = torch.exp(math.log(LOW) + math.log(HIGH / LOW) * torch.rand(BATCH, generator=generator))
        noisy = x + s[:, None, None, None] * torch.randn(x.shape, generator=generator)
        loss = cross_entropy(network(noisy, s), digits.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}/{STEPS}: loss {loss.item():.4f}", flush=True)
    network.eval()
    rows = []
    with torch.no_grad():
        for level in LEVELS:
            x, s = digits.x[held].repeat(8, 1, 1, 1), torch.full((8 * len(held),), level)
            found = network(x + level * torch.randn(x.shape, generator=generator), s).argmax(1)
            rows.append(f"| {level:g} | {(found == digits.labels[held].repeat(8)).float().mean().item():.1%} |")
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    write_whole(PLACE / "classifier.safetensors", lambda path: save_file(weights, path))
    size = sum(p.numel() for p in network.parameters())
    card = CARD.format(size=size, train=len(train), held=len(held), rows="\n".join(rows), seed=SEED, low=LOW, high=HIGH)
    write_whole(PLACE / "README.md", card.encode())
    print("\n".join(rows))


if __name__ == "__main__":
    main()
