"""Operators of deepinv, where it can be imported (it needs torchvision): ours take them as they are."""

import pytest
import torch

import fewstep
from fewstep.inverse.measurements import Measurement, checked_noise, measurement_of

pytest.importorskip("torchvision")
physics = pytest.importorskip("deepinv.physics")


class Plain(Measurement):
    """The same operator without its closed forms."""

    def __init__(self, operator: object) -> None:
        self.operator = operator

    def __call__(self, x0: torch.Tensor) -> torch.Tensor:
        return self.operator.A(x0)

    def transpose(self, y: torch.Tensor) -> torch.Tensor:
        return self.operator.A_adjoint(y)


@pytest.mark.parametrize("name", ["inpainting", "downsampling"])
def test_operators_of_deepinv(name: str) -> None:
    noise = physics.GaussianNoise(0.05)
    made = {
        "inpainting": lambda: physics.Inpainting((1, 8, 8), mask=0.5, noise_model=noise),
        "downsampling": lambda: physics.Downsampling(img_size=(1, 8, 8), factor=2, filter="bilinear", noise_model=noise),
    }
    operator = made[name]()
    a, x = measurement_of(operator), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = a(x)
    assert checked_noise(None, operator) == pytest.approx(0.05)
    torch.testing.assert_close(a.lift(y, 0.3, 0.05), Plain(operator).lift(y, 0.3, 0.05), rtol=1e-4, atol=1e-4)
    found = fewstep.restore(fewstep.load_model("digits-edm"), operator, y[0], seeds=[0])
    assert float(found.misfit) < 2
