"""A ring of narrow modes in the plane: a model to distil in seconds, whose samples can be counted mode by mode."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from fewstep import Model, VarianceExploding

SPREAD = 0.7  # standard deviation of a coordinate of points on the unit circle
WIDE = 0.1  # of one of six modes; of more modes less, so that they stay as far apart
NEAR = 3  # widths within which a point belongs to its mode


class Ring(nn.Module):
    """A denoiser with EDM's preconditioning (arXiv 2206.00364, table 1), small enough to be a student and a fake too.

    The exact denoiser of the ring would be no network to begin a fake with: what a fake has to learn is where the generator's samples
    leave the ring, and there the exact one is wrong by far more than a small network beside it answers.
    """

    def __init__(self, modes: int, hidden: int = 96, octaves: int = 0) -> None:
        super().__init__()
        angle = torch.arange(modes) * 2 * torch.pi / modes
        self.width, self.octaves = 6 * WIDE / modes, octaves  # of sines of the state, which tell narrow modes apart
        self.register_buffer("modes", torch.stack([angle.cos(), angle.sin()], 1))
        layers = [nn.Linear(3 + 4 * self.octaves, hidden), *(nn.Linear(hidden, hidden) for _ in range(2)), nn.Linear(hidden, 2)]
        self.layers = nn.Sequential(*(part for layer in layers for part in (layer, nn.SiLU())))[:-1]

    def exact(self, x: Tensor, level: Tensor) -> Tensor:
        """Return ``E[x0 | x] [B, 2]`` of the ring for states ``x [B, 2]`` at noise levels ``[B, 1]``."""
        modes, spread = self.get_buffer("modes"), level.square() + self.width**2
        mean = (-(x[:, None] - modes).square().sum(2) / (2 * spread)).softmax(1) @ modes
        return mean + self.width**2 / spread * (x - mean)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ``x0 [B, 2]`` of states ``x [B, 2]`` at noise levels ``t [B]``."""
        level = t[:, None].float()
        size = (level.square() + SPREAD**2).sqrt()
        turns = (x / size)[:, :, None] * 2.0 ** torch.arange(1, self.octaves + 1)
        waves = torch.cat([turns.sin(), turns.cos()], 2).flatten(1)
        out = self.layers(torch.cat([x / size, level.log() / 4, waves], 1))
        return SPREAD**2 / size.square() * x + level * SPREAD / size * out

    def points(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw points of the ring, ``[num, 2]``, as many of each mode."""
        modes = self.get_buffer("modes")
        return modes[torch.arange(num) % len(modes)] + self.width * torch.randn(num, 2, generator=generator)

    def counted(self, points: Tensor) -> tuple[Tensor, float]:
        """Return the share of points of each mode, ``[modes]``, and that of points within `NEAR` widths of one."""
        distance, nearest = torch.cdist(points, self.get_buffer("modes")).min(1)
        share = torch.bincount(nearest, minlength=len(self.get_buffer("modes"))) / len(points)
        return share, float((distance < NEAR * self.width).float().mean())


@cache
def ring_model(modes: int = 6, hidden: int = 96, octaves: int = 0, steps: int = 3000, batch: int = 512, lr: float = 2e-3) -> Model:
    """Return a ring as a model to distil: a network that learned the exact denoiser, in some seconds."""
    torch.manual_seed(0)
    ring, generator = Ring(modes, hidden, octaves), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(ring.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        level = torch.exp(-1.2 + 1.6 * torch.randn(batch, 1, generator=generator)).clamp(0.01, 20.0)
        x = ring.points(batch, generator) + level * torch.randn(batch, 2, generator=generator)
        weight = (level.square() + SPREAD**2).sqrt() / (level * SPREAD)
        loss = (weight * (ring(x, level[:, 0]) - ring.exact(x, level))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Model(ring.eval().requires_grad_(False), VarianceExploding(0.01, 20.0), "sample", shape=(2,), name=f"ring-{modes}")


def ring_data(modes: int = 6, num: int = 1200) -> Tensor:
    """Return points of a ring, ``[num, 2]``, as many of each mode."""
    return Ring(modes).points(num, torch.Generator().manual_seed(1))
