"""A text pipeline on the page: a prompt in place of a class, guidance, and pictures in place of latents; what it cannot show it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.diffusers import tiny_pipelines

from fewstep import FewstepError, ModelError
from fewstep.apps.page.compare import begin_compare
from fewstep.apps.page.fit import begin_fit, planned
from fewstep.apps.page.inspect import begin_inspect
from fewstep.apps.page.jobs import Jobs
from fewstep.apps.page.models import Models
from fewstep.apps.page.sample import DEFAULT, LONGEST, Asked, sampled
from fewstep.apps.page.workshop import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")  # of what diffusers itself has deprecated
RED = "a red cat"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.make("sd", tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def models(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("page"), str(pipeline))


@pytest.fixture
def asked(pipeline: Path) -> Asked:
    return Asked(str(pipeline), "unipc-2", nfe=3, num=2, guidance=3.0, exact=False, prompt=RED)


def test_the_lines_make_the_pictures_that_are_shown(models: Models, asked: Asked) -> None:
    shown = list(sampled(models, asked))
    assert [None if strip.images is None else tuple(strip.images.shape[1:]) for strip in shown[0].strips] == [(4, 8, 8), None]
    images = shown[-1].strips[0].images
    assert images is not None and images.shape == (2, 3, 16, 16)
    assert shown[-1].command == ""  # no command takes a prompt
    names: dict[str, Any] = {}
    exec(shown[-1].python, names)
    torch.testing.assert_close(names["images"], images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [{"prompt": "the moon"}, {"guidance": 1.0}, {"seed": 5}], ids=str)
def test_prompt_guidance_and_seed_change_the_pictures(changed: dict[str, Any], models: Models, asked: Asked) -> None:
    one, other = (list(sampled(models, ask))[-1].strips[0].images for ask in (asked, replace(asked, **changed)))
    assert one is not None and other is not None and float((one - other).abs().max()) > 1e-3


def test_errors_are_those_of_latents(models: Models, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.apps.page.sample.exact_samples", lambda problem, seeds, cond: torch.zeros(len(seeds), *problem.shape))
    first, _, exact = list(sampled(models, replace(asked, exact=True)))[-1].strips
    assert first.note.endswith(" of latents") and exact.images is not None and exact.images.shape == (2, 3, 16, 16)


def test_the_guidance_to_begin_with_is_that_of_the_pipelines_own_call(models: Models, asked: Asked) -> None:
    assert models.takes_prompt(asked.model) and models.open(asked.model).default_guidance == 7.5
    assert not models.takes_prompt("digits-edm")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompt": "a" * (LONGEST + 1)}, "a prompt is a text of up to 2000 letters"),
        ({"prompt": 3}, "a prompt is a text"),
        ({"model": "digits-edm"}, "digits-edm takes no prompt"),
    ],
    ids=["long", "a number", "another model"],
)
def test_a_prompt_that_is_none(changed: dict[str, Any], says: str, models: Models, asked: Asked) -> None:
    with pytest.raises(FewstepError, match=says):
        list(sampled(models, replace(asked, **changed)))


def test_the_other_tabs_say_what_to_type_instead(models: Models, asked: Asked) -> None:
    shop = Workshop(models.out, models, Jobs(models.out, "fork"))
    name = asked.model
    for ask in (
        lambda: planned(models, name, "3", 1.0, None),
        lambda: begin_fit(shop, name, "3", 1.0, None),
        lambda: begin_compare(shop, name, ["ddim"], ["angle"], "3", 4, 0, 1.0),
        lambda: begin_inspect(shop, name, "ddim", DEFAULT, 5, 4, 1.0),
    ):
        with pytest.raises(FewstepError, match="--prompts FILE"):
            ask()
    shop.jobs.close()


def test_a_pipeline_that_is_led_by_its_calls_is_refused_before_it_is_loaded(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "led"
    shutil.copytree(pipeline, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KolorsPipeline"}))
    shutil.rmtree(folder / "unet")  # loading it would say something else
    with pytest.raises(ModelError, match="holds a KolorsPipeline, which is led by its own calls"):
        Models(tmp_path / "page", str(folder))


def test_a_pipeline_is_loaded_once_for_all_prompts(models: Models, asked: Asked) -> None:
    pipes = [models._pipe(asked.model) for prompt in ("one", "two", "three", "four") if models.open(asked.model, prompt)]
    assert all(one is pipes[0] for one in pipes) and len(models._held) == 3
    for name in ("digits-edm", "digits-ddpm", "digits-flow-map"):
        models.open(name)
    assert not models._pipes  # nor longer than it is used
    assert models.pictures(asked.model, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
