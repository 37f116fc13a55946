r"""Reflected models: denoisers on a cube, whose samples stay inside because their states are mirrored at its walls.

The state is free, and the network is mirrored: a state beyond a wall is folded into the cube for the network, and the answer is mirrored
back. A trajectory that passes a wall then is the mirror image of one that was reflected there, the history of a multistep solver stays
right, and one fold at the end gives the sample. To fold the state after each step instead would break that history.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser, check_denoiser
from fewstep.core.domain import Cube, domain_of
from fewstep.core.schedule import NoiseSchedule, VarianceExploding
from fewstep.runtime.errors import ModelError

__all__ = ["Reflected", "check_levels", "check_reflected_law", "mirrored"]

BEYOND = 1.1  # times the range of levels that a network may be asked at, for derivatives at its ends


def mirrored(answer: Callable[[Tensor], Tensor], x: Tensor, cube: Cube) -> Tensor:
    """Return a denoiser's answer on the whole line, ``x + m (D(fold x) - fold x)`` with ``m`` the derivative of the fold, ``[B, *D]``.

    Inside the cube it is ``D(x)`` to the bit. It is smooth across the walls where ``D`` is tangential there, as the exact one is.

    Args:
        answer: the denoiser in the cube, ``[B, *D] -> [B, *D]``.
        x: states, ``[B, *D]``.
        cube: the walls.
    """
    folded, m = cube.fold(x)
    return (x - m * folded) + m * answer(folded)


def check_reflected_law(schedule: NoiseSchedule, name: str, cube: Cube) -> None:
    """Refuse a noise law that is not the one of reflected models, where noise is added to the image until none of it is left.

    Folded noise of ``t_max`` is uniform in a cube of edge ``L`` but for a share ``exp(-(pi t_max / L)^2 / 2)``, below 1 % from one edge on.
    Sampling starts from it, so with less noise it would start elsewhere than the images end.

    Raises:
        ModelError: it is another, or ends within the cube.
    """
    if not isinstance(schedule, VarianceExploding):
        raise ModelError(
            f"{name} has a domain, whose walls stand still only where noise is added to images as they are: use "
            f"fewstep.VarianceExploding(t_min=0.01, t_max=3.0), not {type(schedule).__name__}, or leave domain out"
        )
    if schedule.t_max < cube.edge:
        raise ModelError(
            f"{name} has noise up to t_max={schedule.t_max:g}, too little to leave nothing of an image in a cube of edge {cube.edge:g}: "
            f"scale t_max with the edge, as t_max={1.5 * cube.edge:g}, and train the network so"
        )


def check_levels(schedule: NoiseSchedule, t: Tensor, name: str) -> None:
    """Refuse times ``t`` (``[]`` or ``[B]``) at which a reflected network has no answer: those beyond the levels of its training.

    Raises:
        ModelError: there is one (which, and what there is).
    """
    least, most = (float(end) for end in t.detach().aminmax())
    if least < schedule.t_min / BEYOND or most > schedule.t_max * BEYOND:
        raise ModelError(
            f"{name} is a reflected model of noise levels {schedule.t_min:g} to {schedule.t_max:g}, and is asked at "
            f"{most if most > schedule.t_max else least:g}: use a grid of its own, as grid='karras', not one of another model"
        )


@dataclass(frozen=True, eq=False)
class Reflected:
    """A denoiser on a cube, extended to all states by mirror images: samples of it are folded into the cube (arXiv 2304.04740).

    A `Model` with ``domain`` is one by itself; this is for exact denoisers and others of one's own. `sample` folds its start and its end.

    Attributes:
        inner: the denoiser in the cube, of a `VarianceExploding` law; guidance goes inside.
        cube: the walls.

    Raises:
        ModelError: something that is no denoiser, is reflected already, or has another noise law.
    """

    inner: Denoiser
    cube: Cube = field(default_factory=Cube)

    def __post_init__(self) -> None:
        check_denoiser(self.inner, "Reflected")
        if not isinstance(self.cube, Cube):
            raise ModelError(f"the cube of a reflected model is a fewstep.Cube, as fewstep.Cube(-1, 1), got {self.cube!r}")
        if domain_of(self.inner) is not None:
            raise ModelError("this model is reflected already: pass it as it is")
        check_reflected_law(self.inner.schedule, type(self.inner).__name__, self.cube)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise law."""
        return self.inner.schedule

    @property
    def domain(self) -> Cube:
        """The cube that its samples are folded into."""
        return self.cube

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the mean mirror image ``[B, *D]`` at states ``x [B, *D]`` anywhere, at time ``t`` (``[]`` or ``[B]``)."""
        return mirrored(lambda inside: self.inner(inside, t, cond), x, self.cube)
