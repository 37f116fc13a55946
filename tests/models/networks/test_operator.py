"""Operator students: what their output means, where they land, what they cost, and that a folder brings them back to the bit."""

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from tests.problems import ATTENTION_UNET
from torch import Tensor

from fewstep import (
    ArtifactError,
    DiscreteVP,
    Model,
    ModelError,
    RectifiedFlow,
    Sampler,
    SolverError,
    TimeGrid,
    VarianceExploding,
    VPCosine,
    VPLinear,
    load_model,
    make_solver,
    sample,
)
from fewstep.core.schedule import NoiseSchedule
from fewstep.models.flow_map import OperatorMap
from fewstep.models.formats.folders import save_like
from fewstep.models.networks.calls import edm_time, unet_call
from fewstep.models.networks.operator import OperatorForm, OperatorStudent
from fewstep.models.networks.temporal_unet import Mixing

EDM_TIMES = torch.tensor([80.0, 12.5, 2.7, 0.6, 0.0], dtype=torch.float64)
UNIT_TIMES = torch.tensor([0.99, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64)
CLOSE = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # float32, images of order 1
STATES = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-3)  # float32, states of order 100
WAYS = [("all", "input"), ("inner", "input"), ("inner", "inner")]
MIXINGS = [Mixing(form, 2, *way) for form in ("none", "real", "fft", "one-way") for way in WAYS if form == "none" or way != WAYS[0]]
MIXINGS += [Mixing(form) for form in ("real", "fft", "one-way")]
LABELS = torch.tensor([0, 1, 2])


@functools.cache
def teacher(schedule: NoiseSchedule | None = None, kind: str = "edm(0.5)") -> Model:
    """A small network with random weights: by default of EDM, with 3 labels."""
    torch.manual_seed(0)
    network = UNet2DModel(**ATTENTION_UNET, num_class_embeds=3).eval().requires_grad_(False)
    return Model(network, schedule or VarianceExploding(), kind, time=edm_time if schedule is None else lambda t: 1000 * t, call=unet_call)


def student(of: Model, times: Tensor = EDM_TIMES, *, stir: bool = True, **form: object) -> OperatorStudent:
    """A student of a copy of a network; stirred, as if trained, its new weights are not where they started."""
    made = OperatorStudent(replace(of, network=copy.deepcopy(of.network)), times, OperatorForm(**form))
    torch.manual_seed(1)
    for name, parameter in made.operator.named_parameters():
        if stir and not name.startswith("unet."):
            parameter.data = 0.5 * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


def noise(of: NoiseSchedule, t: Tensor, num: int = 3) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(num, 1, 8, 8) * of.sigma(t).float()


def run(made: OperatorStudent, x: Tensor, cond: Tensor | None, times: Tensor, solver: str = "ddim", **options: object) -> Tensor:
    tableau = Sampler.build(make_solver(solver, **options), TimeGrid(times), made.schedule)
    return sample(OperatorMap(made), tableau, x, cond, seeds=range(len(x)))


@pytest.fixture(scope="module")
def digits() -> Model:
    return load_model("digits-edm")


