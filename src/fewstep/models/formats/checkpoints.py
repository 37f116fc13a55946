r"""Published checkpoints as models: EDM's network pickles, ScoreSDE's and guided-diffusion's state dicts, and single safetensors files.

Every one becomes a network of `unets` and a denoiser ``x0 = (x - sigma eps)/alpha`` or EDM's, in the noise law that it was trained with:

    EDMPrecond          alpha = 1, sigma = t             edm(sigma_data)    the network's time is  log(sigma)/4
    VPPrecond, vp       alpha^2 + sigma^2 = 1, linear    eps = F            (M-1) t, as in Song et al.'s continuous training
    VEPrecond, ve       alpha = 1, sigma = t             eps = -F           log(sigma/2): sigma is for images in [-1, 1], theirs in [0, 1]
    iDDPMPrecond        the table sigma/alpha = u        eps = F            M - 1 - j at sigma/alpha = u_j
    guided-diffusion    a table of betas                 eps = F            its index

(arXiv 2206.00364, table 1, and its appendix C; 2011.13456; 2105.05233. The sign of F is turned in the last layer's weights.) Between the
entries of a table the network is given the fraction, where EDM's code would round.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.formats.edm_pickles import edm_network, read_edm
from fewstep.models.formats.folders import DESCRIPTION, ModelRecord, described, read_tensors, record_of, save_described
from fewstep.models.formats.state_dicts import Weights, guided_network, score_sde_network
from fewstep.models.model import Model
from fewstep.runtime.artifact import check_file, named_path, parse_json, parse_record, read_file, written_apart
from fewstep.runtime.errors import ArtifactError, FewstepError, ModelError, first_line, look_up
from fewstep.runtime.job import Job

__all__ = ["FORMATS", "convert", "load_checkpoint", "save_single_file"]

FORMATS = ("edm", "guided-diffusion", "safetensors", "score-sde")
TRUST = (
    "is a pickle, which could run any program when opened in the ordinary way. fewstep reads tensors and a few known classes from it, "
    "runs nothing, and refuses any other; say that you trust where it comes from with trust=True, and convert it to safetensors"
)


def load_checkpoint(path: str | Path, *, format: str | None = None, config: Mapping[str, Any] | None = None, trust: bool = False) -> Model:
    """Load a model from one file.

    Args:
        path: EDM's ``.pkl``, ScoreSDE's or guided-diffusion's ``.pth`` or ``.pt``, each as ``.safetensors``, or a file of `convert`.
        format: ``edm``, ``score-sde``, ``guided-diffusion`` or ``safetensors`` (ours); by default the format that the file shows.
        config: options that the weights do not show, by their names in the checkpoint's own code (see docs/checkpoints.md).
        trust: read a pickle, see the module.

    Raises:
        ModelError: no such file, a pickle that is not trusted or names a class it should not, a damaged or foreign file, or options that
            are missing, unknown, or contradicted by the weights.
    """
    path, config = named_path(path), dict(config or {})
    if path.is_dir():
        raise ModelError(f"{path} is a folder, and a checkpoint is one file: name that, or give the folder to load_model as it is")
    if not path.is_file():
        raise ModelError(f"no file at {path}: name a checkpoint, or see load_model for folders and names")
    check_file(path)
    if format is not None:
        look_up(format, dict.fromkeys(FORMATS), "format", ModelError)
    try:
        meta, weights = _read(path, format, config, trust)
        meta = {"format": ModelRecord.FORMAT, "version": ModelRecord.VERSION, **meta}  # only a file of ours says the two itself
        return described(parse_record(json.dumps(meta), record_of(meta["version"]), path), weights, str(path), path)
    except FewstepError as error:
        raise ModelError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except Exception as error:  # a damaged file makes pickle and torch raise almost anything
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{path} is damaged, or not what it is taken for ({why}); fetch it again") from error


def _read(path: Path, kind: str | None, config: dict[str, Any], trust: bool) -> tuple[dict[str, Any], Weights]:
    """Return the description and the weights in a file."""
    pickled = kind == "edm" or (kind is None and path.suffix == ".pkl")
    if pickled and path.suffix != ".safetensors":
        if not trust:
            raise ModelError(f"{path} {TRUST}")
        _no_config(config, "an EDM pickle")
        return edm_network(*read_edm(path))
    if path.suffix == ".safetensors":
        header, file = read_tensors(path)
        if "fewstep" in header and kind in (None, "safetensors"):
            _no_config(config, "a file that fewstep wrote")
            return parse_json(header["fewstep"], path), file
    else:
        file = _torch_file(path)
    kind = kind or _shown(file)
    if kind == "score-sde":
        return score_sde_network(file, config)
    if kind in ("edm", "guided-diffusion"):
        if not all(isinstance(value, Tensor) for value in file.values()):
            raise ModelError(f"{path} is not a state dict, a mapping of names to tensors")
        weights = {key: value.float() for key, value in file.items()}
        return guided_network(weights, config) if kind == "guided-diffusion" else edm_network(config, weights)
    raise ModelError(f"{path} does not show which format it has: pass format=, one of {', '.join(FORMATS)}")


def _no_config(config: Mapping[str, Any], what: str) -> None:
    if config:
        raise ModelError(f"{what} has all its options in itself: leave config out (it has {', '.join(config)})")


def _torch_file(path: Path) -> dict[str, Any]:
    """Read a file of ``torch.save`` that holds tensors and numbers alone."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than weights, or is no file of torch's: it was refused, and nothing of it has run "
            f"({' '.join(str(error).split())[:300]})"
        ) from error
    if not isinstance(file, dict) or not all(isinstance(key, str) for key in file):
        raise ModelError(f"{path} holds a {type(file).__name__}, not a mapping of names to weights")
    return file


