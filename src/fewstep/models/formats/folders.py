"""Trained models from folders: ours (``fewstep.json``) and diffusers' (a ``UNet2DModel`` with a scheduler). Never a pickle.

A folder of ours is of version 1 (a ``UNet2DModel`` with EDM preconditioning), 2 (which describes a whole `Model`, see `describe`), 3
(whose network is of the caller's own code, see `own`) or 4 (as 2, of a reflected model: with its cube and measured preconditioning).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.domain import Cube
from fewstep.core.prediction import Measured, Prediction, prediction
from fewstep.core.schedule import NoiseSchedule, schedule_from_config
from fewstep.models.carried import FITTED, OPTIMIZED, Carried
from fewstep.models.flow_map import OperatorMap, StudentMap
from fewstep.models.flow_map_student import FlowMapStudent
from fewstep.models.formats.description import description
from fewstep.models.formats.diffusers_law import noise_law
from fewstep.models.formats.own import OwnRecord, entries, own_files, own_model
from fewstep.models.guided import form_of, load_guided, save_guided, untold
from fewstep.models.model import Model
from fewstep.models.networks.calls import NetworkTime, edm_time, image_size, same_time, unet_call
from fewstep.models.networks.extra_embedding import ConditionedNetwork
from fewstep.models.networks.operator import OperatorStudent
from fewstep.models.networks.unets import NETWORKS, build_network, empty_network
from fewstep.runtime.artifact import (
    MODEL_FILES,
    Count,
    Number,
    Record,
    Whole,
    check_file,
    named_path,
    read_json,
    read_record,
    write_whole,
    written_apart,
)
from fewstep.runtime.errors import ArtifactError, FewstepError, ModelError, first_line
from fewstep.runtime.front_door import check_fields
from fewstep.runtime.job import Job
from fewstep.runtime.spec import as_typed

__all__ = [
    "DESCRIPTION",
    "as_student",
    "check_savable",
    "describe",
    "described",
    "holds_model",
    "imports_code",
    "load_folder",
    "read_tensors",
    "record_of",
    "save_described",
    "save_like",
    "save_model",
    "save_ours",
    "write_model",
]

UNFINISHED = ("work", "steps", "checkpoint")  # folders of a run that has not made its model yet
DESCRIPTION, WEIGHTS, OWN_WEIGHTS = "fewstep.json", "unet/model.safetensors", "network.safetensors"
FORMAT = "fewstep-model"
STUDENTS = ("operator", "flow-map", "guided")  # the files beside a network that make a student of it
LARGEST = 1 << 31  # numbers in one sample


@dataclass(frozen=True)
class PlainRecord(Record):
    """The fields of ``fewstep.json`` of version 1: a ``UNet2DModel`` with EDM preconditioning, whose options lie in ``unet/``."""

    FORMAT, VERSION = FORMAT, 1

    prediction: str
    schedule: dict[str, Any]
    shape: tuple[Count, Count, Count]
    null_label: Whole | None


@dataclass(frozen=True)
class ModelRecord(Record):
    """The fields of ``fewstep.json`` of version 2, and of a single file's header: see `description`."""

    FORMAT, VERSION = FORMAT, 2

    network: dict[str, Any]
    prediction: str
    schedule: dict[str, Any]
    time: dict[str, Any]
    shape: list[Count]
    classes: Count | None
    null_label: Whole | None


@dataclass(frozen=True)
class ReflectedRecord(ModelRecord):
    """The fields of ``fewstep.json`` of version 4, and of a single file's header: those of version 2, and of a reflected model.

    Attributes:
        domain: the walls of its cube, ``low`` and ``high``.
        preconditioning: the rows of a `Measured` prediction; None where the prediction has a name.
    """

    VERSION = 4

    domain: dict[str, Number]
    preconditioning: list[list[Number]] | None


