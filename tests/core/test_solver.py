"""What a solver of one's own has to define, said where it is made."""

from dataclasses import InitVar, dataclass

import numpy as np
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


def test_options_have_the_types_of_their_defaults():
    @dataclass(frozen=True)
    class Checked(TwoStep):
        count: int = 3
        above: InitVar[float] = 0.0

        def __post_init__(self, above):
            if not self.gain > above:  # compares numbers alone, since the types come first
                raise SolverError("gain is too small")

    assert Checked(gain=np.float32(2.0), count=np.int64(4)) == Checked(2.0, 4)
    assert type(TwoStep(gain=1).gain) is float and type(Checked(count=np.int64(4)).count) is int
    with pytest.raises(SolverError, match="gain is too small"):
        Checked(gain=1.0, above=2.0)
    for cls in (TwoStep, Checked):
        with pytest.raises(SolverError, match=f"option gain of {cls.__name__} is a number, got 'None'"):
            cls(gain=None)
    with pytest.raises(SolverError, match="option count of Checked is a whole number, got 2.5"):
        Checked(count=2.5)
