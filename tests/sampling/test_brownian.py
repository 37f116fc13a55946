"""Noise as a function of the noise levels: one path for each seed, whatever the steps."""

import math

import pytest
import torch
from tests.problems import mixture

from fewstep import ParallelConfig, RectifiedFlow, Sampler, SolverError, TimeGrid, VarianceExploding, VPLinear, sample, seeded_noise, steps
from fewstep.integrations.kdiffusion import sample_fewstep
from fewstep.sampling.brownian import DEPTH, BrownianPath

COUNT = 20_000
FIVE_ERRORS = 5 / math.sqrt(COUNT)
SUMS = 1e-6  # angles are rounded to 1e-7


def span(s, t):
    """The length of an interval of angles in the signal-to-noise ratio."""
    return math.tan(t) ** -2 - math.tan(s) ** -2


@pytest.mark.parametrize("angles", [(math.pi / 2, 1.3, 0.9, 0.88, 0.2, 0.01), (1.57, 1.569, 3e-3, 2e-3)])
def test_intervals_side_by_side_are_independent_and_normal(angles):
    path = BrownianPath([7], (COUNT,))
    drawn = torch.cat([path.between(s, t) for s, t in zip(angles, angles[1:], strict=False)] + [seeded_noise([7], (COUNT,)).double()])
    assert float((drawn @ drawn.T / COUNT - torch.eye(len(drawn))).abs().max()) < FIVE_ERRORS * math.sqrt(2)


def test_a_refined_interval_adds_up_to_the_whole():
    path, angles = BrownianPath(range(2), (3,)), torch.linspace(1.5, 0.1, 8).tolist()
    parts = sum(math.sqrt(span(s, t)) * path.between(s, t) for s, t in zip(angles, angles[1:], strict=False))
    torch.testing.assert_close(parts / math.sqrt(span(angles[0], angles[-1])), path.between(1.5, angles[-1]), rtol=SUMS, atol=SUMS)


def test_a_point_does_not_depend_on_the_batch_nor_on_what_was_asked_before():
    fresh = BrownianPath([4], (5,)).between(1.0, 0.3)
    path = BrownianPath([3, 4], (5,))
    for s, t in ((1.2, 0.01), (0.31, 0.3), (1.1, 0.9)):
        path.between(s, t)
    assert torch.equal(path.between(1.0, 0.3)[1], fresh[0])
    assert len(path._known) <= DEPTH + 2


@pytest.mark.parametrize("case", [(0.3, 1.0), (0.3, 0.3), (0.3, 0.3 - 1e-8), (0.3, 0.0)])
def test_an_interval_that_does_not_go_down_is_refused(case):
    with pytest.raises(SolverError, match="goes from noise to the image, in steps of at least 9e-08"):
        BrownianPath([1], (2,)).between(*case)


@pytest.mark.parametrize("schedule", [VPLinear(), VarianceExploding(), RectifiedFlow()])
def test_ends_of_any_law(schedule):
    tableau = Sampler.build("ddim:eta=1", TimeGrid.angle(schedule, 5, t_min=schedule.t_clean), schedule).tableau
    drawn = torch.stack([BrownianPath([1], (1000,)).of(tableau, i)[0] for i in range(5)])
    assert torch.isfinite(drawn).all() and not drawn[-1].any()  # nothing is added at the clean image
    torch.testing.assert_close(drawn[:-1].std(1), torch.ones(4, dtype=torch.float64), rtol=0.12, atol=0)


# -- in the loops -------------------------------------------------------------------------------------------------------


def sampler(count, spec="ddim:eta=1"):
    return Sampler.build(spec, TimeGrid.logsnr(VPLinear(), count), VPLinear())


def start(made, seeds):
    return (made.tableau.nodes.sigma[0] * seeded_noise(seeds, (2,))).double()


def ends(count, path, seeds=range(32)):
    made = sampler(count)
    return sample(mixture(VPLinear()), made, start(made, seeds), seeds=seeds, path=path)


def test_more_steps_refine_the_same_sample():
    few, many = ends(32, "brownian"), ends(64, "brownian")
    other, another = ends(32, "steps"), ends(64, "steps")
    assert float((few - many).square().mean().sqrt()) < 0.2 * float((other - another).square().mean().sqrt())


def test_a_sample_does_not_depend_on_its_batch():
    torch.testing.assert_close(ends(8, "brownian", [3, 9])[1], ends(8, "brownian", [9])[0], rtol=1e-12, atol=1e-12)


def test_parallel_and_resumed_runs_and_a_host_add_the_same_noise():
    law, levels = VarianceExploding(0.05, 20.0), torch.logspace(math.log10(20), math.log10(0.05), 9, dtype=torch.float64)
    made = Sampler.build("sde-dpm-solver-pp-2m", TimeGrid(levels), law)
    x, denoiser, seeds = start(made, [1, 2]), mixture(law), [1, 2]
    made_steps = list(steps(denoiser, made.tableau, x, seeds=seeds, path="brownian"))
    end = made_steps[-1].x_next
    resumed = list(steps(denoiser, made.tableau, x, seeds=seeds, path="brownian", resume=(4, made_steps[3].state)))
    assert torch.equal(resumed[-1].x_next, end)
    parallel = sample(denoiser, made, x, seeds=seeds, path="brownian", parallel=ParallelConfig(tol=1e-10))
    torch.testing.assert_close(parallel, end, rtol=1e-6, atol=1e-6)
    hosted = sample_fewstep(lambda x, sigma: denoiser(x, sigma[0]), x, levels, solver="sde-dpm-solver-pp-2m", seeds=seeds, path="brownian")
    torch.testing.assert_close(hosted, end, rtol=1e-9, atol=1e-9)


def test_what_it_cannot_be_is_refused():
    made = sampler(4)
    with pytest.raises(SolverError, match="unknown path 'brown'.*did you mean brownian"):
        sample(mixture(VPLinear()), made, start(made, [1]), seeds=[1], path="brown")
    with pytest.raises(SolverError, match="says how seeds make noise"):
        list(steps(mixture(VPLinear()), made.tableau, start(made, [1]), noise=lambda i: torch.zeros(1, 2), path="brownian"))
