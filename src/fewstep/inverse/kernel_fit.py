r"""Fit a blur kernel to known images: the M-step of Fast Diffusion EM (arXiv 2309.00287), on the simplex.

A kernel :math:`k` of non-negative numbers with the sum 1 blurs circularly, :math:`y = k * x_0 + n`. Given the images it is the solution of
a quadratic programme of as many unknowns as it has pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.runtime.errors import ModelError
from fewstep.runtime.front_door import checked, is_count, number

__all__ = ["checked_size", "fit_kernel", "on_simplex", "recentred"]

STEPS = 1000  # shifts of an image are nearly collinear: 200 plain steps find a wrong kernel
SPILL = 0.01  # of a kernel's mass may leave its support when it is moved


def on_simplex(v: Tensor) -> Tensor:
    """Project ``v [..., n]`` on the simplex ``{k >= 0, sum k = 1}``, by sorting (Held, Wolfe and Crowder, 1974)."""
    u = v.sort(-1, descending=True).values
    excess = (u.cumsum(-1) - 1) / torch.arange(1, v.shape[-1] + 1).to(v)
    rho = (u > excess).sum(-1, keepdim=True)
    return (v - excess.gather(-1, rho - 1)).clamp_min(0)


@checked
def fit_kernel(
    x0: Tensor,
    y: Tensor,
    size: int | tuple[int, int],
    *,
    start: Tensor | None = None,
    rho: float = 0.0,
    steps: int = STEPS,
) -> Tensor:
    r"""Find the kernel ``[h, w]`` that blurs images into others, by accelerated projected gradient (FISTA).

    .. math:: k = \arg\min_{k \in \Delta} \tfrac12 k^T G k - h^T k + \tfrac{\rho}{2} |k - k_\mathrm{old}|^2,
        \quad G_{ab} = \langle S_a x_0, S_b x_0\rangle/n, \quad h_a = \langle S_a x_0, y\rangle/n

    with the circular shifts :math:`S_a` within the support, and means over images and their :math:`n` elements.

    Args:
        x0: the sharp images, ``[B, C, H, W]``, or ``[B, S, C, H, W]`` with S guesses at each.
        y: the blurred ones, ``[B, C, H, W]``.
        size: of the kernel, odd, or its two sides.
        start: the kernel to begin at, ``[h, w]``, to which ``rho`` holds it; by default all are equal.
        rho: how strongly it is held.
        steps: of the minimisation.

    Raises:
        ModelError: images of other shapes than each other, an even size, or one larger than the images.

    Examples:
        >>> import torch
        >>> from fewstep.inverse.kernel_fit import fit_kernel
        >>> x0 = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> fit_kernel(x0, x0.roll(1, -1), 3).round().tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    guesses = x0[:, None] if isinstance(x0, Tensor) and x0.ndim == 4 else x0
    fits = isinstance(y, Tensor) and isinstance(guesses, Tensor) and y.ndim == 4 and guesses.ndim == 5
    if not fits or guesses.shape[0] != y.shape[0] or guesses.shape[2:] != y.shape[1:]:
        raise ModelError(f"sharp and blurred images have one shape [B, C, H, W], got {_shape(x0)} and {_shape(y)}")
    if not is_count(steps) or not number(rho, "rho", ModelError) >= 0:
        raise ModelError(f"a fit takes whole steps from 1 and a rho from 0, got {steps!r} and {rho!r}")
    h, w = checked_size(size, y)
    spectrum = torch.fft.rfft2(guesses.double())
    # both are correlations: of the guesses with themselves, and with y
    own = torch.fft.irfft2(spectrum.abs().square().mean((0, 1, 2)), s=y.shape[-2:])
    cross = torch.fft.irfft2((spectrum.conj() * torch.fft.rfft2(y.double())[:, None]).mean((0, 1, 2)), s=y.shape[-2:])
    rows, columns = (torch.arange(n) - n // 2 for n in (h, w))
    at = torch.cartesian_prod(rows, columns)
    between = at[:, None] - at[None]
    count = y.shape[-2] * y.shape[-1]
    gram, right = own[between[..., 0], between[..., 1]] / count, cross[at[:, 0], at[:, 1]] / count
    old = torch.full((h * w,), 1 / (h * w), dtype=torch.float64, device=y.device) if start is None else start.double().flatten()
    gram, right = gram + rho * torch.eye(h * w).to(gram), right + rho * old
    rate = 1 / torch.linalg.eigvalsh(gram)[-1].clamp_min(torch.finfo(gram.dtype).tiny)
    k, ahead, momentum = old, old, 1.0
    for _ in range(steps):
        before, k = k, on_simplex(ahead - rate * (gram @ ahead - right))
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, momentum = k + (momentum - 1) / after * (k - before), after
    return k.reshape(h, w).to(y.dtype)


def recentred(kernel: Tensor) -> Tensor:
    """Move a kernel ``[h, w]`` by whole pixels until its centre of mass is nearest to its middle.

    A blind kernel is known up to a shift, which moves the image the other way. It goes as far as 99 % of its mass stay within the support.
    """
    for axis in (0, 1):
        mass = kernel.sum(1 - axis)
        n = len(mass)
        mean = float((mass * torch.arange(n).to(mass)).sum() / mass.sum())
        wanted = n // 2 - round(mean)
        for move in range(wanted, 0, -1 if wanted > 0 else 1):
            leaving = mass[n - move :] if move > 0 else mass[:-move]
            if float(leaving.sum()) <= SPILL * float(mass.sum()):
                kept = kernel.narrow(axis, max(-move, 0), n - abs(move))
                empty = torch.zeros_like(kernel.narrow(axis, 0, abs(move)))
                kernel = torch.cat([empty, kept] if move > 0 else [kept, empty], axis)
                kernel = kernel / kernel.sum()
                break
    return kernel


def checked_size(size: Any, y: Tensor) -> tuple[int, int]:  # noqa: ANN401
    """Return the two sides of a kernel for images ``y [..., H, W]``.

    Raises:
        ModelError: they are not odd, or larger than the images.
    """
    sides: tuple[Any, ...] = tuple(size) if isinstance(size, tuple | list | torch.Size) else (size, size)
    if len(sides) != 2 or not all(is_count(side) for side in sides):
        raise ModelError(f"the size of a kernel is an odd number of pixels, or two, as 5 or (5, 7), got {size!r}")
    h, w = (int(side) for side in sides)
    if not (h % 2 and w % 2):
        raise ModelError(f"a kernel has odd sides, so that it has a middle, got {h} x {w} pixels: take the next larger odd size")
    if h > y.shape[-2] or w > y.shape[-1]:
        raise ModelError(f"a kernel of {h} x {w} pixels is larger than images of {y.shape[-2]} x {y.shape[-1]}: take a smaller one")
    return h, w


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
