"""All verbs on a model that is told its guidance scale: at the scale that was asked for, by one call, or refused in words."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.learn.test_contract import CALIBRATION, DISTILL, FINETUNE, FIT, OPTIMIZE, bits, of_samplers, of_statistics, shorten
from tests.own_networks import timed_model
from tests.problems import LAW, frozen, names, tiny_folder, told_model
from torch import Tensor

import fewstep
from fewstep import FewstepError, Model, ModelError, TrajectoryConfig, load_model, sample
from fewstep.data.images import Images
from fewstep.inverse.measurements import Average
from fewstep.learn.networks.distill import FlowMapConfig, GuidedConfig, ProgressiveConfig, distill
from fewstep.learn.networks.objectives.flow_map import FlowMapObjective
from fewstep.learn.networks.objectives.flow_map_targets import TARGETS, Pairs, Step, short_mean
from fewstep.learn.networks.objectives.objective import Networks
from fewstep.learn.teacher.batches import Batch
from fewstep.models.guided import GuidedForm
from fewstep.models.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

SCALES = (1.0, 2.6, 4.0)
GUIDED = GuidedConfig(slots=4, steps=3, batch=4, lr=1e-2, ema=0.5, held_out=4)
MAP = FlowMapConfig(slots=4, max_passes=2, steps=3, batch=8, lr=1e-2, ema=0.5, num=8, held_out=6, teacher_nfe=4)
HALVED = ProgressiveConfig(nfe=(2,), steps=3, batch=4, lr=1e-2, ema=0.5, held_out=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny_folder(tmp_path_factory.mktemp("told") / "teacher", 2, block_out_channels=(8,)))


@pytest.fixture(scope="module")
def told(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(told_model(teacher).save(tmp_path_factory.mktemp("told") / "student"))


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


# -- at a scale ------------------------------------------------------------------------------------------------------


def compared(model: Model, **given: Any) -> Any:
    return [(row.solver, row.rmse) for row in fewstep.compare(model, ["ddim", "unipc-2"], nfe=[2], num=4, **given).rows]


def trajectories(model: Model, out: Path, **given: Any) -> Tensor:
    config = TrajectoryConfig(num=4, nfe=4, batch=2)
    made = fewstep.generate_trajectories(model, fewstep.make_grid("angle", LAW, 2), out, config=config, **given)
    assert made is not None
    return made.states(range(4))


def restored(model: Model, **given: Any) -> Tensor:
    options = {"seeds": range(2), "cond": torch.tensor([1]), "nfe": 4, **given}
    return fewstep.restore(model, Average(2), torch.zeros(1, 2, 2), 0.1, **options).samples


VERBS: dict[str, Callable[..., Any]] = {
    "sample": lambda model, out, **given: sample(model, "unipc-2", nfe=3, seeds=range(3), **given),
    "calibrate": lambda model, out, **given: of_statistics(fewstep.calibrate(model, config=CALIBRATION, **given)),
    "fit": lambda model, out, **given: of_samplers(fewstep.fit(model, nfe=2, config=FIT, **given)),
    "optimize": lambda model, out, **given: of_samplers(fewstep.optimize(model, "unipc-2", nfe=[2], config=OPTIMIZE, **given)),
    "compare": lambda model, out, **given: compared(model, **given),
    "trajectories": lambda model, out, **given: trajectories(model, out, **given),
    "restore": lambda model, out, **given: restored(model, **given),
}

HEAVY = ("calibrate", "compare", "optimize")


def numbers(value: Any) -> Any:
    """What was found, without whose it is."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items() if key not in ("card", "fingerprint")}
    return bits(value)


@pytest.mark.parametrize("verb", [pytest.param(verb, marks=pytest.mark.slow) if verb in HEAVY else verb for verb in VERBS])
@pytest.mark.every(3)
def test_a_verb_works_at_the_scale_that_was_asked_for_by_one_call(told: Model, tmp_path: Path, verb: str) -> None:
    """It does what it does to a plain model that answers as this one does at that scale, with as many calls of as many rows."""
    found, plain, rows = dict[str, Any](), replace(frozen(told, 2.0), name="plain", folder=None), list[int]()
    handle = told.network.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    counted = dict[str, list[int]]()
    for name, model, given in (("told", told, {"guidance": 2}), ("plain", plain, {})):
        rows.clear()
        found[name] = numbers(VERBS[verb](model, tmp_path / name, **given))
        counted[name] = list(rows)
    handle.remove()
    assert found["told"] == found["plain"] and counted["told"] == counted["plain"] and counted["told"]


