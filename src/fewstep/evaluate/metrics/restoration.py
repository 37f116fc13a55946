"""Measure restorations of pictures against their truth: errors, sharpness, how well they fit what was measured, and what they know of it.

Pictures lie in [-1, 1].
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fewstep.evaluate.metrics.distances import features_of
from fewstep.inverse.measurements import Measurement
from fewstep.inverse.restore import sample_interval
from fewstep.runtime.errors import FewstepError

__all__ = ["check_ssim", "coverage", "feature_distance", "mean_and_error", "misfit", "psnr", "ssim"]

LEAST = 1e-10  # a mean square below which a picture is its truth: 106 dB
KNOWN = 0.02  # the width of an interval below which there is nothing to be uncertain of: many samplers leave noise of 0.002
REACH = 5  # pixels of the window of `ssim` on each side


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture in decibels, ``[B, C, H, W] -> [B]`` float64, at most 106.

    Pictures are clamped to [-1, 1], so the peak is 2.
    """
    square = (images.double().clamp(-1, 1) - truth.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / square.clamp_min(LEAST))


def check_ssim() -> None:
    """Check that `ssim` can be computed, before long work.

    Raises:
        FewstepError: torchmetrics is missing.
    """
    if find_spec("torchmetrics") is None:
        raise FewstepError("the structural similarity of pictures needs torchmetrics: pip install 'fewstep[report]'")


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each picture (Wang et al., IEEE TIP 13, 2004), ``[B, C, H, W] -> [B]`` float64; 1 is the truth.

    The window is the paper's Gaussian of 11 pixels. Borders are repeated outwards, so that small pictures count as a whole.

    Raises:
        FewstepError: torchmetrics is missing.
    """
    check_ssim()
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (nn.functional.pad(x.double(), (REACH,) * 4, mode="replicate") for x in (images.clamp(-1, 1), truth))
    found = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    assert isinstance(found, Tensor)  # not with the contrast beside it
    return found.reshape(len(images))


def misfit(images: Tensor, measurement: Measurement, y: Tensor, noise: float) -> Tensor:
    """Return the root mean square of ``y - A x`` of each picture, ``[B]``, in units of the noise, or as it is where there is none.

    Args:
        images: ``[B, C, H, W]``.
        measurement: the operator.
        y: what was measured, ``[B, *Y]``.
        noise: its standard deviation.
    """
    rms = (y - measurement(images)).flatten(1).square().mean(1).sqrt()
    return rms / noise if noise else rms


def feature_distance(images: Tensor, truth: Tensor, network: nn.Module, device: torch.device | None = None) -> float:
    """Return the mean distance to the truth in a network's features, relative to that of the truth to another picture, the next one.

    Pictures that look right in detail are near; a blurred one is not, however small its error. 0 is the truth, and 1 no nearer than
    chance.

    Args:
        images: ``[B, C, H, W]``, two or more, in [-1, 1].
        truth: of each.
        network: that makes features ``[B, F]``.
        device: of the network.

    Raises:
        FewstepError: as `features_of`; or fewer than two pictures, or all alike.
    """
    found, true = (features_of(x.clamp(-1, 1), network, device) for x in (images, truth))
    apart = float((true - true.roll(-1, 0)).norm(dim=1).mean())
    if not apart > 0:
        raise FewstepError("a distance in features is relative to that of two pictures, and these are all alike: take more of them")
    return float((found - true).norm(dim=1).mean()) / apart


def coverage(samples: Tensor, truth: Tensor) -> float | None:
    """Return the share of the truth's elements in the 90 % interval of its samples, see `sample_interval`; 0.9 of an honest posterior.

    Elements that the samples agree on to a hundredth of the range do not count: there the measurement says all, as beside a hole. None
    where these are all.

    Args:
        samples: ``[S, B, *D]``, 19 of each picture or more.
        truth: ``[B, *D]``.

    Raises:
        ModelError: too few samples.
    """
    low, high = sample_interval(samples)
    open_ = high - low > KNOWN
    return float(((truth >= low) & (truth <= high))[open_].double().mean()) if bool(open_.any()) else None


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of values of pictures, ``[B]``, and its standard error; 0 of a single one."""
    error = float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return float(values.double().mean()), error