def _shown(file: Mapping[str, Any]) -> str | None:
    """Return the format that the names in a file show, or None."""
    names = set(file["model"]) if isinstance(file.get("model"), Mapping) else set(file)
    if any(name.removeprefix("module.").startswith("all_modules.") for name in names):
        return "score-sde"
    return "guided-diffusion" if "time_embed.0.weight" in names else None


def save_single_file(model: Model, path: str | Path) -> Path:
    """Write a model as one safetensors file with its description in the header, and return the path.

    `load_checkpoint` reads it back to the bit.

    Raises:
        ModelError: a name without ``.safetensors``; a student; a network or a time that is a function of your own.
        ArtifactError: it cannot be written.
    """
    path = named_path(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"a single file is named *.safetensors, got {path}")
    save_described(model, path)
    return path


def convert(
    path: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    config: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Model:
    """Write a checkpoint as a folder of ours, or as one file where ``out`` ends in ``.safetensors``; return the model.

    The result appears whole or not at all, and no other job of ours may work in its folder meanwhile.

    Args:
        path, format, config, trust: see `load_checkpoint`.
        out: the file, which must not exist yet, or the folder, which must hold nothing yet.

    Raises:
        ModelError: as `load_checkpoint`.
        ArtifactError: ``out`` cannot be written or is there already, or its folder is in use.
        FewstepError: there are several processes.
    """
    out = named_path(out)
    single = out.suffix == ".safetensors"
    there = ArtifactError(f"{out} is there already: name another, or move it away")
    if out.exists() and (single or not out.is_dir()):
        raise there
    with Job.open("convert", out.parent if single else out, alone=True, makes_model=True) as job:
        if out.exists() if single else job.files - {DESCRIPTION}:
            raise there
        model = load_checkpoint(path, format=format, config=config, trust=trust)
        if single:
            save_described(model, out)
            return replace(model, name=str(out))
        with written_apart(out, last="unet") as scratch:
            save_described(model, scratch)
            begun = out / DESCRIPTION  # by a run that was killed before it moved the weights
            if begun.exists() and read_file(begun) != read_file(scratch / DESCRIPTION):
                raise there
    return replace(model, name=out.name, folder=out)
