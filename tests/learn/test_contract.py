"""One contract for all learners, on one toy model: in memory and in folders, killed and continued, in several processes, and refused."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from tests.problems import LAW, contents, names, tiny_folder
from torch import Tensor

import fewstep
from fewstep import ArtifactError, FewstepError, GaussianDenoiser, Model, ModelError, ModelStatistics, Sampler, Trajectories
from fewstep.learn.networks import finetune as finetune_module
from fewstep.learn.networks.distill import GuidedConfig, ProgressiveConfig
from fewstep.learn.networks.objectives import guided as guided_module
from fewstep.learn.networks.objectives import matching as matching_module
from fewstep.learn.samplers import fit_search as fit_search_module
from fewstep.learn.samplers import optimize_plan
from fewstep.learn.teacher.gram import GramConfig
from fewstep.models.flow_map import FirstOrderMap

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

SMALL = {"block_out_channels": (8,)}  # of the U-Net: as small as it gets
CLASSES = 2  # and the null label
ORDER = 1e-5  # relative: sums in another order, of states rounded to float32
TRAINED = 1e-4  # of networks: Adam makes a step of a gradient that is rounding alone (by SGD they are 1e-6 apart)
ROUNDED = {  # where differences pass rounding on: a sweep's of states, and those of two networks that are trained together (by SGD 4e-6)
    "fit": 1e-3,
    "distill dmd": 1e-3,
    "distill em": 1e-3,
    "distill em in passes": 1e-3,
}


@dataclass(frozen=True)
class Learner:
    """What the contract has to know of a learner.

    Attributes:
        run: ``(model, **options) -> result``, small.
        load: ``folder -> result``, from what ``out`` has saved.
        numbers: all numbers of a result that another run has to repeat.
        guidance: the scale that a result is for.
        use: makes pictures of it.
        figures: names of the figures that are documented to be on the card.
        total: the units done at the end, as ``on_progress`` counts them.
        in_memory: whether it works without a folder.
        everywhere: whether all processes of ``torchrun`` get the result.
        reads: whether a finished folder is read, and not refused.
        every_scale: whether a result is for all guidance scales, so that one is refused.
    """

    run: Callable[..., Any]
    load: Callable[[Path], Any]
    numbers: Callable[[Any], Any]
    guidance: Callable[[Any], float]
    use: Callable[[Model, Any], Tensor]
    figures: set[str]
    total: int
    in_memory: bool = True
    everywhere: bool = False
    reads: bool = True
    every_scale: bool = False


def of_statistics(found: ModelStatistics) -> dict[str, Any]:
    return {name: getattr(found, name).float() for name in "lsb"} | {"lam": found.lam, "card": found.card}  # saved in float32


def of_sampler(found: Sampler) -> dict[str, Any]:
    tableau = found.tableau
    return {name: getattr(tableau, name) for name in ("record", "update", "bias")} | {"t": tableau.nodes.t, "card": found.card}


def of_samplers(found: Mapping[int, Sampler]) -> dict[int, Any]:
    return {nfe: of_sampler(one) for nfe, one in found.items()}


def of_student(found: Model) -> dict[str, Any]:
    grids = {nfe: grid.t for table in found.carried.grids for nfe, grid in table.grids.items()}
    return {"weights": found.network.state_dict(), "grids": grids, "card": found.card, "fingerprint": found.fingerprint}


def of_trajectories(found: Trajectories) -> dict[str, Any]:
    return {"x": found.states(range(len(found))), "labels": found.labels(range(len(found))), "t": found.t, "card": found.card}


def saved_samplers(folder: Path) -> dict[int, Sampler]:
    found = (Sampler.load(path.parent) for path in sorted(folder.glob("**/sampler.json")))
    return {one.nfe: one for one in found}


def saved_student(folder: Path, trust: bool = False) -> Model:
    history = json.loads((folder / "history.json").read_text())
    if isinstance(history, list):
        return replace(fewstep.load_model(folder, trust=trust), card={"history": history})
    figures = {key: value for key, value in history.items() if key not in ("config", "of")}
    return replace(fewstep.load_model(folder, trust=trust), card=figures)


def pictures(model: Model, what: Any, **options: Any) -> Tensor:
    return fewstep.sample(model, what, seeds=range(3), **options)


CALIBRATION = fewstep.CalibrationConfig(levels=3, num=6, batch=2)
FIT = fewstep.FitConfig(num=8, held_out=4, levels=6, noises=4, iterations=1, batch=4)
OPTIMIZE = fewstep.OptimizeConfig(levels=6, num=2, noises=8, held_out=8, iterations=4)
FINETUNE = fewstep.FinetuneConfig(nfe=2, rounds=2, steps=3, batch=4, num=8, held_out=4, levels=6, teacher_nfe=8, enough=-1.0)
DISTILL = fewstep.DistillConfig(slots=2, steps=4, batch=4, lr=1e-2, ema=0.5, num=8, held_out=4, teacher_nfe=4)
FLOW_MAP = fewstep.FlowMapConfig(
    target="semigroup", slots=2, max_passes=2, steps=4, batch=4, lr=1e-2, ema=0.5, num=8, held_out=4, teacher_nfe=4
)  # whose targets are made with averaged weights
GUIDED = GuidedConfig(slots=4, steps=12, batch=4, lr=1e-2, ema=0.5, held_out=4)
PROGRESSIVE = ProgressiveConfig(nfe=(2,), steps=12, batch=4, lr=1e-2, ema=0.5, held_out=4)
MATCHING: dict[str, Any] = {"steps": 6, "batch": 4, "lr": 1e-2, "ema": 0.5, "held_out": 8, "updates": 1, "before": 1, "measures": 2}
DMD = fewstep.MatchingConfig(**MATCHING)
EM = fewstep.EMConfig(**MATCHING, langevin=2)
FEW = fewstep.EMConfig(**MATCHING, langevin=2, passes=2, fake_rank=2)


class Mean:
    """A judge that finds samples best whose mean is least: one that a few training steps move."""

    identity = "a mean"

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign

    def __call__(self, samples: Tensor, requested: Tensor | None) -> dict[str, float | None]:
        return {"fd": None, "precision": None, "recall": None, "labels": None, "value": self.sign * float(samples.double().mean())}


TRAJECTORIES = fewstep.TrajectoryConfig(num=8, nfe=8, batch=2)

SAMPLER = {"name", "of", "model", "prediction", "guidance", "chosen", "error", "rmse", "held_out_noises", "network_evaluations"}
LEARNERS = {
    "calibrate": Learner(
        run=lambda model, **given: fewstep.calibrate(model, **{"config": CALIBRATION, **given}),
        load=ModelStatistics.load,
        numbers=of_statistics,
        guidance=lambda found: found.guidance,
        use=lambda model, found: pictures(model, fewstep.DPMSolverV3(found), nfe=2),
        figures={"of", "states", "data", "pool", "seed", "derivatives", "denoiser"},
        total=6 * 4,
    ),
    "fit": Learner(
        run=lambda model, **given: fewstep.fit(model, **{"nfe": (2, 1), "config": FIT, **given}),
        load=saved_samplers,
        numbers=of_samplers,
        guidance=lambda found: found[1].card["guidance"],
        use=lambda model, found: pictures(model, found[2]),
        figures=SAMPLER | {"levels_from", "best_hand_made", "stages", "noises"},
        total=2,
        everywhere=True,
    ),
    "optimize": Learner(
        run=lambda model, **given: fewstep.optimize(model, **{"solver": "unipc-2", "nfe": [2, 1], "config": OPTIMIZE, **given}),
        load=saved_samplers,
        numbers=of_samplers,
        guidance=lambda found: found[1].card["guidance"],
        use=lambda model, found: pictures(model, found[2]),
        figures=SAMPLER | {"best_standard_grid", "calibration_noises", "candidates"},
        total=2,
        everywhere=True,
    ),
    "finetune": Learner(
        run=lambda model, **given: fewstep.finetune(model, **{"config": FINETUNE, **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None),
        figures={"history"},
        total=6,
        reads=False,
    ),
    "distill": Learner(
        run=lambda model, **given: fewstep.distill(model, **{"config": DISTILL, **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None, nfe=1),
        figures={"curve", "slots", "passes", "arithmetic", "seconds"},
        total=4,
        reads=False,
    ),
    "distill flow-map": Learner(
        run=lambda model, **given: fewstep.distill(model, "flow-map", **{"config": FLOW_MAP, **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None, nfe=2),
        figures={"curve", "slots", "passes", "arithmetic", "trained_on", "seconds"},
        total=4,
        reads=False,
    ),
    "distill guided": Learner(
        run=lambda model, **given: fewstep.distill(model, "guided", **{"config": GUIDED, **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.default_guidance,
        use=lambda model, found: pictures(found, "ddim", nfe=2, guidance=3),
        figures={"curve", "calls", "seconds"},
        total=12,
        reads=False,
        every_scale=True,
    ),
    "distill progressive": Learner(
        run=lambda model, **given: fewstep.distill(model, "progressive", **{"config": PROGRESSIVE, **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None),
        figures={"curve", "ends", "passes", "seconds"},
        total=12,
        reads=False,
    ),
    "distill dmd": Learner(
        run=lambda model, **given: fewstep.distill(model, "dmd", **{"config": DMD, "judge": Mean(), **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None, nfe=1),
        figures={"curve", "scores", "kept", "passes", "arithmetic", "seconds"},
        total=6,
        reads=False,
    ),
    "distill em": Learner(
        run=lambda model, **given: fewstep.distill(model, "em", **{"config": EM, "judge": Mean(), **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None, nfe=1),
        figures={"curve", "scores", "kept", "passes", "arithmetic", "seconds"},
        total=6,
        reads=False,
    ),
    "distill em in passes": Learner(
        run=lambda model, **given: fewstep.distill(model, "em", **{"config": FEW, "judge": Mean(), **given}),
        load=saved_student,
        numbers=of_student,
        guidance=lambda found: found.tuned.guidance,
        use=lambda model, found: pictures(found, None, nfe=2),
        figures={"curve", "scores", "kept", "passes", "arithmetic", "fake", "seconds"},
        total=6,
        reads=False,
    ),
    "generate_trajectories": Learner(
        run=lambda model, **given: fewstep.generate_trajectories(
            model, **{"grid": fewstep.make_grid("angle", LAW, 2), "config": TRAJECTORIES, **given}
        ),
        load=Trajectories.load,
        numbers=of_trajectories,
        guidance=lambda found: found.guidance,
        use=lambda model, found: found.states(range(3))[:, -1],
        figures={"of", "solver", "nfe", "teacher_error", "teacher_error_largest"},
        total=8,
        in_memory=False,
    ),
}


def bits(value: Any) -> Any:
    """A value in which a different bit is a different value; without the clock, and as JSON gives it back."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, Mapping):
        return {str(key): bits(one) for key, one in value.items() if key != "seconds"}
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return value.hex() if isinstance(value, float) else value


