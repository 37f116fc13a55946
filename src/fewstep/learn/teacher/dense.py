r"""States of a trajectory between its stored times, without an evaluation of the network.

With ``w = alpha/sigma`` the sampling ODE says ``d(x/sigma)/dw = D``: where the denoiser answers the same, ``x/sigma`` is a line in ``w``.
So cubic interpolation in these coordinates makes an error of the order of the solver's own. Beyond the last level that is not clean
(``w`` is infinite at ``sigma = 0``), ``x/alpha`` is taken for a line in ``sigma/alpha``, which it is for a constant answer too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.schedule import NoiseSchedule
from fewstep.core.tableau import Nodes
from fewstep.runtime.errors import GridError

__all__ = ["interpolation"]

NEAREST = 4  # stored states that a state between them is made of


def interpolation(schedule: NoiseSchedule, stored: Tensor, t: Tensor) -> tuple[list[int], list[float]]:
    """Return places among the ``stored`` times, and weights of the states there, whose sum is the state at the time ``t []``.

    At a stored time it is that state itself.

    Raises:
        GridError: the time is not between the first and the last of them.
    """
    near = torch.isclose(stored, t, rtol=1e-9, atol=1e-12)
    if bool(near.any()):
        return [int(near.double().argmax())], [1.0]
    if not bool(stored[-1] < t) or not bool(t < stored[0]):
        raise GridError(f"trajectories from t = {stored[0]:g} to {stored[-1]:g} have no state at {t:g}")
    nodes, here = Nodes.at(schedule, stored), Nodes.at(schedule, t[None])
    after = int((stored > t).sum())  # the first stored time below it
    if bool(nodes.sigma[after] == 0):
        share = torch.exp(nodes.lam[after - 1] - here.lam[0])  # of sigma/alpha
        return [after - 1, after], [float(here.alpha[0] / nodes.alpha[k] * s) for k, s in ((after - 1, share), (after, 1 - share))]
    finite = int((nodes.sigma > 0).sum())
    first = max(0, min(after - NEAREST // 2, finite - NEAREST))
    places = list(range(first, min(first + NEAREST, finite)))
    w, at = torch.exp(nodes.lam[places]), torch.exp(here.lam[0])
    lagrange = [torch.stack([(at - b) / (a - b) for j, b in enumerate(w) if j != i]).prod() for i, a in enumerate(w)]
    return places, [float(weight * here.sigma[0] / nodes.sigma[place]) for weight, place in zip(lagrange, places, strict=True)]
