"""A trained network as a sampling problem, with what lies in its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.prediction import prediction
from fewstep.core.schedule import NoiseSchedule
from fewstep.core.statistics import ModelStatistics
from fewstep.models.denoiser import AdaptedDenoiser
from fewstep.models.guidance import classifier_free
from fewstep.models.networks.operator import OperatorDenoiser
from fewstep.models.tuned import Tuned
from fewstep.runtime.errors import ArtifactError, GridError, ModelError, SolverError, look_up
from fewstep.sampling.grid_table import GridTable
from fewstep.sampling.sampler import Sampler

__all__ = ["FITTED", "Model", "NetworkTime", "description"]

FITTED = "fitted"  # the name of fitted samplers, where a solver's would stand


@dataclass(frozen=True)
class NetworkTime:
    """The time that a network is given, as data: ``scale`` times ``t``, ``log(factor t)`` or ``sigma(t)``. ``[*] -> [*]``."""

    form: str = "t"
    scale: float = 1.0
    factor: float = 1.0
    schedule: NoiseSchedule | None = None

    def __post_init__(self) -> None:
        look_up(self.form, dict.fromkeys(("t", "log", "sigma")), "form of a network's time", ModelError)

    def __call__(self, t: Tensor) -> Tensor:
        if self.form == "log":
            return self.scale * torch.log(self.factor * t)
        return self.scale * (t if self.schedule is None else self.schedule.sigma(t))


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network as a sampling problem.

    Attributes:
        name: how it was asked for.
        denoiser: the network with its noise schedule.
        shape: of one sample, ``(C, H, W)``.
        classes: number of class labels, or None if it takes none.
        null_label: the label that stands for no condition, or None if it has none.
        data: the data set it was trained on, by the name `load_images` knows, or None.
        folder: where it was loaded from.
    """

    name: str
    denoiser: AdaptedDenoiser | OperatorDenoiser
    shape: tuple[int, ...]
    classes: int | None = None
    null_label: int | None = None
    data: str | None = None
    folder: Path | None = None

    @property
    def is_operator(self) -> bool:
        """Whether it is an operator student, whose evaluations are passes along times of its own."""
        return isinstance(self.denoiser, OperatorDenoiser)

    @property
    def passes(self) -> tuple[int, ...]:
        """The numbers of passes that an operator student can make, as its folder says; none of any other model."""
        path = None if self.folder is None else self.folder / "optimized" / "ddim"
        return tuple(sorted(GridTable.load(path).grids)) if self.is_operator and path is not None else ()

    @property
    def adapted(self) -> AdaptedDenoiser:
        """The denoiser of a network that answers for one time.

        Raises:
            ModelError: it is an operator student.
        """
        if not isinstance(self.denoiser, AdaptedDenoiser):
            raise ModelError(f"{self.name} is an operator student, which is sampled as it is: name its teacher")
        return self.denoiser

    def guided(self, scale: float = 1.0) -> Denoiser:
        """The denoiser with classifier-free guidance; scale 1 is the model as it is.

        Raises:
            ModelError: the model has no null label to guide away from.
        """
        if scale == 1:
            return self.denoiser
        if self.is_operator:
            raise ModelError(f"{self.name} is an operator student: its guidance is in its weights; use guidance 1")
        if self.null_label is None:
            raise ModelError(f"{self.name} cannot be guided: it is not class-conditional with a null label; use guidance 1")
        return classifier_free(self.denoiser, scale, torch.tensor(self.null_label))

    def labels(self, seeds: Sequence[int], label: int | None = None) -> Tensor | None:
        """One class label per sample, ``[len(seeds)]``: ``label``, or the seed modulo the number of classes; None without classes.

        Raises:
            ModelError: a label the model does not have.
        """
        if self.classes is None:
            if label is not None:
                raise ModelError(f"{self.name} takes no labels")
            return None
        if label is not None and not 0 <= label < self.classes:
            raise ModelError(f"{self.name} has labels 0 to {self.classes - 1}, got {label}")
        return torch.tensor([seed % self.classes if label is None else label for seed in seeds])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, the noise law, the prediction type and the network's time: the same for the same model anywhere."""
        denoiser, digest = self.denoiser, hashlib.sha256()
        network, schedule = denoiser.network, denoiser.schedule
        probes = torch.linspace(schedule.t_min + 1e-3, schedule.t_max, 5, dtype=torch.float64)
        definition: tuple[Any, ...] = (schedule.to_config(), prediction(denoiser.prediction).name, denoiser.time(probes).tolist())
        if isinstance(denoiser, OperatorDenoiser):
            definition += (denoiser.network.form, denoiser.network.times.tolist())
        digest.update(repr(definition).encode())
        for key, value in sorted(network.state_dict().items() if isinstance(network, nn.Module) else ()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else str(value).encode())
        return digest.hexdigest()[:16]

    def statistics(self, guidance: float = 1.0) -> ModelStatistics | None:
        """The statistics that lie in the model's folder, below ``statistics*/``, for this guidance scale; None if there are none.

        Raises:
            ArtifactError: they are damaged.
        """
        found = sorted(self.folder.glob("statistics*/statistics.json")) if self.folder is not None else []
        loaded = (ModelStatistics.load(path.parent) for path in found)
        return next((statistics for statistics in loaded if statistics.guidance == guidance), None)

    def optimized(self, solver: str, nfe: int, guidance: float = 1.0) -> TimeGrid:
        """The optimised time grid of a solver that lies in the model's folder, below ``optimized*/``.

        Raises:
            GridError: there is none for this solver, number of evaluations and guidance scale (and what there is).
            ArtifactError: it is damaged, or was made for other weights.
        """
        found = sorted(self.folder.glob("optimized*/*/grids.json")) if self.folder is not None else []
        tables = [GridTable.load(path.parent) for path in found]
        table = next((table for table in tables if (table.solver, table.guidance) == (solver, guidance)), None)
        if table is None and self.is_operator:
            raise GridError(
                f"{self.name} is an operator student, sampled by ddim at guidance 1 along its own times: leave --solver and --grid out"
            )
        if table is None:
            known = ", ".join(f"{table.solver} at {table.guidance:g}" for table in tables)
            there = f"there are some for {known}" if tables else "there are none in its folder"
            raise GridError(
                f"no optimized grid of {self.name} for {solver} at guidance {guidance:g}, {there}: make a sampler with "
                f"'fewstep optimize {self.command_name(guidance)} --solver {solver} --out DIR'"
            )
        if table.model != self.fingerprint:
            raise ArtifactError(f"the optimized grids in {self.folder} were made for other weights ({table.model}, not {self.fingerprint})")
        if self.is_operator and nfe not in table.grids:
            raise GridError(f"{self.name} makes {', '.join(map(str, sorted(table.grids)))} passes, not {nfe}")
        return table.grid(nfe)

    def slot_grid(self, name: str, slots: int, guidance: float = 1.0) -> TimeGrid:
        """The times that trajectories are kept at: a spacing by name, or ``optimized``, the model's own for DDIM.

        Raises:
            GridError: an unknown spacing, or no optimised grid of so many steps.
        """
        return self.optimized("ddim", slots, guidance) if name == "optimized" else make_grid(name, self.denoiser.schedule, slots)

    def fitted(self, nfe: int, guidance: float = 1.0) -> Sampler:
        """The sampler fitted to the model that lies in its folder, below ``fitted*/``.

        Raises:
            SolverError: there is none with so many evaluations at this guidance scale (and what there is).
            ArtifactError: it is damaged, or was made for other weights.
        """
        if self.is_operator:
            raise SolverError(f"{self.name} is an operator student, which has passes and no fitted samplers: leave --solver out")
        paths = sorted(self.folder.glob(f"{FITTED}*/nfe-*/sampler.json")) if self.folder is not None else []
        samplers = [Sampler.load(path.parent) for path in paths]
        for sampler in samplers:
            if (sampler.nfe, sampler.card.get("guidance")) == (nfe, guidance):
                if sampler.card.get("model") != self.fingerprint:
                    raise ArtifactError(f"the fitted samplers in {self.folder} were made for other weights, not {self.fingerprint}")
                return sampler
        known = ", ".join(f"{sampler.nfe} at {sampler.card.get('guidance'):g}" for sampler in samplers)
        there = f"there are some of {known}" if known else "there are none in its folder"
        raise SolverError(
            f"no fitted sampler of {self.name} with {nfe} evaluations at guidance {guidance:g}, {there}: make one with "
            f"'fewstep fit {self.command_name(guidance)} --nfe {nfe} --out DIR' and use it with --sampler DIR"
        )

    def command_name(self, guidance: float) -> str:
        """How a command names this model and a guidance scale."""
        return f"{self.name if self.data or self.folder is None else self.folder}" + ("" if guidance == 1 else f" --guidance {guidance:g}")

    @cached_property
    def tuned(self) -> Tuned | None:
        """What the model was tuned for, if it was.

        Raises:
            ArtifactError: its ``tuned.json`` is damaged.
        """
        return None if self.folder is None else Tuned.load(self.folder)

    def to(self, device: torch.device) -> Model:
        """The same model, its network moved."""
        if isinstance(self.denoiser.network, nn.Module):
            self.denoiser.network.to(device)
        return self

    def named(self, name: str, data: str | None) -> Model:
        """The same model under another name, with its data set."""
        return replace(self, name=name, data=data)


def description(
    kind: str,
    options: Mapping[str, Any],
    schedule: NoiseSchedule,
    prediction: str,
    time: NetworkTime,
    shape: tuple[int, ...],
    classes: int | None,
    null_label: int | None,
) -> dict[str, Any]:
    """As `loaders.describe` says it of a model."""
    return {
        "network": {"class": kind, "options": dict(options)},
        "prediction": prediction,
        "schedule": schedule.to_config(),
        "time": {"form": time.form, "scale": time.scale, "factor": time.factor},
        "shape": shape,
        "classes": classes,
        "null_label": null_label,
    }
