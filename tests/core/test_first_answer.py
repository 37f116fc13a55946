"""A first answer that is foreseen: exact where it can be, in place of one call of the network, and never for what it does not know."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import GaussianDenoiser, Model, ModelError, Sampler, SolverError, VarianceExploding, sample, steps
from fewstep.core.first_answer import FirstAnswer, from_waves, waves
from fewstep.integrations.exports import export
from fewstep.integrations.kdiffusion import sample_fewstep
from fewstep.sampling.parallel import ParallelConfig

LAW, SHAPE = VarianceExploding(0.01, 20.0), (2, 3, 4)
MEAN = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
SPREAD = 0.5
SEEDS = range(5)


class Counted(GaussianDenoiser):
    calls = 0

    def __call__(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
        Counted.calls += len(x)
        return super().__call__(x, t, cond)


def gaussian() -> Model:
    return Model(Counted(LAW, MEAN, torch.tensor(SPREAD)), LAW, "sample", shape=SHAPE, name="gauss")


def exact(classes: int = 1, labelled: bool = False) -> FirstAnswer:
    """That of `gaussian`: D(x_T) = m + alpha S / (alpha^2 S + sigma^2) (x_T - alpha m), where alpha is 1 and S the same for all."""
    top = float(LAW.sigma(torch.tensor(20.0)))
    gain = SPREAD**2 / (SPREAD**2 + top**2)
    response = (gain * top * torch.eye(SHAPE[0], dtype=torch.float64)).expand(12, -1, -1)
    return FirstAnswer(((1 - gain) * MEAN.double()).expand(classes, *SHAPE), response, labelled)


def foreseeing(name: str = "dpm-solver-pp-2m", classes: int = 1, labelled: bool = False) -> Sampler:
    made = Sampler.build(name, "karras", LAW, nfe=6)
    return replace(made, tableau=replace(made.tableau, first=exact(classes, labelled)))


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (1, 2, 3, 4)])
def test_the_cosine_transform_keeps_lengths_and_is_undone(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, *shape, dtype=torch.float64)
    assert waves(x).shape[:2] == (4, shape[0])
    torch.testing.assert_close(waves(x).square().sum(), x.square().sum())
    torch.testing.assert_close(from_waves(waves(x), shape), x)


@pytest.mark.parametrize("name", ["dpm-solver-pp-2m", "unipc-3", "ddim"])
def test_of_gaussian_data_it_changes_nothing_but_the_number_of_calls(name: str) -> None:
    model, ours = gaussian(), foreseeing(name)
    x = torch.randn(5, *SHAPE, dtype=torch.float64) * 20
    Counted.calls = 0
    asked = sample(model, Sampler.build(name, "karras", LAW, nfe=6), x)
    assert Counted.calls == 6 * 5
    foreseen = sample(model, ours, x)
    assert Counted.calls == 11 * 5 and (ours.nfe, ours.tableau.nodes.evaluations) == (5, 6)
    torch.testing.assert_close(foreseen, asked, rtol=1e-10, atol=1e-10)


def test_it_lies_in_the_artifact(tmp_path: Path) -> None:
    model, ours = gaussian(), foreseeing()
    loaded = Sampler.load(ours.save(tmp_path / "sampler"))
    assert loaded.nfe == 5 and loaded.fingerprint == ours.fingerprint != Sampler.build("dpm-solver-pp-2m", "karras", LAW, nfe=6).fingerprint
    assert torch.equal(sample(model, loaded, seeds=SEEDS), sample(model, ours, seeds=SEEDS))
    assert loaded.tableau.first is not None and not loaded.tableau.first.labelled and "5 evaluations" in repr(loaded)


def test_what_starts_elsewhere_asks_the_network() -> None:
    ours, model = foreseeing(), gaussian()
    for other in (ours.tail(1), ours.from_level(5.0)):
        assert other.tableau.first is None and other.nfe == 5
        assert bool(sample(model, other, torch.randn(2, *SHAPE)).isfinite().all())
    short = ours.stopped(3)
    assert short.nfe == 3 and short.tableau.nodes.evaluations == 4 and short.tableau.first is not None
    with pytest.raises(SolverError, match="makes 5 evaluations: stop after 1 to 5, not 6"):
        ours.stopped(6)


def test_conditions_that_it_does_not_know_are_refused() -> None:
    model, x = gaussian(), torch.randn(2, *SHAPE)
    labelled = foreseeing(classes=3, labelled=True).tableau
    for cond in (
        None,
        torch.tensor([0, 3]),
        torch.tensor([0, -1]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([1]),
        {"y": torch.tensor([0, 1])},
    ):
        with pytest.raises(ModelError, match=r"foreseen, by labels 0 to 2, one for each of 2 samples, .*fit a sampler without first"):
            list(steps(model, labelled, x, cond))
    assert len(list(steps(model, labelled, x, torch.tensor([0, 2])))) == 6
    with pytest.raises(ModelError, match="for samples without a condition: leave the condition out"):
        list(steps(model, foreseeing().tableau, x, torch.tensor([0, 1])))
    with pytest.raises(ModelError, match=r"for samples of \(2, 3, 4\), not \(2, 6, 8\)"):
        list(steps(model, foreseeing().tableau, torch.randn(1, 2, 6, 8)))


def test_in_k_diffusion_labels_say_what_the_condition_does_not() -> None:
    ours, x = foreseeing(classes=2, labelled=True), 20 * torch.randn(3, *SHAPE, dtype=torch.float64)
    denoiser, seen = Counted(LAW, MEAN, torch.tensor(SPREAD)), list[float]()

    def host(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        seen.append(float(sigma[0]))
        return denoiser(x, sigma[0].double())

    end = sample_fewstep(host, x, sampler=ours, extra_args={"y": torch.tensor([0, 1, 1])}, labels=torch.tensor([0, 1, 1]))
    torch.testing.assert_close(end, sample(gaussian(), foreseeing(), x), rtol=1e-6, atol=1e-6)
    assert seen == pytest.approx(ours.tableau.nodes.sigma[1:-1].tolist())
    with pytest.raises(ModelError, match="got a dict"):
        sample_fewstep(host, x, sampler=ours, extra_args={"y": torch.tensor([0, 1, 1])})
    with pytest.raises(SolverError, match="labels are for a sampler that foresees"):
        sample_fewstep(denoiser, x, [20.0, 1.0, 0.0], labels=torch.tensor([0, 1, 1]))


def test_where_the_first_answer_is_more_than_the_networks_it_is_refused() -> None:
    ours, model = foreseeing(), gaussian()
    with pytest.raises(SolverError, match="one of few evaluations, and runs in sequence: leave parallel out"):
        sample(model, ours, seeds=SEEDS, parallel=ParallelConfig())
    with pytest.raises(SolverError, match=r"kdiffusion calls the network at every level: fit one without first"):
        export(ours, "kdiffusion")
