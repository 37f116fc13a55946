r"""Deblur without knowing the kernel: Fast Diffusion EM (arXiv 2309.00287), led by the evidence of the kernel.

One reverse pass samples the images and fits the kernel that they share. At each evaluation, with the denoiser's answer :math:`D` of error
spectrum :math:`c`,

- the *M-step* takes the kernel of the largest evidence :math:`p(y \mid x_t, k)`, in which the clean image is integrated out (formula 1 of
  `fewstep.inverse.kernel_evidence`), and
- the *E-step* corrects the answer as a Gaussian with that spectrum, exactly, since a circular blur is diagonal in Fourier too:

.. math:: D'_f = D_f + \frac{c_f \bar K_f}{|K_f|^2 c_f + s_y^2} (Y_f - K_f D_f).

The evidence at pure noise starts it. It sees :math:`|K|` alone: to it a kernel and its mirror image through the middle are equal. So each
of its largest maxima and its mirror image has a pass, and the model judges whose images it finds the more probable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.core.condition import repeated
from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.prediction import aligned
from fewstep.core.tableau import Tableau
from fewstep.inverse.corrections import Projection
from fewstep.inverse.error_spectra import ErrorSpectra, error_spectra
from fewstep.inverse.kernel_evidence import Observed, ascend, evidence, starting_kernels, transfer
from fewstep.inverse.kernel_fit import checked_size, fit_kernel, recentred
from fewstep.inverse.measurements import CircularBlur, checked_noise
from fewstep.inverse.posterior import checked_prior, sample_posterior
from fewstep.inverse.steps import restored_grid
from fewstep.models.guidance import Wrapped
from fewstep.models.model import Model
from fewstep.runtime.errors import FewstepError, ModelError, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked, checked_class, config_of, whole
from fewstep.sampling.loop import run
from fewstep.sampling.noise import seed_list, seeded_noise, start_noise
from fewstep.sampling.sampler import Sampler

__all__ = ["BlindConfig", "BlindResult", "KernelStep", "deblur_blind", "deblur_known"]

SOLVER = "ddim:eta=1"  # whose fresh noise mends what corrections break
JUDGED = (0.2, 0.4, 0.8, 1.6)  # levels at which the model judges images, over their root mean square
STREAM = 800  # of the judge's noises
SPEC_START, SPEC_LEVEL, SPEC_TRUST, SPEC_HOLD = 0.7, 2.0, 0.5, 0.03  # method fast: pixels, level, and the weights of its E- and M-step
SLOW_ROUNDS, SLOW_STEPS = 3, 10


@checked_class
@dataclass(frozen=True)
class BlindConfig:
    """Configure blind deblurring. The defaults were chosen on pictures that no table shows.

    Args:
        nfe: evaluations of a pass that fits the kernel.
        final: evaluations of the restoration with the kernel found; few stay near the posterior mean.
        grid: the spacing of both; by default ``karras``, and ``angle`` for a noise law that begins at pure noise.
        candidates: kernels that have a pass, at most; each is one of the largest maxima of the evidence, or its mirror image.
        alike: kernels nearer than this in L1 are one candidate.
        gap: how much worse than the best one the ``-2 log p`` of a candidate may be.
        random: kernels at random to begin at, beside Gaussians and lines.
        start_steps: gradient steps from each of them.
        steps: gradient steps of an M-step.
        top: the level below which M-steps are made, over the images' root mean square.
        rehearsal: samples of the model on which its errors are measured.

    Raises:
        FewstepError: a number that is too small.
    """

    nfe: int = 10
    final: int = 5
    grid: str | None = None
    candidates: int = 6
    alike: float = 0.25
    gap: float = 40.0
    random: int = 8
    start_steps: int = 120
    steps: int = 40
    top: float = 6.0
    rehearsal: int = 128

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, nfe=2, final=1, candidates=1, alike=0, gap=0, random=0, start_steps=1, steps=1, top=0, rehearsal=8)


class KernelStep(NamedTuple):
    """The kernel after an M-step.

    Attributes:
        level: the noise level ``sigma/alpha``.
        kernel: ``[h, w]``.
        evidence: its ``-2 log p(y | x_t, k)`` up to a constant; None where the method has none.
    """

    level: float
    kernel: Tensor
    evidence: float | None


@dataclass(frozen=True, eq=False)
class BlindResult:
    """Pictures and kernel as blind deblurring found them.

    Attributes:
        x: the images, S samples of each, ``[P, S, *D]``.
        kernel: ``[h, w]``, non-negative, of sum 1; it is known up to a shift, which the images have the other way.
        history: the kernel after each M-step that led to it.
        evaluations: of the network for each picture, all candidates and samples together, without the rehearsal.
        rehearsal: evaluations of one rehearsed sample, times how many there were; 0 where `error_spectra` were passed.
    """

    x: Tensor
    kernel: Tensor
    history: tuple[KernelStep, ...]
    evaluations: int
    rehearsal: int = 0


@checked
@torch.no_grad()
def deblur_blind(
    denoiser: Denoiser,
    y: Tensor,
    noise: float,
    kernel_size: int | tuple[int, int],
    *,
    method: Literal["evidence", "fast", "slow"] = "evidence",
    samples: int = 4,
    seeds: Iterable[int] | None = None,
    cond: Cond = None,
    spectra: ErrorSpectra | None = None,
    config: BlindConfig | None = None,
    on_progress: Callable[[int, str], None] | None = None,
) -> BlindResult:
    """Restore blurred pictures that share a kernel which nobody knows.

    The blur is circular. More pictures of one kernel make it better known: from four on it is reliable. Where the pictures' spectra show no
    blur, the kernel is the one that does nothing.

    Args:
        denoiser: the prior, a `Model` or any denoiser; no student.
        y: the blurred pictures, ``[P, C, H, W]``, or one, ``[C, H, W]``.
        noise: the standard deviation of their noise.
        kernel_size: of the kernel's support, odd, or its two sides.
        method: ``evidence``, see above; ``fast``, Fast Diffusion EM with an isotropic error and a least-squares M-step; ``slow``, EM that
            alternates whole posterior samplings and M-steps from the kernel that does nothing. The last two are for comparison.
        samples: S, of each picture.
        seeds: one for each sample of each picture, P S of them, those of the first picture first; by default 0, 1, ...
        cond: the condition of the P pictures, as the model takes it.
        spectra: the model's `error_spectra`, to measure them once for many calls.
        config: see `BlindConfig`.
        on_progress: called with the passes done and a note.

    Raises:
        ModelError: something that is no prior, pictures that are not finite or have other channels than the model's, a negative noise, an
            even kernel size or one larger than the pictures, another number of seeds, an unknown method, spectra of other pictures.
        GridError: an unknown grid, or one that the noise law does not have.

    Examples:
        >>> import torch, fewstep
        >>> from fewstep.inverse.blind import BlindConfig, deblur_blind
        >>> model = fewstep.load_model("digits-edm")
        >>> config = BlindConfig(nfe=4, final=3, candidates=1, start_steps=5, steps=5, rehearsal=8)
        >>> y, labels = torch.zeros(2, 1, 8, 8), torch.tensor([3, 7])
        >>> found = deblur_blind(model, y, 0.05, 3, samples=1, cond=labels, config=config)
        >>> found.x.shape, found.kernel.shape
        (torch.Size([2, 1, 1, 8, 8]), torch.Size([3, 3]))
    """
    config = config_of(config, BlindConfig)
    if method not in ("evidence", "fast", "slow"):
        look_up(method, dict.fromkeys(("evidence", "fast", "slow")), "method of blind deblurring", ModelError)
    if on_progress is not None and not callable(on_progress):
        raise FewstepError(f"on_progress is a function of the passes done and a note, got {on_progress!r}")
    task = _Task.checked(denoiser, y, noise, samples, seeds, cond, config, on_progress)
    size = checked_size(kernel_size, task.y)
    if method == "slow":
        return _slow(task, size)
    if method == "fast":
        return _fast(task, size)
    given = spectra is not None
    known = task.spectra_of(spectra)
    found = _by_evidence(task, size, known)
    return found if given else BlindResult(found.x, found.kernel, found.history, found.evaluations, known.evaluations * config.rehearsal)


@checked
@torch.no_grad()
def deblur_known(
    denoiser: Denoiser,
    y: Tensor,
    noise: float,
    kernel: Tensor,
    *,
    samples: int = 4,
    seeds: Iterable[int] | None = None,
    cond: Cond = None,
    spectra: ErrorSpectra | None = None,
    config: BlindConfig | None = None,
) -> Tensor:
    """Restore blurred pictures by a kernel ``[h, w]`` that is known, with the E-step of `deblur_blind`; return ``[P, S, *D]``.

    Arguments and errors are those of `deblur_blind`.
    """
    config = config_of(config, BlindConfig)
    task = _Task.checked(denoiser, y, noise, samples, seeds, cond, config, None)
    CircularBlur(kernel).spectrum(task.y)
    known = task.spectra_of(spectra)
    return _Pass(task, known, task.seeds, config.final).run(kernel.to(task.y), fitted=False).x


# -- the task -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Task:
    """A blind deblurring that was asked for: pictures ``y [P, C, H, W]``, seeds ``[S, P]``."""

    denoiser: Denoiser
    y: Tensor
    noise: float
    seeds: Tensor
    cond: Cond
    config: BlindConfig
    say: Callable[[int, str], None]

    @classmethod
    def checked(
        cls,
        denoiser: Denoiser,
        y: object,
        noise: float,
        samples: int,
        seeds: Iterable[int] | None,
        cond: Cond,
        config: BlindConfig,
        say: Callable[[int, str], None] | None,
    ) -> _Task:
        checked_prior(denoiser, Projection(), "deblur_blind")
        level = checked_noise(noise, None)
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim not in (3, 4) or not len(y):
            what = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ModelError(f"y is the blurred pictures, a tensor [P, C, H, W] of floating point numbers, or one, [C, H, W], got {what}")
        y = (y[None] if y.ndim == 3 else y).float()
        if not bool(torch.isfinite(y).all()):
            raise ModelError("y has entries that are not finite: a circular blur mixes all pixels, so crop them away")
        shape = denoiser.shape if isinstance(denoiser, Model) else None
        if shape is not None and len(shape) == 3 and shape[0] != y.shape[1]:
            raise ModelError(f"y has pictures of shape {tuple(y.shape[1:])}, and {denoiser!r} makes samples of shape {tuple(shape)}")
        if (count := whole(samples, "samples", ModelError)) < 1:
            raise ModelError(f"samples of each picture are a whole number from 1, got {samples}")
        chosen = seed_list(range(count * len(y)) if seeds is None else seeds)
        if len(set(chosen)) < len(chosen):
            raise ModelError("two seeds are the same, and would give one sample twice: pass one for each sample of each picture")
        if len(chosen) != count * len(y):
            raise ModelError(f"{len(y)} pictures with {count} samples each take {count * len(y)} seeds, got {len(chosen)}")
        return cls(denoiser, y, level, torch.tensor(chosen).reshape(len(y), count).T, cond, config, say or (lambda done, note: None))

    def spectra_of(self, spectra: object) -> ErrorSpectra:
        """Return the spectra that were passed, or measure them.

        Raises:
            ModelError: they are none, or of images of another size.
        """
        known = self.rehearse() if spectra is None else spectra
        if not isinstance(known, ErrorSpectra):
            raise ModelError(f"spectra are those of error_spectra(model, shape, cond), got a {type(known).__name__}")
        if known.images.shape != torch.fft.rfft2(self.y[0]).shape or known.width != self.y.shape[-1]:
            raise ModelError(f"the spectra are of images of another size than y, {tuple(self.y.shape[1:])}: measure them by error_spectra")
        return known

    def rehearse(self) -> ErrorSpectra:
        rows, *shape = self.y.shape
        options = {"num": self.config.rehearsal, "nfe": self.config.nfe, "grid": self.config.grid, "seed": int(self.seeds[0, 0])}
        return error_spectra(self.denoiser, shape, self.cond, rows=rows, **options)

    def start(self, tableau: Tableau, seeds: Tensor) -> Tensor:
        return start_noise(tableau.nodes, seeds.flatten().tolist(), self.y.shape[1:]).to(self.y)


def _tableau(denoiser: Denoiser, config: BlindConfig, nfe: int, solver: str = SOLVER) -> Tableau:
    return Sampler.build(solver, config.grid or restored_grid(denoiser.schedule), denoiser.schedule, nfe=nfe).tableau


# -- led by the evidence ------------------------------------------------------------------------------------------------


def _by_evidence(task: _Task, size: tuple[int, int], spectra: ErrorSpectra) -> BlindResult:
    config, seen = task.config, Observed.of(task.y, task.noise, spectra)
    one = task.seeds[:1]  # a sample of each picture tells candidates apart
    candidates, tried = _candidates(seen, spectra, size, config, int(one[0, 0])), list[tuple[float, _Passed]]()
    for number, (kernel, cost) in enumerate(candidates):
        task.say(number, "a candidate")
        made = _Pass(task, spectra, one, config.nfe).run(kernel)
        tried.append((_improbability(task, made.x[:, 0], spectra.spread) + cost / 2, made))
    kernel, history = _nothing(size).to(task.y), tuple[KernelStep, ...]()
    if tried:
        task.say(len(tried), "the best candidate")
        _, best = min(tried, key=lambda pair: pair[0])
        again = _Pass(task, spectra, task.seeds, config.nfe).run(best.kernel)
        kernel, history = recentred(again.kernel), (*best.history, *again.history)
    task.say(len(tried) + bool(tried), "the restoration")
    x = _Pass(task, spectra, task.seeds, config.final).run(kernel, fitted=False).x
    passes = len(tried) * (config.nfe + len(JUDGED)) + (len(task.seeds) * config.nfe if tried else 0)
    return BlindResult(x, kernel, history, passes + len(task.seeds) * config.final)


def _candidates(seen: Observed, spectra: ErrorSpectra, size: tuple[int, int], config: BlindConfig, seed: int) -> list[tuple[Tensor, float]]:
    """Return the largest maxima of the evidence and their mirror images, with their ``-2 log p``; none where no blur is to be seen.

    A kernel has more unknowns than none, and fits noise with them: its ``-2 log p`` has to be less by as many logarithms of the number of
    frequencies (Schwarz's criterion, 1978).
    """
    cost = lambda kernels: evidence(kernels, seen, spectra.images)  # noqa: E731
    found = ascend(starting_kernels(*size, config.random, seed).to(seen.y.real), cost, config.start_steps, 0.15)
    costs, known = cost(found), list[tuple[Tensor, float]]()
    unknowns, frequencies = size[0] * size[1] - 1, float(seen.weights.sum()) / 2
    if float(cost(_nothing(size).to(found)[None]) - costs.min()) < unknowns * math.log(frequencies):
        return []
    for i in costs.argsort().tolist():
        if costs[i] > costs.min() + config.gap:
            break
        for kernel in (found[i], found[i].flip(0, 1)):
            if len(known) < config.candidates and all(float((kernel - other).abs().sum()) > config.alike for other, _ in known):
                known.append((kernel, float(costs[i])))
    return known


def _nothing(size: tuple[int, int]) -> Tensor:
    """Return the kernel that does nothing, ``[h, w]``."""
    kernel = torch.zeros(size)
    kernel[size[0] // 2, size[1] // 2] = 1
    return kernel


def _improbability(task: _Task, x: Tensor, spread: float) -> float:
    r"""Return how improbable the model finds images ``x [P, *D]``: :math:`\int E|x - D(x + s n)|^2/s^2\; d\log s`, on a few levels.

    Up to a constant it is :math:`-\log p(x)` between those levels (Kong et al., arXiv 2302.03792).
    """
    law, total = task.denoiser.schedule, 0.0
    between = math.log(JUDGED[1] / JUDGED[0])
    for i, part in enumerate(JUDGED):
        t = law.t_of_lam(torch.tensor(-math.log(part * spread), dtype=torch.float64))
        alpha, sigma = aligned(law.alpha(t), x), aligned(law.sigma(t), x)
        n = seeded_noise(task.seeds[0].tolist(), x.shape[1:], stream=STREAM + i).to(x)
        answer = task.denoiser(alpha * x + sigma * n, t, task.cond).to(x)
        total += float((x - answer).square().sum()) / (part * spread) ** 2 * between
    return total


class _Passed(NamedTuple):
    x: Tensor  # [P, S, *D]
    kernel: Tensor
    history: tuple[KernelStep, ...]


class _Pass:
    """One reverse pass with the E-step, and with M-steps where a kernel is fitted."""

    def __init__(self, task: _Task, spectra: ErrorSpectra, seeds: Tensor, nfe: int) -> None:
        self.task, self.spectra, self.seeds = task, spectra, seeds
        self.tableau = _tableau(task.denoiser, task.config, nfe)
        self.seen = Observed.of(task.y, task.noise, spectra)

    def run(self, kernel: Tensor, *, fitted: bool = True) -> _Passed:
        task, law, history = self.task, self.task.denoiser.schedule, list[KernelStep]()
        count, (height, width) = len(self.seeds), task.y.shape[-2:]

        def answer(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            nonlocal kernel
            x0 = task.denoiser(x, t, cond).to(x)
            level = float(law.sigma(t) / law.alpha(t))
            c, d = self.spectra.at(level), self.spectra.transform(x0.reshape(count, *task.y.shape))
            if fitted and level <= task.config.top * self.spectra.spread:
                cost = lambda kernels: evidence(kernels, self.seen, c, d)  # noqa: E731
                kernel = ascend(kernel[None], cost, task.config.steps, 0.1)[0]
                history.append(KernelStep(level, kernel, float(cost(kernel[None]))))
            k = transfer(kernel, height, width)
            gain = c * k.conj() / (k.abs().square() * c + self.seen.noise**2)
            return self.spectra.back(d + gain * (self.seen.y - k * d), task.y).reshape(x.shape)

        made = Wrapped(law, answer)
        seeds = self.seeds.flatten().tolist()
        x = run(made, self.tableau, task.start(self.tableau, self.seeds), repeated(task.cond, count), seeds=seeds)
        return _Passed(x.reshape(count, *task.y.shape).transpose(0, 1).contiguous(), kernel, tuple(history))


# -- for comparison -----------------------------------------------------------------------------------------------------


def _fast(task: _Task, size: tuple[int, int]) -> BlindResult:
    """Run Fast Diffusion EM with an error of one variance: a least-squares M-step, and a noise that holds what the kernel leaves open."""
    h, w = size
    rows, columns = torch.meshgrid(torch.arange(h) - h // 2.0, torch.arange(w) - w // 2.0, indexing="ij")
    kernel = torch.exp(-(rows**2 + columns**2) / (2 * SPEC_START**2)).to(task.y)
    kernel, history = kernel / kernel.sum(), list[KernelStep]()
    law, count, spread = task.denoiser.schedule, len(task.seeds), Projection().spread
    nfe = 2 * task.config.nfe

    def answer(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        nonlocal kernel
        x0, level = task.denoiser(x, t, cond).to(x), float(law.sigma(t) / law.alpha(t))
        if not math.isfinite(level):
            return x0
        r2 = spread**2 / (1 + (spread / level) ** 2)
        if level <= SPEC_LEVEL:
            guesses = x0.reshape(count, *task.y.shape).transpose(0, 1)
            kernel = fit_kernel(guesses, task.y, size, start=kernel, rho=SPEC_HOLD * r2 + 1e-6)
            history.append(KernelStep(level, kernel, None))
        blur = CircularBlur(kernel)
        left = task.y.repeat(count, 1, 1, 1) - blur(x0)
        noise = math.sqrt(task.noise**2 + SPEC_TRUST**2 * float(left.square().mean()))
        return x0 + r2 * blur.lift(left, r2, noise)

    tableau, seeds = _tableau(task.denoiser, task.config, nfe), task.seeds.flatten().tolist()
    x = run(Wrapped(law, answer), tableau, task.start(tableau, task.seeds), repeated(task.cond, count), seeds=seeds)
    return BlindResult(x.reshape(count, *task.y.shape).transpose(0, 1), kernel, tuple(history), count * nfe)


def _slow(task: _Task, size: tuple[int, int]) -> BlindResult:
    """Run EM of whole posterior samplings, from the kernel that does nothing."""
    kernel = _nothing(size).to(task.y)
    history, x, count = list[KernelStep](), task.y, len(task.seeds)
    tableau, seeds = _tableau(task.denoiser, task.config, SLOW_STEPS, "ddim"), task.seeds.flatten().tolist()
    for number in range(SLOW_ROUNDS):
        task.say(number, "a round")
        y, cond = task.y.repeat(count, 1, 1, 1), repeated(task.cond, count)
        start = task.start(tableau, task.seeds)
        x = sample_posterior(task.denoiser, tableau, start, CircularBlur(kernel), y, task.noise, cond, method="projection", seeds=seeds)
        x = x.reshape(count, *task.y.shape).transpose(0, 1)
        kernel = fit_kernel(x, task.y, size, start=kernel)
        history.append(KernelStep(0.0, kernel, None))
    return BlindResult(x, kernel, tuple(history), count * SLOW_ROUNDS * SLOW_STEPS)
