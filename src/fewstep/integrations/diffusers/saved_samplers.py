"""The samplers of a folder, by their number of steps: what `FewstepScheduler.from_sampler` runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewstep.core.schedule import DiscreteVP, RectifiedFlow
from fewstep.runtime.errors import ArtifactError, GridError, SolverError
from fewstep.runtime.hub import HUB_ID, snapshot
from fewstep.runtime.spec import parse_spec
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import SOLVERS, make_solver, takes_statistics

__all__ = ["SavedSamplers"]

PREDICTIONS = {"v": "v_prediction", "flow": "flow_prediction"}  # ours -> diffusers' names, where they differ


class SavedSamplers:
    """Samplers of one model, each for another number of steps; all of one noise law."""

    def __init__(self, samplers: Mapping[int, Sampler]) -> None:
        self.by_steps = dict(sorted(samplers.items()))
        if len({repr(sampler.schedule.to_config()) for sampler in samplers.values()}) != 1:
            raise ArtifactError("these samplers are of models with different noise laws, or there are none: give those of one model")
        if len({_stages(sampler) for steps, sampler in samplers.items() if steps > 1}) > 1:
            raise ArtifactError("these samplers differ in how many evaluations they make in a step: give those of one solver")

    @classmethod
    def load(cls, folder: str | Path) -> SavedSamplers:
        """Those of a folder with ``sampler.json``, or with ``nfe-NN/sampler.json``; of the hub if it is a repository's name.

        Raises:
            ArtifactError: there are none, or one is damaged.
        """
        place = Path(folder)
        if not isinstance(folder, Path) and not place.exists() and HUB_ID.fullmatch(folder):
            place = snapshot(folder, "samplers", ["sampler.*", "nfe-*/sampler.*"])
        paths = [place] if (place / "sampler.json").is_file() else sorted(path.parent for path in place.glob("nfe-*/sampler.json"))
        if not paths:
            raise ArtifactError(f"no sampler in {folder}: it should hold sampler.json or nfe-NN/sampler.json, as fewstep fit writes them")
        samplers = [Sampler.load(path) for path in paths]
        return cls({sampler.grid.steps: sampler for sampler in samplers})

    def save(self, folder: Path) -> None:
        """Write each to ``nfe-NN``."""
        for sampler in self.by_steps.values():
            sampler.save(folder / f"nfe-{sampler.nfe:02d}")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all their numbers."""
        digest = hashlib.sha256()
        for sampler in self.by_steps.values():
            tableau = sampler.tableau
            for value in (*tableau.nodes, tableau.record, tableau.update, tableau.bias, tableau.noise):
                digest.update(value.detach().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def stages(self) -> int:
        """Evaluations in a step."""
        return _stages(list(self.by_steps.values())[-1])

    def of(self, steps: int | None) -> Sampler:
        """The one with so many steps; the only one, if None.

        Raises:
            GridError: there is none (and what there is).
        """
        if steps is None and len(self.by_steps) == 1:
            return next(iter(self.by_steps.values()))
        if steps not in self.by_steps:
            known = ", ".join(map(str, self.by_steps))
            raise GridError(f"no saved sampler of {steps} steps here, only of {known}: ask for one of these, or make one with fewstep fit")
        return self.by_steps[steps]

    def rebuilt(self, steps: int, *, with_statistics: bool) -> str:
        """The solver that can be put on the rest of a sampler's times: its own, or the hand-made one that a fitted sampler began with.

        Raises:
            SolverError: neither is known here.
        """
        sampler = self.by_steps[steps]
        names = [str(name) for name in (sampler.card.get("name"), sampler.options.get("parent"), _described(sampler), "unipc-2") if name]
        for name in names:
            known = parse_spec(name, SolverError)[0] in SOLVERS and (with_statistics or not takes_statistics(name))
            if known and (takes_statistics(name) or make_solver(name).stages == self.stages):
                return name
        raise SolverError(f"none of {', '.join(names)} can be put on the rest of this sampler's times")

    def config(self) -> dict[str, Any]:
        """The options of a scheduler for them: the noise law, and the prediction type that their card names.

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
            return {"use_flow_sigmas": True, "flow_shift": law.shift, "prediction_type": kind}
        if isinstance(law, DiscreteVP):
            bar = torch.cos(law.theta) ** 2  # from the clean image on
            betas = (1 - bar[1:] / bar[:-1]).tolist()
            return {"trained_betas": betas, "num_train_timesteps": len(betas), "prediction_type": kind}
        raise ArtifactError(f"diffusers' pipelines have discrete times or flows, and this sampler's law is {law}: use fewstep.sample")


def _stages(sampler: Sampler) -> int:
    """Evaluations in a step; the last step to ``sigma = 0`` may have fewer, so it is the first that is counted."""
    if sampler.grid.steps == 1:
        return sampler.nfe
    second = (sampler.tableau.nodes.t[:-1] == sampler.grid.t[1]).nonzero()  # Heun's first step ends with an evaluation there too
    return int(second[-1]) if len(second) else 1


def _described(sampler: Sampler) -> str | None:
    """The name and options of the solver whose class a sampler names; None if there is no such name."""
    found = []
    for name in SOLVERS:
        if takes_statistics(name) or type(made := make_solver(name)).__name__ != sampler.solver:
            continue
        others = {key: value for key, value in sampler.options.items() if value != _listed(getattr(made, key, value))}
        words = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in others.items())
        found.append((len(others), ":".join([name, *words])))
    return min(found)[1] if found else None


def _listed(value: Any) -> Any:  # noqa: ANN401 - as JSON gives a tuple back
    return list(value) if isinstance(value, tuple) else value
