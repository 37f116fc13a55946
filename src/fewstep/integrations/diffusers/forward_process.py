"""The forward process of a scheduler: images noised to the levels of its network's times, and the velocities to train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.core.prediction import aligned
from fewstep.integrations.diffusers.noise_levels import checked_times
from fewstep.integrations.diffusers.scheduler_files import StoredScheduler
from fewstep.models.formats.diffusers_law import NoiseLaw

__all__ = ["NoisingScheduler"]


class NoisingScheduler(StoredScheduler):
    """A scheduler that noises images; `FewstepScheduler` adds the steps back.

    Attributes:
        _law: the noise law of the network.
        _held: evaluations whose level lies beyond the network's table: number, time that the network is told, ``t``.
        _begin_index: the evaluation that samples start from, or None.
    """

    _law: NoiseLaw
    _held: list[tuple[int, float, float]]
    _begin_index: int | None

    def _scales(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        times = checked_times(self.config, self._law, timesteps)
        t = self._law.t_of_time(times)
        begin = [entry for entry in self._held if entry[0] == self._begin_index]
        for _, time, node in [*self._held, *begin]:
            t = torch.where(times == time, node, t)
        t = t.reshape(torch.as_tensor(timesteps).shape)
        alpha, sigma = self._law.schedule.alpha(t), self._law.schedule.sigma(t)
        return aligned(alpha, like), aligned(sigma, like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:  # noqa: ANN401
        """Return the noised images ``alpha x0 + sigma eps [B, *D]``.

        Args:
            original_samples: images ``x0 [B, *D]``.
            noise: standard normal ``eps [B, *D]``.
            timesteps: any times of the network, ``[]`` or ``[B]``.

        Raises:
            GridError: a time that the network does not have.
        """
        alpha, sigma = self._scales(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

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
        alpha, sigma = self._scales(timesteps, sample)
        return alpha * noise - sigma * sample
