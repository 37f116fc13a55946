"""A classifier of noisy states, for guidance: a small network of the digits that ships with the package, for any noise law."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.core.denoiser import Cond
from fewstep.core.prediction import aligned
from fewstep.core.schedule import NoiseSchedule
from fewstep.runtime.errors import FewstepError, ModelError, look_up
from fewstep.runtime.front_door import checked
from fewstep.sampling.splitting import LogProb

__all__ = ["CLASSIFIERS", "NoisyClassifier", "load_classifier"]

WEIGHTS = Path(__file__).parent / "weights"
CLASSIFIERS = {"digits": WEIGHTS / "digits-classifier"}

FREQUENCIES, WIDTH, SIGMA_DATA = 8, 32, 0.5


class NoisyClassifier(nn.Module):
    """A convolutional classifier of noisy 8x8 digits, told the noise level: ``(z [B, 1, 8, 8], s [B]) -> logits [B, 10]``.

    States are in units of the image, ``z = x/alpha``, at the level ``s = sigma/alpha``, so one network serves every noise law.
    """

    classes, shape = 10, (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.first = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.third = nn.Sequential(nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GELU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(16 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, self.classes))

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        """Return the logits ``[B, 10]``."""
        phase = torch.atan2(s, torch.full_like(s, SIGMA_DATA))[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=s.device)
        scale, shift = self.level(torch.cat([phase.sin(), phase.cos()], 1))[:, :, None, None].chunk(2, 1)
        h = self.first(z / torch.hypot(s, torch.full_like(s, SIGMA_DATA))[:, None, None, None])
        h = self.second(nn.functional.gelu(h * (1 + scale) + shift))
        return self.head(self.third(h))

    def log_prob(self, schedule: NoiseSchedule) -> LogProb:
        """Return ``log p(label | x, t)`` for states of a noise law: ``(x [B, 1, 8, 8], t, labels [B]) -> [B]``."""
        if not isinstance(schedule, NoiseSchedule):
            raise ModelError(f"a classifier of noisy states takes the model's noise law, as model.schedule, got {schedule!r}")

        def log_prob(x: Tensor, t: Tensor, labels: Cond) -> Tensor:
            whole = isinstance(labels, Tensor) and labels.shape == x.shape[:1] and not labels.is_floating_point()
            if not whole or not bool(((labels >= 0) & (labels < self.classes)).all()):
                raise ModelError(f"this classifier is guided by labels [B], whole numbers of 0 to {self.classes - 1}")
            if x.shape[1:] != self.shape:
                raise ModelError(f"this classifier knows samples of shape {self.shape}, not {tuple(x.shape[1:])}")
            level = torch.exp(-schedule.lam(t)).expand(len(x)).to(x.dtype).to(x.device)
            logits = self(x / aligned(schedule.alpha(t), x), level)
            return torch.log_softmax(logits, 1).gather(1, labels.to(x.device)[:, None])[:, 0]

        return log_prob


@checked
def load_classifier(name: str = "digits") -> NoisyClassifier:
    """Load a classifier that ships with the package, ready for inference.

    Raises:
        FewstepError: an unknown name.

    Examples:
        >>> from fewstep import classifier_guided, load_model
        >>> from fewstep.models.classifier import load_classifier
        >>> model = load_model("digits-ddpm")
        >>> guided = classifier_guided(model, load_classifier().log_prob(model.schedule), scale=2.0)
    """
    network = NoisyClassifier()
    network.load_state_dict(load_file(look_up(name, CLASSIFIERS, "classifier", FewstepError) / "classifier.safetensors"))
    return network.float().eval().requires_grad_(False)
