r"""Noise schedules: the laws ``alpha(t), sigma(t)`` of the forward process ``x_t = alpha_t x0 + sigma_t eps``.

Every law also gives ``lam(t) = log(alpha/sigma)`` by a formula of its own, accurate where ``alpha`` or ``sigma``
underflows, and the inverse ``t_of_lam``. All methods map tensors elementwise, keep dtype and device, and are differentiable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fewstep.runtime.errors import FewstepError, ModelError, look_up
from fewstep.runtime.front_door import check_fields, checked, checked_class, number, whole

__all__ = ["DiscreteVP", "NoiseSchedule", "RectifiedFlow", "VarianceExploding", "VPCosine", "VPLinear", "schedule_from_config"]


class NoiseSchedule(ABC):
    """An immutable noise law ``alpha(t), sigma(t)`` of the forward process ``x_t = alpha_t x0 + sigma_t eps``.

    Subclass it for a law of one's own: define the three times and the five methods below.

    Attributes:
        t_max: the time at which sampling starts.
        t_min: the time at which it ends, unless a grid says otherwise.
        t_clean: the time at which ``sigma`` is zero.
    """

    t_max: Any  # floats, as fields or properties
    t_min: Any
    t_clean: Any

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal scale at ``t``. ``[*] -> [*]``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise scale at ``t``. ``[*] -> [*]``."""

    @abstractmethod
    def lam(self, t: Tensor) -> Tensor:
        """Return ``log(alpha/sigma)`` at ``t``; ``-inf`` where alpha is 0 and ``+inf`` where sigma is 0. ``[*] -> [*]``."""

    @abstractmethod
    def t_of_lam(self, lam: Tensor) -> Tensor:
        """Return the time with this ``lam``: the inverse of `lam`. ``[*] -> [*]``."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description that `schedule_from_config` reads back."""

    @property
    def times(self) -> Tensor | None:
        """The only times that the network knows, increasing ``[T+1]`` from the clean image on; None if it knows all."""
        return None

    @property
    def t_last(self) -> float:
        """The last time at which the network is evaluated when sampling runs to ``t_min``."""
        return self.t_min

    def held(self, t: Tensor) -> Tensor:
        """Return what a network is told at ``t``: a time of its table, or the first or last one beyond it. ``[*] -> [*]``."""
        return t if self.times is None else t.clamp(self.t_last, self.t_max)

    @property
    def ends(self) -> Tensor:
        """The first and the last time of sampling, ``[t_max, t_min]``, float64."""
        return torch.tensor([self.t_max, self.t_min], dtype=torch.float64)

    @property
    def starts_at_noise(self) -> bool:
        """Whether ``alpha = 0`` at ``t_max``, so that the start is pure noise."""
        return bool(self.alpha(self.ends[0]) == 0)

    @property
    def ends_clean(self) -> bool:
        """Whether ``sigma = 0`` at ``t_min``."""
        return bool(self.sigma(self.ends[1]) == 0)


def _check_law(law: Any, needs: str, holds: Callable[[], bool]) -> None:  # noqa: ANN401 - a dataclass that is a law
    """Refuse fields of a law that are no finite numbers, or do not hold together.

    Args:
        law: with the fields ``t_min``, ``t_max`` and ``t_clean``.
        needs: what its own fields need, with a comma.
        holds: whether they have it, asked once all are numbers.

    Raises:
        FewstepError: one is no number, or they do not hold together (what they need).
    """
    check_fields(law)
    finite = all(math.isfinite(getattr(law, one.name)) for one in fields(law))
    if not (finite and 0 == law.t_clean <= law.t_min < law.t_max and holds()):
        raise ModelError(f"a {type(law).__name__} needs {needs}0 = t_clean <= t_min < t_max, all finite, got {law}")


