"""Linear equations of operators, solved by conjugate gradients, each sample of a batch by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "dot", "least_squares"]

ROUNDS, CLOSE = 200, 1e-7  # at most, and the residual to reach


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of samples, ``[B, 1, ...]``."""
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a/b``, and 0 where a sample has arrived."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(b.dtype).tiny), 0.0)


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], r: Tensor, *, close: float = CLOSE) -> Tensor:
    """Solve ``matrix u = r [B, *Y]`` per sample, for a positive definite matrix (Hestenes and Stiefel, 1952), to ``close |r|``."""
    u, p, rho = torch.zeros_like(r), r, dot(r, r)
    goal = close**2 * rho
    for _ in range(ROUNDS):
        q = matrix(p)
        a = _ratio(rho, dot(p, q)) * (rho > goal)
        u, r = u + a * p, r - a * q
        after = dot(r, r)
        if bool((after <= goal).all()):
            break
        p, rho = r + _ratio(after, rho) * p, after
    return u


def least_squares(forward: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor], r: Tensor) -> Tensor:
    """Return the shortest ``x`` with the least ``|forward x - r|`` per sample, by conjugate gradients on the normal equations."""
    s = transpose(r)
    x, p, rho = torch.zeros_like(s), s, dot(s, s)
    goal = CLOSE**2 * rho
    for _ in range(ROUNDS):
        q = forward(p)
        a = _ratio(rho * (rho > goal), dot(q, q).reshape(rho.shape))
        x, r = x + a * p, r - a.reshape(-1, *(1,) * (r.ndim - 1)) * q
        s = transpose(r)
        after = dot(s, s)
        if bool((after <= goal).all()):
            break
        p, rho = s + _ratio(after, rho) * p, after
    return x
