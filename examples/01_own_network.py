"""Sample a network of your own: three facts and a shape make it a model.

The network here is a small perceptron that learns points on a circle in a few seconds. Yours is whatever you trained.
"""

import math

import torch

import fewstep


class Perceptron(torch.nn.Module):
    """Predicts the velocity ``noise - x0`` at the points ``x [B, 2]`` and the times ``t [B]``, 0 to 1."""

    def __init__(self, width: int = 64):
        super().__init__()
        layers = (torch.nn.Linear(4, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 2))
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * math.pi / 2
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], 1))


def train(net: torch.nn.Module, schedule: fewstep.NoiseSchedule, steps: int = 2000) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        turn, t = 2 * math.pi * torch.rand(512), torch.rand(512)
        x0, noise = torch.stack([turn.cos(), turn.sin()], 1), torch.randn(512, 2)
        x_t = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * noise
        loss = (net(x_t, t) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


torch.manual_seed(0)
net, schedule = Perceptron(), fewstep.RectifiedFlow()
train(net, schedule)

model = fewstep.Model(net, schedule, "flow", shape=(2,), name="circle")
print(model)
for solver in ("ddim", "unipc-2"):
    for nfe in (5, 10, 50):
        points = fewstep.sample(model, solver, nfe=nfe, seeds=range(1000))
        radius = points.norm(dim=1)
        print(f"{solver}, {nfe} evaluations: radius {radius.mean():.3f}, standard deviation {radius.std():.3f}")
print(fewstep.compare(model, ["ddim", "unipc-2", "deis-3"], nfe=[5, 10], grid="angle", num=256))