class _VariancePreserving(NoiseSchedule):
    """The laws with ``alpha^2 + sigma^2 = 1``, given by ``log alpha``: sigma and lam follow without cancellation."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor: ...

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def lam(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))


@checked_class
@dataclass(frozen=True)
class VPLinear(_VariancePreserving):
    r"""The linear VP law in continuous time, ``beta(t) = beta_min + t (beta_max - beta_min)`` (Song et al., arXiv 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    t_clean: float = 0.0

    def __post_init__(self) -> None:
        _check_law(self, "0 <= beta_min <= beta_max, which is above 0, ", lambda: 0 <= self.beta_min <= self.beta_max > 0)

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_of_lam(self, lam: Tensor) -> Tensor:
        q = 0.5 * torch.nn.functional.softplus(-2 * lam, threshold=1e9)  # -log alpha; solve a t^2 + b t = q without cancellation
        a, b = (self.beta_max - self.beta_min) / 4, self.beta_min / 2
        return 2 * q / (b + torch.sqrt(b * b + 4 * a * q))

    def to_config(self) -> dict[str, Any]:
        return {"law": "vp-linear", **asdict(self)}


@checked_class
@dataclass(frozen=True)
class VPCosine(_VariancePreserving):
    r"""The cosine VP law, ``alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s))`` (Nichol and Dhariwal, arXiv 2102.09672)."""

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946
    t_clean: float = 0.0

    def __post_init__(self) -> None:
        _check_law(self, "s >= 0, t_max <= 1, ", lambda: self.s >= 0 and self.t_max <= 1)

    def _log_cos(self, t: Tensor | float) -> Tensor:
        return torch.log(torch.cos(torch.as_tensor(t) * (math.pi / 2 / (1 + self.s)) + math.pi / 2 * self.s / (1 + self.s)))

    def log_alpha(self, t: Tensor) -> Tensor:
        return self._log_cos(t) - self._log_cos(torch.zeros((), dtype=t.dtype, device=t.device))

    def t_of_lam(self, lam: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.nn.functional.softplus(-2 * lam, threshold=1e9)
        cos = torch.exp(log_alpha + self._log_cos(torch.zeros((), dtype=lam.dtype, device=lam.device)))
        return torch.acos(cos) * (2 * (1 + self.s) / math.pi) - self.s

    def to_config(self) -> dict[str, Any]:
        return {"law": "vp-cosine", **asdict(self)}


@checked_class
@dataclass(frozen=True)
class VarianceExploding(NoiseSchedule):
    r"""The law ``alpha = 1, sigma = t`` of VE models and of EDM (Karras et al., arXiv 2206.00364): its time is the noise level."""

    t_min: float = 0.002
    t_max: float = 80.0
    t_clean: float = 0.0

    def __post_init__(self) -> None:
        _check_law(self, "", lambda: True)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def lam(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)

    def to_config(self) -> dict[str, Any]:
        return {"law": "edm", **asdict(self)}


@checked_class
@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    r"""The law ``x_t = (1 - u) x0 + u eps`` with ``u = shift t / (1 + (shift - 1) t)`` of rectified flows.

    See Liu et al., arXiv 2209.03003; the shift is that of Esser et al., arXiv 2403.03206. Sampling starts at ``alpha = 0`` and ends at
    ``sigma = 0``, both exact. The time a network of this family expects is ``u`` (often times 1000), which is ``sigma(t)``.

    Args:
        shift: 1 for none; the larger, the more time is spent at high noise.

    Raises:
        ModelError: the shift is not positive.
    """

    shift: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    t_clean: float = 0.0

    def __post_init__(self) -> None:
        _check_law(self, "a positive shift, t_max <= 1, ", lambda: self.shift > 0 and self.t_max <= 1)

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(self.shift * t)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam - math.log(self.shift))

    def to_config(self) -> dict[str, Any]:
        return {"law": "flow", **asdict(self)}


@checked_class
@dataclass(frozen=True, eq=False, repr=False)
class DiscreteVP(NoiseSchedule):
    r"""The law of a model trained on a table ``alphas_cumprod [T]``; its times are ``0 .. T-1``, and ``t = -1`` is the clean image.

    Between the table's times the angle ``theta = arctan(sigma/alpha)`` is interpolated linearly. It is finite at both ends, so a table with
    zero terminal SNR needs no special case.

    Attributes:
        theta: the angles ``[T+1]``, float64; the first, 0, is the clean image.
        t_min: where grids end: 0, the network's last time, or -1, the clean image.

    Raises:
        ModelError: a table that does not decrease within [0, 1), or another end.
    """

    theta: Tensor  # [T+1] float64, theta[0] = 0 is the clean image, theta[k+1] belongs to time k
    t_min: float = 0.0  # where grids end: the network's last time, or -1, the clean image

    def __post_init__(self) -> None:
        theta = _table(self.theta).double()
        object.__setattr__(self, "theta", theta)
        known = theta.ndim == 1 and len(theta) >= 3 and bool(torch.isfinite(theta).all())
        if not known or bool((torch.diff(theta) <= 0).any()) or theta[0] != 0 or theta[-1] > math.pi / 2:
            raise ModelError(
                "alphas_cumprod must be a 1-d table of at least 2 numbers, strictly decreasing within [0, 1): angles from 0 to at most pi/2"
            )
        if self.t_min not in (0.0, self.t_clean):
            raise ModelError(f"grids of a discrete law end at time 0 or at the clean image, -1, not at {self.t_min}")

    def __repr__(self) -> str:
        low, high = torch.exp(-self.lam(torch.tensor([0.0, self.t_max], dtype=torch.float64))).tolist()
        end = ", to the clean image" if self.t_min == self.t_clean else ""
        return f"DiscreteVP({len(self.theta) - 1} times, noise levels {low:.3g} to {high:.3g}{end})"

    @classmethod
    @checked
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> DiscreteVP:
        """Make the law of ``alphas_cumprod = prod (1 - beta) [T]``. A float32 table is taken at its exact float32 values."""
        table = _table(alphas_cumprod).double()
        theta = torch.atan2(torch.sqrt(1 - table), torch.sqrt(table))
        return cls(torch.nn.functional.pad(theta, (1, 0)))  # the clean image

    @classmethod
    @checked
    def from_betas(cls, betas: Tensor) -> DiscreteVP:
        """Make the law of the variances ``beta [T]``, multiplied up in the dtype given."""
        return cls.from_alphas_cumprod(torch.cumprod(1 - _table(betas), dim=0))

    @classmethod
    @checked
    def linear(cls, count: int = 1000, start: float = 1e-4, end: float = 0.02) -> DiscreteVP:
        """Make the law of ``count`` betas linear in time from ``start`` to ``end`` (DDPM, arXiv 2006.11239)."""
        return cls.from_betas(_ramp(start, end, count))

    @classmethod
    @checked
    def scaled_linear(cls, count: int = 1000, start: float = 0.00085, end: float = 0.012) -> DiscreteVP:
        """Make the law of ``count`` betas whose square roots are linear in time (latent diffusion, arXiv 2112.10752)."""
        return cls.from_betas(_ramp(number(start, "a beta", ModelError) ** 0.5, number(end, "a beta", ModelError) ** 0.5, count) ** 2)

    @classmethod
    @checked
    def squared_cosine(cls, count: int = 1000, max_beta: float = 0.999) -> DiscreteVP:
        """Make the law whose alphas_cumprod follow a squared cosine, with betas up to ``max_beta`` (improved DDPM, arXiv 2102.09672)."""
        t = _ramp(0.0, 1.0, whole(count, "the number of times", ModelError) + 1)
        bar = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=number(max_beta, "max_beta", ModelError)))

    def zero_terminal_snr(self) -> DiscreteVP:
        """Return the law shifted and scaled in ``alpha`` so that the last one is exactly 0 (Lin et al., arXiv 2305.08891, algorithm 1)."""
        alpha = torch.cos(self.theta[1:])
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return DiscreteVP.from_alphas_cumprod(alpha**2)

    def to_clean(self) -> DiscreteVP:
        """Return the law whose grids end at the clean image: the step from their last evaluation leads to ``sigma = 0``."""
        return DiscreteVP(self.theta, self.t_clean)

    @property
    def t_max(self) -> float:
        return float(len(self.theta) - 2)

    @property
    def t_clean(self) -> float:
        return -1.0

    @property
    def t_last(self) -> float:
        """The last time that the network knows."""
        return 0.0

    @property
    def times(self) -> Tensor:
        """The times that the network knows, ``[T+1]``: ``-1`` (the clean image) and ``0 .. T-1``."""
        return torch.arange(len(self.theta), dtype=torch.float64) - 1

    def _theta_at(self, t: Tensor) -> Tensor:
        theta = self.theta.to(t.device, t.dtype)
        index = t.detach().floor().long().clamp(-1, len(theta) - 3) + 1
        weight = t + 1 - index
        return theta[index] + weight * (theta[index + 1] - theta[index])

    def alpha(self, t: Tensor) -> Tensor:
        theta = self._theta_at(t)
        return torch.where(theta == math.pi / 2, torch.zeros_like(theta), torch.cos(theta))  # cos(pi/2) rounds to 6e-17

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._theta_at(t))

    def lam(self, t: Tensor) -> Tensor:
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def t_of_lam(self, lam: Tensor) -> Tensor:
        theta, table = torch.atan(torch.exp(-lam)), self.theta.to(lam.device, lam.dtype)
        index = (torch.searchsorted(table, theta.detach().contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        return index - 1 + (theta - table[index]) / (table[index + 1] - table[index])

    def to_config(self) -> dict[str, Any]:
        return {"law": "discrete-vp", "theta": self.theta.tolist()} | ({} if self.t_min == 0 else {"t_min": self.t_min})


def _table(values: Any) -> Tensor:  # noqa: ANN401
    """Return a table of a discrete law as a tensor on the CPU, in its own dtype.

    Raises:
        ModelError: it is none.
    """
    try:
        table = torch.as_tensor(values).cpu()
        if not table.is_complex():
            return table
        raise TypeError("complex numbers")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"a table of betas or alphas_cumprod is a list of numbers, got {str(values)[:80]!r}") from error


def _ramp(start: Any, end: Any, count: Any) -> Tensor:  # noqa: ANN401
    """Return ``count`` numbers from ``start`` to ``end``, float64."""
    first, last = (number(value, "a beta", ModelError) for value in (start, end))
    return torch.linspace(first, last, max(whole(count, "the number of times", ModelError), 0), dtype=torch.float64)


_LAWS = {"vp-linear": VPLinear, "vp-cosine": VPCosine, "edm": VarianceExploding, "flow": RectifiedFlow}


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """Make the schedule that `NoiseSchedule.to_config` described.

    Raises:
        ModelError: an unknown law, fields that it does not have, or fields that make no law.
    """
    fields = dict(config)
    law = str(fields.pop("law", None))
    try:
        if law == "discrete-vp":
            return DiscreteVP(torch.tensor(fields["theta"], dtype=torch.float64), float(fields.get("t_min", 0.0)))
        return look_up(law, _LAWS, "noise schedule", ModelError)(**fields)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, FewstepError) as error:
        raise ModelError(f"noise schedule {law!r}: {error}") from error
