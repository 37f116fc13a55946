"""Batches that several devices share, as far as one machine can tell: the answers are those of one."""

import pytest
import torch
from tests.problems import DSNO, mixture, noise, toy

import fewstep
from fewstep import FewstepError, ModelError, ParallelConfig, VPLinear, load_model
from fewstep.models.guidance import Wrapped
from fewstep.models.spread import OverDevices, OverProcesses, over_devices

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_answers_are_those_of_one(count):
    rows = list[int]()

    def answer(x, t, cond):
        rows.append(len(x))
        return mixture(VPLinear())(x, t) + cond["shift"]

    one = Wrapped(VPLinear(), answer)
    x, cond, t = noise(count, 2), {"shift": noise(count, 2), "word": "all"}, torch.linspace(0.2, 0.9, count, dtype=torch.float64)
    for split in (OverDevices([one, one], [DEVICE, DEVICE]), OverProcesses(one)):
        rows.clear()
        made = split(x, t, cond)
        assert split.schedule is one.schedule and sum(rows) == count and max(rows, default=0) <= (count + 1) // 2 or len(rows) == 1
        if count:
            torch.testing.assert_close(made, one(x, t, cond), rtol=0, atol=1e-12)
            torch.testing.assert_close(split(x, t[0], cond), one(x, t[0], cond), rtol=0, atol=1e-12)
        assert made.shape == x.shape


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_model_is_copied_to_devices(guidance):
    model = load_model("digits-edm")
    spread = over_devices(model, guidance, ("cpu", "cpu:0"))  # another name, and so a copy
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor(1.0, dtype=torch.float64), torch.tensor([0, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(spread(x, t, labels), model.guided(guidance)(x, t, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sample_shares_its_rounds_among_devices():
    model = load_model("digits-edm")
    made = fewstep.sample(model, "ddim", nfe=12, seeds=range(2), parallel=ParallelConfig(tol=0, devices=("cpu", "cpu")))
    torch.testing.assert_close(made, fewstep.sample(model, "ddim", nfe=12, seeds=range(2)), rtol=0, atol=1e-4)


def test_what_cannot_be_spread_is_refused():
    devices = ParallelConfig(devices=("cpu", "cpu"))
    with pytest.raises(FewstepError, match="device 'cuda:9' cannot be used here"):
        fewstep.sample(toy(), "ddim", nfe=2, seeds=[1], parallel=ParallelConfig(devices=("cpu", "cuda:9")))
    with pytest.raises(ModelError, match="devices are for a Model"):
        fewstep.sample(mixture(VPLinear()), "ddim", noise(1, 2), nfe=2, parallel=devices)
    with pytest.raises(ModelError, match="a student makes each of its few jumps by one call"):
        fewstep.sample(load_model(DSNO), nfe=4, seeds=[1], parallel=devices)
    function = fewstep.Model(lambda x, t: x, VPLinear(), "sample", shape=(2,), identity="mine")
    with pytest.raises(ModelError, match="no model of a torch.nn.Module"):
        fewstep.sample(function, "ddim", nfe=2, seeds=[1], parallel=devices)
    with pytest.raises(FewstepError, match="parallel is a fewstep.ParallelConfig, got '8'"):
        fewstep.sample(toy(), "ddim", nfe=2, seeds=[1], parallel=8)
