"""The samplers of a folder by their number of steps, for `FewstepScheduler.from_sampler`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewstep.core.schedule import NoiseSchedule, RectifiedFlow, VPCosine
from fewstep.models.formats.diffusers_law import ANGLE
from fewstep.runtime.artifact import named_path
from fewstep.runtime.errors import ArtifactError, GridError
from fewstep.runtime.hub import HUB_ID, snapshot
from fewstep.sampling.sampler import Sampler

__all__ = ["SavedSamplers"]

PREDICTIONS = {"v": "v_prediction", "flow": "flow_prediction"}  # ours -> diffusers' names, where they differ


class SavedSamplers:
    """Samplers of one model for different numbers of steps, all of one noise law and solver.

    Args:
        samplers: number of steps -> sampler.

    Raises:
        ArtifactError: their noise laws or numbers of stages differ, or there are none.
    """

    def __init__(self, samplers: Mapping[int, Sampler]) -> None:
        self.by_steps = dict(sorted(samplers.items()))
        if len({repr(sampler.schedule.to_config()) for sampler in samplers.values()}) != 1:
            raise ArtifactError("these samplers are of models with different noise laws, or there are none: give those of one model")
        if len({sampler.stages for steps, sampler in samplers.items() if steps > 1}) > 1:
            raise ArtifactError("these samplers differ in how many evaluations they make in a step: give those of one solver")

    @classmethod
    def load(cls, folder: str | Path) -> SavedSamplers:
        """Load the samplers of a folder with ``sampler.json`` or with ``nfe-NN/sampler.json``, or of a repository on the hub.

        Raises:
            ArtifactError: there are none, or one is damaged.
        """
        place = named_path(folder)
        if not isinstance(folder, Path) and not place.exists() and HUB_ID.fullmatch(folder):
            place = snapshot(folder, "samplers", ["sampler.*", "nfe-*/sampler.*"])
        paths = [place] if (place / "sampler.json").is_file() else sorted(path.parent for path in place.glob("nfe-*/sampler.json"))
        if not paths:
            raise ArtifactError(f"no sampler in {folder}: it should hold sampler.json or nfe-NN/sampler.json, as fewstep fit writes them")
        samplers = [Sampler.load(path) for path in paths]
        return cls({sampler.grid.steps: sampler for sampler in samplers})

    def save(self, folder: Path) -> None:
        """Write each sampler to ``nfe-NN`` below the folder.

        Raises:
            ArtifactError: it cannot be written.
        """
        for sampler in self.by_steps.values():
            sampler.save(folder / f"nfe-{sampler.nfe:02d}")

    @cached_property
    def fingerprint(self) -> str:
        """The hash of all their numbers."""
        return hashlib.sha256("".join(sampler.fingerprint for sampler in self.by_steps.values()).encode()).hexdigest()[:16]

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise law of all of them."""
        return next(iter(self.by_steps.values())).schedule

    @property
    def stages(self) -> int:
        """The number of evaluations in a step."""
        return list(self.by_steps.values())[-1].stages

    def of(self, steps: int | None, law: NoiseSchedule) -> Sampler:
        """Return the sampler with so many steps, for a model of this noise law; the only one, if None.

        Raises:
            GridError: there is none (and what there is).
            ArtifactError: it was made for another noise law.
        """
        if steps is None and len(self.by_steps) == 1:
            return self._checked(next(iter(self.by_steps.values())), law)
        if steps not in self.by_steps:
            known = ", ".join(map(str, self.by_steps))
            raise GridError(f"no saved sampler of {steps} steps here, only of {known}: ask for one of these, or make one with fewstep fit")
        return self._checked(self.by_steps[steps], law)

    @staticmethod
    def _checked(sampler: Sampler, law: NoiseSchedule) -> Sampler:
        sampler.tableau.check_asks("a pipeline calls its network at every step")
        nodes = sampler.tableau.nodes
        t = nodes.t
        if not (torch.allclose(nodes.alpha, law.alpha(t), rtol=1e-4, atol=1e-6) and torch.allclose(nodes.sigma, law.sigma(t), rtol=1e-4)):
            raise ArtifactError(
                f"the saved sampler was made for another noise law: at t = {t[0]:g} it has alpha, sigma = {nodes.alpha[0]:g}, "
                f"{nodes.sigma[0]:g}, this model {law.alpha(t[:1])[0]:g}, {law.sigma(t[:1])[0]:g}"
            )
        return sampler

    def config(self) -> dict[str, Any]:
        """Return the options of a scheduler for them: the noise law, and the prediction type on their card.

        Raises:
            ArtifactError: the card does not name it, or the law is not one of diffusers'.
        """
        sampler = next(iter(self.by_steps.values()))
        law, kind = sampler.schedule, sampler.card.get("prediction")
        if kind is None:
            raise ArtifactError(
                "the card of this sampler does not say what its network predicts: pass the configuration of the pipeline's scheduler too"
            )
        kind = PREDICTIONS.get(str(kind), str(kind))
        if isinstance(law, RectifiedFlow):
            inverted = kind == "reversed-flow"
            kind = "flow_prediction" if inverted else kind
            return {"use_flow_sigmas": True, "flow_shift": law.shift, "prediction_type": kind, "invert_sigmas": inverted}
        if law.times is not None:
            bar = law.alpha(law.times) ** 2  # from the clean image on
            betas = (1 - bar[1:] / bar[:-1]).tolist()
            return {"trained_betas": betas, "num_train_timesteps": len(betas), "prediction_type": kind}
        if isinstance(law, VPCosine) and law.s == 0 and law.t_max < 1:  # Stable Audio's, whose times are angles
            level = math.tan(math.pi / 2 * law.t_max)
            return {"_class_name": ANGLE, "sigma_max": level, "sigma_data": 1.0, "prediction_type": kind}
        raise ArtifactError(f"diffusers' pipelines have discrete times or flows, and this sampler's law is {law}: use fewstep.sample")
