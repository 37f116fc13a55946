"""The trained models that ship with the package, and the one function that loads a model by name or folder."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.errors import ModelError, nearest
from fewstep.models.loaders import Model, load_folder

__all__ = ["BUNDLED", "load_model"]

WEIGHTS = Path(__file__).parent / "weights"

BUNDLED = {  # name -> (what it is, the data it was trained on)
    "digits-edm": ("class-conditional, EDM preconditioning, continuous noise levels 0.002 to 80", "digits"),
    "digits-edm-3step": ("digits-edm tuned to sample in 3 first-order steps", "digits"),
    "digits-dsno": ("digits-edm distilled to sample in 1 pass, 2 or more for less error", "digits"),
    "digits-ddpm": ("unconditional, epsilon prediction, 1000 linear betas, a diffusers pipeline folder", "digits"),
}


def load_model(name: str | Path) -> Model:
    """A bundled model by its name, or one from a folder, see `load_folder`.

    Raises:
        ModelError: neither a bundled name nor a readable folder.
    """
    if str(name) in BUNDLED:
        return load_folder(WEIGHTS / str(name)).named(str(name), BUNDLED[str(name)][1])
    if "/" not in str(name) and not Path(name).exists():
        raise ModelError(f"no model {str(name)!r}: {nearest(str(name), BUNDLED)}")
    return load_folder(name)
