"""What importing the package costs, and what it offers."""

import subprocess
import sys

import pytest

import fewstep

OPTIONAL = ("accelerate", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "scipy", "sklearn", "torchmetrics", "transformers")
PUBLIC = [
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
LOADED = "import sys, fewstep, fewstep.solvers; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


@pytest.mark.slow
def test_importing_loads_no_optional_library():
    run = subprocess.run([sys.executable, "-W", "error", "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "torch" in loaded
    assert set(loaded).isdisjoint(OPTIONAL)
    assert run.stderr == ""


def test_the_public_names_are_these():
    """A name that comes or goes is a change of the interface: say so in CHANGELOG.md, and here."""
    assert fewstep.__all__ == PUBLIC == sorted(set(PUBLIC))
    assert set(PUBLIC) <= set(dir(fewstep))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_says_what_it_is(name):
    doc = getattr(fewstep, name).__doc__
    assert doc and doc.strip().splitlines()[0].endswith((".", ":", "``", ")"))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fewstep' has no attribute 'sampel'"):
        _ = fewstep.sampel
