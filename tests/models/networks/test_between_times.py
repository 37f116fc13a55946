"""Networks of whole times, asked between them: by learners interpolated, by samplers refused."""

from dataclasses import replace

import pytest
import torch
from tests.own_networks import LAW, TIMES, table_model
from torch import nn

import fewstep
from fewstep import DiscreteVP, Model, ModelError, VPLinear
from fewstep.learn.teacher.jvp import JVP_METHODS
from fewstep.models.problem import Problem

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Table(nn.Module):
    """Answers the entry of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TIMES, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.table(t) + 0.1 * x


class Counted(Table):
    """Remembers the times that it was asked at, too; in PyTorch 2.6 they cannot be read inside a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = list[list[int]]()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.asked.append(t.tolist())
        return super().forward(x, t)


def counted(network: type[Table] = Counted, **given: object) -> Model:
    torch.manual_seed(0)
    return Model(network().eval(), LAW, "v", **{"shape": (4,), "time_dtype": torch.int64, **given})


def time(*values: float) -> torch.Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def test_at_its_own_times_a_network_answers_as_it_is_in_one_evaluation() -> None:
    model = counted()
    for t in (time(7), time(0, 7, TIMES - 1)):
        expected = model(X, t)
        model.network.asked.clear()
        assert torch.equal(model.at_any_time()(X, t), expected)
        assert len(model.network.asked) == 1


def test_between_two_times_the_output_is_interpolated() -> None:
    model, table = counted(), counted().network.table.weight
    anytime, t = model.at_any_time(), time(7.25)
    alpha, sigma = (getattr(LAW, name)(t).float() for name in ("alpha", "sigma"))
    output = 0.75 * table[7] + 0.25 * table[8] + 0.1 * X
    torch.testing.assert_close(anytime(X, t), alpha * X - sigma * output)
    assert model.network.asked == [[7, 7, 7], [8, 8, 8]]
    each = anytime(X, time(7.25, 0.0, TIMES - 1))  # of a batch each at its own
    torch.testing.assert_close(each[0], anytime(X, t)[0])
    torch.testing.assert_close(each[1:], model(X, time(7, 0, TIMES - 1))[1:])


def test_it_is_continuous_and_its_slope_is_that_of_the_interpolation() -> None:
    model = counted(Table).at_any_time()
    near = [model(X, time(8 + e)) for e in (-2e-3, 2e-3)]
    torch.testing.assert_close(*near, rtol=0, atol=0.02)
    function, t = lambda x, t: model(x, t), time(8.0)
    for name in ("forward", "reverse"):  # at a time of the table too, where the value needs one evaluation alone
        slope = JVP_METHODS[name](function, (X, t), (torch.zeros_like(X), torch.ones_like(t)), 1.0)[1]
        h = 0.1
        torch.testing.assert_close(slope, (model(X, t + h) - model(X, t)) / h, rtol=0.05, atol=0.02)


def test_the_last_time_of_a_table_is_not_exceeded() -> None:
    model = counted().at_any_time()
    t = time(TIMES - 1.0).requires_grad_()
    (slope,) = torch.autograd.grad(model(X, t).sum(), t)
    assert bool(torch.isfinite(slope)) and max(max(asked) for asked in model.network.asked) == TIMES - 1


@pytest.mark.parametrize("model", [counted(time_dtype=None), counted(time_dtype=torch.float64)])
def test_a_network_of_any_times_is_left_as_it_is(model: Model) -> None:
    assert model.at_any_time() is model


def test_guidance_is_of_the_interpolated_network() -> None:
    model = table_model()
    problem, x, labels = Problem(model, 2.0), torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
    null = torch.tensor([3, 3])
    one, none = (model.at_any_time()(x, time(5.5), y) for y in (labels, null))
    torch.testing.assert_close(problem.teacher(x, time(5.5), labels), none + 2 * (one - none))
    with pytest.raises(ModelError, match="toy takes whole times, but is asked at 5.5: use a law of its own times"):
        problem.denoiser(x, time(5.5), labels)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": VPLinear(), "time": lambda t: (1000 * t).round()}, "a VPLinear has others between them: use the law of its table"),
        ({"time": lambda t: t / 2}, "is asked at 0, 0.5|is asked at 0: .* all times of its table have to be whole"),
    ],
)
def test_a_law_without_whole_times_is_refused(change: dict, says: str) -> None:
    model = replace(counted(), **change)
    with pytest.raises(ModelError, match=says):
        fewstep.fit(model, nfe=2)


def test_a_table_that_is_turned_round_is_one_too() -> None:
    model = counted(time=lambda t: TIMES - 1 - t)
    assert fewstep.sample(model, "unipc-2", nfe=4, seeds=[0]).shape == (1, 4)
    model.network.asked.clear()
    model.at_any_time()(X, time(0.5))
    assert model.network.asked == [[TIMES - 2] * 3, [TIMES - 1] * 3]


# -- samplers --------------------------------------------------------------------------------------------------------


def test_samplers_ask_at_times_of_the_table_alone() -> None:
    """Whatever the spacing, the sampler's noise levels are those that the network is told."""
    model, told = counted(), list[float]()
    for grid in ("uniform", "angle", "karras", "logsnr", "quadratic", "trailing", fewstep.TimeGrid([49.0, 20.4, 3.3, 0.0])):
        model.network.asked.clear()
        told.clear()
        options = {} if isinstance(grid, fewstep.TimeGrid) else {"nfe": 3}
        fewstep.sample(model, "unipc-2", seeds=[0], grid=grid, observe=lambda step: told.append(float(step.t)), **options)
        assert [asked[0] for asked in model.network.asked] == told


def test_a_solver_that_asks_within_its_steps_is_refused() -> None:
    with pytest.raises(
        ModelError, match="takes whole times, but is asked at .*: .* a solver that evaluates at the times of its grid alone"
    ):
        fewstep.sample(counted(), "dpm-solver-2s", nfe=4, seeds=[0])
    table = fewstep.compare(counted(), ["ddim", "dpm-solver-2s"], nfe=[4], grid="uniform", num=4)
    failed = {row["solver"]: row.get("failed") for row in table.results["rows"]}
    assert failed["ddim"] is None and "takes whole times" in failed["dpm-solver-2s"]


def test_noise_levels_of_ones_own_are_moved_to_the_table() -> None:
    model = counted()
    grid = fewstep.TimeGrid.from_sigmas(model.schedule, [10.0, 1.0, 0.1])
    fewstep.sample(model, "ddim", seeds=[0], grid=grid)
    assert len(model.network.asked) == 2


@pytest.mark.parametrize("law", [LAW.to_clean(), DiscreteVP.linear(TIMES).zero_terminal_snr()])
@pytest.mark.every(2)
def test_other_ends_of_a_table(law: DiscreteVP) -> None:
    model = replace(counted(), schedule=law)
    assert bool(torch.isfinite(fewstep.sample(model, "unipc-2", nfe=4, seeds=[0])).all())
    config = fewstep.FitConfig(num=8, held_out=4, levels=6, noises=4, iterations=1, batch=4)
    assert bool(torch.isfinite(fewstep.sample(model, fewstep.fit(model, nfe=3, config=config)[3], seeds=[0])).all())
