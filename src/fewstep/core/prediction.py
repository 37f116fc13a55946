r"""The prediction types of networks and how their output turns into ``x0``: one table, the only place where these formulas exist.

Every prediction type is affine in the state and the network's output,

    x0 = a(alpha, sigma) x + b(alpha, sigma) output,

so the inverse is ``output = (x0 - a x) / b``. With ``alpha^2 + sigma^2 = 1`` the ``v`` row is the usual
``alpha x - sigma v``; with ``alpha + sigma = 1`` the ``flow`` row is ``x - sigma u``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.front_door import checked, number

__all__ = [
    "EDM",
    "PREDICTIONS",
    "Measured",
    "Prediction",
    "add_noise",
    "aligned",
    "convert",
    "from_x0",
    "prediction",
    "to_x0",
    "x0_coefficients",
]

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prediction:
    """A named parameterisation of a network's output: the network sees ``x * input_scale``, and ``x0 = a x + b output``.

    Attributes:
        name: by which `prediction` finds it.
        coefficients: ``(alpha, sigma) -> (a, b)``, elementwise.
        input_scale: ``(alpha, sigma) -> scale``, or None for 1.
        undefined_at_zero_alpha: whether the output says nothing about x0 where ``alpha = 0``.
    """

    name: str
    coefficients: Coefficients  # (alpha, sigma) -> (a, b)
    input_scale: Callable[[Tensor, Tensor], Tensor] | None = None
    undefined_at_zero_alpha: bool = False

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle a parameterisation of this file by its name, since its formulas are no functions of a module."""
        return (prediction, (self.name,)) if self.is_named else super().__reduce__()

    @property
    def is_named(self) -> bool:
        """Whether the name alone says which parameterisation it is."""
        return PREDICTIONS.get(self.name) is self or self.name.startswith("edm(")


