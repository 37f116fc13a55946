"""The adapter: what reaches the network, and what comes back."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.problems import toy
from torch import Tensor, nn

from fewstep import EDM, DiscreteVP, Model, ModelError, VarianceExploding, sample
from fewstep.models.networks.calls import edm_time


class Recorder(nn.Module):
    """Answers half of its input and remembers how it was called."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor, time: Tensor, *cond: Tensor) -> Tensor:
        self.calls.append((x, time, *cond))
        return self.weight * x


def test_epsilon_is_undone_and_times_are_one_per_sample() -> None:
    network, schedule = Recorder(torch.float32), DiscreteVP.linear()
    denoiser, x = Model(network, schedule, "epsilon"), torch.randn(3, 1, 4, 4)
    t = torch.tensor(500.0, dtype=torch.float64)
    x0 = denoiser(x, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(x0, ((1 - 0.5 * sigma) / alpha).float() * x)
    assert network.calls[0][1].tolist() == [500.0] * 3
    torch.testing.assert_close(denoiser(x, t.expand(3)), x0)


def test_edm_scales_its_input_and_its_time() -> None:
    network = Recorder(torch.float32)
    denoiser = Model(network, VarianceExploding(), EDM(0.5), time=edm_time)
    x, t = torch.randn(2, 3), torch.tensor(2.0, dtype=torch.float64)
    denoiser(x, t, torch.tensor([7, 8]))
    seen, time, cond = network.calls[0]
    torch.testing.assert_close(seen, x / (4 + 0.25) ** 0.5)
    torch.testing.assert_close(time, torch.full((2,), torch.log(torch.tensor(2.0)).item() / 4))
    assert cond.tolist() == [7, 8]


def test_a_half_precision_network_sees_its_own_dtype_and_answers_in_that_of_the_state() -> None:
    network = Recorder(torch.bfloat16)
    x0 = Model(network, DiscreteVP.linear(), "v")(torch.randn(2, 3), torch.tensor(10.0, dtype=torch.float64))
    assert network.calls[0][0].dtype == torch.bfloat16 and network.calls[0][1].dtype == torch.float32 and x0.dtype == torch.float32


def test_a_network_that_refuses_or_answers_another_shape_is_named() -> None:
    t = torch.tensor(10.0, dtype=torch.float64)
    with pytest.raises(ModelError, match="refused a state of shape"):
        Model(nn.Linear(5, 5), DiscreteVP.linear(), "v", call=lambda net, x, time, cond: net(x))(torch.randn(2, 3), t)
    with pytest.raises(ModelError, match="pass call="):
        Model(lambda x, time: (x, time), DiscreteVP.linear(), "v")(torch.randn(2, 3), t)
    with pytest.raises(ModelError, match=r"answered shape \(2, 2\)"):
        Model(lambda x, time: x[:, :2], DiscreteVP.linear(), "v")(torch.randn(2, 3), t)


class Stored(nn.Module):
    """A network whose weights lie in several dtypes; it answers the state, and remembers what it was given."""

    def __init__(self, *dtypes: torch.dtype, sizes: tuple[int, ...] = (4, 100, 100)) -> None:
        super().__init__()
        for i, (dtype, size) in enumerate(zip(dtypes, sizes, strict=False)):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.zeros(size, dtype=torch.float32).to(dtype), requires_grad=False))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.given = x.dtype, time.dtype
        return x


