"""The function `restore`: posterior samples of one measurement, with their mean, their spread and how well they fit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fewstep.core.condition import moved, part_of
from fewstep.core.denoiser import Cond, FlowMap
from fewstep.core.grid import TimeGrid
from fewstep.core.tableau import Solver
from fewstep.inverse.measurements import Measurement, Nonlinear
from fewstep.inverse.method import Data, Method
from fewstep.inverse.posterior import checked_data, checked_prior, make_method, sample_posterior
from fewstep.inverse.start import Estimator, checked_estimate, choose_start
from fewstep.inverse.steps import restored_steps
from fewstep.models.batches import is_finished, sampled_in_batches, samples_record
from fewstep.models.identity import digest, parts
from fewstep.models.model import Model
from fewstep.models.problem import Problem, check_model
from fewstep.runtime.artifact import ArtifactRecord, check_no_model, load_artifact, named_path, save_artifact, tensor_of
from fewstep.runtime.errors import ArtifactError, ModelError, first_line
from fewstep.runtime.front_door import checked, is_count, number, scale_of
from fewstep.runtime.job import Job, Progress
from fewstep.runtime.process import wait_for_all
from fewstep.sampling.noise import seed_list, seeded_noise
from fewstep.sampling.sampler import Sampler
from fewstep.sampling.start import level_of, noised

__all__ = ["Restoration", "RestorationCard", "restore", "sample_interval"]

INTERVAL = 0.9
MADE = ("restoration.json", "restoration.safetensors", "README.md", "overview.png", "mean.png", "spread.png", "singles")  # in a folder
ADJOINT = 1e-3  # how far two inner products may be from each other, over the norms
# the code of these stays as it is, or is another version
LIBRARIES = ("builtins", "abc", "typing", "collections", "torch", "numpy", "diffusers", "transformers", "deepinv", "fewstep")
REHEARSE, REHEARSED = "rehearse", 16  # the word for it, and the number of images


@dataclass(frozen=True)
class RestorationCard(ArtifactRecord):
    """The fields of ``restoration.json``, see `Restoration`."""

    FORMAT = "fewstep-restoration"

    card: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Restoration:
    """Samples of the posterior of one measurement: images that the model finds likely and that the measurement allows.

    They are several answers, not one: where they differ, the measurement does not say.

    Attributes:
        samples: ``[S, *D]``.
        y: what was measured, ``[*Y]``.
        misfit: root mean square of ``y - A x0`` of each sample, in units of the noise, ``[S]``; of the measurement where there is none.
        card: model, method, sampler, evaluations and figures.
    """

    samples: Tensor
    y: Tensor
    misfit: Tensor
    card: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        fit = f"misfit {float(self.misfit.mean()):.3g}"
        return f"Restoration({len(self.samples)} samples of {tuple(self.samples.shape[1:])}, {fit}, spread {float(self.spread.mean()):.3g})"

    @cached_property
    def mean(self) -> Tensor:
        """The mean of the samples, ``[*D]``: of all answers the one with the least expected error, and smoother than any sample."""
        return self.samples.mean(0)

    @cached_property
    def spread(self) -> Tensor:
        """The standard deviation of the samples, ``[*D]``: how uncertain each element is; 0 of a single sample."""
        return self.samples.std(0) if len(self.samples) > 1 else torch.zeros_like(self.samples[0])

    def interval(self, share: float = INTERVAL) -> tuple[Tensor, Tensor]:
        """Return the ends, ``[*D]`` each, of an interval that holds one more sample with this probability, see `sample_interval`."""
        return sample_interval(self.samples, share)

    def with_card(self, **facts: Any) -> Restoration:  # noqa: ANN401 - plain JSON values
        """Return the same restoration with more facts on its card, plain JSON values."""
        return replace(self, card={**self.card, **facts})

    def save(self, folder: str | Path) -> Path:
        """Write ``restoration.json``, ``restoration.safetensors`` and a ``README.md`` card, and return the folder.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        tensors = {"samples": self.samples, "y": self.y, "misfit": self.misfit, "mean": self.mean, "spread": self.spread}
        facts = "\n".join(f"- {key}: {value}" for key, value in self.card.items())
        readme = f"""# {len(self.samples)} samples of what was measured

{facts}

Each sample is one image that fits the measurement and that the model finds likely. The mean has the least expected error and is smoother
than any of them. The spread is large where the measurement does not say what is there.

```python
from fewstep.inverse.restore import Restoration

found = Restoration.load("path/to/this/folder")
found.samples, found.mean, found.spread, found.misfit
```
"""
        check_no_model(folder := named_path(folder))
        return save_artifact(folder, "restoration", {"card": dict(self.card)}, tensors, readme)

    @classmethod
    def load(cls, folder: str | Path) -> Restoration:
        """Load a restoration that `save` or `restore` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """

        def build(meta: RestorationCard, tensors: dict[str, Tensor]) -> Restoration:
            samples, y = tensors["samples"], tensors["y"]
            return cls(samples, y, tensor_of(tensors, "misfit", [len(samples)]), meta.card)

        return load_artifact(folder, "restoration", RestorationCard, build)


