"""Load the networks in whose features sets of images are compared: that of the digits, which ships with the package, pixels, Inception."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.data.images import DIGIT_LEVELS
from fewstep.evaluate.metrics.inception import load_inception
from fewstep.runtime.errors import FewstepError, look_up

__all__ = ["FEATURES", "DigitsFeatures", "load_digits_features", "load_features"]

WEIGHTS = Path(__file__).parent / "weights" / "digits-features"


class DigitsFeatures(nn.Module):
    """A small convolutional classifier; called, it gives the 32 numbers before its last layer.

    Images are first rounded to the 17 grey values of the scans, as Frechet distances of photographs are taken on 8-bit
    images, so it does not see noise below half a grey value.
    """

    num_features = 32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 64, 3, padding=1), nn.GELU(), nn.Flatten()),
            *(nn.Dropout(0.3), nn.Linear(64 * 16, self.num_features), nn.GELU()),
        )
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``[B, 32]`` of images ``[B, 1, 8, 8]`` in [-1, 1]."""
        grey = ((images + 1) * (DIGIT_LEVELS / 2) - 0.5).round().clamp(0, DIGIT_LEVELS - 1)
        return self.body(grey / 8 - 1)

    def smooth(self, images: Tensor) -> Tensor:
        """Return features for a loss, ``[B, F]``: activations of both convolutional stages, each place's channels scaled to length 1
        (LPIPS, Zhang et al., arXiv 1801.03924, without its weights), from images that are not rounded.
        """
        h, stages = ((images + 1) * (DIGIT_LEVELS / 2) - 0.5) / 8 - 1, []
        for layer in self.body:
            if isinstance(layer, nn.MaxPool2d | nn.Flatten):  # the end of a stage
                stages.append(nn.functional.normalize(h, dim=1).flatten(1) / h[0, 0].numel() ** 0.5)
            h = layer(h)
        return torch.cat(stages, 1)

    def labels(self, images: Tensor) -> Tensor:
        """Classify the digit in each image, ``[B]``."""
        return self.head(self(images)).argmax(1)


def load_digits_features() -> DigitsFeatures:
    """Load the trained network, ready for inference."""
    network = DigitsFeatures()
    network.load_state_dict(load_file(WEIGHTS / "features.safetensors"))
    return network.eval().requires_grad_(False)


class _Pixels(nn.Module):
    """The image itself as its features, ``[B, C*H*W]``."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = int(torch.Size(shape).numel())

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).clamp(-1, 1)


FEATURES: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {"digits": lambda shape: load_digits_features(), "pixels": _Pixels}


def load_features(name: str, shape: tuple[int, ...]) -> nn.Module:
    """Load a feature network by name, ``digits``, ``pixels`` or ``inception:PATH``, for samples of one shape.

    Raises:
        FewstepError: an unknown name, digits features for images that are not 8x8 grey, Inception for something that is no picture, or
            a weights file that cannot be used.
    """
    if name == "digits" and tuple(shape) != (1, 8, 8):
        raise FewstepError(f"the digits features are for shape (1, 8, 8), these samples have {tuple(shape)}; use pixels")
    kind, _, path = name.partition(":")
    if kind == "inception":
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise FewstepError(
                f"Inception features are for pictures of 1 or 3 channels, these samples have shape {tuple(shape)}; use pixels"
            )
        if not path:
            raise FewstepError("say where the weights are: inception:PATH, a file in the format of pt_inception-2015-12-05-6726825d.pth")
        return load_inception(Path(path))
    return look_up(name, FEATURES, "features", FewstepError)(shape)
