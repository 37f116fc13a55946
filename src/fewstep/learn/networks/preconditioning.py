r"""The preconditioning of a reflected model, measured on its data.

EDM's coefficients (arXiv 2206.00364, section 5) make a network's inputs and targets of unit variance where noise is added to data without
bounds. In a cube their formulas do not hold: at large noise levels the target is the state itself. The principle holds with the moments as
they are, from draws of the data at each level.
"""

from __future__ import annotations

import math

import torch

from fewstep.core.domain import Cube, mirror_mean
from fewstep.core.prediction import Measured
from fewstep.core.schedule import VarianceExploding
from fewstep.data.images import Images
from fewstep.runtime.errors import FewstepError

__all__ = ["measure_preconditioning"]

LEVELS, PAIRS = 64, 512  # noise levels, and images drawn at each
NUMBERS = 1 << 18  # of the images at a level, at most: moments of pixels need no more, and large images need less memory
SEED = 2304_04740
DIGITS = 8  # that are kept, so that the order of a sum changes nothing


def measure_preconditioning(images: Images, cube: Cube, schedule: VarianceExploding) -> Measured:
    """Measure the coefficients of ``D = c_skip x + c_out F(c_in x)`` on images.

    With ``D`` the target of a pair, at each level ``c_skip = cov(D, x)/var(x)``, which leaves the network least to say,
    ``c_out = std(D - c_skip x)`` and ``c_in = 1/rms(x)``. The draws are seeded: the same images give the same coefficients.

    Args:
        images: the data, in the cube.
        cube: the walls.
        schedule: the noise law, whose ends are the first and the last level.

    Returns:
        The coefficients at 64 levels, uniform in ``log sigma``.

    Raises:
        FewstepError: images beyond the cube, or whose targets are the states already, so that there is nothing to learn.
    """
    cube.check(images.x, f"the images of {images.name}")
    generator, rows = torch.Generator().manual_seed(SEED), list[list[float]]()
    count = max(1, min(PAIRS, NUMBERS // math.prod(images.x.shape[1:])))
    for log_level in torch.linspace(math.log(schedule.t_min), math.log(schedule.t_max), LEVELS, dtype=torch.float64):
        sigma, index = torch.exp(log_level), torch.randint(len(images.x), (count,), generator=generator)
        x0 = images.dequantised(index, generator).double()
        x = cube.fold(x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64))[0]
        target = mirror_mean(x, x0, sigma, cube)
        deviation = x - x.mean()
        skip = (target * deviation).mean() / deviation.square().mean()
        out, scale = (target - skip * x).std(correction=0), x.square().mean().rsqrt()
        rows.append([float(f"{float(value):.{DIGITS}g}") for value in (log_level, skip, out, scale)])
    if not all(row[2] > 0 and math.isfinite(row[3]) for row in rows):
        raise FewstepError(f"the images of {images.name} leave a reflected model nothing to learn: their pixels are all but constant")
    return Measured(rows)
