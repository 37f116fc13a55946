r"""The temporal Fourier layer of DSNO (Zheng et al., arXiv 2211.13449): mixes the features of all time slots, pixel by pixel.

On a sequence ``h_0 .. h_{T-1}`` of channel vectors it keeps the ``K`` lowest temporal frequencies ``m`` and multiplies each by a dense
complex matrix ``R_m [C, C]`` (row vectors on the left):

    q = rfft(h),   q'_m = q_m R_m  (m < K, 0 above),   y = irfft(q'),   out = h + gate LeakyReLU(y).

Three equal ways to write ``y``:

- ``fft``: as above, the reference.
- ``real``: in the orthonormal basis ``1, cos(2 pi m k/T), sin(2 pi m k/T)``, where ``R = W + iV`` acts on the coefficients as
  ``c' = c W + s V``, ``s' = s W - c V``. No complex numbers; ``2K - 1`` coefficients instead of ``T`` slots. The default.
- ``y_k = sum_j h_j M_{(k-j) mod T}``, a circulant matrix of the matrices
  ``M_d = (W_0 + 2 sum_m [W_m cos(2 pi m d/T) - V_m sin(2 pi m d/T)]) / T`` (the Nyquist frequency counts once).
  ``one-way`` keeps of it only what a slot reads from itself and from later ones, nearer to the image: so the last slot needs no other.

The imaginary parts at frequency 0, and at the Nyquist frequency ``T/2``, have no effect on ``y``: there is no parameter for them. The
``gate``, one number per channel, starts at 0, so a new layer is exactly the identity and ``R`` may start at its natural size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.runtime.errors import ModelError, look_up

__all__ = ["FORMS", "TemporalConv"]

SLOPE = 0.01  # of the LeakyReLU


class TemporalConv(nn.Module):
    """A layer that mixes slots, ``[B, T, C, *P] -> [B, T, C, *P]``, each place ``P`` for itself.

    It may be called with fewer slots than it was made for: the last ones of a trajectory. Frequencies above theirs are left out.

    Args:
        channels: number of channels ``C``.
        slots: number of slots ``T`` that it is made for.
        modes: number of frequencies ``K``, of ``1 .. T//2 + 1``.
        form: ``real``, ``fft`` or ``one-way``.

    Raises:
        ModelError: an unknown form, or more modes than ``slots`` have.
    """

    def __init__(self, channels: int, slots: int, modes: int = 2, form: str = "real") -> None:
        super().__init__()
        if slots < 1 or not 1 <= modes <= slots // 2 + 1:
            raise ModelError(f"{slots} slots have {slots // 2 + 1} temporal frequencies: modes must lie between 1 and that, got {modes}")
        look_up(form, FORMS, "form of the temporal layer", ModelError)
        self.channels, self.slots, self.modes, self.form = channels, slots, modes, form
        turning = len(range(1, modes)) - (2 * (modes - 1) == slots)  # frequencies with a phase: neither 0 nor Nyquist
        self.real = nn.Parameter(torch.randn(modes, channels, channels) / math.sqrt(channels))
        self.imag = nn.Parameter(torch.randn(turning, channels, channels) / math.sqrt(channels)) if turning else None
        self.gate = nn.Parameter(torch.zeros(channels))

    def forward(self, h: Tensor) -> Tensor:
        y = FORMS[self.form](self, h.flatten(3) if h.ndim > 3 else h[..., None])
        y = nn.functional.leaky_relu(y, SLOPE).reshape(h.shape)
        return h + self.gate.to(h.dtype).reshape(-1, *(1,) * (h.ndim - 3)) * y

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return ``W`` and ``V``, each ``[K, C, C]``; ``V`` is 0 where a frequency has no phase."""
        imag = torch.zeros_like(self.real)
        if self.imag is not None:
            imag = torch.cat([imag[:1], self.imag, imag[1 + len(self.imag) :]])
        return self.real, imag


def _fft(layer: TemporalConv, h: Tensor) -> Tensor:
    """Return ``y`` by FFT; complex numbers are at least float32, whatever the network computes in."""
    with torch.autocast(h.device.type, enabled=False):
        wide = h.to(torch.promote_types(h.dtype, torch.float32)).contiguous()  # MKL of PyTorch 2.6 takes no expanded slots
        spectrum = torch.fft.rfft(wide, dim=1)
        kept = min(layer.modes, spectrum.shape[1])
        matrices = torch.complex(*(matrix[:kept].to(wide.dtype) for matrix in layer.matrices()))
        mixed = torch.einsum("bmcp,mcd->bmdp", spectrum[:, :kept], matrices)
        spectrum = torch.cat([mixed, torch.zeros_like(spectrum[:, kept:])], 1)
        return torch.fft.irfft(spectrum, n=h.shape[1], dim=1).to(h.dtype)


def _real(layer: TemporalConv, h: Tensor) -> Tensor:
    """Return ``y`` frequency by frequency.

    One that so few slots do not have is a wave of 0, so that its parameters get a gradient in all processes.
    """
    cos, sin = (basis.to(h) for basis in _bases(h.shape[1], layer.modes))
    y, phases = torch.zeros_like(h), 0 if layer.imag is None else len(layer.imag)
    for m, (real, imag) in enumerate(zip(*layer.matrices(), strict=True)):
        turning = 1 <= m <= phases
        waves = torch.stack([cos[m], sin[m]]) if turning else cos[m : m + 1]
        matrix = torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)]) if turning else real
        mixed = _right(torch.einsum("wt,btcp->bwcp", waves, h).flatten(1, 2), matrix)
        y = y + torch.einsum("wt,bwcp->btcp", waves, mixed.unflatten(1, (len(waves), -1)))
    return y


def _one_way(layer: TemporalConv, h: Tensor) -> Tensor:
    """Return ``y`` by the circulant form without everything that comes from an earlier slot.

    Distances ``d`` count in the slots that the layer is made for.
    """
    count, total = h.shape[1], layer.slots
    real, imag = layer.matrices()
    cos, sin = (basis.to(real) for basis in _bases(total, layer.modes))
    kernel = torch.einsum("m,mt,mcd->tcd", cos[:, 0], cos, real) - torch.einsum("m,mt,mcd->tcd", cos[:, 0], sin, imag)
    k = torch.arange(count)
    blocks = kernel[(k[None, :] - k[:, None]) % total]  # [j, k, C, C], from slot j to slot k
    blocks = blocks * (k[:, None] >= k[None, :]).to(blocks)[..., None, None]
    return _right(h.flatten(1, 2), blocks.transpose(1, 2).flatten(2).flatten(0, 1)).reshape(h.shape)


FORMS = {"real": _real, "fft": _fft, "one-way": _one_way}


def _right(h: Tensor, matrix: Tensor) -> Tensor:
    """Return channel (row) vectors ``[B, C, P]`` times a matrix ``[C, D]``."""
    return nn.functional.conv1d(h, matrix.mT[..., None].to(h.dtype))


def _bases(slots: int, modes: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal ``cos`` and ``sin`` rows ``[K, T]``, float64; rows of 0 for frequencies that the slots do not have."""
    m, k = torch.arange(modes, dtype=torch.float64)[:, None], torch.arange(slots, dtype=torch.float64)
    angle = 2 * math.pi * m * k / slots
    single = (m == 0) | (2 * m == slots)
    norm = (2 - single.double()) / slots * (2 * m <= slots)
    return norm.sqrt() * torch.cos(angle), norm.sqrt() * torch.sin(angle) * ~single
