"""Inception-v3 (Szegedy et al., arXiv 1512.00567) in the variant of 2015-12-05 in whose features Frechet distances of photographs are
published: 2048 numbers before the classifier.

It differs from the network of the paper in its pooling: means leave the padding out, and the last block takes a maximum. The
parameters have the names of the weights file ``pt_inception-2015-12-05-6726825d.pth``. Images are resized by bilinear interpolation
between pixel centres; TensorFlow's first implementation placed pixels half a pixel off, so published distances differ a little.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

from fewstep.runtime.errors import FewstepError, first_line

__all__ = ["InceptionV3", "load_inception"]

SIDE = 299
CLASSES = 1008
Size = int | tuple[int, int]


class Flat(TypedDict):
    """A kernel of one row or column."""

    kernel: Size
    padding: Size


class _Unit(nn.Module):
    """Convolution, batch normalisation, rectifier."""

    def __init__(self, inputs: int, outputs: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def _mean(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, and the mean."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Unit(inputs, 64, 1)
        self.branch5x5_1 = _Unit(inputs, 48, 1)
        self.branch5x5_2 = _Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Unit(inputs, 64, 1)
        self.branch3x3dbl_2 = _Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Unit(96, 96, 3, padding=1)
        self.branch_pool = _Unit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean(x))], 1)


class _B(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Unit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Unit(inputs, 64, 1)
        self.branch3x3dbl_2 = _Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, max_pool2d(x, 3, stride=2)], 1)


class _C(nn.Module):
    """17x17: 7x7 as 1x7 and 7x1, once and twice."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        along: Flat = {"kernel": (1, 7), "padding": (0, 3)}
        down: Flat = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Unit(inputs, 192, 1)
        self.branch7x7_1 = _Unit(inputs, width, 1)
        self.branch7x7_2 = _Unit(width, width, **along)
        self.branch7x7_3 = _Unit(width, 192, **down)
        self.branch7x7dbl_1 = _Unit(inputs, width, 1)
        self.branch7x7dbl_2 = _Unit(width, width, **down)
        self.branch7x7dbl_3 = _Unit(width, width, **along)
        self.branch7x7dbl_4 = _Unit(width, width, **down)
        self.branch7x7dbl_5 = _Unit(width, 192, **along)
        self.branch_pool = _Unit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean(x))], 1)


class _D(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Unit(inputs, 192, 1)
        self.branch3x3_2 = _Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Unit(inputs, 192, 1)
        self.branch7x7x3_2 = _Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([three, seven, max_pool2d(x, 3, stride=2)], 1)


class _E(nn.Module):
    """8x8: 3x3 split into 1x3 beside 3x1; the last one pools by the maximum."""

    def __init__(self, inputs: int, *, last: bool = False) -> None:
        super().__init__()
        along: Flat = {"kernel": (1, 3), "padding": (0, 1)}
        down: Flat = {"kernel": (3, 1), "padding": (1, 0)}
        self.last = last
        self.branch1x1 = _Unit(inputs, 320, 1)
        self.branch3x3_1 = _Unit(inputs, 384, 1)
        self.branch3x3_2a = _Unit(384, 384, **along)
        self.branch3x3_2b = _Unit(384, 384, **down)
        self.branch3x3dbl_1 = _Unit(inputs, 448, 1)
        self.branch3x3dbl_2 = _Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Unit(384, 384, **along)
        self.branch3x3dbl_3b = _Unit(384, 384, **down)
        self.branch_pool = _Unit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        split = [self.branch3x3_2a(three), self.branch3x3_2b(three), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.last else _mean(x)
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """Called with pictures ``[B, 1 or 3, H, W]`` in [-1, 1], rounded first to 8 bits, it gives the features ``[B, 2048]``."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _C(768, 128), _C(768, 160), _C(768, 160), _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280), _E(2048, last=True)
        self.fc = nn.Linear(self.num_features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``[B, 2048]`` of pictures ``[B, 1 or 3, H, W]``."""
        grey = ((images.clamp(-1, 1) + 1) * 127.5).round()
        x = interpolate(grey.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", align_corners=False) / 127.5 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = max_pool2d(x, 3, stride=2)
        for number in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{number}")(x)
        return x.mean((2, 3))


def load_inception(path: Path) -> InceptionV3:
    """Load the network from a file in the format of ``pt_inception-2015-12-05-6726825d.pth``, ready for inference.

    Raises:
        FewstepError: no such file, not a file of tensors alone, or of another network (which parameters).
    """
    if not path.is_file():
        raise FewstepError(f"no Inception weights at {path}: download pt_inception-2015-12-05-6726825d.pth and say where it is")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise FewstepError(f"{path} is not a file of weights alone: {first_line(error)}") from error
    with torch.device("meta"):
        network = InceptionV3()
    wanted = network.state_dict()
    if not isinstance(weights, Mapping):
        raise FewstepError(f"{path} should hold parameters by name, it holds a {type(weights).__name__}")
    wrong = [
        name
        for name, value in wanted.items()
        if not name.endswith("num_batches_tracked") and (name not in weights or tuple(weights[name].shape) != tuple(value.shape))
    ]
    if wrong:
        few = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise FewstepError(f"{path} is not of the Inception network of 2015-12-05: {few} missing or of another shape")
    there = {name: weights.get(name, torch.zeros(())) for name in wanted}  # old files do not count batches
    network.load_state_dict(there, assign=True)
    return network.eval().float().requires_grad_(False)
