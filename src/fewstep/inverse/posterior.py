"""Posterior samples of a measurement: the denoiser `measured`, and `sample_posterior` by any method."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, FlowMap, check_denoiser
from fewstep.core.domain import check_unbounded
from fewstep.core.tableau import Tableau
from fewstep.inverse.corrections import Correction, Measured, Moments, PiGDM, Projection, Proximal
from fewstep.inverse.jacobian import ROUGH
from fewstep.inverse.measurements import checked_noise, measurement_of
from fewstep.inverse.method import UNBOUNDED, Asked, Data, Method
from fewstep.inverse.moves import DPS, Constrained
from fewstep.inverse.spectral import Spectral
from fewstep.models.model import Model
from fewstep.models.networks.calls import network_dtype
from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.front_door import checked
from fewstep.runtime.spec import check_options, parse_spec
from fewstep.sampling.loop import Step, check_start
from fewstep.sampling.noise import seed_list
from fewstep.sampling.sampler import Sampler, tableau_of

__all__ = ["METHODS", "checked_data", "checked_prior", "make_method", "measured", "sample_posterior"]

METHODS: dict[str, type[Method]] = {
    "moments": Moments,
    "spectral": Spectral,
    "projection": Projection,
    "proximal": Proximal,
    "pigdm": PiGDM,
    "dps": DPS,
    "constrained": Constrained,
}


@checked
def make_method(spec: str | Method) -> Method:
    """Make a method by its name with options, as ``moments:steps=2``; a `Method` is returned as it is.

    Raises:
        ModelError: an unknown name or option, or a value that it cannot have.
    """
    if isinstance(spec, Method):
        return spec
    if not isinstance(spec, str):
        raise ModelError(f"a method is a name, as 'moments', or a Method, got {spec!r}")
    name, options = parse_spec(spec, ModelError)
    kind = look_up(name, METHODS, "method", ModelError)
    check_options(options, kind, f"method {name!r}", ModelError)
    return kind(**options)


@checked
def measured(
    denoiser: Denoiser, measurement: object, y: Tensor, noise: float | None = None, *, method: str | Correction = "moments"
) -> Denoiser:
    """Return the denoiser of the posterior: its answer is the mean of the clean image given the state and a measurement.

    Any sampler runs it, best ``ddim`` of few steps: what other solvers expect of a trajectory, the corrections break.

    Args:
        denoiser: the prior. Guidance goes below: ``measured(classifier_free(...), ...)``.
        measurement: the operator: one of `fewstep.inverse.measurements`, an object with ``A`` and ``A_adjoint``, or a function.
        y: what was measured, ``[B, *Y]``, or ``[*Y]`` for all samples.
        noise: the standard deviation of its noise; by default what the operator's ``noise_model`` says.
        method: how, see `METHODS`: ``moments``, ``projection``, ``proximal`` or ``pigdm`` with options, as ``moments:steps=2``; or
            ``Spectral(error_spectra(denoiser, shape))``.

    Raises:
        ModelError: something that is no denoiser, operator, measurement, noise or method; a method that moves the state, which
            `sample_posterior` runs; a step too small for a network of 16 bits. Later, a measurement of another shape than the operator
            answers, or a correction that is not finite.

    Examples:
        >>> import torch, fewstep
        >>> from fewstep.inverse.measurements import Average
        >>> model = fewstep.load_model("digits-edm")
        >>> y = torch.zeros(1, 4, 4)
        >>> posterior = fewstep.measured(model, Average(2), y, 0.05)
        >>> fewstep.sample(posterior, "ddim", torch.randn(2, 1, 8, 8) * 80, torch.tensor([3, 3]), nfe=5).shape
        torch.Size([2, 1, 8, 8])
    """
    correction = make_method(method)
    if not isinstance(correction, Correction):
        raise ModelError(f"{type(correction).__name__} moves the state: run it by fewstep.inverse.posterior.sample_posterior")
    if isinstance(correction, Spectral) and correction.spectra is None:
        raise ModelError("spectral needs the error spectra of its model: pass method=Spectral(error_spectra(denoiser, shape))")
    return Measured(checked_prior(denoiser, correction), checked_data(measurement, y, noise), correction)


@checked
@torch.no_grad()
def sample_posterior(
    denoiser: Denoiser,
    sampler: Sampler | Tableau,
    x: Tensor,
    measurement: object,
    y: Tensor,
    noise: float | None = None,
    cond: Cond = None,
    *,
    method: str | Method = "moments",
    seeds: Iterable[int] | Tensor | None = None,
    observe: Callable[[Step], None] | None = None,
) -> Tensor:
    """Sample the posterior of a measurement from ``x [B, *D]`` by any method; return the samples ``[B, *D]``.

    Args:
        denoiser: the prior.
        sampler: a sampler or tableau; ``dps`` and ``constrained`` need one without a memory, as ``ddim``.
        x: the start, noise of the sampler's first level.
        measurement, y, noise: as for `measured`.
        cond: handed to the denoiser.
        method: one of `METHODS` with options, or a `Method`.
        seeds: one per sample, for samplers that add noise.
        observe: called with each `Step`.

    Raises:
        ModelError, SolverError: as `measured` and `steps`.
    """
    chosen, data = make_method(method), checked_data(measurement, y, noise)
    if observe is not None and not callable(observe):
        raise ModelError(f"observe is a function that is called with each Step, got {observe!r}")
    check_start(x)
    prior, tableau = checked_prior(denoiser, chosen), tableau_of(sampler)
    tableau.check_asks("a restoration guides that one too")
    chosen.check(tableau)
    seeds = None if seeds is None else seed_list(seeds)
    if seeds is not None and len(seeds) != len(x):
        raise ModelError(f"{len(seeds)} seeds for {len(x)} starts: pass one for each")
    asked = Asked(tableau, x, data, cond, seeds, observe)
    return chosen.prepared(prior, x.shape[1:], cond).sample(prior, asked)


def checked_data(measurement: object, y: object, noise: float | None) -> Data:
    """Return what was measured, by an operator with a noise.

    Raises:
        ModelError: no operator, tensor of finite numbers, or noise.
    """
    level, operator = checked_noise(noise, measurement), measurement_of(measurement)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise ModelError(f"y is what was measured, a tensor of floating point numbers, got {str(y)[:80]}")
    if not bool(torch.isfinite(y).all()):
        raise ModelError("y has entries that are not finite: leave them out by a Mask, and set them to 0")
    return Data(operator, y, level)


def checked_prior(denoiser: Denoiser, method: Method, taker: str = "a restoration") -> Denoiser:
    """Return a denoiser that a method can work with.

    Raises:
        ModelError: it is none, a student, made for few steps, or reflected; or it computes in 16 bits where a difference of answers is
            taken at a small distance.
    """
    check_denoiser(denoiser, taker)
    if isinstance(denoiser, FlowMap) or (isinstance(denoiser, Model) and denoiser.flow_map is not None):
        raise ModelError("a student jumps to the image and has no answers on the way to correct: take its teacher as the prior")
    if isinstance(denoiser, Model):
        denoiser.need_trajectories()
    check_unbounded(denoiser, taker, UNBOUNDED)
    size = getattr(method, "size", None)
    if isinstance(denoiser, Model) and size is not None and not getattr(method, "backward", False) and size < ROUGH:
        dtype = denoiser.dtype or network_dtype(denoiser.network, torch.float32)
        if dtype.itemsize < 4:
            name = next(name for name, kind in METHODS.items() if isinstance(method, kind))
            raise ModelError(
                f"{denoiser.name} computes in {str(dtype).removeprefix('torch.')}, where a difference of answers drowns at {size:g} sigma: "
                f"say {name}:size={ROUGH:g}, or load it in float32"
            )
    return denoiser
