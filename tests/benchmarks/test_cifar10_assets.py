"""The published teacher of CIFAR-10 and the page of its study: what is committed belongs together."""

from pathlib import Path

import pytest
import torch
from benchmarks.cifar10.features import load_cifar_features
from benchmarks.cifar10.tables import PAGE, PLACE, filled

from fewstep import load_model
from fewstep.models.generate import sample
from fewstep.models.model import Model
from fewstep.runtime.artifact import read_json
from fewstep.sampling.noise import start_noise

ROOT = Path(__file__).parents[2]
TEACHER, ROWS = ROOT / "assets" / "cifar10-16", ROOT / "benchmarks" / "results" / "cifar10-16"


@pytest.fixture(scope="module")
def teacher() -> Model:
    return load_model(TEACHER)


def test_rows_are_of_the_published_weights(teacher: Model) -> None:
    assert teacher.shape == (3, 16, 16)
    assert read_json(ROWS / "teacher.json")["model"] == teacher.fingerprint
    assert teacher.classes == 10


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_was_made_for_it_lies_beside_it_and_samples(guidance: float, teacher: Model) -> None:
    sampler, seeds = teacher.fitted(5, guidance), range(2)
    assert teacher.statistics(guidance).model == teacher.fingerprint
    noise = start_noise(sampler.tableau.nodes, seeds, teacher.shape)
    with torch.no_grad():
        samples = sample(teacher, sampler, noise, seeds=seeds, guidance=guidance)
    assert samples.shape == (2, 3, 16, 16) and 0.05 < float(samples.std()) < 1 and float(samples.abs().max()) < 2


def test_the_tuned_network_lies_beside_its_teacher_and_is_the_one_of_its_row(teacher: Model) -> None:
    student = load_model(TEACHER.with_name("cifar10-16-tuned-4"))
    assert student.tuned is not None
    assert (student.tuned.teacher, student.tuned.fingerprint) == (str(TEACHER), teacher.fingerprint)
    assert read_json(ROWS / "tuned" / "results.json")["problem"]["fingerprint"] == student.fingerprint


def test_features_see_the_classes() -> None:
    assert load_cifar_features(TEACHER / "features").num_features == 64
    assert read_json(TEACHER / "features" / "features.json")["accuracy"] > 0.75


def test_the_page_is_what_its_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert (ROOT / "docs" / PLACE).read_text(encoding="utf-8") == filled(PAGE.read_text(encoding="utf-8"), ROWS)
