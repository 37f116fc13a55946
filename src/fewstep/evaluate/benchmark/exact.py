"""The exact trajectories that a model's samples are measured against: its own, or those of the teacher that it was made from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond
from fewstep.models.formats.folders import imports_code
from fewstep.models.model import Model
from fewstep.models.problem import Problem
from fewstep.models.tuned import Tuned
from fewstep.models.zoo import load_model
from fewstep.runtime.errors import ModelError
from fewstep.sampling.loop import run
from fewstep.sampling.reference import REFERENCE_NFE, reference_sampler

__all__ = ["exact_problem", "exact_samples"]


def exact_problem(problem: Problem) -> Problem:
    """Return the problem whose exact trajectories samples are measured against: the same one, or its teacher's of a tuned model.

    Raises:
        ModelError: the teacher is not to be found or has other weights now, or the model is a student without one.
    """
    teacher, tuned = _teacher(problem.model), problem.model.tuned
    return problem if teacher is None or tuned is None else Problem(teacher, _scale_of(tuned, problem), problem.device)


@torch.no_grad()
def exact_samples(problem: Problem, seeds: Sequence[int], cond: Cond, nfe: int = REFERENCE_NFE) -> Tensor:
    """Return the ends ``[len(seeds), *D]`` of the trajectories of some seeds on the CPU, by a tight solver of ``nfe`` evaluations."""
    sampler = reference_sampler(problem.schedule, nfe)
    return run(problem.teacher, sampler.tableau, problem.start(seeds, sampler.tableau.nodes), cond, seeds=seeds).cpu()


def _teacher(model: Model) -> Model | None:
    """Return the teacher of a tuned model, whose exact trajectories it is measured against; None if it has none.

    Raises:
        ModelError: the teacher is not to be found or has other weights now, or the model is a student without one.
    """
    if model.tuned is None:
        if model.flow_map is not None:
            raise ModelError(
                f"{model.name} is a student that does not say who its teacher was, so it has no trajectories to be measured against: "
                "measure its samples as a set, by fewstep.evaluate.metrics.judge.Judge.of(images)(samples)"
            )
        return None
    try:
        teacher = load_model(model.tuned.teacher, trust=imports_code(model))  # who trusts a student's code trusts its teacher's
    except ModelError as error:
        mend = "; make the student with out=..., which saves a teacher in memory beside it" if model.folder is None else ""
        raise ModelError(f"{model.name} is measured against the teacher that it was tuned from: {error}{mend}") from error
    if teacher.fingerprint != model.tuned.fingerprint:
        raise ModelError(
            f"{model.name} was tuned from {model.tuned.teacher} with fingerprint {model.tuned.fingerprint}; that model now has "
            f"{teacher.fingerprint}: put the old weights back"
        )
    return teacher


def _scale_of(tuned: Tuned, problem: Problem) -> float:
    """Return the scale at which the teacher of a tuned model sampled; where the model is told its scale, that one."""
    return problem.guidance if tuned.guidance is None else tuned.guidance