def edm_output(x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """EDM's ``F`` that says ``x0`` (arXiv 2206.00364, table 1), sigma_data 0.5."""
    return (x0 - 0.25 / (sigma**2 + 0.25) * x) / (sigma * 0.5 / torch.sqrt(sigma**2 + 0.25))


ZERO_SNR = DiscreteVP.scaled_linear().zero_terminal_snr()
PERFECT: dict[str, tuple[NoiseSchedule, list[float], str, Callable[..., Tensor]]] = {
    "edm": (VarianceExploding(), EDM_TIMES.tolist(), "edm(0.5)", lambda x0, eps, a, s: edm_output(x0, x0 + s * eps, s)),
    "v": (VPCosine(), UNIT_TIMES.tolist(), "v", lambda x0, eps, a, s: a * eps - s * x0),
    "v where alpha is 0": (ZERO_SNR, [999.0, 600.0, 3.5, -1.0], "v", lambda x0, eps, a, s: a * eps - s * x0),
    "sample": (VPLinear(), UNIT_TIMES.tolist(), "sample", lambda x0, eps, a, s: x0),
    "epsilon": (VPLinear(), UNIT_TIMES.tolist(), "epsilon", lambda x0, eps, a, s: x0),  # learned to be x0 itself
    "epsilon where alpha is 0": (ZERO_SNR, [999.0, 600.0, 3.5, -1.0], "epsilon", lambda x0, eps, a, s: x0),
    "flow where alpha is 0": (RectifiedFlow(), [1.0, 0.5, 0.1, 0.0], "flow", lambda x0, eps, a, s: eps - x0),
    "shifted flow": (RectifiedFlow(3.0), [0.9, 0.5, 0.0], "flow", lambda x0, eps, a, s: eps - x0),
}


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("case", PERFECT)
@pytest.mark.every(3)
def test_the_output_of_a_perfect_network_is_the_trajectory_itself(case: str, begin: int) -> None:
    """Of one image alone the trajectories are ``alpha x0 + sigma eps``."""
    schedule, times, kind, says = PERFECT[case]
    t = torch.tensor(times, dtype=torch.float64)
    s, t = t[begin], t[begin + 1 :]
    x0, eps = torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, states = (schedule.alpha(u).reshape(-1, 1, 1) * x0 + schedule.sigma(u).reshape(-1, 1, 1) * eps for u in (s, t))
    size = torch.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).reshape(-1, 1, 1)
    outputs = {
        "denoised": says(x0, eps, schedule.alpha(s), schedule.sigma(s)),
        "skip": states - (schedule.sigma(t) / schedule.sigma(s)).reshape(-1, 1, 1) * x,
        "state": states / size,
    }
    for output, said in outputs.items():
        made = student(teacher(schedule, kind) if case != "edm" else teacher(), torch.tensor(times), output=output)
        a, b = made.coefficients(s, t)
        assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape == t.shape
        torch.testing.assert_close(a.reshape(-1, 1, 1) * x + b.reshape(-1, 1, 1) * said, states, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "mixing"), [*(("edm", mixing) for mixing in MIXINGS), ("v", Mixing()), ("flow where alpha is 0", Mixing())]
)
@pytest.mark.every(3)
def test_a_new_student_makes_its_teachers_first_order_steps(kind: str, mixing: Mixing) -> None:
    schedule, times, _, _ = PERFECT[kind]
    of, t = (teacher() if kind == "edm" else teacher(schedule, kind[:4].strip())), torch.tensor(times, dtype=torch.float64)
    made = student(of, t, stir=False, mixing=mixing)
    for begin in range(2):
        x, s = noise(schedule, t[begin]), t[begin]
        x0, states = of(x, s, LABELS), made(x, t[begin + 1 :], LABELS, s)
        for k, u in enumerate(t[begin + 1 :]):
            ratio = schedule.sigma(u) / schedule.sigma(s)
            step = ratio * x.double() + (schedule.alpha(u) - ratio * schedule.alpha(s)) * x0.double()
            CLOSE(states[:, k], step.float())


def test_given_the_slots_time_a_new_student_says_what_its_teacher_says_there() -> None:
    of = load_model("digits-ddpm")
    t = torch.tensor([999.0, 500.0, 123.0, 0.0], dtype=torch.float64)
    made, x = student(of, t, stir=False, time="slot", output="state", mixing=Mixing("real", 2)), noise(of.schedule, t[0])
    for k, u in enumerate(t[1:]):
        CLOSE(made(x, t[1:])[:, k], unet_call(of.network, x, u.float().expand(len(x))))
    one, two = (student(of, t, time="slot", output="state", anywhere=anywhere) for anywhere in (False, True))
    assert one.operator.extra_embedding is None and two.operator.extra_embedding is not None
    x = noise(of.schedule, t[1])
    assert float((two(x, t[2:], None, t[0]) - two(x, t[2:], None, t[1])).abs().max()) > 1e-3


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
@pytest.mark.every(6)
def test_a_jump_lands_where_the_whole_answer_has_that_slot(mixing: Mixing) -> None:
    made = student(teacher(), output="skip", mixing=mixing)
    for begin in range(2):
        s, t = EDM_TIMES[begin], EDM_TIMES[begin + 1 :]
        x = noise(made.schedule, s)
        states = made(x, t, LABELS, s)
        assert states.shape == (3, len(t), 1, 8, 8)
        for k, u in enumerate(t):
            STATES(made.jump(x, s, u, LABELS), states[:, k])


