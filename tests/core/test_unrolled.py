"""A tableau as one linear map gives what running it gives, whatever is in it."""

import pytest
import torch
from tests.problems import ALL, WHOLE_REGISTRY
from torch.testing import assert_close

from fewstep import Nodes, RectifiedFlow, Sampler, Tableau, TimeGrid, VPLinear, advance

STEPS, BATCH = 4, 3
DATA = (3, 2)  # *D
ROUND_OFF = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def biased(shape=(), memory=3):
    """Numbers of no solver: every coefficient, a bias, and noise in all rows but one."""
    noise = random(STEPS, seed=4)
    noise[1] = 0
    nodes = Nodes.at(VPLinear(), TimeGrid.uniform(VPLinear(), STEPS).t)
    tables = random(STEPS, 2, *shape), random(STEPS, 2, 2 + memory, *shape, seed=1), random(STEPS, 2, *shape, seed=2)
    return Tableau(nodes, *tables, noise)


def of_solver(name, schedule=None):
    schedule = schedule or VPLinear()
    solver = ALL[name]
    return Sampler.build(solver, TimeGrid.angle(schedule, STEPS), schedule).tableau


TABLEAUX = {
    **{name: (lambda name=name: of_solver(name)) for name in WHOLE_REGISTRY},
    "from pure noise to clean": lambda: of_solver("unipc-3", RectifiedFlow()),
    "numbers per element": lambda: of_solver("v3-3-true-pseudo"),
    "biased": biased,
    "biased per channel": lambda: biased((3, 1)),
    "biased per element": lambda: biased(DATA, memory=1),
}


def run(tableau, x, answers, noises):
    """The states ``[N, B, *D]`` after each row, given the denoiser's answers and the noises, each ``[N, B, *D]``."""
    state, states = tableau.start(x), []
    for row, answer, noise in zip(tableau.rows(x), answers, noises, strict=True):
        state = advance(row, state, answer, noise)
        states.append(state.x)
    return torch.stack(states)


@pytest.mark.parametrize("case", TABLEAUX)
@pytest.mark.every(3, 2)
def test_it_equals_running_the_tableau(case):
    tableau = TABLEAUX[case]()
    element = tableau.update.shape[3:]
    data = (3, 2) if len(element) != 1 else (3, *element)
    count = tableau.nodes.evaluations
    x, answers, noises = random(BATCH, *data), random(count, BATCH, *data, seed=6), random(count, BATCH, *data, seed=7)
    made, lead = tableau.unrolled(), (1,) * (len(data) - len(element))

    def over(table, values):
        """``sum_j table[i, j] values[j]`` with the coefficients' own shape aligned to the data's."""
        aligned = table.reshape(*table.shape[:2], 1, *lead, *element)
        return (aligned * values).sum(1)

    start, bias = (value.reshape(count, 1, *lead, *element) for value in (made.start, made.bias))
    expected = start * x + over(made.answers, answers) + over(made.noise, noises) + bias
    assert_close(expected, run(tableau, x, answers, noises), **ROUND_OFF)


@pytest.mark.parametrize("case", TABLEAUX)
@pytest.mark.every(5, 2)
def test_its_tables_say_what_depends_on_what(case):
    tableau = TABLEAUX[case]()
    made, count, element = tableau.unrolled(), tableau.nodes.evaluations, tuple(tableau.update.shape[3:])
    assert {value.dtype for value in made} == {torch.float64}
    assert made.start.shape == made.bias.shape == (count, *element)
    assert made.answers.shape == made.noise.shape == (count, count, *element)
    later = torch.ones(count, count).triu(1).bool()
    assert not made.answers[later].any() and not made.noise[later].any()
    assert bool(made.noise.any()) == tableau.stochastic and bool(made.bias.any()) == bool(tableau.bias.any())
    assert_close(made.noise.diagonal().movedim(-1, 0), tableau.noise.reshape(count, *(1,) * len(element)).expand(count, *element))
