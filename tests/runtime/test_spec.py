"""Names with options, as people type them."""

import pytest
import torch

from fewstep import DiscreteVP, GridError, SolverError, VarianceExploding, make_grid, make_solver
from fewstep.solvers import DDIM, DPMSolverPP, UniPC

SCHEDULE = VarianceExploding()


def test_options_in_the_name_are_options() -> None:
    assert make_solver("ddim:eta=0.5") == DDIM(eta=0.5)
    assert make_solver("dpm-solver-pp-3m:third_order=corrected:lower_order_below=0") == DPMSolverPP(3, "midpoint", "corrected", 0)
    assert make_solver("unipc-2:corrector=false", weights="exact") == UniPC(2, "exact", corrector=False)
    assert torch.equal(make_grid("karras:rho=5", SCHEDULE, 4).t, make_grid("karras", SCHEDULE, 4, rho=5).t)
    assert torch.equal(make_grid("trailing", DiscreteVP.linear(), 4).t[:-1], torch.tensor([999.0, 749.0, 499.0, 249.0]).double())


@pytest.mark.parametrize(
    "text", ["ddim:eta", "ddim:=1", "ddim:eta=", "ddim:rho=1", "ddim:eta=high", "ddim:eta=2", "dim:eta=1", "unipc-2:weights=bh3"]
)
def test_what_a_solver_cannot_take_is_said(text: str) -> None:
    with pytest.raises(SolverError):
        make_solver(text)


@pytest.mark.parametrize("text", ["angle:c", "angle:rho=7", "karras:rho=seven", "karas", "angle:steps=4"])
def test_what_a_grid_cannot_take_is_said(text: str) -> None:
    with pytest.raises(GridError):
        make_grid(text, SCHEDULE, 4)