def record_of(version: object) -> type[ModelRecord]:
    """Return the fields of a description of a version: those of 4, else of 2, which refuse any other."""
    return ReflectedRecord if version == ReflectedRecord.VERSION else ModelRecord


def load_folder(source: str | Path, *, trust: bool = False) -> Model:
    """Load a model from a folder with ``unet/`` and either ``fewstep.json`` (as `fewstep train` writes) or a diffusers ``scheduler/``.

    A name like ``owner/repository`` that is no folder is fetched from the hub by diffusers.

    Args:
        source: the folder or hub id.
        trust: import, and so run, the code that a folder of `Model.save` names.

    Raises:
        ModelError: no model there, one whose code is not trusted (and what it names), unreadable weights, or a scheduler or prediction type
            that is not known.
        ArtifactError: ``fewstep.json`` is damaged, or of another version.
    """
    path = named_path(source)
    if not holds_model(path) and any((path / name).is_dir() for name in UNFINISHED):
        raise ModelError(f"{path} holds an unfinished run and no model yet: run the command that began it again, it continues")
    model = _load_network(path, source, trust)
    for kind in STUDENTS:
        if (path / f"{kind}.safetensors").exists() and not (path / f"{kind}.json").exists():
            raise ArtifactError(f"{path} has {kind}.safetensors, the rest of a student, and no {kind}.json: fetch or make it again")
    if (path / "guided.json").is_file():
        model = load_guided(path, model)
    if (path / "operator.json").is_file():
        return as_student(model, OperatorStudent.load(path, model))
    return as_student(model, FlowMapStudent.load(path, model)) if (path / "flow-map.json").is_file() else model


def as_student(model: Model, student: OperatorStudent | FlowMapStudent) -> Model:
    """Return the student that was made of a model. Its guidance is in its weights, or it is told its scale."""
    flow_map = OperatorMap(student) if isinstance(student, OperatorStudent) else StudentMap(student)
    return model.with_network(student, flow_map=flow_map, null_label=None)


def _load_network(path: Path, source: str | Path, trust: bool) -> Model:
    if (path / DESCRIPTION).is_file():
        return _load_ours(path, trust)
    if not path.exists() and (str(source).count("/") != 1 or str(source).startswith((".", "/"))):
        raise ModelError(f"no model at {source}: name a bundled model (see 'fewstep models') or a folder with unet/ and scheduler/")
    return _load_diffusers(str(source))


def _load_ours(path: Path, trust: bool) -> Model:
    file = path / DESCRIPTION
    version = read_json(file).get("version")
    if version == OwnRecord.VERSION:
        return _load_own(path, trust)
    if version != PlainRecord.VERSION:
        return replace(described(read_record(file, record_of(version)), read_tensors(path / WEIGHTS)[1], path.name, file), folder=path)
    meta = read_record(file, PlainRecord)
    if not meta.prediction.startswith("edm("):
        raise ModelError(f"{file} has prediction {meta.prediction!r}; version 1 holds edm(sigma_data) models only")
    network, schedule = _unet(str(path)), schedule_from_config(meta.schedule)
    called = {"time": edm_time, "call": unet_call, "classes": meta.null_label, "null_label": meta.null_label}
    return Model(network, schedule, meta.prediction, shape=meta.shape, name=path.name, folder=path, **called)


def _load_own(path: Path, trust: bool) -> Model:
    file = path / DESCRIPTION
    meta = read_record(file, OwnRecord)
    if not trust:
        raise ModelError(
            f"{path} holds a network of someone's own code, {' and '.join(entries(meta))}, and importing that would run it: if you trust "
            "it, load it by fewstep.load_model(folder, trust=True), or say --trust on the command line"
        )
    return replace(own_model(meta, read_tensors(path / OWN_WEIGHTS)[1], path.name, file), folder=path)


