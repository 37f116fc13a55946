"""The tab *Sample*: what it shows is what the command and the lines below it make; what it cannot take it refuses in words."""

import resource
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.apps.conftest import run, samples

from fewstep import FewstepError, Sampler, sample
from fewstep.apps.page.compare import samplers_to_compare
from fewstep.apps.page.models import Models
from fewstep.apps.page.sample import (
    DEFAULT,
    RECOMMENDED,
    Asked,
    ExactSamples,
    asked_for,
    grids_of,
    picked,
    sampled,
    solvers_of,
    whole_of,
)
from fewstep.apps.page.shown import strips
from fewstep.apps.page.workshop import Workshop

QUICK = Asked("digits-edm", nfe=3, num=2, exact=False)
MEMORY = 200  # MB that a hundred requests may take


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "changed",
    [
        {"nfe": 5},  # the fitted sampler that the model carries
        {"solver": "unipc-2", "grid": "karras", "guidance": 2.0, "label": 3},
        {"solver": "ddim", "seed": 7},
        {"model": "digits-ddpm", "solver": "dpm-solver-pp-2m"},
        {"model": "digits-flow-map", "nfe": 2, "other": RECOMMENDED},
        {"model": "digits-edm-3step", "nfe": 3, "other": RECOMMENDED},
    ],
    ids=lambda changed: " ".join(map(str, changed.values())),
)
def test_the_command_and_the_lines_make_what_is_shown(
    changed: dict[str, Any], models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    *_, last = sampled(models, replace(QUICK, **changed))
    shown = last.strips[0].images
    names: dict[str, Any] = {}
    exec(last.python, names)
    torch.testing.assert_close(names["images"].cpu(), shown, rtol=0, atol=1e-5)
    verb, *words = shlex.split(last.command)[1:]
    assert run(monkeypatch, verb, *words[:-1], tmp_path / "out", "--npz") == 0
    torch.testing.assert_close(torch.from_numpy(samples(tmp_path / "out")), shown, rtol=0, atol=1e-5)


def test_the_guidance_that_is_shown_is_the_one_that_was_used(models: Models) -> None:
    *_, last = sampled(models, replace(QUICK, solver="ddim", guidance=1.2345678))
    assert "--guidance 1.2345678" in last.command and "guidance=1.2345678" in last.python


def test_a_saved_sampler_is_one_to_choose(shop: Workshop) -> None:
    folder = shop.out / "fit-1" / "nfe-03"
    shop.models.open("digits-edm").fitted(3).save(folder)
    assert solvers_of(shop.models, "digits-edm")[-1] == str(folder)
    assert str(folder) not in solvers_of(shop.models, "digits-ddpm")
    *_, last = sampled(shop.models, replace(QUICK, solver=str(folder)))
    assert last.command.count(f"--sampler {folder}") == 1 and f'fewstep.Sampler.load("{folder}")' in last.python
    expected = sample(shop.models.open("digits-edm"), Sampler.load(folder), seeds=range(2))
    torch.testing.assert_close(last.strips[0].images, expected)
    with pytest.raises(FewstepError, match="has 3 evaluations and a grid of its own"):
        picked(shop.models, "digits-edm", str(folder), DEFAULT, 4, 1.0)


@pytest.mark.usefixtures("short_reference")
def test_pictures_appear_evaluation_by_evaluation_and_errors_at_the_end(models: Models) -> None:
    shown = list(sampled(models, replace(QUICK, exact=True), ExactSamples()))
    notes = [one.strips[0].note for one in shown]
    assert notes[:4] == ["1 of 3", "2 of 3", "3 of 3", "3 evaluations"]
    assert all(one.strips[1].images is None for one in shown[:4])
    assert not any(one.command for one in shown[:-1])
    first, second, exact = shown[-1].strips
    assert float(first.note.split()[-1]) < float(second.note.split()[-1]) and exact.images is not None
    assert shown[-1].strips[0].images is not None and 'alt="2 samples by exact trajectory"' in strips(shown[-1].strips)


def test_the_recommended_sampler_comes_first_and_every_kind_after_it(models: Models) -> None:
    known = solvers_of(models, "digits-edm")
    assert known[:2] == [RECOMMENDED, "fitted"] and {"unipc-2", "heun", "sde-dpm-solver-pp-2m", "dpm-solver-v3"} <= set(known)
    assert solvers_of(models, "digits-flow-map") == [RECOMMENDED]
    assert "trailing" in grids_of(models, "digits-ddpm") and "trailing" not in grids_of(models, "digits-edm")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"nfe": 21}, "nfe is 1 to 20 on this page"),
        ({"num": 0}, "num is 1 to 16"),
        ({"seed": -1}, "seeds must lie between"),
        ({"guidance": float("nan")}, "guidance is a number"),
        ({"guidance": float("inf")}, "guidance is a finite number"),
        ({"solver": "no-such"}, "choose one of the list"),
        ({"grid": "../../etc"}, "choose one of the list"),
        ({"solver": RECOMMENDED, "grid": "karras"}, "has a grid of its own"),
        ({"label": 10}, "labels 0 to 9"),
        ({"model": "/etc"}, "choose one of the list"),
        ({"model": "os:system"}, "choose one of the list"),
        ({"model": "somebody/something"}, "choose one of the list"),
    ],
    ids=str,
)
def test_what_it_cannot_take_is_refused_in_words(changed: dict[str, Any], says: str, models: Models) -> None:
    with pytest.raises(FewstepError, match=says):
        list(sampled(models, replace(QUICK, **changed)))