@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
@pytest.mark.every(6)
def test_passes_of_the_sampler_are_jumps(mixing: Mixing) -> None:
    made, t = student(teacher(), mixing=mixing), EDM_TIMES
    x = noise(made.schedule, t[0])
    once = made.denoise_once(x, LABELS)
    CLOSE(made(x, t[1:], LABELS)[:, -1], once)
    CLOSE(run(made, x, LABELS, t[[0, -1]]), once)
    between = made.jump(x, t[0], t[2], LABELS)
    twice = made.jump(between, t[2], t[-1], LABELS)
    CLOSE(run(made, x, LABELS, t[[0, 2, -1]]), twice)
    CLOSE(run(made, between, LABELS, t[[2, -1]]), twice)
    STATES(run(made, x, LABELS, t[[0, 2]]), between)
    assert float((once - twice).abs().max()) > 1e-3


def test_passes_from_where_there_is_no_signal_are_jumps() -> None:
    t = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)
    made = student(teacher(RectifiedFlow(), "flow"), t)
    x = noise(made.schedule, t[0])
    CLOSE(run(made, x, LABELS, t[[0, -1]]), made.denoise_once(x, LABELS))
    CLOSE(run(made, x, LABELS, t[[0, 1, -1]]), made.jump(made.jump(x, t[0], t[1], LABELS), t[1], t[-1], LABELS))


def test_samplers_that_do_not_make_first_order_steps_are_refused() -> None:
    made, first = student(teacher()), "a flow map makes first-order steps alone: use the solver ddim"
    x = noise(made.schedule, EDM_TIMES[0])
    for solver in ("unipc-2", "unipc-3", "heun", "dpm-solver-pp-2m", "deis-3", "ipndm"):
        with pytest.raises(SolverError, match=first):
            run(made, x, LABELS, EDM_TIMES, solver)
    assert torch.equal(run(made, x, LABELS, EDM_TIMES, "euler"), run(made, x, LABELS, EDM_TIMES))


@pytest.mark.parametrize("solver", ["sde-dpm-solver-pp-2m", "dpm-solver-v3"])  # one has noise, one coefficients shaped like an image
def test_samplers_of_another_kind_are_refused_in_the_same_words(digits: Model, solver: str) -> None:
    made, options = student(teacher()), {"statistics": digits.statistics()} if solver == "dpm-solver-v3" else {}
    for times in (EDM_TIMES, EDM_TIMES[[0, -1]]):
        if solver == "dpm-solver-v3" or len(times) > 2:
            with pytest.raises(SolverError, match="a flow map makes first-order steps alone: use the solver ddim"):
                run(made, noise(made.schedule, times[0]), LABELS, times, solver, **options)


def test_times_that_an_operator_does_not_have_are_refused() -> None:
    made, x = student(teacher()), noise(VarianceExploding(), EDM_TIMES[0])
    one = student(teacher(), anywhere=False)
    for times in ([80.0, 2.5, 0.0], [79.0, 0.0], [80.0, 0.002]):
        with pytest.raises(SolverError, match="between its own times only, 80, 12.5, 2.7, 0.6, 0: use ddim on the grid optimized"):
            run(made, x, LABELS, torch.tensor(times, dtype=torch.float64))
    with pytest.raises(SolverError, match="this operator makes one pass only, not 2"):
        run(one, x, LABELS, EDM_TIMES[[0, 2, -1]])
    with pytest.raises(SolverError, match="this operator starts at t = 80 only, not at 12.5"):
        run(one, x, LABELS, EDM_TIMES[[1, -1]])
    CLOSE(run(one, x, LABELS, EDM_TIMES[[0, -1]]), one.denoise_once(x, LABELS))
    with pytest.raises(ModelError, match=r"is a student, .*: sample it by fewstep\.sample"):
        replace(teacher(), network=made, flow_map=OperatorMap(made))(x, EDM_TIMES[0], LABELS)


