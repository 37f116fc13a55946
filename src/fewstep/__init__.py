"""Sample any diffusion or flow model in a few steps.

::

    model = fewstep.load_model("digits-edm")
    schedule = model.denoiser.schedule
    sampler = fewstep.Sampler.build(fewstep.make_solver("unipc-2"), fewstep.make_grid("angle", schedule, 6), schedule)
    x_T = fewstep.start_noise(sampler.tableau.nodes, seeds=range(16), shape=model.shape)
    images = fewstep.sample(model.denoiser, sampler, x_T, cond=model.labels(range(16)))
"""

from importlib.metadata import version

from fewstep.core.denoiser import Denoiser
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.prediction import EDM, convert, from_x0, to_x0
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding, VPCosine, VPLinear
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Nodes, Solver, State, Tableau, advance, tabulate
from fewstep.integrations.diffusers.pipelines import from_pipeline
from fewstep.learn.networks.distill import DistillConfig, distill
from fewstep.learn.networks.finetune import FinetuneConfig, finetune
from fewstep.learn.samplers.calibrate import CalibrationConfig, calibrate
from fewstep.learn.samplers.fit import FitConfig, fit
from fewstep.learn.samplers.optimize import OptimizeConfig, optimize
from fewstep.learn.search.coefficients import FitForm, fit_in_sequence
from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
from fewstep.models.analytic import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from fewstep.models.denoiser import AdaptedDenoiser
from fewstep.models.formats.folders import Model
from fewstep.models.guidance import classifier_free, classifier_guided, dynamic_threshold, static_threshold
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing
from fewstep.models.zoo import load_model
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, ModelError, SolverError
from fewstep.sampling.loop import Step, sample
from fewstep.sampling.noise import seeded_noise, start_noise
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import make_solver

__version__ = version("fewstep")

__all__ = [
    "AdaptedDenoiser",
    "ArtifactError",
    "CalibrationConfig",
    "DatasetDenoiser",
    "Denoiser",
    "DiscreteVP",
    "DistillConfig",
    "EDM",
    "FewstepError",
    "FinetuneConfig",
    "FitConfig",
    "FitForm",
    "GaussianDenoiser",
    "GridError",
    "Mixing",
    "MixtureDenoiser",
    "Model",
    "ModelError",
    "ModelStatistics",
    "Nodes",
    "NoiseSchedule",
    "OperatorForm",
    "OperatorStudent",
    "OptimizeConfig",
    "RectifiedFlow",
    "Sampler",
    "Solver",
    "SolverError",
    "State",
    "Step",
    "Tableau",
    "TimeGrid",
    "Trajectories",
    "TrajectoryConfig",
    "VPCosine",
    "VPLinear",
    "VarianceExploding",
    "__version__",
    "advance",
    "calibrate",
    "classifier_free",
    "classifier_guided",
    "convert",
    "distill",
    "dynamic_threshold",
    "finetune",
    "fit",
    "fit_in_sequence",
    "from_pipeline",
    "from_x0",
    "generate_trajectories",
    "load_model",
    "make_grid",
    "make_solver",
    "optimize",
    "sample",
    "seeded_noise",
    "start_noise",
    "static_threshold",
    "tabulate",
    "to_x0",
]