@checked
def EDM(sigma_data: float = 0.5) -> Prediction:  # noqa: N802 - a constructor, named as the field names it
    r"""Return EDM's preconditioning (Karras et al., arXiv 2206.00364, table 1) as a prediction type.

    With ``s = sigma/alpha`` it is
    ``x0 = sd^2/(s^2+sd^2) x/alpha + s sd/sqrt(s^2+sd^2) F(x / (alpha sqrt(s^2+sd^2)))``,
    written with ``alpha`` multiplied through, so that it also holds at ``alpha = 0``.

    Args:
        sigma_data: standard deviation ``sd`` of the data.

    Raises:
        ModelError: it is not a positive number.
    """
    sd = number(sigma_data, "sigma_data of EDM preconditioning", ModelError)
    if not 0 < sd < math.inf:
        raise ModelError(f"sigma_data of EDM preconditioning must be a positive number, got {sd:g}")

    def norm(alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.sqrt(sigma**2 + (sd * alpha) ** 2)

    def coefficients(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return alpha * sd**2 / norm(alpha, sigma) ** 2, sigma * sd / norm(alpha, sigma)

    return Prediction(f"edm({sd})", coefficients, input_scale=lambda alpha, sigma: 1 / norm(alpha, sigma))


class Measured(Prediction):
    r"""A preconditioning with measured coefficients: EDM's principle (arXiv 2206.00364, section 5) where its formulas do not hold.

    With ``s = sigma/alpha`` it is ``x0 = c_skip(s) x/alpha + c_out(s) F(c_in(s) x/alpha)``. Between levels of the table coefficients are
    interpolated linearly in ``s^2``, ``c_out`` and ``c_in`` by their logarithms: in a cube ``c_out`` falls like ``exp(-pi^2 s^2/8)`` at
    large levels. Beyond the ends of the table they are those of the end.

    Args:
        table: rows ``log s, c_skip, c_out, c_in``, in the order of increasing levels, two or more.

    Raises:
        ModelError: something else: levels that do not increase, numbers that are not finite, or scales that are not positive.
    """

    NAME: ClassVar[str] = "measured"
    table: tuple[tuple[float, float, float, float], ...]

    def __init__(self, table: Sequence[Sequence[float]] | Tensor) -> None:
        try:
            rows = torch.as_tensor(table, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"measured coefficients are rows of numbers log sigma, c_skip, c_out, c_in, got {str(table)[:80]}") from error
        if rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] != 4:
            raise ModelError(f"measured coefficients are 2 or more rows log sigma, c_skip, c_out, c_in, got shape {tuple(rows.shape)}")
        if not bool(torch.isfinite(rows).all()) or bool((rows[1:, 0] <= rows[:-1, 0]).any()) or bool((rows[:, 2:] <= 0).any()):
            raise ModelError("measured coefficients are finite, of increasing levels, with c_out and c_in above 0: measure them again")
        super().__init__(self.NAME, self._output, self._input)
        object.__setattr__(self, "table", tuple(tuple(row) for row in rows.tolist()))
        object.__setattr__(self, "_knots", torch.cat([torch.exp(2 * rows[:, :1]), rows[:, 1:2], rows[:, 2:].log()], 1))

    def __reduce__(self) -> tuple[Any, ...]:
        return Measured, (self.table,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Measured) and self.table == other.table

    def __hash__(self) -> int:
        return hash(self.table)

    def __repr__(self) -> str:
        low, high = math.exp(self.table[0][0]), math.exp(self.table[-1][0])
        return f"Measured({len(self.table)} levels, {low:.3g} to {high:.3g})"

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description: the name and the table."""
        return {"name": self.name, "table": [list(row) for row in self.table]}

    def at(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``c_skip, c_out, c_in`` at noise levels ``sigma/alpha [*]``, each ``[*]``."""
        knots: Tensor = vars(self)["_knots"].to(level.dtype).to(level.device)
        where = level.square().clamp(knots[0, 0], knots[-1, 0])
        index = (torch.searchsorted(knots[:, 0].contiguous(), where.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        low, high = knots[index], knots[index + 1]
        weight = ((where - low[..., 0]) / (high[..., 0] - low[..., 0]))[..., None]
        skip, out, scale = torch.lerp(low[..., 1:], high[..., 1:], weight).unbind(-1)
        return skip, torch.exp(out), torch.exp(scale)

    def _output(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        skip, out, _ = self.at(sigma / alpha)
        return skip / alpha, out

    def _input(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.at(sigma / alpha)[2] / alpha


PREDICTIONS: dict[str, Prediction] = {
    p.name: p
    for p in (
        Prediction("epsilon", lambda a, s: (1 / a, -s / a), undefined_at_zero_alpha=True),
        Prediction("sample", lambda a, s: (torch.zeros_like(a), torch.ones_like(a))),
        Prediction("v", lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2))),  # v = alpha eps - sigma x0
        Prediction("score", lambda a, s: (1 / a, s**2 / a), undefined_at_zero_alpha=True),
        Prediction("flow", lambda a, s: (1 / (a + s), -s / (a + s))),  # u = eps - x0
        Prediction("reversed-flow", lambda a, s: (1 / (a + s), s / (a + s))),  # x0 - eps, where a network's time runs to the data
    )
}


def prediction(name: str | Prediction) -> Prediction:
    """Look a prediction type up by name: ``epsilon``, ``sample`` (x0), ``v``, ``score``, ``flow``, ``reversed-flow``, ``edm(sigma_data)``.

    Raises:
        ModelError: for an unknown name, with the nearest ones, or a ``sigma_data`` that is not positive.
    """
    if isinstance(name, Prediction):
        return name
    if not isinstance(name, str):
        raise ModelError(f"a prediction type is a name, as 'epsilon', 'v' or 'edm(0.5)', got {name!r}")
    if name.startswith("edm(") and name.endswith(")"):
        try:
            return EDM(float(name[4:-1]))
        except ValueError as error:
            raise ModelError(f"edm(sigma_data) wants a number, got {name!r}") from error
    return look_up({"v_prediction": "v", "flow_prediction": "flow"}.get(name, name), PREDICTIONS, "prediction type", ModelError)


def x0_coefficients(kind: str | Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a, b`` of ``x0 = a x + b output``, each of the shape ``[*]`` of ``alpha`` and ``sigma``.

    Raises:
        ModelError: the output says nothing about x0 at one of these, where ``alpha = 0``.
    """
    p = prediction(kind)
    if p.undefined_at_zero_alpha and bool((alpha == 0).any()):
        raise ModelError(
            f"a network that predicts {p.name!r} says nothing about x0 where alpha = 0: start the grid later, or use v or flow"
        )
    return p.coefficients(alpha, sigma)


def aligned(coefficient: Tensor, x: Tensor) -> Tensor:
    """Return a coefficient ``[]`` or ``[B]`` shaped to multiply ``x [B, *D]``, in its dtype and on its device.

    It is cast first and then moved: some devices have no float64.
    """
    coefficient = coefficient.to(x.dtype).to(x.device)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the noised images ``alpha x0 + sigma eps [B, *D]``, the forward process that every noise law is one of.

    Args:
        x0: clean images ``[B, *D]``.
        noise: standard normal ``eps [B, *D]``.
        alpha, sigma: scales at their time, ``[]`` or ``[B]``.
    """
    return aligned(alpha, x0) * x0 + aligned(sigma, x0) * noise


def to_x0(kind: str | Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the estimate ``x0 [B, *D]`` of the clean image that a network's output stands for.

    Args:
        kind: the prediction type.
        output: the network's output ``[B, *D]``.
        x: the state it was evaluated at, ``[B, *D]``.
        alpha, sigma: scales at that time, ``[]`` or ``[B]``.

    Raises:
        ModelError: the output says nothing about x0 at this time.
    """
    a, b = x0_coefficients(kind, alpha, sigma)
    return (aligned(a, x) * x).addcmul_(aligned(b, x), output.to(x.dtype))


def from_x0(kind: str | Prediction, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the network output ``[B, *D]`` that stands for ``x0`` at the state ``x``: the inverse of `to_x0`, with its errors."""
    a, b = x0_coefficients(kind, alpha, sigma)
    return (x0 - aligned(a, x) * x) / aligned(b, x)


def convert(source: str | Prediction, target: str | Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return an output ``[B, *D]`` of one prediction type as that of another at the same state; arguments and errors of `to_x0`."""
    return from_x0(target, to_x0(source, output, x, alpha, sigma), x, alpha, sigma)
