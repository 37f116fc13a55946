"""The forward process of a scheduler: images noised to the levels of its network's times, and the velocities to train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.core.prediction import add_noise, aligned
from fewstep.integrations.diffusers.arguments import check_states, numbers
from fewstep.integrations.diffusers.noise_levels import checked_times
from fewstep.integrations.diffusers.scheduler_files import StoredScheduler
from fewstep.models.formats.diffusers_law import NoiseLaw
from fewstep.runtime.errors import FewstepError, GridError

__all__ = ["NoisingScheduler"]


class NoisingScheduler(StoredScheduler):
    """A scheduler that noises images; `FewstepScheduler` adds the steps back.

    Attributes:
        _law: the noise law of the network.
        _held: evaluations whose level lies beyond the network's table: number, time that the network is told, ``t``.
        _begin_index: the evaluation that samples start from, or None.
        _times: the times of the evaluations, float32; empty before `set_timesteps`.
        _noised: whether an image was noised to the first of them.
    """

    _law: NoiseLaw
    _held: list[tuple[int, float, float]]
    _begin_index: int | None
    _times: list[float]
    _noised: bool

    def _scales(self, timesteps: Any, like: Tensor, noise: Tensor, name: str) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        check_states(**{name: like, "noise": noise})
        if like.shape[1:] != noise.shape[1:] or not _is_batch(len(like), len(noise)):
            raise FewstepError(f"noise has shape {tuple(noise.shape)}, but {name} has {tuple(like.shape)}")
        times = checked_times(self.config, self._law, timesteps)
        t = self._law.t_of_time(times)
        begin = [entry for entry in self._held if entry[0] == self._begin_index]
        for _, time, node in [*self._held, *begin]:
            t = torch.where(times == time, node, t)
        if not _is_batch(len(t), max(len(like), len(noise))):
            raise GridError(f"timesteps are one time, or one for each of {max(len(like), len(noise))} samples, got {len(t)}")
        return self._law.schedule.alpha(t), self._law.schedule.sigma(t)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:  # noqa: ANN401
        """Return the noised images ``alpha x0 + sigma eps [B, *D]``. Of one image, noise or time the same is taken for the others' batch.

        Args:
            original_samples: images ``x0 [B, *D]``.
            noise: standard normal ``eps [B, *D]``.
            timesteps: any times of the network, ``[]`` or ``[B]``.

        Raises:
            GridError: a time that the network does not have, or times of another number of samples.
            FewstepError: images or noise of another shape, or that are no floating point numbers.
        """
        alpha, sigma = self._scales(timesteps, original_samples, noise, "original_samples")
        alpha, sigma = (torch.ones_like(alpha), sigma / alpha) if self._law.grows else (alpha, sigma)
        self._noised |= bool(self._times) and self._times[0] in numbers(timesteps, "timesteps").float().tolist()
        return add_noise(original_samples, noise, alpha, sigma)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:  # noqa: ANN401
        """Return the noised images ``[B, *D]``: `add_noise` with the arguments of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:  # noqa: ANN401
        """Return ``v = alpha eps - sigma x0 [B, *D]``, the training target of v prediction.

        Args:
            sample: images ``x0 [B, *D]``.
            noise: standard normal ``eps [B, *D]``.
            timesteps: times of the network, ``[]`` or ``[B]``.
        """
        alpha, sigma = self._scales(timesteps, sample, noise, "sample")
        return aligned(alpha, sample) * noise - aligned(sigma, sample) * sample


def _is_batch(one: int, two: int) -> bool:
    return one == two or 1 in (one, two)
