"""Pipelines in folders: which folder holds one, and how it is loaded without running anything that lies there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.runtime.artifact import named_path, read_json
from fewstep.runtime.errors import ModelError, first_line

__all__ = ["is_pipeline", "load_pipeline"]


def is_pipeline(source: str | Path) -> bool:
    """Return whether a folder holds a whole pipeline, whose network `load_folder` does not read by itself."""
    index = named_path(source) / "model_index.json"
    if not index.is_file():
        return False
    unet = read_json(index).get("unet")
    return not (isinstance(unet, list) and unet[-1:] == ["UNet2DModel"])


def load_pipeline(source: str | Path, *, dtype: torch.dtype | None = None) -> Any:  # noqa: ANN401
    """Load a diffusers pipeline from its folder; a text encoder that was not saved stays out.

    Nothing in the folder runs: its classes are those of diffusers and transformers, its weights safetensors.

    Args:
        source: the folder.
        dtype: of the weights; by default float32.

    Raises:
        ModelError: diffusers is not there, or cannot read it; a class of another library or with code of its own, or weights that are a
            pickle.
    """
    folder = named_path(source)
    try:
        from diffusers.pipelines import pipeline_utils
    except ImportError as error:
        raise ModelError(f"{source} needs diffusers: pip install 'fewstep[diffusers]' transformers") from error
    index = read_json(folder / "model_index.json")
    _check_classes(folder, index)
    parts = {key: value for key, value in index.items() if not key.startswith("_") and isinstance(value, list)}
    left_out = {f"text_encoder_{k}": None for k in (2, 3) if f"text_encoder_{k}" in parts and not (folder / f"text_encoder_{k}").is_dir()}
    left_out |= {key.replace("text_encoder", "tokenizer"): None for key in left_out}
    named = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"  # as releases of diffusers call it
    options: dict[str, Any] = {**left_out, **({} if dtype is None else {named: dtype})}
    try:
        return pipeline_utils.DiffusionPipeline.from_pretrained(str(source), use_safetensors=True, local_files_only=True, **options)
    except Exception as error:  # diffusers raises OSError, ValueError, EnvironmentError and others for an unreadable folder
        raise ModelError(f"cannot load {source} as a pipeline: {first_line(error)}") from error


def _check_classes(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that names a class outside diffusers and transformers: diffusers imports it, from a file beside it if there is one.

    Args:
        folder: of the pipeline.
        index: what its ``model_index.json`` holds.

    Raises:
        ModelError: there is such a class (which).
    """
    from diffusers import pipelines

    where = f"{folder / 'model_index.json'} was refused, and nothing of it has run: "
    if not isinstance(name := index.get("_class_name"), str):
        raise ModelError(f"{where}its pipeline is {str(name)[:80]}, not the name of a class of diffusers")
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue
        library, kind = value if len(value) == 2 else (None, None)
        if not isinstance(library, str) or not isinstance(kind, str):
            raise ModelError(f"{where}its {part} is {str(value)[:80]}, not a library and a class")
        known = library in ("diffusers", "transformers") or (library.isidentifier() and library in dir(pipelines))
        if not known or (folder / f"{library}.py").exists() or (folder / part / f"{library}.py").exists():
            raise ModelError(f"{where}its {part} is of the library {library}, and only classes of diffusers and transformers are loaded")
        for config in (folder / part).glob("*config.json"):
            if "auto_map" in read_json(config):
                raise ModelError(f"{where}{config} names code of its own (auto_map)")
