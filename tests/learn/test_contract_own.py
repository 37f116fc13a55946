"""The contract of all learners again, on a network of a user's own that looks whole times and labels up in tables."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.learn.test_contract import (
    CLASSES,
    DISTILL,
    FLOW_MAP,
    GUIDED,
    LEARNERS,
    Calls,
    Learner,
    Mean,
    half,
    model,
    saved_student,
    shorten,
    test_a_finished_folder_is_read_or_refused,
    test_a_killed_run_continues_to_the_same_bits,
    test_a_second_job_in_the_folder_is_refused_and_harms_nothing,
    test_another_models_work_is_refused,
    test_guidance_reaches_the_work,
    test_in_memory_it_gives_the_same_and_leaves_nothing,
    test_mistakes_are_named_before_any_work,
    test_progress_is_counted_to_the_end,
    test_the_card_has_the_documented_figures,
    test_the_folder_holds_what_was_returned,
    test_the_model_is_left_as_it_was,
    test_wherever_it_was_killed,
    whole,
)
from tests.own_networks import LAW, TableNet, table_model
from torch import Tensor

import fewstep
from fewstep import Model
from fewstep.models.flow_map_student import FlowMapForm
from fewstep.models.guided import GuidedForm

__all__ = [
    "half",
    "model",
    "test_a_finished_folder_is_read_or_refused",
    "test_a_killed_run_continues_to_the_same_bits",
    "test_a_second_job_in_the_folder_is_refused_and_harms_nothing",
    "test_another_models_work_is_refused",
    "test_guidance_reaches_the_work",
    "test_in_memory_it_gives_the_same_and_leaves_nothing",
    "test_mistakes_are_named_before_any_work",
    "test_progress_is_counted_to_the_end",
    "test_the_card_has_the_documented_figures",
    "test_the_folder_holds_what_was_returned",
    "test_the_model_is_left_as_it_was",
    "test_wherever_it_was_killed",
    "whole",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode of some PyTorch releases says so
]

TRUSTED: dict[str, Any] = {"load": lambda folder: saved_student(folder, trust=True)}
KD = replace(DISTILL, slots=None, steps=12)
OWN_MAP = replace(FLOW_MAP, form=FlowMapForm(insert_at="time"))
OWN_GUIDED = replace(GUIDED, form=GuidedForm(insert_at="time"))
OWN = {
    **LEARNERS,
    "finetune": replace(LEARNERS["finetune"], **TRUSTED),
    "distill": replace(
        LEARNERS["distill"],
        run=lambda model, **given: fewstep.distill(model, **{"method": "kd", "config": KD, **given}),
        total=12,
        **TRUSTED,
    ),
    "distill flow-map": replace(
        LEARNERS["distill flow-map"],
        run=lambda model, **given: LEARNERS["distill flow-map"].run(model, **{"config": OWN_MAP, **given}),
        **TRUSTED,
    ),
    "distill guided": replace(
        LEARNERS["distill guided"],
        run=lambda model, **given: LEARNERS["distill guided"].run(model, **{"config": OWN_GUIDED, **given}),
        **TRUSTED,
    ),
    "distill progressive": replace(LEARNERS["distill progressive"], **TRUSTED),
    "distill dmd": replace(
        LEARNERS["distill dmd"],
        run=lambda model, **given: LEARNERS["distill dmd"].run(model, **{"judge": Mean(-1), **given}),
        **TRUSTED,
    ),
    "distill em": replace(LEARNERS["distill em"], **TRUSTED),
    "distill em in passes": replace(
        LEARNERS["distill em in passes"],
        run=lambda model, **given: LEARNERS["distill em in passes"].run(model, **{"judge": Mean(-1), **given}),
        **TRUSTED,
    ),
    "generate_trajectories": replace(
        LEARNERS["generate_trajectories"],
        run=lambda model, **given: LEARNERS["generate_trajectories"].run(model, **{"grid": fewstep.make_grid("angle", LAW, 2), **given}),
    ),
}


class OwnCalls(Calls):
    """Counts the calls of all tables of times, sees their labels, and interrupts one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begin()
        real: Callable[..., Tensor] = TableNet.forward

        def forward(network: TableNet, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            self.count += 1
            self.labels |= set() if y is None else set(y.tolist())
            if self.count == self.stop:
                raise KeyboardInterrupt
            return real(network, x, t, y)

        patch.setattr(TableNet, "forward", forward)


@pytest.fixture(scope="module")
def calls() -> Iterator[Calls]:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield OwnCalls(patch)


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    """A model, and another that differs in its weights alone."""
    first, second = (table_model(seed=seed, classes=CLASSES, null_label=CLASSES) for seed in (0, 1))
    return first, second


@pytest.fixture(scope="module", params=OWN)
def learner(request: pytest.FixtureRequest) -> Learner:
    return OWN[request.param]
