"""What a solver of one's own has to define, said where it is made."""

from dataclasses import dataclass

import pytest
import torch
from tests.problems import Tanh

from fewstep import Sampler, Solver, SolverError, VPLinear, sample


@dataclass(frozen=True)
class TwoStep(Solver):
    """Adams-Bashforth in the noise level, as docs/extending.md could have it."""

    gain: float = 0.5
    order = 2
    memory = 2

    def update(self, nodes, i, anchor, x, history):
        ratio, step = nodes.first_order(i, i + 1)
        towards = history[0] if i == 0 else (1 + self.gain) * history[0] - self.gain * history[1]
        return anchor, ratio * x + step * towards


def without(*names):
    body = {"order": 1, "memory": 1, "update": lambda self, nodes, i, anchor, x, history: (anchor, x)}
    return type("Mine", (Solver,), {key: value for key, value in body.items() if key not in names})


@pytest.mark.parametrize("missing", ["update", "order", "memory"])
def test_each_of_the_three_is_named(missing):
    with pytest.raises(SolverError, match=f"Mine is no solver yet: define {missing} in it .docs/extending.md has a whole one"):
        without(missing)()
    with pytest.raises(SolverError, match="define update and order and memory in it"):
        without("update", "order", "memory")()
    assert without()().order == 1


def test_they_may_be_attributes_fields_or_properties():
    class Properties(TwoStep):
        @property
        def order(self):
            return 3

    @dataclass(frozen=True)
    class Fields(TwoStep):
        order: int = 4

    assert (TwoStep().order, Properties().order, Fields().order, Fields(order=5).order) == (2, 3, 4, 5)


def test_a_solver_of_ones_own_runs():
    sampler = Sampler.build(TwoStep(gain=0.25), "logsnr", VPLinear(), nfe=5)
    assert sampler.options == {"gain": 0.25} and sampler.name == "TwoStep" and sampler.nfe == 5
    x = torch.ones(2, 3)
    ours = sample(Tanh(), TwoStep(gain=0.25), x, nfe=5, grid="logsnr")
    assert torch.equal(ours, sample(Tanh(), sampler, x)) and not torch.equal(ours, sample(Tanh(), "ddim", x, nfe=5, grid="logsnr"))


def test_an_unknown_option_is_pythons_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gian'"):
        TwoStep(gian=1)
