"""Judge samples while a student is trained, so that its best weights are kept: by Frechet distance and recall together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.images import Images, load_images
from fewstep.evaluate.metrics.distances import NEIGHBOURS, Gaussian, Manifold, features_of, precision_recall
from fewstep.evaluate.metrics.quality import feature_network, label_agreement
from fewstep.models.generate import sample
from fewstep.models.model import Model
from fewstep.runtime.errors import FewstepError

__all__ = ["EVALUATIONS", "OWN", "Judge"]

MOST = 4096  # images that samples are compared with
OWN = 2048  # samples of a model whose data is not known
BATCH = 256  # of them at a time
EVALUATIONS = 32  # of the network for each of them
ABOVE = 5 * 2**40  # where their seeds begin


@dataclass(frozen=True, eq=False)
class Judge:
    """A measure of samples against reference images: ``judge(samples [n, *D], labels) -> figures``, whose ``value`` is to be least.

    The value is the Frechet distance over the recall. A distance alone does not see a mode that is gone while the others are sharp, and a
    recall alone is highest of samples that are scattered anywhere.

    Attributes:
        network: makes features of images.
        identity: the features and the images, in a word.
        shape: of an image.
        images: makes the reference images ``[n, *D]``, when they are first asked for.
        device: where the features are computed.
        own: how many of the reference images are a model's own samples, of 32 evaluations each, made when they are first asked for.
    """

    network: nn.Module = field(repr=False)
    identity: str
    shape: tuple[int, ...]
    images: Callable[[], Tensor] = field(repr=False)
    device: torch.device
    own: int = 0

    @cached_property
    def features(self) -> Tensor:
        """The features ``[n, F]`` of the reference images."""
        return features_of(self.images(), self.network, self.device)

    @cached_property
    def gaussian(self) -> Gaussian:
        """The normal distribution of the reference images."""
        return Gaussian.of(self.features)

    @cached_property
    def manifold(self) -> Manifold:
        """The manifold of the reference images."""
        return Manifold.of(self.features)

    @classmethod
    def of(
        cls, images: Images | Tensor, features: str | nn.Module | None = None, device: torch.device | str = "cpu", name: str = ""
    ) -> Judge:
        """Return the judge by reference images.

        Args:
            images: a data set, or ``[n, *D]``; of more than 4096 a fixed choice.
            features: the network to compare in, see `load_features`; by default ``digits`` of the digits, and ``pixels`` otherwise.
            device: where to compute the features.
            name: what the images are called; by default the data set's own name.

        Raises:
            FewstepError: 3 images or fewer, none at all, or features that do not fit them.
        """
        name = name or (images.name if isinstance(images, Images) else "images")
        x = images.x if isinstance(images, Images) else images
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) <= NEIGHBOURS:
            raise FewstepError(
                f"a judge compares samples with more than {NEIGHBOURS} images [n, *D], got {str(getattr(x, 'shape', x))[:80]}"
            )
        if len(x) > MOST:
            x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MOST]]
        if features is None:
            features = "digits" if name == "digits" else "pixels"
        device = torch.device(device)
        network, called = feature_network(features, tuple(x.shape[1:]), device)
        digest = hashlib.sha256(x.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:8]
        made = cls(network, f"{called} of {len(x)} {name} ({digest})", tuple(x.shape[1:]), lambda: x, device)
        _ = made.features  # what has none is refused here
        return made

    @classmethod
    def of_model(
        cls,
        model: Model,
        guidance: float = 1.0,
        features: str | nn.Module | None = None,
        num: int = OWN,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Judge:
        """Return the judge of a model's students: by the model's data, or by its own samples.

        Samples of 32 evaluations, made at the first call, take the place of data that is not known, and of the data at a guidance scale
        other than 1, since a guided model makes other pictures.

        Args:
            model: the teacher.
            guidance: the scale at which it teaches.
            features: see `of`; by default ``digits`` of the bundled digits, and ``pixels`` otherwise.
            num: number of its own samples.
            on_progress: called with the number of them that are made.

        Raises:
            FewstepError: as `of` and `sample`.
        """
        if features is None and model.data == "digits":
            features = "digits"
        if model.data is not None and guidance == 1:
            return cls.of(load_images(model.data), features, model.device)
        if num <= NEIGHBOURS:
            raise FewstepError(f"a judge compares samples with more than {NEIGHBOURS} images, got num={num}")
        network, called = feature_network("pixels" if features is None else features, model.need_shape(), model.device)
        _ = model.guided(guidance)  # what cannot be sampled is refused here

        def own() -> Tensor:
            made: list[Tensor] = []
            for seeds in torch.arange(ABOVE, ABOVE + num).split(BATCH):
                on_progress(BATCH * len(made))
                made.append(sample(model, "unipc-3", nfe=EVALUATIONS, seeds=seeds, guidance=guidance).float().cpu())
            on_progress(num)
            return torch.cat(made)

        identity = f"{called} of {num} samples of {model.name} at guidance {guidance:g} ({model.fingerprint[:8]})"
        return cls(network, identity, model.need_shape(), own, model.device, num)

    def __call__(self, samples: Tensor, requested: Tensor | None = None) -> dict[str, Any]:
        """Measure samples.

        Args:
            samples: ``[n, *D]``, the same noises each time.
            requested: the labels ``[n]`` that they were made for.

        Returns:
            ``fd``, the Frechet distance; ``precision`` and ``recall``; ``labels``, the share of samples whose label, as the features'
            network sees it, is the requested one, or None; ``value``, which is to be least.

        Raises:
            FewstepError: samples of another shape, 3 or fewer, or not finite.
        """
        if tuple(samples.shape[1:]) != self.shape:
            raise FewstepError(
                f"the judge knows images of shape {self.shape}, the samples have {tuple(samples.shape[1:])}: use another judge"
            )
        found = features_of(samples, self.network, self.device)
        distance = self.gaussian.distance(found)
        precision, recall = precision_recall(self.manifold, found)
        labels = label_agreement(self.network, samples, requested, self.device)
        value = distance / max(recall, 1 / len(self.manifold.features))
        return {"fd": distance, "precision": precision, "recall": recall, "labels": labels, "value": value}
