"""The bundled noisy classifier, and what splitting gains with it and with one that was trained on a model's usual levels alone."""

import pytest
import torch

from benchmarks import splitting_study
from fewstep import FewstepError, ModelError, Sampler, Splitting, VPLinear, classifier_guided, load_model, sample_split
from fewstep.data.images import load_images
from fewstep.evaluate.metrics.features import load_digits_features
from fewstep.models.classifier import CLASSIFIERS, NoisyClassifier, load_classifier
from fewstep.models.guidance import Wrapped
from fewstep.sampling.loop import run
from fewstep.sampling.noise import start_noise

COUNT = 32


def test_it_is_small_and_knows_noisy_digits():
    assert (CLASSIFIERS["digits"] / "classifier.safetensors").stat().st_size < 200_000
    digits, network = load_images("digits"), load_classifier()
    x = digits.x[:400]
    for level, least in ((0.1, 0.97), (1.0, 0.7), (20.0, 0.08)):
        z = x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        found = network(z, torch.full((400,), level)).argmax(1)
        assert float((found == digits.labels[:400]).float().mean()) > least


def test_it_serves_any_noise_law():
    """In units of the image: the same picture at the same level has the same probabilities."""
    network, labels = load_classifier(), torch.tensor([3, 5])
    z = torch.randn(2, 1, 8, 8)
    answers = []
    for law in (load_model("digits-edm").schedule, VPLinear()):
        t = law.t_of_lam(torch.tensor(0.3, dtype=torch.float64))
        answers.append(network.log_prob(law)(z * law.alpha(t).float(), t, labels))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_know_is_refused():
    log_prob, t = load_classifier().log_prob(VPLinear()), torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(FewstepError, match="unknown classifier 'digit'"):
        load_classifier("digit")
    with pytest.raises(ModelError, match=r"samples of shape \(1, 8, 8\), not \(3, 8, 8\)"):
        log_prob(torch.zeros(2, 3, 8, 8), t, torch.tensor([1, 2]))
    with pytest.raises(ModelError, match="takes the model's noise law, as model.schedule, got 3"):
        load_classifier().log_prob(3)
    for labels in (None, torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor([1, 10]), torch.tensor([-1, 3])):
        with pytest.raises(ModelError, match=r"guided by labels \[B\]"):
            log_prob(torch.zeros(2, 1, 8, 8), t, labels)


@pytest.fixture(scope="module")
def of_usual_levels() -> NoisyClassifier:
    """A classifier as people train one: on EDM's noise levels, of which hardly any is above 10."""
    return splitting_study.of_usual_levels()


@torch.no_grad()
def medians(network: NoisyClassifier, scale: float) -> dict[str, float]:
    """Return the median RMSE to the guided ODE's solution, at 5 evaluations: joint, and split."""
    model, log_prob = load_model("digits-edm"), network.log_prob(load_model("digits-edm").schedule)
    labels, null = torch.arange(COUNT) % 10, torch.full((COUNT,), model.null_label)
    denoiser = Wrapped(model.schedule, lambda x, t, cond: model(x, t, null))
    sampler = lambda name, nfe: Sampler.build(name, "angle", model.schedule, nfe=nfe)  # noqa: E731
    x, joint = start_noise(sampler("ddim", 5).tableau.nodes, range(COUNT), model.shape), classifier_guided(denoiser, log_prob, scale)
    exact = run(joint, Sampler.build("heun", "karras", model.schedule, nfe=120).tableau, x, labels)
    assert float((load_digits_features().labels(exact) == labels).float().mean()) > 0.85

    def median(made: torch.Tensor) -> float:
        return float((made - exact).square().flatten(1).mean(1).sqrt().median())

    split = {"lie": Splitting(), "strang": Splitting("strang"), "frozen": Splitting(form="frozen")}
    two = sampler("dpm-solver-pp-2m", 5)
    found = {name: median(sample_split(denoiser, two, x, log_prob, scale, guide=labels, splitting=how)) for name, how in split.items()}
    return found | {"joint": median(run(joint, two.tableau, x, labels))}


@pytest.mark.slow
def test_splitting_stands_a_classifier_that_never_saw_the_highest_levels(of_usual_levels):
    """Its gradient there is large and wrong; a joint solver extrapolates it, a kick is where the step has ended."""
    mild, strong = medians(of_usual_levels, 2.0), medians(of_usual_levels, 10.0)
    assert mild["lie"] < 0.6 * mild["joint"] and mild["strang"] < mild["lie"]
    assert strong["lie"] < 0.3 * strong["joint"]
    assert mild["frozen"] > 50 * mild["lie"]  # the paper's kick is for many steps


@pytest.mark.slow
def test_with_a_classifier_of_all_levels_there_is_little_to_gain():
    for scale in (2.0, 10.0):
        found = medians(load_classifier(), scale)
        assert 0.6 * found["joint"] < found["lie"] < found["joint"]