def tidy(folder: Path) -> dict[str, Any]:
    """The contents of a folder without the clock."""
    return {name: bits(json.loads(data)) if name.endswith(".json") else data for name, data in contents(folder).items()}


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Exact trajectories of few steps, one rival, and few levels to choose from."""
    patch.setattr(fit_search_module, "HAND_MADE", ("dpm-solver-pp-2m",))
    patch.setattr(optimize_plan, "REFERENCE_NFE", 12)
    patch.setattr(guided_module, "FINE", 2)
    patch.setattr(matching_module, "FINE", 2)
    patch.setattr(finetune_module, "GramConfig", lambda num: GramConfig(levels=8, num=2))


class Calls:
    """Counts the calls of all U-Nets, sees their labels, and interrupts one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.stop, self.labels = 0, -1, set[int]()
        real = UNet2DModel.forward

        def forward(network: UNet2DModel, x: Tensor, time: Tensor, class_labels: Tensor | None = None, **options: Any) -> Any:
            self.count += 1
            self.labels |= set() if class_labels is None else set(class_labels.tolist())
            if self.count == self.stop:
                raise KeyboardInterrupt
            return real(network, x, time, class_labels, **options)

        patch.setattr(UNet2DModel, "forward", forward)

    def begin(self, stop: int = -1) -> None:
        self.count, self.stop, self.labels = 0, stop, set()