def describe(model: Model) -> dict[str, Any]:
    """Return a JSON-able description of a model beside its weights, which `described` reads back.

    Raises:
        ModelError: its network, or its network's time, is a function that cannot be written down, or has a dtype by decree.
    """
    network, time = model.need_denoiser().network, model.time
    times: dict[Any, NetworkTime] = {edm_time: NetworkTime("log", 0.25), same_time: NetworkTime()}
    time = time if isinstance(time, NetworkTime) else times.get(time)
    config = getattr(network, "options", None) if type(network).__name__ in NETWORKS else getattr(network, "config", None)
    if model.dtype is not None or model.time_dtype is not None:
        raise ModelError(
            f"{model.name} cannot be written down: a description has no dtype and time_dtype; save the network in its own dtype"
        )
    if time is None or config is None:
        raise ModelError(f"{model.name} cannot be written down: its {'time' if time is None else 'network'} is a function of your own")
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    kind, facts = type(network).__name__, (model.need_shape(), model.classes, model.null_label)
    predicted = prediction(model.prediction)
    about = description(kind, options, model.schedule, predicted.name, time, *facts)
    if model.domain is None:
        return {"format": FORMAT, "version": ModelRecord.VERSION, **about}
    table = [list(row) for row in predicted.table] if isinstance(predicted, Measured) else None
    about |= {"domain": model.domain.to_config(), "preconditioning": table}
    return {"format": FORMAT, "version": ReflectedRecord.VERSION, **about}


def described(meta: ModelRecord, weights: Mapping[str, Tensor], name: str, where: Path) -> Model:
    """Make the model of a description and its weights.

    Args:
        meta: its description.
        weights: by name.
        name: of the model.
        where: the file of the description, for errors.

    Raises:
        ModelError: the description lacks something, or the weights do not fit it.
    """
    try:
        network = build_network(meta.network["class"], meta.network["options"], weights)
        schedule = schedule_from_config(meta.schedule)
        time = NetworkTime(**meta.time, schedule=schedule if meta.time["form"] == "sigma" else None)
        check_fields(time)
        if not (math.isfinite(time.scale) and math.isfinite(time.factor)):
            raise ModelError(f"the network's time is scaled by {time.scale} and {time.factor}, which are not finite")
        call = None if type(network).__name__ in NETWORKS else unet_call
        labels: dict[str, Any] = {"classes": meta.classes, "null_label": meta.null_label}
        predicted: str | Prediction = meta.prediction
        if isinstance(meta, ReflectedRecord):
            labels["domain"] = Cube(**meta.domain)
            if (meta.preconditioning is None) == (predicted == Measured.NAME):
                raise ModelError(f"prediction {predicted!r} and a table of measured coefficients belong together")
            predicted = predicted if meta.preconditioning is None else Measured(meta.preconditioning)
        if math.prod(meta.shape) > LARGEST:
            raise ModelError(f"samples of shape {meta.shape} have more numbers than any network makes")
        return Model(network, schedule, predicted, shape=tuple(meta.shape), time=time, call=call, name=name, **labels)
    except FewstepError as error:
        raise ModelError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{where} does not describe a model: {error!r}; make it again") from error


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file.

    Raises:
        ModelError: it is not there, or damaged.
    """
    try:
        check_file(path)
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, ArtifactError) as error:
        raise ModelError(f"cannot read {path} as safetensors: {error}; fetch or make it again") from error


def save_described(model: Model, path: Path, network: Any = None) -> None:  # noqa: ANN401
    """Write a model as a folder of version 2 or 4, or as one file where ``path`` ends in ``.safetensors``; each file whole or not at all.

    Args:
        model: to be written.
        path: the folder or file.
        network: weights of the same kind to write in place of the model's, or None.

    Raises:
        ModelError: see `describe`.
        ArtifactError: it cannot be written.
    """
    meta, single = json.dumps(describe(model)), path.suffix == ".safetensors"
    network = model.need_denoiser().network if network is None else network
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    header = {"format": "pt", **({"fewstep": meta} if single else {})}
    write_whole(path if single else path / WEIGHTS, lambda target: save_file(weights, target, header))
    if not single:
        write_whole(path / DESCRIPTION, (json.dumps(json.loads(meta), indent=1) + "\n").encode())


def imports_code(model: Model) -> bool:
    """Return whether a folder of the model names code to import, or would if it were saved."""
    return model.needs_trust or (model.folder is None and not _has_format(model))


def _has_format(model: Model) -> bool:
    """Return whether a description of version 2 or 4 says all of a model."""
    network = model.network
    ours = model.call is None if type(network).__name__ in NETWORKS else model.call is unet_call and hasattr(network, "config")
    timed = isinstance(model.time, NetworkTime) or model.time in (edm_time, same_time)
    plain = model.dtype is None and model.time_dtype is None and not model.identity and model.build is None
    predicted = prediction(model.prediction)
    known = predicted.is_named or (isinstance(predicted, Measured) and model.domain is not None)
    return ours and timed and plain and known


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model, or part of one."""
    return any((folder / name).exists() for name in MODEL_FILES)


