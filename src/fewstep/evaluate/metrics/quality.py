"""Measure the quality of a set of samples: its distances to the data, with their intervals."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.evaluate.metrics.confidence import half_subsets, subset_interval
from fewstep.evaluate.metrics.distances import NEIGHBOURS, Gaussian, Kernel, Manifold, features_of, precision_recall
from fewstep.evaluate.metrics.features import load_features
from fewstep.runtime.entry import imported, is_entry
from fewstep.runtime.errors import FewstepError

__all__ = ["Quality", "feature_network", "features_name", "label_agreement"]

WIDE = 256  # features: of more, fewer subsets are measured
SUBSETS = {False: 100, True: 20}
NO_METRICS: dict[str, Any] = dict.fromkeys(("fd", "fd_features", "fd_ci", "kd", "kd_ci", "precision", "recall", "labels"))


def features_name(features: str | nn.Module) -> str:
    """Return how rows call a feature network: by its name, with a hash of its weights where the name does not say what they are.

    Raises:
        FewstepError: the weights of Inception are not there.
    """
    if isinstance(features, nn.Module):
        digest = hashlib.sha256()
        for key, value in sorted(features.state_dict().items()):
            digest.update(f"{key}{tuple(value.shape)}".encode() + value.detach().cpu().double().numpy().tobytes())
        return f"{type(features).__name__}:{digest.hexdigest()[:8]}"
    kind, _, path = features.partition(":")
    if kind != "inception" or not path:
        return features
    try:
        return f"inception:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"
    except OSError as error:
        raise FewstepError(f"no Inception weights at {path}: {error.strerror}") from error


def _is_third_party(features: str) -> bool:
    """Return whether features are named as ``module:function``."""
    return is_entry(features) and not features.startswith("inception:")


def feature_network(features: str | nn.Module, shape: tuple[int, ...], device: torch.device) -> tuple[nn.Module, str]:
    """Return the network of features on a device, ready for inference, and what rows call it.

    Args:
        features: by name, see `load_features`; ``module:function``, which is called with the shape of a sample and makes it; or itself.
        shape: of a sample.
        device: where it computes.

    Raises:
        FewstepError: as `load_features` and `imported`, or a function that makes no network.
    """
    if isinstance(features, nn.Module) or not _is_third_party(features):
        network = features if isinstance(features, nn.Module) else load_features(features, shape)
        return network.to(device).eval(), features_name(features)
    network = imported(features)(shape)
    if not isinstance(network, nn.Module):
        raise FewstepError(f"{features} made a {type(network).__name__}: it should return a torch.nn.Module that makes [B, F] of images")
    return network.to(device).eval(), features_name(network)


@torch.no_grad()
def label_agreement(network: nn.Module, samples: Tensor, requested: Tensor | None, device: torch.device) -> float | None:
    """Return the share of samples ``[num, *D]`` whose label, as a network sees it, is the requested one; None if it sees none."""
    seen = getattr(network, "labels", None)
    if requested is None or not callable(seen):
        return None
    labels = torch.cat([torch.as_tensor(seen(part.to(device))).cpu() for part in samples.float().split(256)])
    return float((labels == requested.cpu()).double().mean())


@dataclass(frozen=True, eq=False)
class Quality:
    """Data ``[n, *D]`` that samples are compared with, in the features of a network."""

    network: nn.Module
    name: str
    gaussian: Gaussian
    kernel: Kernel
    manifold: Manifold | None  # of too little data there is none
    halves: float  # the Frechet distance of one half of the data to the other
    device: torch.device

    @classmethod
    def of(cls, images: Tensor, features: str | nn.Module, device: torch.device) -> Quality:
        """Prepare images ``[n, *D]`` in features by name or of any network.

        Raises:
            FewstepError: as `feature_network` and `features_of`.
        """
        network, name = feature_network(features, tuple(images.shape[1:]), device)
        data = features_of(images, network, device)
        first, second = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))].chunk(2)
        manifold = Manifold.of(data) if len(data) > NEIGHBOURS else None
        return cls(network, name, Gaussian.of(data), Kernel.of(data), manifold, Gaussian.of(first).distance(second), device)

    def measure(self, samples: Tensor, requested: Tensor | None) -> dict[str, Any]:
        """Measure samples ``[num, *D]`` made for the labels ``requested [num]``; the keys are fields of `Row`.

        Raises:
            FewstepError: fewer than 2 samples, or they are not finite.
        """
        found = features_of(samples, self.network, self.device)
        distance = self.gaussian.distance(found)
        measured = {**NO_METRICS, "fd": distance, "fd_features": self.name, "kd": self.kernel.distance(found)}
        if len(found) >= 4:  # a half has at least 2
            halves = half_subsets(len(found), SUBSETS[found.shape[1] > WIDE], requested)
            of_halves = torch.tensor([self.gaussian.distance(found[index]) for index in halves], dtype=torch.float64)
            measured["fd_ci"] = [max(0.0, end) for end in subset_interval(distance, of_halves)]
            measured["kd_ci"] = subset_interval(measured["kd"], self.kernel.distances(found, halves))
        if self.manifold is not None and len(found) > NEIGHBOURS:
            measured["precision"], measured["recall"] = precision_recall(self.manifold, found)
        return {**measured, "labels": label_agreement(self.network, samples, requested, self.device)}