WHOLE_TYPES = (torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("first", WHOLE_TYPES)
def test_weights_that_are_only_stored_in_a_dtype_do_not_decide_it(first: torch.dtype) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for others, expected in (((torch.bfloat16,), torch.bfloat16), ((), torch.float32), ((first, torch.float16), torch.float16)):
        network = Stored(first, *others)
        model = Model(network, DiscreteVP.linear(), "sample")
        x0 = model(x, torch.tensor(10.0, dtype=torch.float64))
        assert network.given[0] == expected and x0.dtype == torch.float32
        torch.testing.assert_close(x0, x, rtol=1e-2, atol=1e-2)


def test_the_dtype_is_that_of_most_weights_or_what_the_network_or_the_user_says() -> None:
    t, x = torch.tensor(10.0, dtype=torch.float64), torch.randn(2, 3)
    network = Stored(torch.float32, torch.bfloat16)  # as some networks keep their first layer
    model = Model(network, DiscreteVP.linear(), "sample")
    model(x, t)
    assert network.given == (torch.bfloat16, torch.float32)
    network.to(torch.float16)
    model(x, t)
    assert network.given[0] == torch.float16
    network.dtype = torch.float64
    model(x, t)
    assert network.given == (torch.float64, torch.float64)
    replace(model, dtype=torch.bfloat16)(x, t)
    assert network.given[0] == torch.bfloat16


def test_a_network_of_whole_times_is_given_them_and_no_others() -> None:
    table = nn.Embedding(1000, 3)
    model = Model(table, DiscreteVP.linear(), "v", call=lambda net, x, time, cond: net(time), time_dtype=torch.int64, shape=(3,))
    x = torch.zeros(2, 3)
    alpha, sigma = (getattr(model.schedule, name)(torch.tensor(10.0)) for name in ("alpha", "sigma"))
    torch.testing.assert_close(model(x, torch.tensor(10.0)), alpha * x - sigma * table.weight[10].expand(2, 3))
    torch.testing.assert_close(model(x, torch.tensor([10.0, 500.0]))[1], -model.schedule.sigma(torch.tensor(500.0)) * table.weight[500])
    with pytest.raises(ModelError, match=r"takes whole times, but is asked at 10.5: use a law of its own times, as DiscreteVP"):
        model(x, torch.tensor(10.5))
    assert sample(model, "unipc-2", nfe=5, seeds=[1]).shape == (1, 3)  # a grid of a discrete law is of its own times


@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (torch.uint8, 255), (torch.int16, 999)])
def test_a_time_that_its_dtype_does_not_hold_is_refused(dtype: torch.dtype, most: int) -> None:
    told = list[float]()
    model = Model(lambda x, t: told.append(float(t[0])) or x, DiscreteVP.linear(), "v", time_dtype=dtype)
    model(torch.zeros(2, 3), torch.tensor(float(most)))
    assert told == [most]
    if most < 999:
        with pytest.raises(ModelError, match=f"is asked at {most + 1}, which .*int8 does not hold: make it with a larger time_dtype"):
            model(torch.zeros(2, 3), torch.tensor([5.0, most + 1.0]).flip(0))


@pytest.mark.parametrize(
    "answer", [lambda x: (x,), lambda x: [x], lambda x: SimpleNamespace(sample=x), lambda x: SimpleNamespace(sample=(x,))]
)
def test_the_only_tensor_of_an_answer_is_it(answer: Callable[[Tensor], object]) -> None:
    x = torch.randn(2, 3)
    assert torch.equal(Model(lambda x, t: answer(x), DiscreteVP.linear(), "sample")(x, torch.tensor(10.0)), x)


@pytest.mark.parametrize(
    "time",
    [lambda t: 5.0, lambda t: t[None, None], lambda t: torch.zeros(7), lambda t: t + 0j, lambda t: None],
    ids=["float", "two more", "seven", "complex", "None"],
)
def test_a_time_that_is_none_is_refused(time: Callable[[Tensor], object]) -> None:
    with pytest.raises(ModelError, match=r"time of .* answers .* to times of shape \(\): it is a function t \[\*\] -> \[\*\]"):
        Model(lambda x, t: x, DiscreteVP.linear(), "v", time=time)(torch.zeros(2, 3), torch.tensor(10.0))


@pytest.mark.parametrize("labels", [[1, 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.int32)])
def test_labels_may_be_of_any_library(labels: object) -> None:
    model = toy(classes=2)
    for guidance in (1.0, 3.0):
        asked = {"nfe": 3, "seeds": [1, 2], "guidance": guidance}
        assert torch.equal(sample(model, "ddim", cond=labels, **asked), sample(model, "ddim", cond=torch.tensor([1, 0]), **asked))
    null = sample(model, "ddim", cond=[2, 2], nfe=3, seeds=[1, 2])  # the label of no condition is one too
    assert torch.isfinite(null).all()


def test_a_student_of_a_model_with_a_name_for_its_weights_is_another_model() -> None:
    teacher = Model(nn.Linear(2, 2), DiscreteVP.linear(), "v", shape=(2,), identity="teacher v1")
    students = [teacher.with_network(nn.Linear(2, 2)) for _ in range(2)]
    assert len({teacher.fingerprint, *(student.fingerprint for student in students)}) == 3
    assert Model(nn.Linear(2, 2), DiscreteVP.linear(), "v").with_network(students[0].network).identity == ""
