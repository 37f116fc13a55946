"""Trained models from folders: ours (``fewstep.json``) and diffusers' (a ``UNet2DModel`` with a scheduler). Never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.core.artifact import read_json, write_whole
from fewstep.core.errors import ArtifactError, GridError, ModelError, SolverError
from fewstep.core.grid import TimeGrid, make_grid
from fewstep.core.grid_table import GridTable
from fewstep.core.prediction import EDM, Prediction, prediction
from fewstep.core.sampler import Sampler
from fewstep.core.sampling import Denoiser
from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding, schedule_from_config
from fewstep.core.statistics import ModelStatistics
from fewstep.models.denoiser import AdaptedDenoiser, edm_time, image_size, unet_call
from fewstep.models.guidance import classifier_free
from fewstep.models.operators.student import OperatorDenoiser, OperatorStudent
from fewstep.models.tuned import Tuned

__all__ = ["FITTED", "Model", "load_folder", "save_like", "save_ours"]

FITTED = "fitted"  # the name of fitted samplers, where a solver's would stand


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


def load_folder(source: str | Path) -> Model:
    """A model from a folder with ``unet/`` and either ``fewstep.json`` (as `fewstep train` writes) or a diffusers ``scheduler/``.

    A name like ``owner/repository`` that is no folder is fetched from the hub by diffusers.

    Raises:
        ModelError: no model there, unreadable weights, or a scheduler or prediction type that is not known.
    """
    path = Path(source)
    model = _load_network(path, source)
    return _as_operator(model, path) if (path / "operator.json").is_file() else model


def _as_operator(model: Model, path: Path) -> Model:
    """The operator student around a network that was read already."""
    student = OperatorStudent.load(path, model.adapted)
    return replace(model, denoiser=OperatorDenoiser(student), null_label=None)  # the guidance is in the weights


def _load_network(path: Path, source: str | Path) -> Model:
    if (path / "fewstep.json").is_file():
        return _load_ours(path)
    if not path.exists() and (str(source).count("/") != 1 or str(source).startswith((".", "/"))):
        raise ModelError(f"no model at {source}: name a bundled model (see 'fewstep models') or a folder with unet/ and scheduler/")
    return _load_diffusers(str(source))


def _load_ours(path: Path) -> Model:
    meta = read_json(path / "fewstep.json")
    if meta.get("format") != "fewstep-model" or meta.get("version") != 1:
        raise ModelError(
            f"{path / 'fewstep.json'} is {meta.get('format')!r} version {meta.get('version')!r}, not 'fewstep-model' version 1"
        )
    try:
        if not str(meta["prediction"]).startswith("edm("):
            raise ModelError(f"{path / 'fewstep.json'} has prediction {meta['prediction']!r}; version 1 holds edm(sigma_data) models only")
        denoiser = AdaptedDenoiser(_unet(str(path)), schedule_from_config(meta["schedule"]), meta["prediction"], edm_time, unet_call)
        return Model(path.name, denoiser, tuple(meta["shape"]), meta["null_label"], meta["null_label"], folder=path)
    except KeyError as error:
        raise ModelError(f"{path / 'fewstep.json'} lacks {error}") from error


def save_ours(
    folder: Path,
    network: Any,  # noqa: ANN401 - a diffusers network
    kind: str | Prediction,
    schedule: NoiseSchedule,
    shape: Sequence[int],
    null_label: int | None,
) -> None:
    """Write ``unet/`` and ``fewstep.json``, as `load_folder` reads them."""
    meta = {
        "format": "fewstep-model",
        "version": 1,
        "prediction": prediction(kind).name,
        "schedule": schedule.to_config(),
        "shape": list(shape),
        "null_label": null_label,
    }
    _save_network(network, folder)
    write_whole(folder / "fewstep.json", (json.dumps(meta, indent=1) + "\n").encode())


def _save_network(network: Any, folder: Path) -> None:  # noqa: ANN401 - a diffusers network
    try:
        network.save_pretrained(folder / "unet")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {folder / 'unet'}: {error}; make room and run the same command again") from error


def save_like(model: Model, network: Any, folder: Path) -> None:  # noqa: ANN401 - a diffusers network
    """Write another network of the same kind as ``model``'s, in the form of the model's own folder.

    Raises:
        ModelError: the model was not loaded from a folder, or is an operator student.
    """
    _ = model.adapted
    if model.folder is None:
        raise ModelError(f"{model.name} was not loaded from a folder: save it to one first")
    if (model.folder / "fewstep.json").exists():
        save_ours(folder, network, model.denoiser.prediction, model.denoiser.schedule, model.shape, model.null_label)
        return
    _save_network(network, folder)
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        if (model.folder / file).exists():
            write_whole(folder / file, (model.folder / file).read_bytes())


def _load_diffusers(source: str) -> Model:
    network = _unet(source)
    config = _scheduler_config(source)
    try:
        denoiser = _by_scheduler(network, config)
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{source}/scheduler/scheduler_config.json does not describe a noise schedule: {error!r}") from error
    if network.config.sample_size is None:
        raise ModelError(f"{source}/unet/config.json has no sample_size: write the height and width of the images there")
    shape = (network.config.in_channels, *image_size(network))
    folder = Path(source) if Path(source).is_dir() else None
    return Model(Path(source).name, denoiser, shape, network.config.num_class_embeds, folder=folder)


def _by_scheduler(network: Any, config: dict[str, Any]) -> AdaptedDenoiser:  # noqa: ANN401
    """The noise law that a diffusers scheduler's configuration describes; betas are built by diffusers itself."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    kind, name = config.get("prediction_type", "epsilon"), str(config.get("_class_name", ""))
    if "FlowMatch" in name:
        if config.get("use_dynamic_shifting"):
            raise ModelError(f"{name} shifts its schedule by the image size (use_dynamic_shifting), which a folder does not say: set shift")
        schedule = RectifiedFlow(shift=float(config.get("shift", 1.0)))
        steps = float(config.get("num_train_timesteps", 1000))
        return AdaptedDenoiser(network, schedule, "flow", lambda t: steps * schedule.sigma(t), unet_call)
    if name.startswith("EDM"):
        schedule = VarianceExploding(float(config["sigma_min"]), float(config["sigma_max"]))
        if kind != "epsilon":
            raise ModelError(f"an EDM scheduler with prediction type {kind!r} is not known here, only epsilon (EDM's own F)")
        return AdaptedDenoiser(network, schedule, EDM(float(config["sigma_data"])), edm_time, unet_call)
    if "beta_schedule" not in config or name in ("CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"):
        raise ModelError(
            f"the noise schedule of a {name or 'scheduler without a class name'} is not known here: a table of betas, FlowMatch or EDM is"
        )
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    betas: Any = DDPMScheduler.from_config({key: config[key] for key in keys if config.get(key) is not None})
    return AdaptedDenoiser(network, DiscreteVP.from_alphas_cumprod(betas.alphas_cumprod), kind, call=unet_call)


def _unet(source: str) -> Any:  # noqa: ANN401
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except ImportError as error:
        raise ModelError(f"{source} needs diffusers: pip install 'fewstep[diffusers]'") from error
    try:
        network = UNet2DModel.from_pretrained(source, subfolder="unet", use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers raises OSError, ValueError, SafetensorError and hub errors for an unreadable folder
        raise ModelError(f"cannot load {source}/unet as a UNet2DModel: {str(error).splitlines()[0]}") from error
    return network.eval().requires_grad_(False)


def _scheduler_config(source: str) -> dict[str, Any]:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    try:
        config: Any = DDPMScheduler.load_config(source, subfolder="scheduler")
        return dict(config)
    except Exception as error:
        raise ModelError(f"cannot read {source}/scheduler/scheduler_config.json: {str(error).splitlines()[0]}") from error
