"""The reader of other people's networks, on arrays that the tests write themselves in the same layout."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.foreign_networks import NETWORKS, hsc_32, load, place, read

import fewstep

ROOT = Path(__file__).parents[2]
PATCH, SIDE, CHANNELS, WIDE, BLOCKS = 2, 3, 4, 5, 2  # all different, so that no two can be taken for each other
PATCHES = SIDE * SIDE


def arrays(seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)

    def perceptron(size: int) -> list[tuple[int, ...]]:
        return [(WIDE, size), (WIDE,), (size, WIDE), (size,)]

    norms = [(CHANNELS, PATCHES)] * 2 + [(PATCHES, CHANNELS)] * 2
    block = [*perceptron(PATCHES), *perceptron(CHANNELS), *norms]
    convolutions = [(CHANNELS, 2, PATCH, PATCH), (CHANNELS, 1, 1), (1, CHANNELS, PATCH, PATCH), (1, 1, 1)]
    shapes = [*convolutions, *block * BLOCKS, (CHANNELS, PATCHES), (CHANNELS, PATCHES)]
    return [*(draw.normal(size=shape).astype(np.float32) for shape in shapes), np.float32(10)]


def write(path: Path, values: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for value in values:
            np.save(file, value)


def score(values: list[np.ndarray], x: np.ndarray, t: float) -> np.ndarray:
    """The network's formulas for one picture ``[H, H]``, patch by patch."""
    *left, last = values
    take = lambda: left.pop(0).astype(np.float64)  # noqa: E731

    def norm(h: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5) * weight + bias

    def perceptron(h: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray) -> np.ndarray:
        return np.maximum(h @ w1.T + b1, 0) @ w2.T + b2

    into, into_bias, out, out_bias = (take() for _ in range(4))
    both = np.stack([x, np.full_like(x, t / last)])
    places = [(i, j) for i in range(SIDE) for j in range(SIDE)]
    cut = [both[:, PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)] for i, j in places]
    h = np.stack([(into * one).sum((1, 2, 3)) for one in cut], 1) + into_bias[:, :, 0]
    for _ in range(BLOCKS):
        patches, channels = [take() for _ in range(4)], [take() for _ in range(4)]
        first, second = [take() for _ in range(2)], [take() for _ in range(2)]
        h = h + perceptron(norm(h, *first), *patches)
        h = (h.T + perceptron(norm(h.T, *second), *channels)).T
    h, made = norm(h, take(), take()), np.zeros_like(x)
    for patch, (i, j) in enumerate(places):
        for a in range(PATCH):
            for b in range(PATCH):
                made[PATCH * i + a, PATCH * j + b] = (h[:, patch] * out[0, :, PATCH - 1 - a, PATCH - 1 - b]).sum() + out_bias.item()
    return made


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in which all networks have numbers of our own."""
    for seed, file in enumerate(NETWORKS.values()):
        write(tmp_path / "galaxygrad" / f"{file}.eqx", arrays(seed))
    (tmp_path / "galaxygrad" / "__init__.py").write_text("raise ImportError('JAX is not here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.foreign_networks.find_spec", lambda name: None)


def test_a_network_answers_what_its_formulas_say(tmp_path: Path) -> None:
    write(tmp_path / "one.eqx", arrays())
    model, draw = read(tmp_path / "one.eqx", "one"), np.random.default_rng(1)
    assert model.shape == (1, PATCH * SIDE, PATCH * SIDE)
    x, t = draw.normal(size=(3, *model.shape)), np.array([0.1, 2.0, 10.0])
    made = model.network(torch.from_numpy(x).float(), torch.from_numpy(t).float())
    expected = np.stack([score(arrays(), one[0], time)[None] for one, time in zip(x, t, strict=True)])
    torch.testing.assert_close(made, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


def test_a_network_is_a_model_of_a_score_under_a_law_of_constant_rate(tmp_path: Path) -> None:
    write(tmp_path / "one.eqx", arrays())
    model, x, t = read(tmp_path / "one.eqx", "one"), torch.randn(2, 1, 6, 6), torch.tensor(0.3)
    alpha, sigma = torch.exp(torch.tensor(-1.5)), torch.sqrt(1 - torch.exp(torch.tensor(-3.0)))
    expected = (x + sigma**2 * model.network(x, torch.full((2,), 3.0))) / alpha  # Tweedie's formula at the network's time 3
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("installed")
def test_each_network_is_found_where_the_package_is_and_nothing_of_it_is_imported() -> None:
    models = [load(name) for name in NETWORKS]
    assert [model.name for model in models] == list(NETWORKS.values())
    assert len({model.fingerprint for model in models}) == len(models)
    assert "galaxygrad" not in sys.modules
    assert hsc_32().fingerprint == models[0].fingerprint


@pytest.mark.usefixtures("missing")
def test_without_the_package_a_sentence_says_how_to_get_it() -> None:
    assert place("ztf-32") is None
    with pytest.raises(fewstep.ModelError, match="the weights of ztf-32 are not here: pip install --no-deps galaxygrad==0.1.5"):
        load("ztf-32")
    with pytest.raises(fewstep.ModelError, match="hsc-32"):
        load("hsc-33")


@pytest.mark.usefixtures("missing")
def test_without_the_package_the_example_ends_with_that_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "19_foreign_network.py"), run_name="__main__")
    assert capsys.readouterr().out == "nothing to sample, since its weights are not here: pip install --no-deps galaxygrad==0.1.5\n"


@pytest.mark.parametrize("values", [arrays()[:-1], arrays()[:6], arrays()[1:]])
def test_arrays_of_another_layout_are_refused(values: list[np.ndarray], tmp_path: Path) -> None:
    write(tmp_path / "one.eqx", values)
    with pytest.raises(fewstep.ModelError, match="a mixer is 7 arrays and 12 for each block"):
        read(tmp_path / "one.eqx", "one")
