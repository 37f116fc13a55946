r"""Linear multistep methods for ``dz/dr = eps``, ``z = x/alpha``, ``r = sigma/alpha``: polynomials in ``r`` through past ``eps``.

They are rhoAB-DEIS (Zhang and Chen, arXiv 2204.13902), LMS of k-diffusion and iPNDM-v, which differ in their last step alone. ``r`` is
finite at ``sigma = 0``, so a polynomial may reach the clean image; where ``alpha = 0`` it is infinite, and the step from there is DDIM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.tableau import Nodes, Solver
from fewstep.runtime.errors import SolverError
from fewstep.solvers.ddim import first_order
from fewstep.solvers.deis import NoiseMultistep, weighted
from fewstep.solvers.phi import interpolation_weights, noise_moment, plain_moment
from fewstep.solvers.stencil import noise_or_data

__all__ = ["ABM", "LMS", "GradientEstimation"]

Weights = Literal["exact", "published"]


def level_weights(nodes: Nodes, s: int, past: list[int]) -> Tensor:
    """Return weights ``[p]`` that integrate the polynomial through values at the nodes ``past`` over ``r``, from node ``s`` to the next."""
    r = nodes.sigma / nodes.alpha
    h = r[s + 1] - r[s]
    return interpolation_weights([r[k] - r[s] for k in past], [plain_moment(k, h) for k in range(len(past))])


@dataclass(frozen=True)
class LMS(NoiseMultistep):
    """LMS of k-diffusion: ``z_t = z_s + int_{r_s}^{r_t} P dr``, where ``P`` is the polynomial in ``r`` through the last ``eps``.

    With ``euler_at_clean`` it is rhoAB-DEIS (arXiv 2204.13902) as in ComfyUI, and iPNDM-v, the Adams-Bashforth method of variable steps.
    Programs share code of iPNDM-v whose weights of 3 and 4 evaluations are not the polynomial's: they are ``weights="published"``. Those of
    4 do not sum to 1 on unequal steps, so that even a constant ``eps`` is not integrated exactly.

    Args:
        steps: number of evaluations that the polynomial passes through, 1 to 4; the order.
        euler_at_clean: make a last step to ``sigma = 0`` of first order.
        weights: ``exact``, or ``published`` for parity with other programs' iPNDM-v.

    Raises:
        SolverError: an option that is none of these.
    """

    steps: int = 4
    euler_at_clean: bool = False
    weights: Weights = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("exact", "published"):
            raise SolverError(f"LMS has weights exact or published, got {self.weights!r}")

    @property
    def order(self) -> int:
        return 2 if self.steps == 4 and self.weights == "published" else self.steps

    def integral(self, nodes: Nodes, i: int, eps: list[Tensor]) -> Tensor:
        clean = self.euler_at_clean and bool(nodes.sigma[i + 1] == 0)
        usable = 1 if clean else self.usable(nodes, i)
        r = nodes.sigma / nodes.alpha
        if self.weights == "published":
            weights = (r[i + 1] - r[i]) * published_weights([r[i + 1 - k] - r[i - k] for k in range(usable)])
        else:
            weights = level_weights(nodes, i, [i - k for k in range(usable)])
        return weighted(-weights / r[i], eps)


def published_weights(h: list[Tensor]) -> Tensor:
    """Return iPNDM-v's shares ``[p]`` of a step in each past ``eps``, as its published code has them.

    Those of 2 are the polynomial's. With 3 the code multiplies inside a parenthesis instead of outside, and with 4 it adds a term that is
    to be subtracted, and takes ``h_1/h_2`` for ``h_2/h_3`` in the last share.

    Args:
        h: this step and the ones before, newest first.
    """
    if len(h) == 1:
        return torch.ones_like(h[0])[None]
    ratio = h[0] / h[1]
    shares = [1 + ratio / 2, -ratio / 2]
    if len(h) == 2:
        return torch.stack(shares)
    near, a = h[0] * (h[0] + h[1]) / (h[1] * (h[1] + h[2])), h[1] / h[2]
    third = (1 - h[0] / (3 * (h[0] + h[1])) * near) / 2
    shares = [shares[0] + third, shares[1] - (1 + a) * third, a * third]
    if len(h) == 3:
        return torch.stack(shares)
    fourth = (1 - h[0] / (3 * (h[0] + h[1]))) / 2 + (1 - h[0] / (2 * (h[0] + h[1]))) * h[0] / (6 * (h[0] + h[1] + h[2]))
    fourth = fourth * near * (h[0] + h[1] + h[2]) / (h[1] + h[2] + h[3])
    b = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
    return torch.stack(
        [shares[0] + fourth, shares[1] - (1 + a + b) * fourth, shares[2] + (a + b * (1 + h[2] / h[3])) * fourth, -b * a * fourth]
    )


@dataclass(frozen=True)
class GradientEstimation(NoiseMultistep):
    """Gradient estimation: DDIM's step with ``gamma eps_0 + (1 - gamma) eps_1`` for ``eps`` (Permenter and Yuan, arXiv 2306.04848, alg. 2).

    Args:
        gamma: 1 is DDIM, 1.5 the Adams-Bashforth method of 2 equal steps. The paper's is 2.

    Raises:
        SolverError: a ``gamma`` that is no finite number.
    """

    gamma: float = 2.0
    references = ("2306.04848",)
    steps = 2

    def __post_init__(self) -> None:
        if not -torch.inf < self.gamma < torch.inf:
            raise SolverError(f"gamma is a finite number, got {self.gamma}")

    @property
    def order(self) -> int:
        return 2 if self.gamma == 1.5 else 1

    def integral(self, nodes: Nodes, i: int, eps: list[Tensor]) -> Tensor:
        first = self.usable(nodes, i) == 1 or bool(nodes.sigma[i + 1] == 0)
        mean = eps[0] if first else self.gamma * eps[0] + (1 - self.gamma) * eps[1]
        return noise_moment(0, nodes.lam[i + 1] - nodes.lam[i]) * mean


@dataclass(frozen=True)
class ABM(Solver):
    """Adams-Bashforth-Moulton in ``r``: predict by `LMS`, then correct with the ``eps`` found there (Hairer, Norsett, Wanner I, III.1).

    One evaluation a step: the corrected state is the next anchor, and ``eps`` of the predicted one is recorded, as in UniPC, which with
    exact weights is this method in ``lam`` for ``x0``.

    Args:
        steps: evaluations that the predictor's polynomial passes through, 1 to 4; the corrector's passes through the new one too.
        euler_at_clean: predict a last step to ``sigma = 0`` by first order. Nothing is evaluated there, so nothing corrects it.

    Raises:
        SolverError: another number of steps.
    """

    steps: int = 3
    euler_at_clean: bool = False
    references = ("2204.13902",)

    def __post_init__(self) -> None:
        self._predictor()

    def _predictor(self) -> LMS:
        return LMS(self.steps, self.euler_at_clean)

    @property
    def order(self) -> int:
        return self.steps + 1

    @property
    def memory(self) -> int:
        return self.steps + 1

    def record(self, nodes: Nodes, i: int, x: Tensor, x0: Tensor) -> Tensor:
        return noise_or_data(nodes, i, x, x0)

    def update(self, nodes: Nodes, i: int, anchor: Tensor, x: Tensor, history: list[Tensor]) -> tuple[Tensor, Tensor]:
        predictor = self._predictor()
        if i > 0 and bool(nodes.alpha[i - 1] > 0):
            s, t = i - 1, i
            past = [t, *(s - k for k in range(predictor.usable(nodes, s)))]
            z = anchor / nodes.alpha[s] + weighted(level_weights(nodes, s, past), history)
            x = nodes.alpha[t] * z
        if bool(nodes.alpha[i] == 0):
            return x, first_order(nodes, i, i + 1, x, history[0])
        return x, predictor.update(nodes, i, x, x, history)[1]
