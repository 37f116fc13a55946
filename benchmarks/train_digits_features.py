"""Train the digits feature network that ships with the package; about two minutes on two cores.

    python benchmarks/train_digits_features.py

Four fifths of scikit-learn's digits train it, the rest measure it; the card beside the weights says how well it does.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, pad

from fewstep.data.images import load_images
from fewstep.evaluate.metrics.features import WEIGHTS, DigitsFeatures
from fewstep.runtime.artifact import write_whole

EPOCHS, BATCH, SEED = 60, 64, 0

CARD = """# digits-features

A classifier of scikit-learn's digits (8x8) with {size:,} parameters whose 32 last hidden numbers serve as features for Frechet
distances. Trained on {train} images, held-out accuracy {accuracy:.2%} on the other {held} (drawn with seed {seed}). Made by

```
python benchmarks/train_digits_features.py
```
"""


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images moved by one pixel in some direction."""
    dy, dx = (int(v) for v in torch.randint(-1, 2, (2,), generator=generator))
    moved = pad(images, (1, 1, 1, 1), value=-1.0)[:, :, 1 + dy : 9 + dy, 1 + dx : 9 + dx]
    keep = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(keep, images, moved)


def main() -> None:
    torch.manual_seed(SEED)
    digits = load_images("digits")
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(digits.x), generator=generator)
    train, held = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    network = DigitsFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        index = train[torch.randint(len(train), (BATCH,), generator=generator)]
        x = shifted(digits.dequantised(index, generator), generator)
        loss = cross_entropy(network.head(network(x)), digits.labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}", flush=True)
    network.eval()
    with torch.no_grad():
        accuracy = (network.labels(digits.x[held]) == digits.labels[held]).float().mean().item()
    write_whole(WEIGHTS / "features.safetensors", lambda path: save_file(network.state_dict(), path))
    size = sum(p.numel() for p in network.parameters())
    card = CARD.format(size=size, train=len(train), held=len(held), accuracy=accuracy, seed=SEED)
    write_whole(WEIGHTS / "README.md", card.encode())
    print(f"held-out accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