@pytest.mark.parametrize("value", ["8", 2.5, None, True, float("nan"), [1]])
def test_a_browser_sends_whole_numbers(value: Any) -> None:
    with pytest.raises(FewstepError, match="whole numbers"):
        asked_for("digits-edm", RECOMMENDED, DEFAULT, "ddim", DEFAULT, value, 1.0, None, 0, 1, False, "")


def test_a_model_of_ones_own_is_named_by_the_command_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "tests.apps.own_models:shrink"
    own = Models(tmp_path, entry)
    assert own.names[0] == entry and own.open(entry).name == entry
    assert own.python(entry)[0] == "from tests.apps.own_models import shrink"


@pytest.mark.slow
@pytest.mark.usefixtures("short_reference")
def test_a_hundred_requests_do_not_grow_the_process(models: Models) -> None:
    exact, asked = ExactSamples(), replace(QUICK, exact=True, num=8, nfe=5)
    for seed in range(5):
        list(sampled(models, replace(asked, seed=seed), exact))
    before = _resident()
    for seed in range(100):
        for shown in sampled(models, replace(asked, seed=8 * seed), exact):
            strips(shown.strips)
    grown = _resident() - before
    assert grown < MEMORY, f"it grew by {grown:.0f} MB"


def _resident() -> float:
    """The memory of this process in MB."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@pytest.mark.parametrize("out", ["d", "unipc-2", "."])
def test_a_folder_named_as_a_solver_begins(out: str, models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    here = Models(Path(out))
    here._held = models._held
    models.open("digits-edm").fitted(3).save(Path(out) / "fit-1" / "nfe-03")
    for name in ("ddim", "unipc-2"):
        assert picked(here, "digits-edm", name, DEFAULT, 3, 1.0).words == ["--solver", name, "--nfe", "3"]
    saved = str(Path(out) / "fit-1" / "nfe-03")
    assert picked(here, "digits-edm", saved, DEFAULT, 3, 1.0).words == ["--sampler", saved]
    assert {"ddim", "unipc-2"} < set(samplers_to_compare(here, "digits-edm")[0]) and saved not in samplers_to_compare(here, "digits-edm")[0]


@pytest.mark.parametrize("value", [True, 2.5, float("nan"), float("inf"), "7", None])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(FewstepError, match="takes whole numbers"):
        whole_of(value)
    assert whole_of(8.0) == 8 and whole_of(10**400) == 10**400
