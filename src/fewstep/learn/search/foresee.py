r"""Learn to foresee a denoiser's first answer from some of them: the mean of each label, and what is linear in the noise.

The noise is white, so least squares needs no inverse to speak of; but a matrix that was fitted to few noises is mostly their chance. Each
frequency's is shrunk to 0 by the part of its size that chance explains (James and Stein, 1961).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fewstep.core.denoiser import Cond, Denoiser
from fewstep.core.first_answer import FirstAnswer, from_waves, waves
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import sum_over_processes

__all__ = ["Foreseeing", "learn_first_answer"]

LEAST = 8  # answers for each label, on average, below which their means say little


def learn_first_answer(noise: Sequence[Tensor], answers: Sequence[Tensor], labels: Sequence[Cond], classes: int | None) -> FirstAnswer:
    """Learn a first answer from batches of noises ``x_T / sigma [B, *D]`` with what the network said, ``[B, *D]``.

    With several processes each has batches of its own, and all get the same.

    Args:
        noise: by batch.
        answers: likewise.
        labels: likewise, ``[B]``; None where there are no classes.
        classes: their number; None for one mean of all.

    Raises:
        FewstepError: there are fewer than `LEAST` answers for each class, or one has none.
    """
    rows = [
        torch.zeros(len(x), dtype=torch.int64) if classes is None else torch.as_tensor(y).cpu() for x, y in zip(noise, labels, strict=True)
    ]
    z, d = [x.double().cpu() for x in noise], [x.double().cpu() for x in answers]
    shape, groups = tuple(z[0].shape[1:]), classes or 1
    counts = _total(torch.bincount(y, minlength=groups).double() for y in rows)
    if not bool((counts > 0).all()) or float(counts.sum()) < LEAST * groups:
        raise FewstepError(
            f"a first answer is learned from {LEAST} noises or more for each of {groups} classes, got {int(counts.sum())} in all, and "
            f"{int(counts.min())} of one: raise num"
        )

    def means(values: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(groups, *shape, dtype=torch.float64)
        for y, value in zip(rows, values, strict=True):
            total.index_add_(0, y, value)
        return sum_over_processes(total) / counts.reshape(-1, *(1,) * len(shape))

    of_noise, of_answers = means(z), means(d)  # least squares for means and matrix together is that of what deviates from them
    seen, left = ([waves(x - mean[y]) for x, y in zip(values, rows, strict=True)] for values, mean in ((z, of_noise), (d, of_answers)))
    gram = _total(torch.einsum("bcf,bdf->fcd", a, a) for a in seen)
    cross = _total(torch.einsum("bcf,bdf->fcd", a, b) for a, b in zip(left, seen, strict=True))
    size = _total(a.square().sum((0, 1)) for a in left)  # [F]
    channels, ridge = gram.shape[1], 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1)
    response = torch.linalg.solve(gram + ridge[:, None, None] * torch.eye(channels, dtype=torch.float64), cross.mT).mT
    chance = (size - (response * cross).sum((1, 2))).clamp_min(0) / (channels * counts.sum())  # variance of what is left, [F]
    by_chance = channels**2 * chance / counts.sum()  # what the size of a matrix of zeros would be
    response = response * (1 - by_chance / response.square().sum((1, 2)).clamp_min(1e-300)).clamp_min(0)[:, None, None]
    linear = from_waves(torch.einsum("fcd,bdf->bcf", response, waves(of_noise)), shape)
    return FirstAnswer((of_answers - linear).float(), response.float(), classes is not None)


def _total(values: Iterable[Tensor]) -> Tensor:
    """Return the sum over the batches of all processes."""
    return sum_over_processes(torch.stack(list(values)).sum(0))


class Foreseeing:
    """A denoiser whose answer at one time is foreseen, and not asked of the network.

    Attributes:
        answered: samples whose answer was foreseen, which whoever counts calls of a denoiser has counted.
    """

    def __init__(self, denoiser: Denoiser, first: FirstAnswer, t: float, sigma: float) -> None:
        self.denoiser, self.first, self.t, self.sigma = denoiser, first, t, sigma
        self.answered = 0

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise law."""
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return ``x0 [B, *D]`` of the states ``x [B, *D]``."""
        if float(t) != self.t:
            return self.denoiser(x, t, cond)
        self.answered += len(x)
        return self.first(x / self.sigma, cond)
