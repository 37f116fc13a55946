"""Score networks of galaxies that nobody here trained (arXiv 2401.07313), read from the package ``galaxygrad`` where it is installed.

    pip install --no-deps galaxygrad==0.1.5

The package states no licence: nothing of it is part of this repository. Its weights are arrays one after another in one file; its
networks are mixers over patches that answer the score under a noise law of constant rate.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fewstep

NETWORKS = ("eqx_hsc_ScoreNet32", "eqx_ZTF_ScoreNet32")
WIDTH, PATCH, BLOCKS = 64, 4, 4


class _Mixer(nn.Module):
    """``(x [B, 1, H, H], t [B]) -> score [B, 1, H, H]``."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.from_numpy(one.copy()), requires_grad=False) for one in arrays[:-1])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        left = iter(self.weights)
        take = lambda count: [next(left) for _ in range(count)]  # noqa: E731
        in_w, in_b, out_w, out_b = take(4)
        level = (t.to(x.dtype) / 10)[:, None, None, None].expand_as(x)
        h = nn.functional.conv2d(torch.cat([x, level], 1), in_w, in_b.reshape(-1), stride=PATCH)
        batch, channels, height, width = h.shape
        h = h.flatten(2)  # [B, channels, patches]

        def perceptron(value: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.relu(nn.functional.linear(value, w1, b1)), w2, b2)

        def norm(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return nn.functional.layer_norm(value, value.shape[1:], weight, bias)

        for _ in range(BLOCKS):
            patch, hidden, first, second = take(4), take(4), take(2), take(2)
            h = h + perceptron(norm(h, *first), *patch)
            h = h.transpose(1, 2)
            h = (h + perceptron(norm(h, *second), *hidden)).transpose(1, 2)
        h = norm(h, *take(2)).reshape(batch, channels, height, width)
        return nn.functional.conv_transpose2d(h, out_w.flip(2, 3).transpose(0, 1), out_b.reshape(-1), stride=PATCH)


def _arrays(path: Path) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    with path.open("rb") as file:
        while file.peek(1):
            found.append(np.load(file, allow_pickle=False))
    return found


def load(name: str) -> fewstep.Model:
    """Load one of `NETWORKS`; a ``FileNotFoundError`` says how to install them."""
    spec: Any = find_spec("galaxygrad")  # which would import JAX
    places = [] if spec is None else [path for root in spec.submodule_search_locations for path in Path(root).rglob(f"{name}*")]
    if not places:
        raise FileNotFoundError(f"no {name}: pip install --no-deps galaxygrad==0.1.5")
    law = fewstep.VPLinear(10.0, 10.0)
    return fewstep.Model(_Mixer(_arrays(places[0])), law, "score", shape=(1, 32, 32), time=_ten_times, name=name)


def _ten_times(t: Tensor) -> Tensor:
    return 10 * t
