"""Denoising score matching on images: the loss that diffusion models are trained with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.core.domain import mirror_mean
from fewstep.core.prediction import add_noise, aligned, from_x0, prediction
from fewstep.data.images import Images
from fewstep.learn.teacher.batches import Batch
from fewstep.models.model import Model
from fewstep.models.networks.calls import answer_of, network_device, plain_call
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.process import share

__all__ = ["check_images", "check_log_levels", "draw_images", "score_matching"]

LARGEST_LOG = 10.0  # of noise levels in training; beyond e^10 and e^-10 a picture, or the noise, is all there is
WIDEST = 5.0  # the deviation of their logarithm


def score_matching(
    model: Model,
    images: Images,
    levels: Callable[[int, torch.Generator], Tensor],
    *,
    conditional: bool,
    null: int | None = None,
    dropout: float = 0.1,
    flip: bool = False,
) -> Callable[[nn.Module, int, torch.Generator], Tensor]:
    """Return the loss of denoising score matching in the network's own output: for EDM its loss weighting, for epsilon the simple loss.

    Every process draws the whole batch, and computes the loss of its `share`. Of a reflected model the noised images are folded into its
    cube, and the target is `mirror_mean` instead of the image (arXiv 2304.04740).

    Args:
        model: what the network predicts, its noise law, and its cube if it is reflected.
        images: the data.
        levels: ``(b, generator)`` -> the times ``[b]`` of a batch.
        conditional: whether the network is conditioned on the labels.
        null: the label that stands for no condition, which replaces some of the labels; None for none.
        dropout: share of the labels that are replaced.
        flip: mirror half of the images, left to right.
    """
    kind = prediction(model.prediction)

    def loss(network: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
        device = network_device(network)
        index = torch.randint(len(images.x), (batch,), generator=generator)
        x0 = images.dequantised(index, generator)
        if flip:
            x0 = torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.5, x0.flip(-1), x0)
        t, noise, cond = levels(batch, generator), torch.randn(x0.shape, generator=generator), None
        rows = share(range(batch))
        mine = slice(rows.start, None, rows.step)
        if conditional and images.labels is not None:
            drop = torch.rand(batch, generator=generator) < (dropout if null is not None else 0.0)
            cond = _moved(torch.where(drop, torch.tensor(null or 0), images.labels[index])[mine], device)
        x0, t, noise = (_moved(of[mine], device) for of in (x0, t, noise))
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        x, target = add_noise(x0, noise, alpha, sigma), x0
        if model.domain is not None:
            x = model.domain.fold(x)[0]
            target = mirror_mean(x, x0, sigma, model.domain)
        scale = 1.0 if kind.input_scale is None else aligned(kind.input_scale(alpha, sigma), x0)
        output = answer_of((model.call or plain_call)(network, x * scale, model.network_time(t, x, x.dtype), cond), x)
        return (output.float() - from_x0(kind, target, x, alpha, sigma)).square().mean()

    return loss


def check_log_levels(mean: float, deviation: float) -> None:
    """Refuse a normal law of the logarithm of noise levels whose levels no network can be trained at.

    Raises:
        FewstepError: a mean beyond 10 either way, or a deviation that is not positive or is above 5.
    """
    if not (abs(mean) <= LARGEST_LOG and 0 < deviation <= WIDEST):
        raise FewstepError(
            f"log noise levels have a mean (p_mean) between -{LARGEST_LOG:g} and {LARGEST_LOG:g} and a positive deviation (p_std) up to "
            f"{WIDEST:g}, got {mean:g} and {deviation:g}"
        )


def draw_images(images: Images, size: int, generator: torch.Generator) -> Batch:
    """Draw dequantised pictures ``[b, C, H, W]`` with their labels, and return this process's share of ``size`` of them."""
    rows, index = torch.tensor(share(range(size))), torch.randint(len(images.x), (size,), generator=generator)
    return Batch(images.dequantised(index, generator)[rows], None if images.labels is None else images.labels[index][rows])


def check_images(images: Images, model: Model) -> None:
    """Refuse pictures that are none of a model's.

    Raises:
        FewstepError: they have another shape, or the model has labels that they lack.
    """
    if tuple(images.x.shape[1:]) != model.need_shape():
        raise FewstepError(
            f"the images of {images.name} have shape {tuple(images.x.shape[1:])}, those of {model.name} {model.need_shape()}"
        )
    if model.classes is not None and (images.labels is None or int(images.labels.max()) >= model.classes):
        raise FewstepError(
            f"{model.name} has labels 0 to {model.classes - 1}, and {images.name} has none or others: pass images with these"
        )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Move a tensor without waiting for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