# -- what all tests share --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calls() -> Iterator[Calls]:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield Calls(patch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A model, and another that differs in its weights alone."""
    folder = tmp_path_factory.mktemp("models")
    first, second = (fewstep.load_model(tiny_folder(folder / str(seed) / "toy", CLASSES, seed=seed, **SMALL)) for seed in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def model(models: tuple[Model, Model]) -> Model:
    return models[0]


@pytest.fixture(scope="module", params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> Learner:
    return LEARNERS[request.param]


@pytest.fixture(scope="module")
def whole(learner: Learner, model: Model, calls: Calls, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run in a folder that nobody killed. A second one was begun in the same folder while it ran."""
    out, notes, refusals = tmp_path_factory.mktemp("whole") / "out", list[tuple[int, str]](), list[str]()

    def on_progress(done: int, note: str) -> None:
        if len(notes) in (0, 5):
            with pytest.raises(ArtifactError) as error:
                learner.run(model, out=out)
            refusals.append(str(error.value))
        notes.append((done, note))

    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    modes = [(part.training, *(value.requires_grad for value in part.parameters(False))) for part in model.network.modules()]
    calls.begin()
    result = learner.run(model, out=str(out), on_progress=on_progress)
    count = calls.count
    after = [(part.training, *(value.requires_grad for value in part.parameters(False))) for part in model.network.modules()]
    untouched = after == modes and bits(before) == bits(model.network.state_dict())
    return SimpleNamespace(out=out, result=result, calls=count, notes=notes, refusals=refusals, untouched=untouched, files=tidy(out))


def killed(learner: Learner, model: Model, calls: Calls, out: Path, at: int) -> None:
    """Run a learner whose network is interrupted at a call."""
    calls.begin(stop=at)
    with pytest.raises(KeyboardInterrupt):
        learner.run(model, out=out)
    calls.begin()


@pytest.fixture(scope="module")
def half(learner: Learner, model: Model, calls: Calls, whole: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed on its way."""
    out = tmp_path_factory.mktemp("half") / "out"
    killed(learner, model, calls, out, int(0.6 * whole.calls))
    return out


# -- in memory and in a folder ---------------------------------------------------------------------------------------


@pytest.mark.every(4)
def test_in_memory_it_gives_the_same_and_leaves_nothing(
    learner: Learner, model: Model, whole: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not learner.in_memory:
        with pytest.raises(FewstepError, match="missing a required argument: 'out'; it takes model, grid, out"):
            learner.run(model)
        return
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = learner.run(model)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
    assert bits(learner.numbers(result)) == bits(learner.numbers(whole.result))
    made = learner.use(model, result)
    assert made.shape == (3, 1, 4, 4) and bool(torch.isfinite(made).all())


def test_the_folder_holds_what_was_returned(learner: Learner, model: Model, whole: SimpleNamespace) -> None:
    loaded = learner.load(whole.out)
    assert bits(learner.numbers(loaded)) == bits(learner.numbers(whole.result))
    torch.testing.assert_close(learner.use(model, loaded), learner.use(model, whole.result), rtol=ORDER, atol=ORDER)
    assert not list(whole.out.rglob(".*"))


def test_the_card_has_the_documented_figures(learner: Learner, model: Model, whole: SimpleNamespace) -> None:
    cards = [one.card for one in whole.result.values()] if isinstance(whole.result, dict) else [whole.result.card]
    for card in cards:
        assert learner.figures <= set(card)
        assert card.get("of", model.name) == model.name and card.get("model", model.fingerprint) == model.fingerprint
        if "chosen" in card:
            assert [*card.get("stages", card.get("candidates"))[card["chosen"]]][0] > 0
            assert len(card["error"]) == len(card["rmse"]) == 2 and all(value > 0 for value in (*card["error"], *card["rmse"]))
    if "history" in learner.figures:
        wanted = {one.name for one in fields(finetune_module.Round)}
        assert [set(one) for one in cards[0]["history"]] == [wanted, wanted]


def test_progress_is_counted_to_the_end(learner: Learner, whole: SimpleNamespace) -> None:
    counts = [done for done, _ in whole.notes]
    assert counts == sorted(counts) and counts[-1] == learner.total and all(isinstance(note, str) for _, note in whole.notes)


def test_the_model_is_left_as_it_was(whole: SimpleNamespace) -> None:
    assert whole.untouched


def test_a_second_job_in_the_folder_is_refused_and_harms_nothing(whole: SimpleNamespace) -> None:
    """Its numbers are compared with those of runs in memory and of a killed one, which nothing disturbed."""
    assert len(whole.refusals) == 2
    assert all(f"another fewstep job is working in {whole.out}: wait until it ends, or use" in said for said in whole.refusals)


def test_a_finished_folder_is_read_or_refused(learner: Learner, model: Model, calls: Calls, whole: SimpleNamespace) -> None:
    calls.begin()
    if learner.reads:
        assert bits(learner.numbers(learner.run(model, out=whole.out))) == bits(learner.numbers(whole.result))
    else:
        with pytest.raises(FewstepError, match="already holds a finished student: choose another folder, or remove it"):
            learner.run(model, out=whole.out)
    assert calls.count == 0 and tidy(whole.out) == whole.files


# -- killed and continued --------------------------------------------------------------------------------------------


def continued(learner: Learner, model: Model, calls: Calls, whole: SimpleNamespace, out: Path) -> None:
    calls.begin()
    result = learner.run(model, out=out)
    assert bits(learner.numbers(result)) == bits(learner.numbers(whole.result))
    assert tidy(out) == whole.files


@pytest.mark.every(3)
def test_a_killed_run_continues_to_the_same_bits(
    learner: Learner, model: Model, calls: Calls, whole: SimpleNamespace, half: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(half, out)
    assert names(out) and {path.name for path in out.rglob(".*")} <= {".lock"}  # nothing half made
    continued(learner, model, calls, whole, out)
    assert calls.count < 0.9 * whole.calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", [0.1, 0.4, 0.97, *(pytest.param(n, marks=pytest.mark.release) for n in (0.01, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9))]
)
def test_wherever_it_was_killed(learner: Learner, model: Model, calls: Calls, whole: SimpleNamespace, tmp_path: Path, share: float) -> None:
    killed(learner, model, calls, tmp_path / "out", max(1, int(share * whole.calls)))
    continued(learner, model, calls, whole, tmp_path / "out")


@pytest.mark.parametrize("state", ["half", "whole"])
@pytest.mark.every(3)
def test_another_models_work_is_refused(
    learner: Learner, models: tuple[Model, Model], calls: Calls, whole: SimpleNamespace, half: Path, tmp_path: Path, state: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(half if state == "half" else whole.out, out)
    before = contents(out)
    calls.begin()
    with pytest.raises(FewstepError, match="another|already holds a finished student"):
        learner.run(models[1], out=out)
    assert contents(out) == before and calls.count <= 0.3 * whole.calls


# -- guidance --------------------------------------------------------------------------------------------------------


def bare(value: Any) -> Any:
    """Numbers without what says whose they are."""
    known = ("card", "fingerprint")
    return {key: bare(one) for key, one in value.items() if key not in known} if isinstance(value, Mapping) else value


@pytest.mark.every(4)
def test_guidance_reaches_the_work(learner: Learner, model: Model, calls: Calls, whole: SimpleNamespace, tmp_path: Path) -> None:
    calls.begin()
    if learner.every_scale:
        with pytest.raises(FewstepError, match="leave guidance out, and sample it at 2"):
            learner.run(model, guidance=2)
        return
    result = learner.run(model, guidance=2, out=None if learner.in_memory else tmp_path / "out")
    assert CLASSES in calls.labels  # the null label
    assert learner.guidance(result) == 2.0 and learner.guidance(whole.result) == 1.0
    assert bits(bare(learner.numbers(result))) != bits(bare(learner.numbers(whole.result)))
    unconditional = replace(model, null_label=None)
    with pytest.raises(ModelError, match="toy cannot be guided"):
        learner.run(unconditional, guidance=2, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# -- mistakes --------------------------------------------------------------------------------------------------------


def student(model: Model) -> Model:
    return replace(model, flow_map=FirstOrderMap(model))


MISTAKES: dict[str, tuple[Callable[[Model, Path], tuple[Any, dict[str, Any]]], type[FewstepError], str]] = {
    "misspelt": (lambda model, path: (model, {"guidence": 2}), FewstepError, "'guidence'; did you mean guidance"),
    "bare-network": (lambda model, path: (model.network, {}), ModelError, "takes a fewstep.Model, not a \\w+: wrap"),
    "denoiser": (
        lambda model, path: (GaussianDenoiser(LAW, torch.zeros(1, 4, 4), torch.ones(())), {}),
        ModelError,
        "a GaussianDenoiser does not know the shape of its samples: make a Model of it",
    ),
    "no-shape": (
        lambda model, path: (replace(model, shape=None), {}),
        ModelError,
        "does not know the shape of its samples: make the Model",
    ),
    "student": (lambda model, path: (student(model), {}), ModelError, "toy is a student, which is sampled as it is: name its teacher"),
    "file": (lambda model, path: (model, {"out": path / "file"}), ArtifactError, "file is a file; choose a folder that you may write to"),
    "below-a-file": (lambda model, path: (model, {"out": path / "file" / "x"}), ArtifactError, "file is a file; choose a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.every(5)
def test_mistakes_are_named_before_any_work(learner: Learner, model: Model, calls: Calls, tmp_path: Path, mistake: str) -> None:
    (tmp_path / "file").write_text("mine")
    make, error, says = MISTAKES[mistake]
    wrong, given = make(model, tmp_path)
    calls.begin()
    with pytest.raises(error, match=says.replace("?", "[?]")):
        learner.run(wrong, **{"out": tmp_path / "out", **given})
    assert calls.count == 0 and [path.name for path in tmp_path.rglob("*")] == ["file"]


WRONG = {
    "config": (5, {}, {"num": 8}, False),
    "guidance": ("a", "2", [2], float("nan")),
    "out": (5, ["folder"]),
    "device": ("nodevice", 5.5),
    "on_progress": (5,),
}


@pytest.mark.parametrize("argument", WRONG)
@pytest.mark.every(3)
def test_a_value_without_meaning_is_refused_before_any_work(
    learner: Learner, model: Model, calls: Calls, tmp_path: Path, argument: str
) -> None:
    calls.begin()
    for value in WRONG[argument]:
        with pytest.raises(FewstepError, match=re.escape(repr(value)) if argument != "config" else "config is a"):
            learner.run(model, **{"out": tmp_path / "out", argument: value})
    assert calls.count == 0 and not list(tmp_path.iterdir())


# -- several processes -----------------------------------------------------------------------------------------------


def two_processes(folder: Path) -> None:
    """Become two processes that run all learners together, and write what each got; one import serves both."""
    child = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
    torch.set_num_threads(1)
    shorten(pytest.MonkeyPatch())
    model, found = fewstep.load_model(folder / "toy"), dict[str, Any]()
    for name, learner in LEARNERS.items():
        if learner.in_memory:
            found[f"{name} in memory"] = refusal(learner, model)
        result = learner.run(model, out=folder / name)
        found[name] = None if result is None else learner.numbers(result)
    torch.save(found, folder / f"found-{os.environ['RANK']}")
    if child:
        assert os.waitpid(child, 0)[1] == 0


def refusal(learner: Learner, model: Model) -> str:
    try:
        learner.run(model)
    except FewstepError as error:
        return str(error)
    return "not refused"


@pytest.fixture(scope="module")
def together(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes left, and what each got."""
    folder = tmp_path_factory.mktemp("together")
    assert model.folder is not None
    shutil.copytree(model.folder, folder / "toy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from pathlib import Path; from tests.learn.test_contract import two_processes; two_processes(Path({str(folder)!r}))"
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-c", code], env=shared, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, [torch.load(folder / f"found-{rank}", weights_only=False) for rank in (0, 1)]


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compare the numbers of two results that sums in another order made."""
    if isinstance(ours, Tensor) and ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    elif isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for key in set(ours) - {"seconds", "fingerprint"}:  # the clock, and a hash of weights that were rounded otherwise
            close(ours[key], theirs[key], tolerance)
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other, tolerance)
    else:
        assert bits(ours) == bits(theirs) or ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(
    request: pytest.FixtureRequest, learner: Learner, model: Model, whole: SimpleNamespace, together: tuple[Path, list[dict[str, Any]]]
) -> None:
    name, (folder, (first, second)) = request.node.callspec.params["learner"], together
    if learner.in_memory:
        assert f"several processes can only {name.split()[0]} together with a folder to meet in" in first[f"{name} in memory"]
    assert second[name] is None if not learner.everywhere else bits(second[name]) == bits(first[name])
    assert bits(learner.numbers(learner.load(folder / name))) == bits(first[name])
    if name == "generate_trajectories":
        assert tidy(folder / name) == whole.files
    close(first[name], learner.numbers(whole.result), ROUNDED.get(name, TRAINED if name.startswith("distill") else ORDER))
