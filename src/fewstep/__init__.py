"""Sample any diffusion or flow model in a few steps.

::

    import fewstep

    model = fewstep.load_model("digits-edm")                                   # or fewstep.Model(net, schedule, "epsilon", shape=...)
    images = fewstep.sample(model, "unipc-2", nfe=6, seeds=range(16))          # any solver, by name
    samplers = fewstep.fit(model, nfe=[5, 8])                                  # samplers of its own, in minutes
    images = fewstep.sample(model, samplers[5], seeds=range(16))
    print(fewstep.compare(model, ["ddim", "unipc-2", samplers[5]], nfe=[5, 8]))
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fewstep.core.denoiser import Denoiser, FlowMap
from fewstep.core.domain import Cube
from fewstep.core.grid import TimeGrid
from fewstep.core.prediction import EDM, convert, from_x0, to_x0
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding, VPCosine, VPLinear
from fewstep.core.spacings import make_grid
from fewstep.core.statistics import ModelStatistics
from fewstep.core.tableau import Nodes, Solver, State, Tableau, advance, tabulate
from fewstep.models.analytic import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from fewstep.models.generate import sample
from fewstep.models.guidance import classifier_free, classifier_guided, dynamic_threshold, static_threshold
from fewstep.models.invert import invert
from fewstep.models.model import Model
from fewstep.models.zoo import load_model
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, ModelError, SolverError
from fewstep.sampling.loop import Step, steps
from fewstep.sampling.noise import seeded_noise, start_noise
from fewstep.sampling.parallel import ParallelConfig, sample_in_parallel
from fewstep.sampling.parareal import parareal
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.splitting import Splitting, sample_split
from fewstep.solvers import DPMSolverV3, make_solver

if TYPE_CHECKING:
    from fewstep.evaluate.benchmark.compare import compare
    from fewstep.integrations.diffusers.pipelines import from_pipeline
    from fewstep.inverse.blind import BlindConfig, deblur_blind
    from fewstep.inverse.posterior import measured, sample_posterior
    from fewstep.inverse.restore import Restoration, restore
    from fewstep.inverse.start import choose_start
    from fewstep.learn.networks.distill import (
        DistillConfig,
        EMConfig,
        FlowMapConfig,
        GuidedConfig,
        MatchingConfig,
        ProgressiveConfig,
        distill,
    )
    from fewstep.learn.networks.finetune import FinetuneConfig, finetune
    from fewstep.learn.samplers.calibrate import CalibrationConfig, calibrate
    from fewstep.learn.samplers.fit import FitConfig, fit, plan_fit
    from fewstep.learn.samplers.optimize import optimize
    from fewstep.learn.samplers.optimize_plan import OptimizeConfig
    from fewstep.learn.search.coefficients import FitForm
    from fewstep.learn.teacher.trajectories import Trajectories, TrajectoryConfig, generate_trajectories
    from fewstep.models.flow_map_student import FlowMapForm
    from fewstep.models.foreign_maps import flow_map_model
    from fewstep.models.guided import GuidedForm

__version__ = version("fewstep")

_LAZY = {  # imported when first asked for, so that sampling does not wait for what only learning needs
    "compare": "evaluate.benchmark.compare",
    "from_pipeline": "integrations.diffusers.pipelines",
    "BlindConfig": "inverse.blind",
    "deblur_blind": "inverse.blind",
    "measured": "inverse.posterior",
    "sample_posterior": "inverse.posterior",
    "Restoration": "inverse.restore",
    "restore": "inverse.restore",
    "choose_start": "inverse.start",
    "DistillConfig": "learn.networks.distill",
    "EMConfig": "learn.networks.distill",
    "FlowMapConfig": "learn.networks.distill",
    "GuidedConfig": "learn.networks.distill",
    "MatchingConfig": "learn.networks.distill",
    "ProgressiveConfig": "learn.networks.distill",
    "distill": "learn.networks.distill",
    "FinetuneConfig": "learn.networks.finetune",
    "finetune": "learn.networks.finetune",
    "CalibrationConfig": "learn.samplers.calibrate",
    "calibrate": "learn.samplers.calibrate",
    "FitConfig": "learn.samplers.fit",
    "plan_fit": "learn.samplers.fit",
    "fit": "learn.samplers.fit",
    "OptimizeConfig": "learn.samplers.optimize_plan",
    "optimize": "learn.samplers.optimize",
    "FitForm": "learn.search.coefficients",
    "Trajectories": "learn.teacher.trajectories",
    "TrajectoryConfig": "learn.teacher.trajectories",
    "generate_trajectories": "learn.teacher.trajectories",
    "FlowMapForm": "models.flow_map_student",
    "flow_map_model": "models.foreign_maps",
    "GuidedForm": "models.guided",
}

__all__ = [
    "ArtifactError",
    "BlindConfig",
    "CalibrationConfig",
    "Cube",
    "DPMSolverV3",
    "Denoiser",
    "DiscreteVP",
    "DistillConfig",
    "EDM",
    "EMConfig",
    "FewstepError",
    "FinetuneConfig",
    "FitConfig",
    "FlowMap",
    "FlowMapConfig",
    "FlowMapForm",
    "GridError",
    "GuidedConfig",
    "GuidedForm",
    "MatchingConfig",
    "Model",
    "ModelError",
    "ModelStatistics",
    "NoiseSchedule",
    "OptimizeConfig",
    "ParallelConfig",
    "ProgressiveConfig",
    "RectifiedFlow",
    "Restoration",
    "Sampler",
    "Solver",
    "SolverError",
    "Splitting",
    "TimeGrid",
    "VPCosine",
    "VPLinear",
    "VarianceExploding",
    "calibrate",
    "choose_start",
    "classifier_free",
    "classifier_guided",
    "compare",
    "deblur_blind",
    "distill",
    "finetune",
    "fit",
    "flow_map_model",
    "from_pipeline",
    "generate_trajectories",
    "invert",
    "load_model",
    "make_grid",
    "make_solver",
    "measured",
    "optimize",
    "parareal",
    "plan_fit",
    "restore",
    "sample",
    "sample_in_parallel",
    "sample_posterior",
    "sample_split",
    "steps",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _LAZY:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(f"fewstep.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