def sample_interval(samples: Tensor, share: float = INTERVAL) -> tuple[Tensor, Tensor]:
    """Return the ends, ``[*D]`` each, of an interval in which one more sample of the same distribution lies with a probability.

    They are order statistics at the ranks ``p (S + 1)``, so this holds for any number of samples: 19 for 90 % from the least to the most.

    Args:
        samples: ``[S, *D]``.
        share: the probability.

    Raises:
        ModelError: no probability, or too few samples for it (how many there should be).
    """
    if not 0 < number(share, "the share of an interval", ModelError) < 1:
        raise ModelError(f"the share of an interval is between 0 and 1, as 0.9, got {share:g}")
    count, least = len(samples), math.ceil(2 / (1 - share) - 1 - 1e-9)
    if count < least:
        raise ModelError(f"an interval of {share:.0%} wants at least {least} samples, and there are {count}: pass seeds=range({least})")
    ordered, rank = samples.sort(0).values, (1 - share) / 2 * (count + 1) - 1
    low = max(math.floor(rank + 1e-9), 0)
    weight = max(rank - low, 0.0)
    return torch.lerp(ordered[low], ordered[low + 1], weight), torch.lerp(ordered[-1 - low], ordered[-2 - low], weight)


@checked
@torch.no_grad()
def restore(
    model: Model,
    measurement: object,
    y: Tensor,
    noise: float | None = None,
    *,
    nfe: int = 10,
    seeds: Iterable[int] | Tensor = range(4),
    method: str | Method = "moments",
    solver: str | Solver | Sampler = "ddim",
    grid: str | TimeGrid | None = None,
    guidance: float | None = None,
    cond: Cond = None,
    strength: float | str | None = None,
    estimate: Estimator | Tensor | None = None,
    batch: int = 64,
    out: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Restoration:
    """Sample what was measured, given a model of such images: no training, and no back-propagation by default.

    Args:
        model: the prior.
        measurement: the operator: one of `fewstep.inverse.measurements`, an object with ``A`` and ``A_adjoint``, or a function.
        y: what was measured, ``[*Y]``.
        noise: the standard deviation of its noise, in the units of the images, which mostly lie in [-1, 1].
        nfe: network evaluations per sample, with those of the method. Few have the least error, many look sharper.
        seeds: one for each sample.
        method: one of `fewstep.inverse.posterior.METHODS` with options, as ``moments:steps=2``; or a `Method`.
        solver: a solver, or a `Sampler` with a grid of its own.
        grid: the name of a spacing, or a `TimeGrid`; by default ``karras``, or ``angle`` where the model starts without any signal.
        guidance: classifier-free guidance scale; by default the model's own.
        cond: what the network is conditioned on: for all samples ``[1]``, or one for each; by default the null label of a model with one.
        strength: begin at an estimate with this share of noise, ``sigma/(alpha + sigma)``, rather than at noise; ``rehearse`` chooses it by
            `choose_start`. It pays where the estimate is good.
        estimate: with a strength: the images ``[*D]``, or a function ``y [B, *Y] -> [B, *D]``; by default the regularised pseudo-inverse.
        batch: samples at a time.
        out: a folder for the `Restoration`; a killed run continues there.
        on_progress: called with the samples done and a note.

    Raises:
        ModelError: a measurement, noise, method, condition or guidance that cannot be used; a student; a model without a null label and
            without ``cond``.
        SolverError: an ``nfe`` that is no multiple of what the method takes for a step.
        ArtifactError: the folder holds something else.

    Examples:
        >>> import torch, fewstep
        >>> from fewstep.inverse.measurements import Average
        >>> model = fewstep.load_model("digits-edm")
        >>> found = fewstep.restore(model, Average(2), torch.zeros(1, 4, 4), 0.05, seeds=range(3))
        >>> found.samples.shape, found.spread.shape
        (torch.Size([3, 1, 8, 8]), torch.Size([1, 8, 8]))
    """
    check_model(model)
    chosen, numbers, scale = make_method(method), seed_list(seeds), scale_of(guidance, model.default_guidance)
    if not numbers or not is_count(batch):
        raise ModelError("restore makes one sample for each seed, in batches of at least 1: pass seeds=range(4)")
    if len(set(numbers)) < len(numbers):
        raise ModelError("two seeds are the same, and would give one sample twice: pass seeds=range(4)")
    checked_prior(model, chosen)
    if scale != 1 and cond is None and model.null_label is not None:
        raise ModelError(
            "guidance leads to a condition, and by default there is none: pass cond=, the label of what was measured, or leave it out"
        )
    problem, data = Problem(model, scale, model.device), checked_data(measurement, y, noise)
    check_one(data, problem)
    if strength is None and estimate is not None:
        raise ModelError("an estimate is where to begin: pass strength=, the share of noise that it gets, or 'rehearse', or leave it out")
    rehearsed = 0
    if strength is not None and not isinstance(strength, str):
        level_of(strength)
    if isinstance(strength, str):
        if strength != REHEARSE:
            raise ModelError(f"strength is a number above 0 and up to 1, or {REHEARSE!r}, got {strength!r}")
        if isinstance(estimate, Tensor):
            raise ModelError("a rehearsal makes estimates of other measurements: pass estimate= as a function, or strength= as a number")
        options = {"nfe": nfe, "method": chosen, "solver": solver, "grid": grid, "guidance": scale, "estimate": estimate}
        found = choose_start(model, data.measurement, data.noise, cond=cond_of_all(cond), num=REHEARSED, **options)
        strength, rehearsed = found.strength, found.evaluations
    strength = None if strength == 1 else strength  # from noise
    sampler = restored_steps(model, chosen, solver, nfe, grid, scale, strength)
    start = None if strength is None else checked_estimate(estimate, data.measurement, data.y[None], data.noise, problem.shape)
    run = _Run(problem, data, chosen, sampler, numbers, problem.conditions(numbers, cond), start, strength, rehearsed, int(batch))
    with Job.open("restore", out, device=model.device, on_progress=on_progress) as job:
        return run.within(job)


def check_one(data: Data, problem: Problem) -> None:
    """Refuse anything but one measurement of one image.

    Raises:
        ModelError: it does not fit the model's images, or is several.
    """
    nothing = torch.zeros(1, *problem.shape, device=problem.device)
    try:
        r = data.residual(nothing)
        check_transpose(data.measurement, problem.shape, r)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ModelError(f"the operator cannot measure an image of shape {tuple(problem.shape)}: {first_line(error)}") from error
    if data.y.shape != r.shape[1:]:
        raise ModelError(
            f"restore takes one measurement {list(r.shape[1:])}, got {list(data.y.shape)}: call it for each, or sample many by "
            "fewstep.sample_posterior"
        )


def cond_of_all(cond: Cond) -> Cond:
    """Return the one condition of all samples, ``[1]``, for the images of a rehearsal.

    Raises:
        ModelError: the samples have several.
    """
    if isinstance(cond, Tensor) and cond.ndim and not bool((cond == cond[:1]).all()):
        raise ModelError("a rehearsal is made under one condition, and the samples have several: pass strength= as a number")
    return None if cond is None else part_of(cond, slice(0, 1))


def code_of(thing: object) -> list[object]:
    """Return the functions of the classes that an operator of one's own is of, and of what it holds: their code is part of a request."""
    found, waiting, seen = list[object](), [thing], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        kinds = [kind for kind in type(one).__mro__ if kind.__module__.split(".")[0] not in LIBRARIES]
        found += [value for kind in kinds for _, value in sorted(vars(kind).items()) if isinstance(value, FunctionType)]
        held = vars(one) if hasattr(one, "__dict__") else {}
        waiting += [value for name, value in sorted(held.items()) if not isinstance(value, Tensor | FunctionType | type)]
    return found


def check_transpose(measurement: Measurement, shape: Sequence[int], r: Tensor) -> None:
    """Refuse a linear operator whose transpose is none: ``<A x, u>`` has to be ``<x, A^T u>``.

    Args:
        measurement: the operator.
        shape: of an image, ``*D``.
        r: what it answers to one, ``[1, *Y]``.

    Raises:
        ModelError: it is none.
    """
    x, u = seeded_noise([0], shape).to(r), seeded_noise([1], r.shape[1:]).to(r)
    if isinstance(measurement, Nonlinear) or measurement.at(x, u, 0.0) is not measurement:
        return
    back = measurement.transpose(u)
    if back.shape != x.shape:
        raise ModelError(f"the operator's transpose answers shape {tuple(back.shape)}, and images have {tuple(x.shape)}")
    one, two = float((measurement(x) * u).sum()), float((x * back).sum())
    if not abs(one - two) <= ADJOINT * (float(measurement(x).norm() * u.norm()) + float(x.norm() * back.norm())):
        raise ModelError(f"the operator's transpose is none: <A x, u> is {one:.4g} and <x, A^T u> is {two:.4g} for the same x and u")


@dataclass(frozen=True, eq=False)
class _Run:
    """Posterior samples to be made: everything is checked."""

    problem: Problem
    data: Data
    method: Method
    sampler: Sampler
    seeds: list[int]
    cond: Cond
    start: Tensor | None  # where to begin, [1, *D]; None for noise
    strength: float | None
    rehearsed: int  # evaluations of a rehearsal
    batch: int

    @property
    def identity(self) -> str:
        """A hash of all that the samples depend on."""
        given = (
            self.data.measurement,
            code_of(self.data.measurement),
            *moved((self.data.y.detach(), self.start, self.cond), torch.device("cpu")),
        )
        facts = (
            self.problem.identity,
            self.sampler.tableau.fingerprint,
            repr(self.method),
            digest(parts(self.method, "method")),
            digest(parts(given, "measurement")),
            self.data.noise,
            self.seeds,
            self.batch,
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def within(self, job: Job) -> Restoration:
        """Sample, and write what was found."""
        problem, tableau, denoiser = self.problem, self.sampler.tableau, self.problem.denoiser
        assert not isinstance(denoiser, FlowMap)  # a student is refused
        numbers = {seed: k for k, seed in enumerate(self.seeds)}
        identity = "memory" if job.in_memory else self.identity
        if (job.folder / "restoration.json").exists() and is_finished(job.folder, identity):
            job.on_progress(len(self.seeds), "there already")
            try:
                return Restoration.load(job.folder)
            except ArtifactError as error:
                raise ArtifactError(f"{error}: remove {job.folder / 'restoration.json'}, and type the same again") from error
        method = self.method.prepared(denoiser, problem.shape, self.cond)

        def make(part: Sequence[int]) -> Tensor:
            first = numbers[part[0]]
            cond = None if self.cond is None else part_of(self.cond, slice(first, first + len(part)))
            data, nodes = self.data, tableau.nodes
            begin = None if self.start is None else self.start.expand(len(part), *problem.shape)
            x = problem.start(part, nodes) if begin is None else noised(begin, nodes, part)
            return sample_posterior(denoiser, tableau, x, data.measurement, data.y, data.noise, cond, method=method, seeds=part)

        about = samples_record(identity, problem.name, repr(self.sampler), self.seeds)
        made = sampled_in_batches(
            job.folder, about, self.seeds, self.batch, make, made=MADE, on_progress=lambda done: job.on_progress(done, "")
        )
        if made is None:  # another process than the first, which has no samples to give
            wait_for_all()
            return Restoration.load(job.folder)
        samples, folder = made
        found = Restoration(samples, self.data.y.detach().cpu(), self._misfit(samples), self.card())
        if not job.in_memory:
            found.save(job.folder)
            rmtree(folder)
            wait_for_all()
        return found

    def _misfit(self, samples: Tensor) -> Tensor:
        r = self.data.residual(samples.to(self.problem.device)).cpu()
        rms = r.flatten(1).square().mean(1).sqrt()
        return rms / self.data.noise if self.data.noise else rms

    def card(self) -> dict[str, Any]:
        """Return what the samples are of."""
        evaluations, products = self.method.cost
        count = self.sampler.nfe
        return {
            **self.problem.card(),
            "measurement": type(self.data.measurement).__name__,
            "noise": self.data.noise,
            "method": repr(self.method),
            "sampler": repr(self.sampler),
            "evaluations": count * evaluations,
            **({"evaluations before": before} if (before := self.method.preparation + self.rehearsed) else {}),
            "backward passes": count * products,
            "seeds": self.seeds,
            **({} if self.strength is None else {"strength": self.strength}),
        }
