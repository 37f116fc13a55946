"""Score networks of galaxies that nobody here trained (arXiv 2401.07313), read from the package ``galaxygrad`` where it is installed.

    pip install --no-deps galaxygrad==0.1.5

The package states no licence: nothing of it is part of this repository. Without ``--no-deps`` it brings JAX, which reading its weights does
not take. Its weights are arrays one after another in one file; its networks are mixers over patches (arXiv 2105.01601) that answer the
score under a noise law of constant rate. Each is a model of the command line, too: ``fewstep bench benchmarks.foreign_networks:hsc_32``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewstep
from fewstep.runtime.errors import ModelError, look_up

NETWORKS = {
    "hsc-32": "eqx_hsc_ScoreNet32",  # Hyper Suprime-Cam
    "ztf-32": "eqx_ZTF_ScoreNet32",  # simulations of the Zwicky Transient Facility
    "hsc-64": "eqx_hsc_ScoreNet64",
    "ztf-64": "eqx_ZTF_ScoreNet64",
    "hsc-log-32": "eqx_hsc_LogNet32",  # of another scaling of the pixels
    "hsc-log-64": "eqx_hsc_LogNet64",
}
STUDIED = ("hsc-32", "ztf-32")
INSTALL = "pip install --no-deps galaxygrad==0.1.5"
ENDS, BLOCK = 7, 12  # arrays beside the blocks: both convolutions, the last norm, the end of time; arrays of a block


class Mixer(nn.Module):
    """A mixer over patches, ``(x [B, 1, H, H], t [B]) -> score [B, 1, H, H]``, of the sizes that its arrays have.

    Args:
        arrays: in the order of the file: weight and bias of the convolution that makes patches and of the one that makes pixels again; of
            each block two perceptrons of two layers, over patches and over channels, and weight and bias of both their norms; weight and
            bias of the last norm; the last time.

    Raises:
        ModelError: arrays of another layout.
    """

    def __init__(self, arrays: list[np.ndarray]) -> None:
        super().__init__()
        if len(arrays) < ENDS + BLOCK or (len(arrays) - ENDS) % BLOCK or arrays[0].ndim != 4 or arrays[-3].ndim != 2:
            raise ModelError(f"a mixer is {ENDS} arrays and {BLOCK} for each block, as in galaxygrad 0.1.5; got {len(arrays)} others")
        self.blocks = (len(arrays) - ENDS) // BLOCK
        self.patch, self.side, self.last = arrays[0].shape[-1], isqrt(arrays[-3].shape[1]), float(arrays[-1])
        self.weights = nn.ParameterList(nn.Parameter(torch.from_numpy(one.copy()), requires_grad=False) for one in arrays[:-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a picture."""
        return 1, self.patch * self.side, self.patch * self.side

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        left = iter(self.weights)
        in_w, in_b, out_w, out_b = _next(left, 4)
        level = (t.to(x.dtype) / self.last)[:, None, None, None].expand_as(x)
        h = nn.functional.conv2d(torch.cat([x, level], 1), in_w, in_b.reshape(-1), stride=self.patch)
        h = h.flatten(2)  # [B, channels, patches]
        for _ in range(self.blocks):
            over_patches, over_channels, first, second = (_next(left, count) for count in (4, 4, 2, 2))
            h = h + _perceptron(_norm(h, *first), *over_patches)
            h = h.mT
            h = (h + _perceptron(_norm(h, *second), *over_channels)).mT
        h = _norm(h, *_next(left, 2)).unflatten(2, (self.side, self.side))
        kernel = out_w.flip(2, 3).transpose(0, 1)  # the other library's transposed convolution does not mirror it
        return nn.functional.conv_transpose2d(h, kernel, out_b.reshape(-1), stride=self.patch)


def _next(left: Iterator[Tensor], count: int) -> list[Tensor]:
    return [next(left) for _ in range(count)]


def _perceptron(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return nn.functional.linear(nn.functional.relu(nn.functional.linear(x, w1, b1)), w2, b2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[1:], weight, bias)


def load(name: str) -> fewstep.Model:
    """Load one of `NETWORKS` by its short name.

    Raises:
        FewstepError: no such name; the package is missing, or has no such weights (how to install it).
    """
    path = place(name)
    if path is None:
        raise ModelError(f"the weights of {name} are not here: {INSTALL}")
    return read(path, NETWORKS[name])


def place(name: str) -> Path | None:
    """Return where the weights of one of `NETWORKS` lie; None if they are not installed.

    Raises:
        FewstepError: no such name.
    """
    file = look_up(name, NETWORKS, "network", ModelError)
    spec: Any = find_spec("galaxygrad")  # which would import JAX
    roots = [] if spec is None else spec.submodule_search_locations
    return next((path for root in roots for path in sorted(Path(root).rglob(f"{file}*"))), None)


def read(path: Path, name: str) -> fewstep.Model:
    """Read a network from its file, ``name`` in tables.

    Raises:
        ModelError: arrays of another layout.
    """
    network = Mixer(_arrays(path))
    return fewstep.Model(network, fewstep.VPLinear(10.0, 10.0), "score", shape=network.shape, time=_ten_times, name=name)


def _arrays(path: Path) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    with path.open("rb") as file:
        while file.peek(1):
            found.append(np.load(file, allow_pickle=False))
    return found


def _ten_times(t: Tensor) -> Tensor:
    return 10 * t


# Each as module:function, for the command line.
hsc_32 = partial(load, "hsc-32")
ztf_32 = partial(load, "ztf-32")
hsc_64 = partial(load, "hsc-64")
ztf_64 = partial(load, "ztf-64")
hsc_log_32 = partial(load, "hsc-log-32")
hsc_log_64 = partial(load, "hsc-log-64")
