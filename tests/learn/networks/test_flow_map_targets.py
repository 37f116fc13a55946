"""The equations of flow maps: exact on Gaussian data in closed form, and as targets to regress on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.problems import tiny_folder
from torch import Tensor
from torch.testing import assert_close

from fewstep import GaussianDenoiser, Model, NoiseSchedule, RectifiedFlow, VarianceExploding, VPLinear, load_model, make_grid
from fewstep.learn.networks.objectives import flow_map_targets as module
from fewstep.learn.networks.objectives.flow_map_targets import TARGETS, Pairs, Step, composed, jump, short_mean
from fewstep.learn.teacher.jvp import JVP_METHODS
from fewstep.models.flow_map_student import FlowMapForm, FlowMapStudent

LAWS = {"ve": VarianceExploding(0.05, 20.0), "vp": VPLinear(), "flow": RectifiedFlow()}
MEAN, STD = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64), torch.tensor([0.7, 0.3, 0.5], dtype=torch.float64)
EXACT = 1e-12  # float64

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode of some PyTorch releases says so

forward = JVP_METHODS["forward"]


def column(values: Tensor) -> Tensor:
    return values[..., None]


class Exact:
    """The mean of the denoiser along exact trajectories of Gaussian data, ``(x [B, D], s [B], t [B]) -> g [B, D]``, from s = t on.

    With ``R^2 = alpha^2 v + sigma^2`` it is
    ``m + v (sigma_s alpha_t + sigma_t alpha_s) / (R_s (R_t sigma_s + R_s sigma_t)) (x - alpha_s m)``.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor = MEAN, std: Tensor = STD) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std
        self.denoiser = GaussianDenoiser(schedule, mean, std)

    def spread(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = column(self.schedule.alpha(t)), column(self.schedule.sigma(t))
        return alpha, sigma, torch.sqrt(alpha**2 * self.std**2 + sigma**2)

    def __call__(self, x: Tensor, s: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        (a_s, n_s, r_s), (a_t, n_t, r_t) = self.spread(s), self.spread(t)
        slope = self.std**2 * (n_s * a_t + n_t * a_s) / (r_s * (r_t * n_s + r_s * n_t))
        return (self.mean + slope * (x.double() - a_s * self.mean)).to(x.dtype)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, _, spread = self.spread(t)
        return self.mean + alpha * self.std**2 / spread**2 * (x - alpha * self.mean)

    def flow(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        (a_s, _, r_s), (a_t, _, r_t) = self.spread(s), self.spread(t)
        return a_t * self.mean + r_t / r_s * (x - a_s * self.mean)

    def state(self, t: Tensor) -> Tensor:
        """States at times ``[B]``, of their own law."""
        alpha, _, spread = self.spread(t)
        noise = torch.randn(len(t), len(self.mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return alpha * self.mean + spread * noise


def inner_pairs(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """All triples ``s > v > t`` of the inner times of a grid, ``[B]`` each."""
    inner = make_grid("angle", schedule, 7).t[1:-1]
    triples = [(i, k, j) for i in range(6) for k in range(i + 1, 6) for j in range(k + 1, 6)]
    s, v, t = (inner[[triple[n] for triple in triples]] for n in range(3))
    return s, v, t


def residual(exact: Exact, mean: Callable[..., Tensor], x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Both sides of the Lagrangian equation, apart."""
    lam = exact.schedule.lam(t)
    g, slope = torch.func.jvp(lambda lam: mean(x, s, exact.schedule.t_of_lam(lam)), (lam,), (torch.ones_like(lam),))
    there = jump(exact.schedule, x, g, s, t)
    return g + column(1 - module.ratio(exact.schedule, s, t)) * slope - exact.denoise(there, t)


# -- the equations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_the_exact_mean_leads_along_the_exact_trajectory(law: str) -> None:
    exact = Exact(LAWS[law])
    for s, t in [(exact.schedule.ends[:1], exact.schedule.ends[1:]), inner_pairs(exact.schedule)[::2]]:
        x = exact.state(s)
        assert_close(jump(exact.schedule, x, exact(x, s, t), s, t), exact.flow(x, s, t), rtol=0, atol=EXACT)
        assert_close(exact.denoise(x, s), torch.stack([exact.denoiser(one[None], at)[0] for one, at in zip(x, s, strict=True)]))


@pytest.mark.parametrize("law", LAWS)
def test_the_exact_mean_satisfies_the_three_equations(law: str) -> None:
    exact, schedule = Exact(LAWS[law]), LAWS[law]
    s, v, t = inner_pairs(schedule)
    x = exact.state(s)
    assert_close(residual(exact, exact, x, s, t), torch.zeros_like(x), rtol=0, atol=EXACT)  # Lagrangian

    def along(scaled: Tensor, lam: Tensor) -> Tensor:
        s = schedule.t_of_lam(lam)
        return exact(scaled * column(schedule.alpha(s)), s, t)

    x0, scaled, lam = exact.denoise(x, s), x / column(schedule.alpha(s)), schedule.lam(s)
    g, slope = torch.func.jvp(along, (scaled, lam), (x0 - scaled, torch.ones_like(lam)))
    rho = column(module.ratio(schedule, s, t))
    assert_close(rho * (x0 - g), -(1 - rho) * slope, rtol=0, atol=EXACT)  # Eulerian

    g_sv = exact(x, s, v)
    whole = composed(schedule, g_sv, exact(jump(schedule, x, g_sv, s, v), v, t), s, v, t)
    assert_close(whole, exact(x, s, t), rtol=0, atol=EXACT)  # semigroup


@pytest.mark.parametrize("law", LAWS)
def test_a_first_order_map_does_not(law: str) -> None:
    exact = Exact(LAWS[law])
    s, _, t = inner_pairs(exact.schedule)
    x = exact.state(s)
    off = residual(exact, lambda x, s, t: exact.denoise(x, s) + 0 * column(t), x, s, t)
    assert float(off.square().mean().sqrt()) > 0.1


@pytest.mark.parametrize("law", LAWS)
def test_a_short_step_has_the_denoiser_for_a_mean(law: str) -> None:
    exact = Exact(LAWS[law])
    s = inner_pairs(exact.schedule)[0]
    t, x = exact.schedule.t_of_lam(exact.schedule.lam(s) + 1e-4), exact.state(s)
    assert_close(exact(x, s, t), exact.denoise(x, s), rtol=0, atol=1e-3)
    assert_close(exact(x, s, s), exact.denoise(x, s), rtol=0, atol=EXACT)


@pytest.mark.parametrize("law", LAWS)
def test_the_derivative_in_the_target_time_is_a_central_difference(law: str) -> None:
    exact, schedule = Exact(LAWS[law]), LAWS[law]
    s, _, t = inner_pairs(schedule)
    x, lam, h = exact.state(s), schedule.lam(t), 1e-5
    slope = torch.func.jvp(lambda lam: exact(x, s, schedule.t_of_lam(lam)), (lam,), (torch.ones_like(lam),))[1]
    ahead, behind = (exact(x, s, schedule.t_of_lam(lam + by)) for by in (h, -h))
    assert_close(slope, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


# -- targets ---------------------------------------------------------------------------------------------------------


def step_of(exact: Exact, s: Tensor, v: Tensor, t: Tensor, *, stored: bool = True, **changes: Any) -> Step:
    """A step whose student is exact."""
    x = exact.state(s)
    known = {"x_v": exact.flow(x, s, v), "x_t": exact.flow(x, s, t)} if stored else {}
    pairs = Pairs(x, s, v, t, None, **known, x0=exact.denoise(x, s))
    return Step(
        pairs, **{"schedule": exact.schedule, "student": exact, "averaged": exact, "teacher": exact.denoiser, **changes}, derivative=forward
    )


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_an_exact_student_is_its_own_target(law: str, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short steps are exact here; times between may be anywhere, an end too."""
    exact = Exact(LAWS[law])
    monkeypatch.setattr(module, "short_mean", lambda denoiser, x, s, t, cond: exact(x, s, t))
    s, v, t = inner_pairs(exact.schedule)
    for between in (v, s, t):
        step = step_of(exact, s, between, t, stored=stored, teacher=lambda x, t, cond=None: exact.denoise(x, t))
        for name, target in TARGETS.items():
            if (stored or name != "trajectory") and (name != "eulerian" or between is not s):
                answer, wanted = target(step)
                assert_close(answer, wanted, rtol=0, atol=EXACT, msg=lambda said, name=name: f"{name}: {said}")
                assert name == "lagrangian-jvp" or torch.equal(answer, exact(step.pairs.x, s, t))


def one_pass(exact: Exact, steps: int, target: str) -> Tensor:
    """Where the fixed point of a target leads in one pass, whose short steps are the teacher's."""
    t = make_grid("angle", exact.schedule, steps).t[:, None].expand(-1, 8)

    def mean(i: int, j: int, x: Tensor) -> Tensor:
        if j == i + 1:
            return short_mean(exact.denoiser, x, t[i], t[j], None)
        v = {"lagrangian": j - 1, "eulerian": i + 1, "semigroup": (i + j) // 2}[target]
        index = {float(time): k for k, time in enumerate(t[:, 0])}
        averaged = lambda x, s, t, cond: mean(index[float(s[0])], index[float(t[0])], x)  # noqa: E731
        step = Step(Pairs(x, t[i], t[v], t[j], None), exact.schedule, lambda x, *_: x, averaged, exact.denoiser)
        return TARGETS[target](step)[1]

    x = exact.state(t[0])
    return jump(exact.schedule, x, mean(0, steps, x), t[0], t[-1])


def test_fixed_points_of_short_steps_are_of_second_order() -> None:
    schedule = VarianceExploding()
    exact = Exact(schedule, torch.zeros(1, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64))
    s, t = (time.expand(8) for time in schedule.ends)
    wanted = exact.flow(exact.state(s), s, t)
    found = [one_pass(exact, steps, "lagrangian") for steps in (16, 32, 64)]
    off = [float((one - wanted).norm() / wanted.norm()) for one in found]
    assert off[0] < 0.02 and off[1] < 0.005 and off[2] < 0.0013
    assert off[0] > 3.4 * off[1] and off[1] > 3.4 * off[2]
    for target in ("eulerian", "semigroup"):
        assert_close(one_pass(exact, 16, target), found[0], rtol=1e-9, atol=1e-9)


def test_the_target_of_matching_is_affine_in_the_image() -> None:
    """So its mean over the images that a state may be of is the target along the denoiser."""
    exact = Exact(LAWS["ve"])
    s, v, t = inner_pairs(exact.schedule)
    step, (a, b) = step_of(exact, s, v, t), torch.randn(2, len(s), 3, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))

    def bent(x: Tensor, s: Tensor, t: Tensor, cond: Any) -> Tensor:  # any smooth network in float32
        return torch.tanh(x @ weights + column(s / (1 + s)).to(x) - column(t).to(x))

    def target(x0: Tensor) -> Tensor:
        pairs = Pairs(step.pairs.x.float(), s, v, t, None, x0=x0)
        return TARGETS["matching"](Step(pairs, exact.schedule, bent, bent, exact.denoiser, forward))[1]

    assert_close(target((a + b) / 2), (target(a) + target(b)) / 2, rtol=0, atol=1e-5)
    assert float((target(a) - target(b)).abs().max()) > 0.1


# -- pure noise and the clean image ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> FlowMapStudent:
    """A student of rectified flow, whose embedding of the target time answers something."""
    network = load_model(tiny_folder(tmp_path_factory.mktemp("targets") / "it", block_out_channels=(8,))).network
    teacher = Model(network, RectifiedFlow(), "flow", shape=(1, 4, 4), call=lambda net, x, t, cond: net(x, t).sample)
    made = FlowMapStudent(teacher, 1.0, 0.0, FlowMapForm())
    for parameter in made.network.embeddings.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


TRIPLES: dict[str, list[list[float]]] = {  # as the objective draws them: v just before t, just after s, or in the middle
    "lagrangian": [[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.5], [0.5, 0.5, 0.0]],
    "eulerian": [[1.0, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.5, 0.5], [0.5, 0.0, 0.0]],
    "semigroup": [[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.5], [0.5, 0.5, 0.0]],
    "matching": [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.0]],
}


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.every(3, 2)
def test_targets_are_finite_where_log_snr_is_not(student: FlowMapStudent, name: str, stored: bool) -> None:
    s, v, t = torch.tensor(TRIPLES.get(name, TRIPLES["lagrangian"]), dtype=torch.float64).T
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    known = {"x_v": torch.where((v == s)[:, None, None, None], x, 0.5 * x), "x_t": 0.3 * x} if stored or name == "trajectory" else {}
    pairs = Pairs(x, s, v, t, None, **known, x0=0.3 * x)
    teacher = Model(student.network.network, RectifiedFlow(), "flow", call=lambda net, x, t, cond: net(x, t).sample)
    answer, target = TARGETS[name](Step(pairs, student.schedule, student, student, teacher, forward))
    assert bool(torch.isfinite(answer).all()) and float(target.abs().max()) < 100
    (answer - target).square().mean().backward()
    gradients = [one.grad for one in student.parameters() if one.grad is not None]
    student.zero_grad()
    assert gradients and all(bool(torch.isfinite(one).all()) for one in gradients)