@pytest.mark.parametrize("method", ["dsno", "slots", "kd", "finetune"])
def test_what_makes_a_student_of_one_scale_says_so(told: Model, tmp_path: Path, method: str) -> None:
    says = f"student is told its guidance scale, and {method} makes a student of one scale: name its teacher with guidance=..., or use the"
    for guidance in (None, 2.0):
        with pytest.raises(ModelError, match=says):
            if method == "finetune":
                fewstep.finetune(told, config=FINETUNE, guidance=guidance, out=tmp_path / "out")
            else:
                config = replace(DISTILL, slots=1) if method == "kd" else DISTILL
                distill(told, method, config=config, guidance=guidance, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_that_is_told_every_scale_is_not_made_at_one(told: Model, teacher: Model, tmp_path: Path) -> None:
    for method, config in {"flow-map": MAP, "progressive": HALVED}.items():
        with pytest.raises(ModelError, match=f"so is its student by {method}: leave guidance out, and sample the student at guidance 2"):
            distill(told, method, config=config, guidance=2, out=tmp_path / "out")
    with pytest.raises(FewstepError, match="a guided student is told its scale, from 1 to 4: leave guidance out, and sample it at 2"):
        distill(teacher, "guided", config=GUIDED, guidance=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") <= {"work"}


def test_an_own_network_is_told_where_it_was_said(tmp_path: Path) -> None:
    config = replace(GUIDED, form=GuidedForm(insert_at="clock"))
    guided = distill(timed_model(), "guided", config=config, out=tmp_path / "guided")
    halved = distill(guided, "progressive", config=HALVED, out=tmp_path / "halved")
    made = distill(guided, "flow-map", config=MAP, out=tmp_path / "map")
    for folder, model in {"guided": guided, "halved": halved, "map": made}.items():
        loaded = load_model(tmp_path / folder, trust=True)
        assert loaded.scales == (1.0, 4.0) and loaded.fingerprint == model.fingerprint


# -- flow maps that are told -----------------------------------------------------------------------------------------


def check_same(model: Model, loaded: Model, scales: tuple[float, ...]) -> None:
    assert loaded.fingerprint == model.fingerprint and (loaded.scales, loaded.classes, loaded.null_label) == (model.scales, 2, None)
    seen = []
    for scale in scales:
        for nfe in (1, 2):
            ours, theirs = (sample(one, nfe=nfe, seeds=range(3), guidance=scale) for one in (model, loaded))
            assert torch.equal(ours, theirs)
        seen.append(ours)
    assert all(float((one - seen[0]).abs().max()) > 1e-4 for one in seen[1:])


@pytest.mark.slow
@pytest.mark.parametrize("of", ["guided", "teacher"])
def test_one_flow_map_serves_all_scales(told: Model, teacher: Model, tmp_path: Path, of: str) -> None:
    model, config = (told, MAP) if of == "guided" else (teacher, replace(MAP, scales=(1.0, 3.0)))
    scales = SCALES if of == "guided" else (1.0, 2.6, 3.0)
    made, kept = distill(model, "flow-map", config=config, out=tmp_path / "map"), distill(model, "flow-map", config=config)
    check_same(made, kept, scales)
    check_same(made, loaded := load_model(tmp_path / "map"), scales)
    assert set(loaded.network.network.embeddings) == {"time", "scale"}
    held = fewstep.Trajectories.load(tmp_path / "map" / "work" / "trajectories") if (tmp_path / "map" / "work").exists() else None
    assert held is None or held.scales == loaded.scales
    by_scale = made.card["passes_by_scale"]
    assert len(by_scale) == 3 and all(set(errors) == {1, 2} for errors in by_scale.values())
    tuned = loaded.tuned
    assert tuned is not None and (tuned.guidance, tuned.solver, tuned.nfe) == (None, "ddim", 1)
    assert json.loads((tmp_path / "map" / "history.json").read_text())["passes_by_scale"]
    with pytest.raises(ModelError, match="knows guidance scales from 1 to"):
        sample(loaded, nfe=1, seeds=[0], guidance=5)


class ToldMean(torch.nn.Module):
    """A student that knows the guided teacher: its first-order answers at the scale of each row, and which scales it was told."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.scales = problem, list[Tensor]()

    def forward(self, x: Tensor, s: Tensor, t: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        self.scales.append(scale)
        return self.problem.teacher_at(scale)(x, s, cond)


@pytest.mark.parametrize("target", ["trajectory", "lagrangian", "eulerian", "semigroup"])
@pytest.mark.parametrize("states", ["stored", "noised"])
@pytest.mark.every(3)
def test_each_row_is_learned_at_its_own_scale(teacher: Model, target: str, states: str) -> None:
    """The loss of a batch is the mean of those of its rows alone, each of a teacher of one scale."""
    if states == "noised" and target in ("trajectory", "eulerian"):
        return
    config = replace(MAP, target=target, states=states, scales=(1.0, 4.0), batch=1, loss="l2")
    scales, generator = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    x, labels = torch.randn(3, 5, 1, 4, 4, generator=generator), torch.tensor([0, 1, 0])
    for row in range(3):
        batch, losses = Batch(x[row : row + 1], labels[row : row + 1], scales[row : row + 1]), []
        batch = Batch(batch.x[:, -1], batch.cond, batch.scale) if states == "noised" else batch
        for problem, one, given in (
            (Problem(teacher), config, batch),
            (Problem(teacher, float(scales[row])), replace(config, scales=None, guidance=float(scales[row])), Batch(batch.x, batch.cond)),
        ):
            objective = FlowMapObjective(problem, one)
            mean = ToldMean(Problem(teacher))
            if given.scale is None:
                mean.forward = lambda x, s, t, cond, row=row: Problem(teacher).teacher_at(scales[row : row + 1].expand(len(x)))(x, s, cond)
            losses.append(objective.loss(Networks(mean, mean), given, torch.Generator().manual_seed(5)))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)


def test_neighbours_are_taught_by_the_teacher_at_their_scales(teacher: Model) -> None:
    """Those of the semigroup equation, where no trajectories are stored: only some rows of a batch."""
    problem, scale = Problem(teacher), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    t, x, cond = fewstep.make_grid("angle", LAW, 4).t, problem.start(range(3)), torch.tensor([0, 1, 0])
    s, v = t[torch.tensor([0, 1, 2])], t[torch.tensor([1, 1, 2])]  # the last two are neighbours
    pairs = Pairs(x, s, v, t[torch.tensor([2, 2, 3])], cond, scale=scale)
    told = problem.teacher_at(scale)
    mean = lambda x, s, t, cond: told(x, s, cond)  # noqa: E731
    with torch.no_grad():
        _, target = TARGETS["semigroup"](Step(pairs, LAW, mean, mean, told, teacher_at=problem.teacher_at))
        for row in (1, 2):
            one = slice(row, row + 1)
            alone = short_mean(problem.teacher_at(float(scale[row])), x[one], s[one], pairs.t[one], cond[one])
            torch.testing.assert_close(target[one], alone, rtol=1e-5, atol=1e-6)


def test_pairs_of_the_students_own_states_are_at_their_scales(teacher: Model) -> None:
    objective = FlowMapObjective(Problem(teacher), replace(MAP, scales=(1.0, 4.0), own=1.0, first=0.0, batch=32))
    seen = list[tuple[Tensor, Tensor]]()

    class Jumps(torch.nn.Module):
        def jump(self, x: Tensor, s: Tensor, t: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
            seen.append((cond, scale))
            return x + scale.float().reshape(-1, 1, 1, 1)

    scale = torch.linspace(1, 4, 32, dtype=torch.float64)
    batch = Batch(torch.zeros(32, 5, 1, 4, 4), torch.arange(32), scale)
    generator = torch.Generator().manual_seed(0)
    pairs = objective.pairs(batch, generator)
    moved = objective._from_own_states(pairs, batch, Jumps(), generator)
    jumps = moved.x[:, 0, 0, 0].double() / scale
    assert set(jumps.round().tolist()) == {0.0, 1.0, 2.0} and torch.allclose(jumps, jumps.round(), atol=1e-5)
    assert all(torch.equal(scale[cond], told) for cond, told in seen)


def test_pictures_get_scales_of_their_own(teacher: Model) -> None:
    pictures = Images(torch.rand(20, 1, 4, 4) * 2 - 1, torch.arange(20) % 2, 16, "squares")
    objective = FlowMapObjective(
        Problem(teacher), replace(MAP, target="semigroup", scales=(1.0, 4.0), batch=64, num=FlowMapConfig().num), pictures
    )
    batch = objective.batch(None, 64, torch.Generator().manual_seed(0))
    assert batch.scale is not None and 1 <= float(batch.scale.min()) < 1.5 and 3.5 < float(batch.scale.max()) <= 4
    network = objective.student()
    assert bool(torch.isfinite(objective.loss(Networks(network, network), batch, torch.Generator())))


def test_mistakes_with_scales_of_a_flow_map_are_named(told: Model, teacher: Model, tmp_path: Path) -> None:
    pictures = Images(torch.rand(20, 1, 4, 4) * 2 - 1, torch.arange(20) % 2, 16, "squares")
    ranged = replace(MAP, scales=(1.0, 3.0))
    matching = replace(ranged, target="matching")
    for says, model, config, given in [
        (r"from 1 to 4, and so is its flow map: leave scales out", told, ranged, {}),
        ("teacher cannot be guided, since it has no null label: leave scales out", replace(teacher, null_label=None), ranged, {}),
        ("has one guidance, or is told one of its scales, not 2 and", teacher, ranged, {"guidance": 2}),
        ("the target matching learns the data, not what guidance makes of it", teacher, matching, {"images": pictures}),
        ("the target matching learns the data", teacher, replace(matching, scales=None), {"images": pictures, "guidance": 2}),
        ("the target matching learns the data", told, replace(matching, scales=None), {"images": pictures}),
    ]:
        with pytest.raises(FewstepError, match=says):
            distill(model, "flow-map", config=config, out=tmp_path / "out", **given)
    with pytest.raises(FewstepError, match="range from one of at least 0 to a larger one"):
        FlowMapConfig(scales=(3.0, 1.0))
    assert not (tmp_path / "out" / "fewstep.json").exists()
