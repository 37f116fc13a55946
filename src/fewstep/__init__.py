"""Sample any diffusion or flow model in a few steps."""

from fewstep.core.errors import ArtifactError, FewstepError, GridError, ModelError, SolverError
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.prediction import EDM, from_x0, to_x0
from fewstep.core.sampler import Sampler
from fewstep.core.sampling import Denoiser, sample, seeded_noise, start_noise
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding, VPCosine, VPLinear
from fewstep.core.tableau import Nodes, Solver, State, Tableau, advance, tabulate
from fewstep.models.denoiser import AdaptedDenoiser
from fewstep.solvers import make_solver

__all__ = [
    "AdaptedDenoiser",
    "ArtifactError",
    "Denoiser",
    "DiscreteVP",
    "EDM",
    "FewstepError",
    "GridError",
    "ModelError",
    "Nodes",
    "NoiseSchedule",
    "RectifiedFlow",
    "Sampler",
    "Solver",
    "SolverError",
    "State",
    "Tableau",
    "TimeGrid",
    "VPCosine",
    "VPLinear",
    "VarianceExploding",
    "advance",
    "from_x0",
    "make_grid",
    "make_solver",
    "sample",
    "seeded_noise",
    "start_noise",
    "tabulate",
    "to_x0",
]
