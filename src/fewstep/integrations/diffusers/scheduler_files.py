"""The configuration of a `FewstepScheduler` and its artifacts on disk: its JSON, and the tensors in folders beside it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch

from fewstep.core.statistics import ModelStatistics
from fewstep.integrations.diffusers.same_steps import read_scheduler
from fewstep.integrations.diffusers.saved_samplers import SavedSamplers
from fewstep.integrations.diffusers.solver_names import DESCRIPTIVE, end_of, options_of
from fewstep.models.formats.diffusers_law import ends_clean, is_angle, is_edm, is_flow, noise_law, refuse_no_ode
from fewstep.runtime.artifact import read_json
from fewstep.runtime.errors import ArtifactError, ModelError
from fewstep.runtime.hub import HUB_ID, snapshot

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils.import_utils import DummyObject
    from diffusers.utils.outputs import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("fewstep.integrations.diffusers needs diffusers: pip install 'fewstep[diffusers]'") from error

__all__ = ["BaseOutput", "SchedulerMixin", "StoredScheduler", "randn_tensor", "register_to_config", "resolve_artifact"]

STATISTICS, SAMPLERS = "statistics", "samplers"  # folders beside scheduler_config.json
_KNOWN: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # artifacts in memory that configurations refer to


class StoredScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler as configuration and files; `FewstepScheduler` adds the steps.

    Attributes:
        _samplers: saved samplers in place of a solver, or None.
        _statistics: statistics of the model for a solver that takes them, or None.
    """

    _compatibles: ClassVar[list[str]] = [*(e.name for e in KarrasDiffusionSchedulers), "FlowMatchEulerDiscreteScheduler"]
    _samplers: SavedSamplers | None
    _statistics: ModelStatistics | None

    def _settle(self, name: str, sampler: object, statistics: object) -> None:
        """Write the solver's name into the configuration, with the options of diffusers that describe it and names of artifacts."""
        settled: dict[str, Any] = {"solver": name, **options_of(name)}
        for key, value, artifact in ((STATISTICS, statistics, self._statistics), ("sampler", sampler, self._samplers)):
            if artifact is not None and not isinstance(value, str | Path):
                settled[key] = f"memory:{artifact.fingerprint}"
                _KNOWN[settled[key]] = artifact
            elif value is not None:
                settled[key] = str(value)
        if self.config["use_flow_sigmas"]:
            settled["shift"] = self.config["flow_shift"]  # as diffusers' own flow schedulers call it
        settled |= end_of(settled["algorithm_type"], clean=ends_clean(self.config), chosen=self.config["to_clean"])
        defaults = self.config.get("_use_default_values")
        if defaults is not None:  # what is settled survives a journey through another scheduler's configuration
            same = {"algorithm_type"} if settled["algorithm_type"] == "dpmsolver++" else set()  # for which SA-Solver has another word
            settled["_use_default_values"] = sorted(set(defaults) - (set(settled) - same))
        self.register_to_config(**settled)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for key, artifact in ((STATISTICS, self._statistics), ("sampler", self._samplers)):
            if str(self.config[key]).startswith("memory:"):  # so that this process knows it too
                _KNOWN[self.config[key]] = artifact

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [one for one in super()._get_compatibles() if not isinstance(one, DummyObject)]  # those whose libraries are there

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
        """Make a scheduler from the configuration of this class or of any of diffusers' schedulers.

        DPM-Solver, UniPC and DEIS keep their formulas; of others only the noise law, the prediction type and the spacing are taken. To keep
        the solver of any scheduler see `from_scheduler`.

        Args:
            config: the configuration, as ``pipe.scheduler.config``.
            return_unused_kwargs: return a pair, with a dict of the options that this class does not have.
            kwargs: options that override the configuration, see `FewstepScheduler`.

        Raises:
            ModelError: the configuration is of a scheduler whose states or steps are of another kind (EDM's, stochastic flows).
            FewstepError: an unknown name or option, or artifacts of another model.
        """
        if isinstance(config, Mapping):
            changed, of = dict(config), str(config.get("_class_name", ""))
            refuse_no_ode(changed)
            if "solver" not in changed:  # it was never ours
                made = changed.pop("_use_default_values", None) is not None or of  # by a scheduler, rather than by hand
                lawless = made and not is_flow(changed) and not is_angle(changed) and "beta_schedule" not in changed
                if str(changed.get("algorithm_type")).endswith("_prediction"):
                    del changed["algorithm_type"]  # SA-Solver has another meaning for it
                if is_edm(changed):
                    raise ModelError(f"{of or 'a scheduler'} with sigma_data has a state that grows with the noise: keep that scheduler")
                if lawless:
                    raise ModelError(f"{of or 'a scheduler'} has no beta_schedule and is no flow known here: keep that scheduler")
                if is_angle(changed):
                    changed["algorithm_type"] = "sde-dpmsolver++"  # the only one that it has
                if changed.get("algorithm_type") == "deis":
                    changed.setdefault("final_sigmas_type", "sigma_min")  # where DEIS ends, which has no such option
                if changed.get("use_flow_sigmas") and changed.get("use_karras_sigmas") and "sigma_max" in changed:
                    changed |= _unipc_levels(changed)
                if is_flow(changed) and not changed.get("use_flow_sigmas"):
                    changed |= {"use_flow_sigmas": True, "flow_shift": changed.get("shift", 1.0), "prediction_type": "flow_prediction"}
            if set(DESCRIPTIVE) & set(kwargs) and "solver" not in kwargs:
                changed.pop("solver", None)  # what is asked for now wins over what the name said
            if "final_sigmas_type" in kwargs:
                kwargs.setdefault("to_clean", None)
            if {*DESCRIPTIVE, "solver"} & set(kwargs) and "sampler" not in kwargs:
                changed.pop("sampler", None)  # and over a saved sampler
            if kwargs and "same_as" not in kwargs:
                changed.pop("same_as", None)  # and over the steps of another scheduler
            config = changed
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_scheduler(cls, scheduler: Any, **options: Any) -> Any:  # noqa: ANN401
        """Make a scheduler that takes the very steps of one of diffusers' own: its solver, noise levels, times and start.

        `from_config` keeps a scheduler's noise law and gives it a solver for few steps; this keeps its solver. Samples are the same but for
        rounding, of stochastic ones with the same noises.

        Args:
            scheduler: the scheduler, as ``pipe.scheduler``.
            options: options that override what is read, as ``solver="ddim:eta=1"``; the levels stay those of its class.

        Raises:
            SolverError: a class whose steps no solver here takes, or an option of it that changes them (which).
            FewstepError: an unknown name or option, or one that says other levels.
        """
        same_as, said = read_scheduler(scheduler)
        known = signature(cls.__init__).parameters
        kept = {key: value for key, value in same_as.items() if key in known and key not in (*DESCRIPTIVE, "use_dynamic_shifting")}
        return cls(**{**kept, **said, "same_as": same_as, **options})

    @classmethod
    def from_sampler(cls, folder: str | Path, config: Mapping[str, Any] | None = None, **options: Any) -> Any:  # noqa: ANN401
        """Make a scheduler that runs saved samplers: those of `fewstep fit` or `fewstep optimize`, or a single one.

        ``set_timesteps(n)`` takes the one with ``n`` steps.

        Args:
            folder: a folder with ``sampler.json`` or with ``nfe-NN/sampler.json``; or a hub id.
            config: the configuration of the pipeline's own scheduler; by default the noise law and prediction type on the sampler's card.
            options: options that override the configuration.

        Raises:
            ArtifactError: no sampler there, a damaged one, or one of another noise law.
        """
        samplers = SavedSamplers.load(folder)
        return cls.from_config(samplers.config() if config is None else config, sampler=samplers, **options)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        """Write ``scheduler_config.json`` and, in folders beside it, the artifacts that it names, with their checksums.

        Args:
            save_directory: the folder; made if it is not there.
            push_to_hub: push it to the hub too, as diffusers does.
            kwargs: diffusers' options for the hub.

        Raises:
            ArtifactError: the folder is a file, or cannot be written.
        """
        folder, kept = Path(save_directory), {}
        if folder.is_file():
            raise ArtifactError(f"{folder} is a file: choose a folder to save the scheduler in")
        if self._statistics is not None:
            self._statistics.save(folder / STATISTICS)
            kept[STATISTICS] = STATISTICS
        if self._samplers is not None:
            kept["sampler"] = f"{SAMPLERS}-{self._samplers.fingerprint}"  # those that were saved here before may stay
            self._samplers.save(folder / kept["sampler"])
        before = {key: self.config[key] for key in kept}
        self.register_to_config(**kept)
        try:
            super().save_pretrained(folder, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.register_to_config(**before)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,  # noqa: ANN401
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Load a scheduler that `save_pretrained` wrote, or one of diffusers' own, from a folder or from the hub.

        Args:
            pretrained_model_name_or_path: the folder or hub id.
            subfolder: the folder inside it, ``scheduler`` for a pipeline's.
            return_unused_kwargs: return a pair, with a dict of the options that this class does not have.
            kwargs: options that override the configuration, and diffusers' options for the hub.

        Raises:
            ArtifactError: an artifact beside it is damaged.
            FewstepError: as `from_config`.
        """
        root = Path(str(pretrained_model_name_or_path))
        if not root.exists() and HUB_ID.fullmatch(str(root)):
            options = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
            root = snapshot(str(root), "a scheduler", [f"{subfolder}/*" if subfolder else "*"], **options)
        place = root / (subfolder or "")
        beside: dict[str, Any] = {}
        if (place / cls.config_name).is_file():
            named = read_json(place / cls.config_name)
            here = [key for key in (STATISTICS, "sampler") if named.get(key) and (place / named[key]).is_dir()]
            beside = {key: str(place / named[key]) for key in here}
        return super().from_pretrained(str(root), subfolder=subfolder, return_unused_kwargs=return_unused_kwargs, **{**beside, **kwargs})


def _unipc_levels(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the ends of the Karras levels of diffusers' UniPC on a flow: those that are not given are its table's."""
    law = noise_law({key: value for key, value in config.items() if key not in ("use_flow_sigmas", "prediction_type")}).schedule
    low, high = torch.exp(-law.lam(torch.tensor([law.t_last, law.t_max], dtype=torch.float64))).tolist()
    return {"sigma_min": config["sigma_min"] or low, "sigma_max": config["sigma_max"] or high}


def resolve_artifact(value: Any, kind: Any) -> Any:  # noqa: ANN401 - an artifact class, and a value that names an artifact
    """Return the artifact that a scheduler's option names: itself, one in memory (``memory:...``), or that of a folder or hub id.

    Args:
        value: the option, or None.
        kind: `SavedSamplers` or `ModelStatistics`.

    Raises:
        ArtifactError: a value of another type, an artifact that is no longer in memory, or one that cannot be read.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, str | Path):
        raise ArtifactError(f"{value!r} is no {kind.__name__}: give one, its folder or its hub id")
    if str(value).startswith("memory:"):
        if str(value) not in _KNOWN:
            raise ArtifactError(
                f"this configuration refers to an artifact in memory that is gone: pass {kind.__name__} or its folder again"
            )
        return _KNOWN[str(value)]
    return kind.load(value) if kind is SavedSamplers else kind.from_pretrained(value)