def check_savable(model: Model) -> None:
    """Refuse, before long work, a model whose student could not be saved.

    Raises:
        ModelError: see `save_model`.
    """
    if model.folder is not None and not imports_code(model):
        return
    model = untold(model)
    if _has_format(model):
        describe(model)
    else:
        own_files(model)


def save_model(model: Model, folder: str | Path) -> Path:
    """Write a model as a folder, whole or not at all: by its description where that says all, else with the names of its code.

    Raises:
        ModelError: it is somebody else's flow map, or cannot be described (see `describe`) nor built again (see `own_files`).
        ArtifactError: the folder holds a model, is in use, or cannot be written.
    """
    student: Any = model.network
    folder, made_of = named_path(folder), _made_of(model)
    check_savable(made_of)
    with Job.open("save", folder, alone=True, makes_model=True):
        if holds_model(folder):
            raise ArtifactError(f"{folder} already holds a model, which would be lost: choose another folder, or remove it")
        with written_apart(folder, last=DESCRIPTION) as scratch:
            write_model(made_of, scratch)
            if made_of is not model:
                student.save(scratch, trust=not _has_format(untold(made_of)))
            _write_carried(model.carried, scratch)
    return folder


def _made_of(model: Model) -> Model:
    """Return the model of the network inside a student, the opposite of `as_student`; any other model as it is.

    Raises:
        ModelError: it is somebody else's flow map.
    """
    student = model.network
    if isinstance(student, OperatorStudent):
        return model.with_network(student.operator.network, flow_map=None)
    if isinstance(student, FlowMapStudent):
        told = model.scales is not None
        return model.with_network(student.network if told else student.network.network, flow_map=None)
    if model.flow_map is not None:
        raise ModelError(f"{model.name} is a flow map of your own code, which makes it anew: save its network's weights with that code")
    return model


def _write_carried(carried: Carried, folder: Path) -> None:
    """Write the artifacts of a model below its folder, where `Carried` finds them."""

    def place(kind: str, guidance: float | None) -> Path:
        return folder / (kind if guidance is None or guidance == 1 else f"{kind}-guidance-{as_typed(guidance)}")

    for table in carried.grids:
        table.save(place(OPTIMIZED, table.guidance) / table.solver)
    for sampler in carried.samplers:
        sampler.save(place(FITTED, sampler.card.get("guidance")) / f"nfe-{sampler.nfe:02d}")
    for one in carried.statistics:
        one.save(place("statistics", one.guidance))
    if carried.tuned is not None:
        carried.tuned.save(folder)


def write_model(model: Model, folder: Path) -> None:
    """Write the files of a model; the description is the last of them."""
    if model.scales is not None and isinstance(model.network, ConditionedNetwork):
        tuned = model.tuned
        steps = {} if tuned is None or tuned.nfe is None else {"steps": tuned.nfe}
        save_guided(model.network, form_of(model), steps, folder, trust=not _has_format(untold(model)))
    model = untold(model)
    if _has_format(model):
        save_described(model, folder)
        return
    weights, about = own_files(model)
    write_whole(folder / OWN_WEIGHTS, lambda target: save_file(weights, target, {"format": "pt"}))
    write_whole(folder / DESCRIPTION, about)


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
    write_whole(folder / DESCRIPTION, (json.dumps(meta, indent=1) + "\n").encode())


