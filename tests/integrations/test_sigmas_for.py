"""The levels that a host is given: of spacings, of grids; those of saved samplers are tested where these are run."""

import pytest
import torch

from fewstep import DiscreteVP, GridError, RectifiedFlow, Sampler, TimeGrid, VarianceExploding
from fewstep.integrations.kdiffusion import sigmas_for
from fewstep.sampling.start import level_of


def test_sigmas_for_spacings():
    levels = sigmas_for("karras:rho=5", 4, 0.03, 14.6)
    assert levels.dtype == torch.float32
    assert levels[0] == pytest.approx(14.6)
    assert levels[-1] == 0
    assert len(levels) == 5
    appended = sigmas_for("karras", 4, 0.03, 14.6, end="append")
    root = torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), 4, dtype=torch.float64) ** 7  # k-diffusion's get_sigmas_karras
    torch.testing.assert_close(appended, torch.cat([root, torch.zeros(1)]).float(), rtol=1e-6, atol=0)
    assert sigmas_for("angle", 4, 0.03, 14.6, end="sigma_min")[-1] == pytest.approx(0.03)
    assert sigmas_for("angle", 1, 0.03, 14.6, end="append").tolist() == pytest.approx([14.6, 0.0])
    table = DiscreteVP.scaled_linear()
    known = torch.exp(-table.lam(table.times[1:]))
    trailing = sigmas_for("trailing", 5, schedule=table)
    assert all(float((known - level).abs().min() / level) < 1e-6 for level in trailing[:-1].double())
    grid = TimeGrid(torch.tensor([900.0, 400.0, -1.0]))
    torch.testing.assert_close(sigmas_for(grid, schedule=table), torch.exp(-table.lam(grid.t)).float())
    flow = sigmas_for("uniform", 4, 0.0, 1.0, law="flow")
    assert flow.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_sigmas_for_a_strength():
    for steps in (1, 4, 9):
        levels = sigmas_for("karras", steps, 0.03, 14.6, strength=0.5)
        assert float(levels[0]) == pytest.approx(1.0) and len(levels) == steps + 1
    assert sigmas_for("uniform", 4, 0.0, 1.0, law="flow", strength=0.3)[0] == pytest.approx(0.3)
    assert torch.equal(sigmas_for("karras", 4, 0.03, 14.6, strength=1), sigmas_for("karras", 4, 0.03, 14.6))
    grid = TimeGrid(torch.tensor([900.0, 400.0, 100.0, -1.0]))
    own = sigmas_for(grid, schedule=DiscreteVP.scaled_linear().to_clean(), strength=0.3)
    assert len(own) == 4 and own[0] == pytest.approx(3 / 7, rel=1e-2)
    assert torch.equal(own[:1], sigmas_for("angle", 8, schedule=DiscreteVP.scaled_linear(), strength=0.3)[:1])
    sampler = Sampler.build("unipc-2", "angle", VarianceExploding(), nfe=5)
    with pytest.raises(GridError, match=r"take sampler.from_level\(0.4286\), which starts at strength 0.3, and pass it here and to sample"):
        sigmas_for(sampler, strength=0.3)
    part = sampler.from_level(level_of(0.3))
    assert sigmas_for(part)[0] == pytest.approx(3 / 7) and len(sigmas_for(part)) == 6
    for strength in (0.0, 2.0, 0.99):
        with pytest.raises(GridError, match="strength"):
            sigmas_for("karras", 5, 0.03, 14.6, strength=strength)


def test_sigmas_for_says_what_is_missing():
    for ask, message in (
        (lambda: sigmas_for("karras", 5), "pass sigma_min and sigma_max"),
        (lambda: sigmas_for("karras"), "needs at least 1 step"),
        (lambda: sigmas_for("karras", 5, 1, 2, end="nowhere"), "an end of clean, append or sigma_min"),
        (lambda: sigmas_for("karas", 5, 1, 2), "did you mean karras"),
        (lambda: sigmas_for("karras", 5, 1, 2, law="vp"), "unknown law"),
        (lambda: sigmas_for(TimeGrid(torch.tensor([2.0, 1.0]))), "pass schedule="),
        (lambda: sigmas_for("uniform", 5, schedule=RectifiedFlow()), "pure noise"),
    ):
        with pytest.raises(GridError, match=message):
            ask()
