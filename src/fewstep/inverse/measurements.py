r"""Measurements: what is known of an image, as an operator :math:`A` with :math:`y = A x_0 + s_y n`.

A method needs of it :math:`A`, its transpose, and the solution of :math:`(r^2 A A^T + s_y^2 I) u = r`. The classes of this file have
closed forms of the last one; for any other operator conjugate gradients solve it. Operators act on clean images, never on noisy states.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.prediction import aligned
from fewstep.inverse.conjugate_gradients import conjugate_gradients, least_squares
from fewstep.runtime.errors import ModelError, first_line
from fewstep.runtime.front_door import is_count, number

__all__ = [
    "Average",
    "CircularBlur",
    "Clip",
    "Compose",
    "Diagonal",
    "Grayscale",
    "Mask",
    "Matrix",
    "Measurement",
    "Nonlinear",
    "checked_kernel",
    "checked_noise",
    "measurement_of",
]

CUT = 1e-3  # singular values below this part of the largest are noise to a pseudo-inverse


class Measurement(ABC):
    r"""A linear operator :math:`A` on images: subclass it and define `__call__` and `transpose`; `solve` is for closed forms.

    Examples:
        >>> import torch
        >>> from fewstep.inverse.measurements import Average
        >>> Average(2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor:
        """Measure the images ``x0 [B, *D]`` without noise, ``[B, *Y]``."""

    @abstractmethod
    def transpose(self, y: Tensor) -> Tensor:
        """Apply the transpose to ``y [B, *Y]``, ``[B, *D]``."""

    def solve(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        r"""Solve :math:`(r^2 A A^T + s_y^2 I) u = r` for ``u [B, *Y]``; its pseudo-inverse where the noise is 0.

        Args:
            r: the right side, ``[B, *Y]``.
            r2: the variance of the image, ``[]`` or ``[B]``.
            noise: the standard deviation :math:`s_y` of the measurement.
        """
        gain = aligned(torch.as_tensor(r2).to(r), r)
        if noise > 0:
            return conjugate_gradients(lambda u: gain * self(self.transpose(u)) + noise**2 * u, r)
        return least_squares(self.transpose, self, least_squares(self, self.transpose, r)) / gain

    def lift(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        r"""Return :math:`A^T (r^2 A A^T + s_y^2 I)^{-1} r`, ``[B, *D]``: the shortest image that explains ``r``, over :math:`r^2`.

        Arguments are those of `solve`.
        """
        if noise > 0:
            return self.transpose(self.solve(r, r2, noise))
        return least_squares(self, self.transpose, r) / aligned(torch.as_tensor(r2).to(r), r)

    def at(self, x0: Tensor, y: Tensor, noise: float) -> Measurement:
        """Return the linear operator near the images ``x0 [B, *D]``: itself, where it is linear. ``y [B, *Y]`` was measured."""
        del x0, y, noise
        return self

    def __matmul__(self, inner: Measurement) -> Compose:
        """Return the operator that measures what another one has measured, `Compose`."""
        return Compose(self, inner)


class _Closed(Measurement):
    """An operator with a `solve` in closed form, which takes the pseudo-inverse where the noise is 0."""

    def lift(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        return self.transpose(self.solve(r, r2, noise))


class _Orthogonal(_Closed):
    """An operator whose rows are orthogonal and of one length: ``A A^T = gain I``."""

    gain: float

    def solve(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        return r / (aligned(torch.as_tensor(r2).to(r), r) * self.gain + noise**2)


class Diagonal(_Closed):
    """Measure each element times a weight of its own.

    Args:
        weights: ``[*D]``, ``[B, *D]``, or what broadcasts to it.
    """

    def __init__(self, weights: Tensor) -> None:
        if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point or not bool(torch.isfinite(weights).all()):
            raise ModelError(f"weights are a tensor of finite numbers, [*D], got {str(weights)[:80]}")
        self.weights = weights

    def __call__(self, x0: Tensor) -> Tensor:
        """Return ``weights x0``."""
        try:
            y = self.weights.to(x0) * x0
        except RuntimeError:
            y = x0.new_empty(0)
        if y.shape != x0.shape:
            what = type(self).__name__.lower() if type(self) is Mask else "weights"
            raise ModelError(f"the {what} of shape {tuple(self.weights.shape)} does not fit images of shape {tuple(x0.shape[1:])}")
        return y

    def transpose(self, y: Tensor) -> Tensor:
        """Return ``weights y``."""
        return self(y)

    def solve(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        """Solve element by element."""
        square = aligned(torch.as_tensor(r2).to(r), r) * self.weights.to(r) ** 2 + noise**2
        return torch.where(square > 0, r / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0)


class Mask(Diagonal):
    """Measure the pixels where a mask is 1, and nothing where it is 0 (inpainting; all ones: denoising).

    Args:
        mask: ``[*D]`` or what broadcasts to it, as ``[1, H, W]`` for all channels; zeros and ones, or booleans.

    Raises:
        ModelError: other numbers.
    """

    def __init__(self, mask: Tensor) -> None:
        known = isinstance(mask, Tensor) and mask.numel() > 0 and bool(((mask == 0) | (mask == 1)).all())
        if not known:
            raise ModelError(f"a mask is a tensor of zeros (unknown) and ones (measured), [*D], got {str(mask)[:80]}")
        super().__init__(mask.float())


class Average(_Orthogonal):
    """Measure the means of blocks of ``factor x factor`` pixels (upscaling).

    Raises:
        ModelError: no whole number, or images whose sides are not multiples of it.
    """

    def __init__(self, factor: int) -> None:
        if not is_count(factor):
            raise ModelError(f"factor is how many pixels are averaged on a side, a whole number from 1, got {factor!r}")
        self.factor, self.gain = int(factor), 1 / int(factor) ** 2

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the means, ``[B, C, H/factor, W/factor]``."""
        if x0.ndim != 4 or x0.shape[-1] % self.factor or x0.shape[-2] % self.factor:
            raise ModelError(f"images of shape {tuple(x0.shape[1:])} cannot be averaged in blocks of {self.factor} x {self.factor} pixels")
        return nn.functional.avg_pool2d(x0, self.factor)

    def transpose(self, y: Tensor) -> Tensor:
        """Return each mean, shared by its block."""
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2) * self.gain


class CircularBlur(_Closed):
    """Measure the image convolved with a kernel; the borders are joined (deblurring).

    Args:
        kernel: ``[h, w]``, odd sides, its middle is where it sits; or one for each image, ``[B, h, w]``.

    Raises:
        ModelError: a kernel of even sides, without finite numbers, or larger than the image.
    """

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = checked_kernel(kernel)

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the blurred images, ``[B, *D]``."""
        return self._through(x0, lambda k: k)

    def transpose(self, y: Tensor) -> Tensor:
        """Return the images correlated with the kernel."""
        return self._through(y, torch.conj)

    def solve(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        """Solve frequency by frequency; without noise those below a thousandth of the largest are left out."""
        gain = aligned(torch.as_tensor(r2).to(r), r)

        def inverse(k: Tensor) -> Tensor:
            square = k.abs() ** 2
            if noise > 0:
                return 1 / (gain * square + noise**2)
            kept = square > CUT**2 * square.amax((-2, -1), keepdim=True)
            return torch.where(kept, 1 / (gain * square.clamp_min(torch.finfo(square.dtype).tiny)), 0.0)

        return self._through(r, inverse)

    def spectrum(self, like: Tensor) -> Tensor:
        """Return the kernel's Fourier transform ``[..., H, W/2 + 1]`` on the grid of images ``like [B, C, H, W]``."""
        height, width = like.shape[-2:]
        kernel = self.kernel.to(like)
        h, w = kernel.shape[-2:]
        if like.ndim < 3 or h > height or w > width:
            raise ModelError(f"a kernel of {h} x {w} pixels is larger than images of shape {tuple(like.shape[1:])}")
        padded = nn.functional.pad(kernel, (0, width - w, 0, height - h)).roll((-(h // 2), -(w // 2)), (-2, -1))
        return torch.fft.rfft2(padded if kernel.ndim == 2 else padded[:, None])

    def _through(self, x: Tensor, filtered: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * filtered(self.spectrum(x)), s=x.shape[-2:])


class Grayscale(_Orthogonal):
    """Measure a weighted mean of the channels (colourising).

    Args:
        weights: of the channels; by default the luma of ITU-R BT.601, which picture files in grey mean.

    Raises:
        ModelError: no numbers, or images of another number of channels.
    """

    def __init__(self, weights: tuple[float, ...] = (0.299, 0.587, 0.114)) -> None:
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ModelError(f"weights are those of the channels, as (0.299, 0.587, 0.114), got {weights!r}")
        self.weights = tuple(number(weight, "a weight of a channel", ModelError) for weight in weights)
        self.gain = sum(weight**2 for weight in self.weights)
        if not self.gain > 0 or not math.isfinite(self.gain):
            raise ModelError(f"the weights of the channels are finite and not all 0, got {weights}")

    def __call__(self, x0: Tensor) -> Tensor:
        """Return the means, ``[B, 1, *D[1:]]``."""
        if x0.ndim < 3 or x0.shape[1] != len(self.weights):
            raise ModelError(f"{len(self.weights)} weights of channels do not fit images of shape {tuple(x0.shape[1:])}")
        return (x0 * self._column(x0)).sum(1, keepdim=True)

    def transpose(self, y: Tensor) -> Tensor:
        """Return the mean times each weight, ``[B, C, *D[1:]]``."""
        return y * self._column(y)

    def _column(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights).to(like).reshape(-1, *(1,) * (like.ndim - 2))


class Matrix(_Closed):
    """Measure by a matrix, of which a singular value decomposition is made once.

    Args:
        matrix: ``[m, n]``.
        shape: of an image of ``n`` elements, ``*D``; by default ``(n,)``.

    Raises:
        ModelError: no matrix of finite numbers, or a shape of another number of elements.
    """

    def __init__(self, matrix: Tensor, shape: Sequence[int] | None = None) -> None:
        known = isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.numel() and not matrix.is_complex()
        if not known or not bool(torch.isfinite(matrix).all()):
            raise ModelError(f"a matrix is a tensor [m, n] of finite real numbers, got {str(matrix)[:80]}")
        if not (shape is None or (isinstance(shape, Sequence) and all(map(is_count, shape)))):
            raise ModelError(f"shape is that of an image, as (1, 8, 8), got {shape!r}")
        self.matrix, self.shape = matrix, tuple(matrix.shape[1:]) if shape is None else tuple(shape)
        if math.prod(self.shape) != matrix.shape[1]:
            raise ModelError(f"a matrix of shape {tuple(matrix.shape)} does not fit images of shape {self.shape}")
        self.u, self.s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)

    def __call__(self, x0: Tensor) -> Tensor:
        """Return ``matrix x0``, ``[B, m]``."""
        if tuple(x0.shape[1:]) != self.shape:
            raise ModelError(f"this matrix is for images of shape {self.shape}, not {tuple(x0.shape[1:])}: say Matrix(matrix, shape=...)")
        return x0.flatten(1) @ self.matrix.to(x0).T

    def transpose(self, y: Tensor) -> Tensor:
        """Return ``matrix^T y``, ``[B, *D]``."""
        return (y @ self.matrix.to(y)).reshape(-1, *self.shape)

    def solve(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        """Solve by singular values; without noise those below a thousandth of the largest are left out."""
        u, gain = self.u.to(r), torch.as_tensor(r2).to(r).reshape(-1, 1)
        return self._within(r, gain, noise) + ((r - (r @ u) @ u.T) / noise**2 if noise > 0 else 0.0)

    def lift(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        """Return the shortest image that explains ``r``; what no image explains takes no part, however small the noise."""
        return self.transpose(self._within(r, torch.as_tensor(r2).to(r).reshape(-1, 1), noise))

    def _within(self, r: Tensor, gain: Tensor, noise: float) -> Tensor:
        """Solve for the part of ``r`` that images explain."""
        u, square = self.u.to(r), (self.s**2).to(r)
        kept = square > (0.0 if noise > 0 else CUT**2) * square.max()
        inverse = torch.where(kept, 1 / (gain * square + noise**2).clamp_min(torch.finfo(square.dtype).tiny), 0.0)
        return ((r @ u) * inverse) @ u.T


class Compose(Measurement):
    """Measure by one operator what another one has measured: ``outer(inner(x0))``, also written ``outer @ inner``."""

    def __init__(self, outer: Measurement, inner: Measurement) -> None:
        self.outer, self.inner = measurement_of(outer), measurement_of(inner)

    def __call__(self, x0: Tensor) -> Tensor:
        """Return ``outer(inner(x0))``."""
        return self.outer(self.inner(x0))

    def transpose(self, y: Tensor) -> Tensor:
        """Return the inner transpose of the outer one."""
        return self.inner.transpose(self.outer.transpose(y))

    def at(self, x0: Tensor, y: Tensor, noise: float) -> Measurement:
        """Return the composition of both near ``x0``."""
        inner = self.inner.at(x0, y, noise)
        return Compose(self.outer.at(self.inner(x0), y, noise), inner)


class Nonlinear(Measurement):
    """Measure by any function that PyTorch can differentiate, as a decoder or a camera's response.

    At each evaluation its derivative at the estimate stands for it; no gradient runs through the model.

    Args:
        function: ``[B, *D] -> [B, *Y]``.

    Raises:
        ModelError: no function, or one that does not depend on the images.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        if not callable(function):
            raise ModelError(f"a measurement is a function of images [B, *D] -> [B, *Y], got a {type(function).__name__}")
        self.function = function

    def __call__(self, x0: Tensor) -> Tensor:
        """Return ``function(x0)``."""
        return self.function(x0)

    def transpose(self, y: Tensor) -> Tensor:
        """Refuse: a function has a transpose only near an image, see `at`."""
        raise ModelError("a nonlinear measurement has a transpose only near an image: measurement.at(x0, y, noise).transpose(y)")

    def at(self, x0: Tensor, y: Tensor, noise: float) -> Measurement:
        """Return its derivative at ``x0``."""
        del y, noise
        return _Derivative(self.function, x0)


class _Derivative(Measurement):
    """The derivative of a function at images: both products by backward passes through the function alone."""

    def __init__(self, function: Callable[[Tensor], Tensor], x0: Tensor) -> None:
        with torch.enable_grad():
            self.x0 = x0.detach().clone().requires_grad_()
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
                    self.y = function(self.x0)
                self.u = torch.zeros_like(self.y, requires_grad=True)
                (self.back,) = torch.autograd.grad(self.y, self.x0, self.u, create_graph=True)  # linear in u, so its derivative is A
            except RuntimeError as error:
                raise ModelError(f"the measurement cannot be differentiated by the image: {first_line(error)}") from error
        if not self.back.requires_grad:
            raise ModelError("the measurement has slope 0 everywhere, as a rounding has, and says nothing of which way to go: smooth it")

    def __call__(self, x0: Tensor) -> Tensor:
        return torch.autograd.grad(self.back, self.u, x0, retain_graph=True)[0]

    def transpose(self, y: Tensor) -> Tensor:
        return torch.autograd.grad(self.y, self.x0, y, retain_graph=True)[0]


class Clip(Nonlinear):
    """Measure ``clip(gain x0, low, high)``: a camera that saturates.

    A saturated pixel has no slope, so nothing could move an estimate back into the range. The slope is kept where the measurement says by
    more than twice its noise that the pixel is not saturated.
    """

    def __init__(self, gain: float = 2.0, low: float = -1.0, high: float = 1.0) -> None:
        self.gain, self.low, self.high = (number(value, "a number of Clip", ModelError) for value in (gain, low, high))
        if not (self.gain != 0 and math.isfinite(self.gain) and self.low < self.high):
            raise ModelError(f"Clip wants a gain that is not 0 and low < high, got {gain}, {low}, {high}")
        super().__init__(lambda x0: (self.gain * x0).clamp(self.low, self.high))

    def at(self, x0: Tensor, y: Tensor, noise: float) -> Measurement:
        """Return the slope of each pixel."""
        value = self.gain * x0
        inside = (value > self.low) & (value < self.high)
        wrong = ((value >= self.high) & (y < self.high - 2 * noise)) | ((value <= self.low) & (y > self.low + 2 * noise))
        return Diagonal(torch.where(inside | wrong, self.gain, 0.0))


# -- operators of other libraries ---------------------------------------------------------------------------------------


class _Physics(Measurement):
    """An object with the protocol of deepinv's linear physics: ``A``, ``A_adjoint``, and if it has them ``A_dagger`` and ``prox_l2``."""

    def __init__(self, physics: Any) -> None:  # noqa: ANN401 - of another library
        self.physics = physics

    def __call__(self, x0: Tensor) -> Tensor:
        return self.physics.A(x0)

    def transpose(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)

    def lift(self, r: Tensor, r2: Tensor | float, noise: float) -> Tensor:
        value = float(torch.as_tensor(r2).flatten()[0])
        one = torch.as_tensor(r2).numel() == 1
        if noise > 0 and one and hasattr(self.physics, "prox_l2"):
            nothing = torch.zeros_like(self.transpose(r))
            return self.physics.prox_l2(nothing, r, value / noise**2) / value  # argmin g/2 |A x - r|^2 + |x|^2/2
        if noise == 0 and hasattr(self.physics, "A_dagger"):
            return self.physics.A_dagger(r) / aligned(torch.as_tensor(r2).to(r), r)
        return super().lift(r, r2, noise)


def measurement_of(thing: object) -> Measurement:
    """Return the measurement that something stands for: one of this file, an object with ``A`` and ``A_adjoint``, or a function.

    An object with the protocol of deepinv's physics is used as it is, without importing that library; one with ``A`` alone is nonlinear.

    Raises:
        ModelError: it is none of these.
    """
    if isinstance(thing, Measurement):
        return thing
    operator: Any = thing
    if callable(getattr(thing, "A", None)):
        return _Physics(thing) if callable(getattr(thing, "A_adjoint", None)) else Nonlinear(operator.A)
    if callable(thing) and not isinstance(thing, type):
        return Nonlinear(operator)
    raise ModelError(
        f"a measurement is an operator of fewstep.inverse.measurements, as Average(2), an object with A and A_adjoint, or a function of "
        f"images, not {'the class ' + thing.__name__ if isinstance(thing, type) else 'a ' + type(thing).__name__}"
    )


def checked_noise(noise: float | None, measurement: object) -> float:
    """Return the standard deviation of a measurement's noise: what was passed, or what an object of deepinv's protocol says.

    Raises:
        ModelError: none is known, or it is no finite number from 0.
    """
    if noise is None:
        noise = getattr(getattr(measurement, "noise_model", None), "sigma", None)
        if noise is None:
            raise ModelError("say how large the noise of the measurement is, as noise=0.05; 0 is none (images lie in [-1, 1])")
        noise = float(torch.as_tensor(noise).flatten()[0]) if torch.as_tensor(noise).numel() == 1 else math.nan
    value = number(noise, "the noise of a measurement", ModelError)
    if not (value >= 0 and math.isfinite(value)):
        raise ModelError(f"the noise of a measurement is a standard deviation, a finite number from 0, got {value:g}")
    return value


def checked_kernel(kernel: Tensor) -> Tensor:
    """Return a blur kernel ``[..., h, w]``.

    Raises:
        ModelError: it is no tensor of finite numbers with odd sides.
    """
    if not isinstance(kernel, Tensor) or kernel.ndim not in (2, 3) or not kernel.is_floating_point():
        raise ModelError(f"a kernel is a tensor [h, w] of floating point numbers, got {str(kernel)[:80]}")
    if not (kernel.shape[-1] % 2 and kernel.shape[-2] % 2):
        raise ModelError(f"a kernel has odd sides, so that it has a middle, got {kernel.shape[-2]} x {kernel.shape[-1]} pixels: pad it")
    if not bool(torch.isfinite(kernel).all()) or not bool(kernel.any()):
        raise ModelError("a kernel has finite numbers, not all 0")
    return kernel
