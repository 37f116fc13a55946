"""The model that a command names."""

from __future__ import annotations

import inspect
import traceback
from dataclasses import replace
from pathlib import Path

from fewstep.apps.pipelines import PipelineOptions, open_pipeline
from fewstep.integrations.diffusers.pipeline_folders import is_pipeline
from fewstep.integrations.diffusers.pipelines import PipelineModel
from fewstep.models.carried import OPTIMIZED
from fewstep.models.model import Model
from fewstep.models.zoo import load_model
from fewstep.runtime.artifact import named_path
from fewstep.runtime.entry import imported, is_entry
from fewstep.runtime.errors import FewstepError, ModelError, first_line
from fewstep.runtime.spec import as_typed

__all__ = ["bench_words", "guidance_of", "made_for", "model_words", "open_model", "said_guidance"]

HOW = "it should be a function without arguments that returns a fewstep.Model"


def open_model(name: str, pipeline: PipelineOptions | None = None, guidance: float | None = None, *, trust: bool = False) -> Model:
    """Load a model by the name of a bundled one, its folder, checkpoint file or hub id; or make it by a function.

    Args:
        name: or ``module:function``: a function without arguments that returns a `Model`; or the folder of a whole pipeline.
        pipeline: how that pipeline is called and held.
        guidance: the scale that was typed, for the calls of a pipeline that is led by them.
        trust: of a folder or a file, see `load_model`.

    Raises:
        ModelError: no such model, options of pipelines for something else, a pipeline that cannot be led; a function that is none, takes
            arguments, raises, or returns something else than a model with a shape.
    """
    named_path(name)
    if is_pipeline(name):
        return open_pipeline(name, pipeline or PipelineOptions(), guidance)
    if pipeline is not None and pipeline.given:
        raise ModelError(f"{name} is not a pipeline: leave {' and '.join(pipeline.given)} out, or name the folder of one")
    return _made(name) if is_entry(name) and not Path(name).exists() else load_model(name, trust=trust)


def _made(entry: str) -> Model:
    """Return what a function of the caller's own returns, under the name that was typed if it has no folder."""
    try:
        function = imported(entry)
    except FewstepError as error:
        raise ModelError(f"{error}; {HOW}") from error
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ModelError(f"{entry} cannot be called without arguments ({error}); {HOW}") from error
    except ValueError:  # a function in C that does not say what it takes
        pass
    try:
        made = function()
    except FewstepError as error:
        raise ModelError(f"{entry} made no model: {error}") from error
    except (Exception, SystemExit) as error:  # whatever another's function does
        raise ModelError(f"{entry} made no model: {type(error).__name__}: {first_line(error)}{_place(error)}") from error
    if not isinstance(made, Model):
        raise ModelError(f"{entry} returned a {type(made).__name__}, not a fewstep.Model: {_WRAP}")
    if made.shape is None:
        raise ModelError(f"the model that {entry} returned does not know the shape of its samples: make it with shape=, as in {_EXAMPLE}")
    return made if made.folder is not None else replace(made, name=entry)


_EXAMPLE = 'fewstep.Model(network, fewstep.DiscreteVP.scaled_linear(), "epsilon", shape=(4, 64, 64))'
_WRAP = f"wrap the network with its noise law and what it predicts, as in {_EXAMPLE}"


def _place(error: BaseException) -> str:
    """Return the last line of the caller's own file that led to an error, as `` (my_model.py, line 3)``."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call here
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def guidance_of(model: Model, scale: float | None) -> float:
    """Return the guidance scale that was typed, else the model's own."""
    said = said_guidance(model, scale)
    return model.default_guidance if said is None else said


def said_guidance(model: Model, scale: float | None) -> float | None:
    """Return the guidance scale that was typed; None where none was, or the calls that lead a pipeline have it already."""
    return None if isinstance(model, PipelineModel) and model.led else scale


def made_for(model: Model, *, alone: bool = False) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]] | None:
    """Return the solver, the grid and the evaluations that a model was tuned for; None if it was for none.

    Args:
        model: opened.
        alone: only of a model whose answers are for its own steps alone.
    """
    tuned = model.tuned
    if tuned is None or tuned.solver is None or (alone and not tuned.own_steps):
        return None
    return (tuned.solver,), (OPTIMIZED,), model.num_jumps or (tuned.nfe or 5,)


def model_words(model: Model, scale: float | None = None) -> list[str]:
    """Return the options that go with a model on the command line: trust in its code, and a guidance scale that it does not have anyway."""
    scaled = [] if scale is None or scale == model.default_guidance else ["--guidance", as_typed(scale)]
    return [*(["--trust"] if model.needs_trust else []), *scaled]


def bench_words(model: Model, data: str | None) -> list[str]:
    """Return the options without which ``bench`` refuses a model: samples with fresh noise have no error, only a distance to data."""
    noisy = model.tuned is not None and model.tuned.solver == "lcm"
    return ["--stochastic", "--data", data or "PICTURES"] if noisy else []