def test_what_cannot_be_a_student_is_refused() -> None:
    for times in ([80.0], [80.0, 80.0], [0.0, 80.0], [[80.0, 0.0]], [80.0, float("nan"), 0.0]):
        with pytest.raises(ModelError, match="a start and at least one slot at decreasing times"):
            student(teacher(), torch.tensor(times))
    with pytest.raises(ModelError, match="the network's own time is not finite"):
        student(teacher(), time="slot")
    for bad in ({"output": "noise"}, {"time": "end"}, {"time": "slot", "mixing": Mixing(insert_after="inner", branch_at="inner")}):
        with pytest.raises(ModelError):
            OperatorForm(**bad)
    with pytest.raises(ModelError, match="between the blocks of a diffusers UNet2DModel, which a Linear does not have"):
        student(replace(teacher(), network=torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("form", ["none", "real", "fft", "one-way"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.every(3)
def test_a_half_precision_network_lands_nearby_in_full_precision_states(form: str, dtype: torch.dtype) -> None:
    full, half = (student(teacher(), mixing=Mixing(form, 3)) for _ in range(2))
    half.operator.to(dtype)
    x = noise(full.schedule, EDM_TIMES[0])
    out = half(x, EDM_TIMES[1:], LABELS)
    assert out.dtype == torch.float32 and half.times.dtype == torch.float64
    torch.testing.assert_close(out, full(x, EDM_TIMES[1:], LABELS), rtol=0.02, atol=0.05)
    torch.testing.assert_close(run(half, x, LABELS, EDM_TIMES[[0, 2, -1]]), run(full, x, LABELS, EDM_TIMES[[0, 2, -1]]), rtol=0, atol=0.05)


@pytest.mark.slow
def test_arithmetic_counts_evaluations_of_the_network() -> None:
    def costs(*passes: int, **mixing: str) -> float:
        return student(teacher(), mixing=Mixing(**mixing)).arithmetic(EDM_TIMES[list(passes)])

    assert costs(0, 4, form="none") == pytest.approx(1, abs=0.03)  # the new embedding is small but not nothing
    assert costs(0, 4, form="none") > 1 and costs(0, 1, 4, form="none") == pytest.approx(2 * costs(0, 4, form="none"))
    assert 4 < costs(0, 4, form="real") < 6 and 1 < costs(0, 4, form="one-way") < 1.5
    assert costs(3, 4, form="real") < 1.5 < 4 < costs(0, 2, form="real")
    assert costs(0, 2, 4, form="real") == pytest.approx(costs(0, 2, form="real") + costs(2, 4, form="real"))
    less = [costs(0, 4, form="real", insert_after=places, branch_at=fan) for places, fan in WAYS]
    assert less == sorted(less, reverse=True) and less[-1] > 1 and len(set(less)) == 3


# -- folders ------------------------------------------------------------------------------------------------------------


def folder_of(digits: Model, made: OperatorStudent, folder: Path) -> Path:
    """A student of the bundled network, as distilling saves it."""
    made.save(folder)
    save_like(digits, made.operator.unet, folder)
    return folder


@pytest.mark.parametrize("mixing", [Mixing("none"), Mixing(), Mixing("fft", 3), Mixing("one-way", 2, "inner", "inner")], ids=repr)
@pytest.mark.every(2)
def test_a_folder_brings_a_student_back_to_the_bit(digits: Model, tmp_path: Path, mixing: Mixing) -> None:
    made = student(digits, EDM_TIMES, mixing=mixing, output="skip")
    made.card.update({"teacher": "digits-edm", "numbers": [1, 2.5]})
    loaded = load_model(folder_of(digits, made, tmp_path / "it"))
    assert loaded.flow_map is not None and loaded.null_label is None and loaded.classes == 10 and not loaded.network.training
    again = loaded.network
    assert again.form == made.form and again.card == made.card and torch.equal(again.times, EDM_TIMES)
    x = noise(made.schedule, EDM_TIMES[0])
    assert torch.equal(again(x, EDM_TIMES[1:], LABELS), made(x, EDM_TIMES[1:], LABELS))
    assert torch.equal(run(again, x, LABELS, EDM_TIMES[[0, 2, -1]]), run(made, x, LABELS, EDM_TIMES[[0, 2, -1]]))
    for refused in (loaded.need_denoiser, lambda: loaded.guided(2.0)):
        with pytest.raises(ModelError, match="is a student"):
            refused()


def test_a_folder_in_half_precision_brings_back_the_rounded_weights(digits: Model, tmp_path: Path) -> None:
    made = student(digits)
    made.operator.half()
    loaded = load_model(folder_of(digits, made, tmp_path)).network
    made.operator.float()
    x = noise(made.schedule, EDM_TIMES[0])
    assert torch.equal(loaded.denoise_once(x, LABELS), made.denoise_once(x, LABELS)) and torch.equal(loaded.times, EDM_TIMES)


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "operator.json"
        meta = json.loads(path.read_text())
        for name, value in changes.items():
            (meta["form"]["mixing"] if name in meta["form"]["mixing"] else meta["form"] if name in meta["form"] else meta)[name] = value
        path.write_text(json.dumps(meta))

    return edit


def other_network(folder: Path) -> None:
    """Whose layers are not as wide."""
    shutil.rmtree(folder / "unet")
    UNet2DModel(**ATTENTION_UNET, num_class_embeds=11).save_pretrained(folder / "unet")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: (folder / "operator.safetensors").write_bytes(b"cut"), id="weights cut"),
        pytest.param(lambda folder: (folder / "operator.safetensors").unlink(), id="weights gone"),
        pytest.param(lambda folder: (folder / "operator.json").write_text("{"), id="no JSON"),
        pytest.param(lambda folder: (folder / "operator.json").write_text("[]"), id="no object"),
        pytest.param(edited(version=2), id="another version"),
        pytest.param(edited(sha256="0" * 64), id="another checksum"),
        pytest.param(edited(mixing=None), id="no mixing"),
        pytest.param(edited(output="noise"), id="unknown output"),
        pytest.param(edited(form="none"), id="weights too many"),
        pytest.param(edited(modes=1), id="fewer modes"),
        pytest.param(edited(modes=3), id="more modes"),
        pytest.param(edited(insert_after="inner"), id="other places"),
        pytest.param(edited(modes=99), id="too many modes"),
        pytest.param(other_network, id="another network"),
    ],
)
@pytest.mark.every(7)
def test_damaged_folders_are_refused(digits: Model, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = folder_of(digits, student(digits), tmp_path / "it")
    damage(folder)
    with pytest.raises(ArtifactError, match=r"it(/operator\.| is not a whole operator)"):
        load_model(folder)


def test_a_student_of_the_first_version_is_refused_by_name(digits: Model, tmp_path: Path) -> None:
    folder = folder_of(digits, student(digits), tmp_path / "it")
    meta = json.loads((folder / "operator.json").read_text())
    mixing = meta["form"]["mixing"]
    mixing["places"], mixing["fan"] = mixing.pop("insert_after"), mixing.pop("branch_at")
    (folder / "operator.json").write_text(json.dumps(meta))
    with pytest.raises(ArtifactError, match="it holds a student of fewstep 0.1, whose parts had other names: distil it again"):
        load_model(folder)


def test_a_card_that_is_not_json_is_refused(digits: Model, tmp_path: Path) -> None:
    made = student(digits)
    made.card["teacher"] = EDM_TIMES
    with pytest.raises(ArtifactError, match="must be plain JSON values"):
        made.save(tmp_path)


def test_a_fingerprint_is_of_the_whole_student(digits: Model) -> None:
    def fingerprint(made: OperatorStudent) -> str:
        return replace(digits, network=made, flow_map=OperatorMap(made)).fingerprint

    def moved(name: str) -> OperatorStudent:
        made = student(digits)
        made.operator.get_parameter(name).data.view(-1)[0] += 1
        return made

    first = fingerprint(student(digits))
    assert fingerprint(student(digits)) == first
    parts = (
        "temporal.0.real",
        "temporal.3.imag",
        "temporal.6.gate",
        "extra_embedding.0.weight",
        "extra_embedding.2.bias",
        "unet.conv_out.bias",
    )
    others = [fingerprint(moved(name)) for name in parts]
    forms = [
        {"output": "skip"},
        {"anywhere": False},
        *({"mixing": mixing} for mixing in (Mixing("fft"), Mixing("one-way"), Mixing("none"))),
    ]
    others += [fingerprint(student(digits, **form)) for form in forms]
    others += [fingerprint(student(digits, EDM_TIMES + torch.tensor([0, 0, 0.1, 0, 0]))), digits.fingerprint]
    assert len({first, *others}) == len(others) + 1


def test_a_student_of_a_discrete_unconditional_noise_predictor(tmp_path: Path) -> None:
    model = load_model("digits-ddpm")
    t = torch.tensor([999.0, 620.5, 300.0, 40.0, -1.0], dtype=torch.float64)
    made = student(model, t)
    loaded = load_model(folder_of(model, made, tmp_path))
    assert loaded.flow_map is not None and loaded.classes is None and asdict(loaded.network.form) == asdict(made.form)
    x, again = noise(made.schedule, t[0]), loaded.network
    once = made.denoise_once(x)
    assert torch.equal(again.denoise_once(x), once) and bool(torch.isfinite(once).all())
    CLOSE(run(again, x, None, t[[0, -1]]), once)
    CLOSE(run(again, x, None, t[[0, 1, -1]]), made.jump(made.jump(x, t[0], t[1]), t[1], t[-1]))
    assert 4 < again.arithmetic(t[[0, -1]]) < 6
