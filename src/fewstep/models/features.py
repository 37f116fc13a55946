"""The digits feature network that ships with the package: for Frechet distances and label checks on 8x8 digits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.models.data import DIGIT_LEVELS

__all__ = ["DigitsFeatures", "load_digits_features"]

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
        """Features ``[B, 32]`` of images ``[B, 1, 8, 8]`` in [-1, 1]."""
        grey = ((images + 1) * (DIGIT_LEVELS / 2) - 0.5).round().clamp(0, DIGIT_LEVELS - 1)
        return self.body(grey / 8 - 1)

    def smooth(self, images: Tensor) -> Tensor:
        """What a loss can compare, ``[B, F]``: activations of both convolutional stages, each place's channels scaled to length 1 (LPIPS,
        Zhang et al., arXiv 1801.03924, without its weights), from images that are not rounded.
        """
        h, stages = ((images + 1) * (DIGIT_LEVELS / 2) - 0.5) / 8 - 1, []
        for layer in self.body:
            if isinstance(layer, nn.MaxPool2d | nn.Flatten):  # the end of a stage
                stages.append(nn.functional.normalize(h, dim=1).flatten(1) / h[0, 0].numel() ** 0.5)
            h = layer(h)
        return torch.cat(stages, 1)

    def labels(self, images: Tensor) -> Tensor:
        """The digit it sees in each image, ``[B]``."""
        return self.head(self(images)).argmax(1)


def load_digits_features() -> DigitsFeatures:
    """The trained network, ready for inference."""
    network = DigitsFeatures()
    network.load_state_dict(load_file(WEIGHTS / "features.safetensors"))
    return network.eval().requires_grad_(False)
