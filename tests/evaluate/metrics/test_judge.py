"""A judge of samples: by distance and recall together, on the data or on the teacher's own samples."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.problems import toy

from fewstep import FewstepError, load_model
from fewstep.data.images import Images
from fewstep.evaluate.metrics import judge as module
from fewstep.evaluate.metrics.distances import Manifold, frechet_distance, precision_recall
from fewstep.evaluate.metrics.features import load_features
from fewstep.evaluate.metrics.judge import Judge


def draws(count: int, seed: int = 0, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_its_figures_are_those_of_a_benchmark() -> None:
    data, samples = draws(50), draws(40, 1)
    found = Judge.of(data)(samples, None)
    flat = [x.flatten(1).clamp(-1, 1).double() for x in (data, samples)]
    assert found["fd"] == pytest.approx(frechet_distance(data, samples, load_features("pixels", (1, 2, 2))))
    assert (found["precision"], found["recall"]) == precision_recall(Manifold.of(flat[0]), flat[1])
    assert found["labels"] is None and found["value"] == pytest.approx(found["fd"] / found["recall"])


def test_a_mode_that_is_gone_costs_more_than_its_distance() -> None:
    data = torch.cat([draws(60, 0, 0.05) + 0.5, draws(60, 1, 0.05) - 0.5])
    judge = Judge.of(data)
    whole, half = judge(data + draws(120, 2, 0.01), None), judge(data[:60].repeat(2, 1, 1, 1), None)
    assert whole["recall"] > 0.9 > half["recall"] and half["value"] > half["fd"] and whole["value"] < half["value"]


def test_samples_that_cover_nothing_still_have_a_value() -> None:
    found = Judge.of(draws(20))(draws(20, 1) + 50, None)
    assert found["recall"] == 0 and found["value"] == pytest.approx(20 * found["fd"])


def test_it_knows_the_data_of_the_bundled_models() -> None:
    model = load_model("digits-edm")
    judge = Judge.of_model(model)
    assert judge.identity.startswith("digits of 1797 digits (") and judge.shape == (1, 8, 8)
    images = Images(torch.zeros(5, 1, 8, 8), torch.arange(5), 17, "mine")
    assert Judge.of(images).identity.startswith("pixels of 5 mine (")
    assert judge.identity == Judge.of_model(model).identity


def test_a_model_without_known_data_and_a_guided_one_are_judged_by_their_own_samples() -> None:
    model = toy(classes=2)
    seen: list[int] = []
    plain, guided = Judge.of_model(model, num=12, on_progress=seen.append), Judge.of_model(model, 2.0, num=12)
    assert plain.own == 12 and not seen  # they are made when first asked for, and said one by one
    plain(torch.zeros(4, *plain.shape))
    assert seen[0] == 0 and seen[-1] == 12
    assert "of 12 samples of toy at guidance 1 (" in plain.identity and "at guidance 2 (" in guided.identity
    known = replace(model, data="digits")  # whose guided samples are no data
    assert Judge.of_model(known, 2.0, features="pixels", num=12).identity == guided.identity


def test_many_images_are_thinned_always_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 10)
    one, other = Judge.of(draws(30)), Judge.of(draws(30))
    assert one.identity == other.identity and len(one.manifold.features) == 10


def test_what_cannot_be_judged_is_refused() -> None:
    for images in (draws(3), torch.zeros(5), [1], SimpleNamespace(shape=(9,))):
        with pytest.raises(FewstepError, match="a judge compares samples with more than 3 images"):
            Judge.of(images)
    judge = Judge.of(draws(8))
    with pytest.raises(FewstepError, match="knows images of shape \\(1, 2, 2\\), the samples have \\(1, 4, 4\\)"):
        judge(torch.zeros(8, 1, 4, 4), None)
    with pytest.raises(FewstepError, match="not finite"):
        judge(torch.full((8, 1, 2, 2), torch.nan), None)
