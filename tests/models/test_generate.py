"""Samples into a folder, batch by batch: a killed run continues, and nobody takes them for those of another command."""

import shutil

import pytest
import torch
from tests.problems import LAW, toy

from fewstep import ArtifactError, Sampler, sample
from fewstep.models.generate import generate_to
from fewstep.models.problem import Problem

SEEDS = range(100, 107)


def sampler(name="unipc-2"):
    return Sampler.build(name, "angle", LAW, nfe=4)


@pytest.mark.parametrize("name", ["unipc-2", "ddim:eta=1"])
def test_batches_are_samples_of_their_seeds(tmp_path, name):
    problem, seen = Problem(toy(classes=2), guidance=2.0), []
    samples, parts = generate_to(tmp_path, problem, sampler(name), SEEDS, batch=3, on_progress=seen.append)
    assert seen == [3, 6, 7] and len(list(parts.iterdir())) == 3 and parts.parent == tmp_path
    torch.testing.assert_close(samples, sample(problem.model, sampler(name), seeds=SEEDS, guidance=2.0))
    again, parts = generate_to(tmp_path, problem, sampler(name), SEEDS, batch=3)
    assert torch.equal(again, samples)


def test_a_killed_run_continues(tmp_path):
    whole, _ = generate_to(tmp_path / "whole", Problem(toy()), sampler(), SEEDS, batch=3)
    with pytest.raises(KeyboardInterrupt):
        generate_to(tmp_path / "killed", Problem(toy(stop=6)), sampler(), SEEDS, batch=3)
    rest = toy()
    samples, _ = generate_to(tmp_path / "killed", Problem(rest), sampler(), SEEDS, batch=3)
    assert torch.equal(samples, whole) and rest.network.samples == 4 * 4  # the last two batches alone


OTHERS = pytest.mark.parametrize(
    "other",
    [
        lambda folder, problem: generate_to(folder, problem, sampler("ddim"), SEEDS),
        lambda folder, problem: generate_to(folder, problem, sampler(), range(3)),
        lambda folder, problem: generate_to(folder, problem, sampler(), SEEDS, label=1),
        lambda folder, problem: generate_to(folder, problem, sampler(), SEEDS, batch=4),
        lambda folder, problem: generate_to(folder, Problem(problem.model, guidance=3.0), sampler(), SEEDS),
    ],
    ids=["sampler", "seeds", "label", "batch", "guidance"],
)


@OTHERS
def test_unfinished_samples_of_another_command_are_refused(tmp_path, other):
    problem = Problem(toy(classes=2))
    generate_to(tmp_path, problem, sampler(), SEEDS)
    with pytest.raises(ArtifactError, match="holds unfinished samples of another command: remove .*parts-.*, or choose another folder"):
        other(tmp_path, problem)


@OTHERS
def test_samples_of_another_command_are_never_replaced(tmp_path, other):
    problem = Problem(toy(classes=2))
    made, parts = generate_to(tmp_path, problem, sampler(), SEEDS)
    shutil.rmtree(parts)
    (tmp_path / "samples.npz").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="holds the samples of another command .see .*samples.json.: choose another folder"):
        other(tmp_path, problem)
    again, _ = generate_to(tmp_path, problem, sampler(), SEEDS)  # the same request may
    assert torch.equal(again, made) and (tmp_path / "samples.npz").read_bytes() == b"mine"


def test_samples_of_unknown_origin_are_not_replaced(tmp_path):
    (tmp_path / "grid.png").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="holds grid.png, and nothing says what made it"):
        generate_to(tmp_path, Problem(toy()), sampler(), SEEDS)


def test_a_damaged_batch_is_named(tmp_path):
    _, parts = generate_to(tmp_path, Problem(toy()), sampler(), SEEDS, batch=3)
    (parts / "00000003.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="parts-.* is damaged .*: remove it and sample again"):
        generate_to(tmp_path, Problem(toy()), sampler(), SEEDS, batch=3)


def test_a_label_is_every_samples(tmp_path):
    model = toy(classes=2)
    samples, _ = generate_to(tmp_path, Problem(model), sampler(), SEEDS, label=1)
    assert torch.equal(samples, sample(model, sampler(), seeds=SEEDS, cond=torch.ones(7, dtype=torch.int64)))
