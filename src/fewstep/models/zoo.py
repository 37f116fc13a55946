"""The trained models that ship with the package, and the one function that loads a model by name, folder or file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.models.formats.checkpoints import load_checkpoint
from fewstep.models.formats.folders import load_folder
from fewstep.models.model import WEIGHTS, Model
from fewstep.runtime.artifact import named_path
from fewstep.runtime.errors import ModelError, nearest
from fewstep.runtime.front_door import checked

__all__ = ["BUNDLED", "load_model"]

BUNDLED = {  # name -> (what it is, the data it was trained on)
    "digits-edm": ("class-conditional, EDM preconditioning, continuous noise levels 0.002 to 80", "digits"),
    "digits-edm-3step": ("digits-edm tuned to sample in 3 first-order steps", "digits"),
    "digits-flow-map": ("digits-edm distilled into a flow map, which samples in 1 pass, 2 or more for less error", "digits"),
    "digits-ddpm": ("unconditional, epsilon prediction, 1000 linear betas, a diffusers pipeline folder", "digits"),
}


@checked
def load_model(
    name: str | Path,
    *,
    format: str | None = None,
    config: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Model:
    """Load a bundled model by its name, one from a folder or the hub (see `load_folder`), or one from a file (see `load_checkpoint`).

    Args:
        name: the name, folder, hub id or file.
        format, config: of a file, see `load_checkpoint`.
        trust: read a pickle (see `load_checkpoint`); import, and so run, the code that a folder of `Model.save` names.

    Raises:
        ModelError: something that wants trust without it; neither a bundled name nor a readable folder or file; options of a file for
            anything else.
    """
    if not isinstance(name, str | Path):
        raise ModelError(f"a model is loaded by a name, a folder or a file, got {type(name).__name__} {str(name)[:80]}")
    named_path(name)
    if str(name) not in BUNDLED and Path(name).is_file():
        return load_checkpoint(name, format=format, config=config, trust=trust)
    if format is not None or config:
        raise ModelError(f"{name} is no file: format and config are for checkpoint files; a folder or a bundled model says them itself")
    if str(name) in BUNDLED:
        return replace(load_folder(WEIGHTS / str(name)), name=str(name), data=BUNDLED[str(name)][1])
    if "/" not in str(name) and not Path(name).exists():
        raise ModelError(f"no model {str(name)!r}: {nearest(str(name), BUNDLED)}")
    return load_folder(name, trust=trust)