def _save_network(network: Any, folder: Path) -> None:  # noqa: ANN401 - a diffusers network
    try:
        network.save_pretrained(folder / "unet")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {folder / 'unet'}: {error}; make room and run the same command again") from error


def save_like(model: Model, network: Any, folder: Path) -> None:  # noqa: ANN401 - a diffusers network
    """Write another network of the same kind as ``model``'s, in the form of the model's own folder, or as `Model.save` would.

    Raises:
        ModelError: the model is an operator student, or cannot be saved.
    """
    null = model.need_denoiser().null_label if model.scales is None else model.classes  # as the file says that the classes are
    model = untold(model)
    if model.folder is None or imports_code(model):
        write_model(model.with_network(network), folder)
        return
    if isinstance(model.network, tuple(NETWORKS.values())) or model.domain is not None:
        save_described(model, folder, network)
        return
    if (model.folder / DESCRIPTION).exists():
        save_ours(folder, network, model.prediction, model.schedule, model.need_shape(), null)
        return
    _save_network(network, folder)
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        if (model.folder / file).exists():
            write_whole(folder / file, (model.folder / file).read_bytes())


def _load_diffusers(source: str) -> Model:
    network = _unet(source)
    config = _scheduler_config(source)
    try:
        law = noise_law(config)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{source}/scheduler/scheduler_config.json does not describe a noise schedule: {error!r}") from error
    if network.config.sample_size is None:
        raise ModelError(f"{source}/unet/config.json has no sample_size: write the height and width of the images there")
    try:
        shape = (network.config.in_channels, *image_size(network))
    except (LookupError, TypeError) as error:
        raise ModelError(f"{source}/unet/config.json has sample_size {network.config.sample_size!r}: write height and width") from error
    folder = Path(source) if Path(source).is_dir() else None
    called = {"time": law.time, "call": unet_call, "classes": network.config.num_class_embeds}
    return Model(network, law.schedule, law.prediction, shape=shape, name=Path(source).name, folder=folder, **called)


def _unet(source: str) -> Any:  # noqa: ANN401
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except ImportError as error:
        raise ModelError(f"{source} needs diffusers: pip install 'fewstep[diffusers]'") from error
    if (folder := Path(source) / "unet").is_dir():
        _check_unet(folder)
    try:
        network = UNet2DModel.from_pretrained(source, subfolder="unet", use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers raises OSError, ValueError, SafetensorError and hub errors for an unreadable folder
        raise ModelError(f"cannot load {source}/unet as a UNet2DModel: {first_line(error)}") from error
    return network.eval().requires_grad_(False)


def _check_unet(folder: Path) -> None:
    """Refuse a ``UNet2DModel`` whose options make another number of weights than its file has, before memory is taken for them.

    Raises:
        ModelError: they differ, or the folder cannot be read.
    """
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.exists():
        return  # weights in several files, or none
    options = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    weights = read_tensors(path)[1]
    made = sum(weight.numel() for weight in empty_network("UNet2DModel", options, len(weights)).state_dict().values())
    if made != (found := sum(weight.numel() for weight in weights.values())):
        raise ModelError(f"{folder} has {found} numbers, where its config.json describes a UNet2DModel of {made}: fetch or make it again")


def _scheduler_config(source: str) -> dict[str, Any]:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    try:
        config: Any = DDPMScheduler.load_config(source, subfolder="scheduler")
        return dict(config)
    except Exception as error:
        raise ModelError(f"cannot read {source}/scheduler/scheduler_config.json: {first_line(error)}") from error
