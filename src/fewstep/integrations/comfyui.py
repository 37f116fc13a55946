"""ComfyUI nodes: this library's solvers and saved samplers as SAMPLER, its spacings as SIGMAS.

A node is a class with ``INPUT_TYPES``, ``RETURN_TYPES``, ``FUNCTION`` and ``CATEGORY``, found through ``NODE_CLASS_MAPPINGS``. ComfyUI's
own modules (``comfy``, ``folder_paths``) exist only inside it and are imported when a node runs. The work is done by `sample_fewstep` and
`sigmas_for`; this file translates ComfyUI's names and values.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.core.schedule import DiscreteVP, NoiseSchedule, RectifiedFlow, VarianceExploding
from fewstep.core.spacings import KNOWN, is_curve
from fewstep.core.statistics import ModelStatistics
from fewstep.integrations.kdiffusion import Law, sample_fewstep, sigmas_for
from fewstep.runtime.errors import ArtifactError, FewstepError, GridError, look_up
from fewstep.sampling.sampler import Sampler
from fewstep.solvers import SOLVERS, takes_statistics

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "FewstepArtifact", "FewstepSampler", "FewstepSigmas", "law_of"]

FOLDER = "fewstep"  # below ComfyUI's models
KINDS: dict[str, type[Sampler] | type[ModelStatistics]] = {"sampler": Sampler, "statistics": ModelStatistics}
LAWS = ("auto", "eps", "flow")
ENDS = ("clean", "append", "sigma_min")


class ArtifactLink(NamedTuple):
    """The value of a FEWSTEP_ARTIFACT link between nodes: an artifact and the name that it was chosen by."""

    name: str
    artifact: Sampler | ModelStatistics


class FewstepArtifact:
    """A ComfyUI node that loads a sampler or statistics from a folder below ``models/fewstep``."""

    RETURN_TYPES = ("FEWSTEP_ARTIFACT",)
    RETURN_NAMES = ("artifact",)
    FUNCTION = "load"
    CATEGORY = "sampling/fewstep"
    DESCRIPTION = "A fewstep sampler, or statistics of a model for DPM-Solver-v3, from a folder below models/fewstep."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the node's inputs: the names of the folders that exist now."""
        return {"required": {"name": (sorted(_folders()),)}}

    @classmethod
    def IS_CHANGED(cls, name: str) -> str:  # noqa: N802 - ComfyUI's name
        """Return the artifact's JSON text, by whose change ComfyUI knows to load it again."""
        kind, folder = _folder(name)
        return (folder / f"{kind}.json").read_text()

    def load(self, name: str) -> tuple[ArtifactLink]:
        """Load the artifact of this name, as the node's one output.

        Raises:
            ArtifactError: there is none of that name, or it is damaged.
        """
        kind, folder = _folder(name)
        return (ArtifactLink(name, KINDS[kind].load(folder)),)


class FewstepSampler:
    """A ComfyUI node that makes a SAMPLER for custom sampling: a solver with options, or an artifact."""

    RETURN_TYPES = ("SAMPLER",)
    RETURN_NAMES = ("sampler",)
    FUNCTION = "build"
    CATEGORY = "sampling/fewstep"
    DESCRIPTION = "A solver for few steps. A sampler artifact takes the place of the solver; statistics belong to dpm-solver-v3."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the node's inputs: solver, options, law, artifact."""
        options = {"default": "", "tooltip": "options of the solver, for example steps=3:corrector=same"}
        kinds = "what the model's sigmas are: auto asks the model, eps is Stable Diffusion's, flow is SD3's and Flux'"
        law = {"default": "auto", "tooltip": kinds}
        return {
            "required": {"solver": (list(SOLVERS), {"default": "unipc-2"}), "options": ("STRING", options), "law": (list(LAWS), law)},
            "optional": {"artifact": ("FEWSTEP_ARTIFACT",)},
        }

    def build(self, solver: str, options: str = "", law: str = "auto", artifact: ArtifactLink | None = None) -> tuple[Any]:
        """Return a ``comfy.samplers.KSAMPLER`` around `sample_fewstep`, as the node's one output.

        Args:
            solver: its name in this library.
            options: of the solver, as ``key=value`` joined by colons.
            law: what the model's sigmas are: ``eps``, ``flow``, or ``auto`` to ask the model.
            artifact: a sampler in place of the solver, or statistics for one that takes them.

        Raises:
            FewstepError: outside ComfyUI, or a law that is not known.
            ArtifactError: statistics for a solver that takes none.
        """
        look_up(law, dict.fromkeys(LAWS), "law")
        spec = f"{solver}:{options.strip().strip(':')}".rstrip(":")
        chosen = None if artifact is None else artifact.artifact
        choice: dict[str, Any] = {"solver": spec}
        if isinstance(chosen, Sampler):
            chosen.tableau.check_asks("it knows nothing of prompts")
            choice = {"sampler": chosen}
        elif chosen is not None:
            if not takes_statistics(spec):
                raise ArtifactError(f"{artifact.name if artifact else ''} holds statistics, and {solver} takes none: choose dpm-solver-v3")
            choice["statistics"] = chosen
        return (_comfy("comfy.samplers").KSAMPLER(_sample, extra_options={**choice, "law": law}),)


class FewstepSigmas:
    """A ComfyUI node that makes SIGMAS: a spacing on the levels of a MODEL, or the levels of a sampler artifact.

    Statistics have no levels of their own: with them the spacing counts.
    """

    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    FUNCTION = "levels"
    CATEGORY = "sampling/fewstep"
    DESCRIPTION = "Noise levels: a spacing of fewstep on the model's range, or exactly those that a sampler artifact was made for."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the node's inputs: model, spacing, steps, denoise, end, artifact, strength."""
        tips = {
            "spacing": "leading, linspace and trailing are for models with discrete times, shift and dynamic_shift for flow models; an "
            "artifact has its own",
            "spacing_options": "options of the spacing, for example rho=5, or end=sigma_min for levels with a name of another program",
            "strength": "the share of noise to begin with, sigma / (alpha + sigma), for image to image: all steps lie below that level, "
            "whatever the spacing and their number; 0.5 is as much noise as image, 1 all of the model's range",
            "end": "clean: the last step goes to 0; append: sigma_min, and then 0; sigma_min: stop there",
        }
        return {
            "required": {
                "model": ("MODEL",),
                "spacing": (list(KNOWN), {"default": "angle", "tooltip": tips["spacing"]}),
                "steps": ("INT", {"default": 8, "min": 1, "max": 1000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
                "end": (list(ENDS), {"default": "clean", "tooltip": tips["end"]}),
            },
            "optional": {  # after the others, so that graphs that were saved before it existed still load
                "artifact": ("FEWSTEP_ARTIFACT",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": tips["strength"]}),
                "spacing_options": ("STRING", {"default": "", "tooltip": tips["spacing_options"]}),
            },
        }

    def levels(
        self,
        model: Any,  # noqa: ANN401 - ComfyUI's MODEL
        spacing: str,
        steps: int,
        denoise: float = 1.0,
        end: str = "clean",
        artifact: ArtifactLink | None = None,  # noqa: ANN401
        strength: float = 1.0,
        spacing_options: str = "",
    ) -> tuple[Tensor]:
        """Return the sigmas ``[steps+1]``, float32, as the node's one output.

        Args:
            model: ComfyUI's MODEL.
            spacing: the name of a spacing of this library, or of noise levels of another program, which have an end of their own.
            steps: intervals.
            denoise: 0..1, the part of the noise that is removed: below 1 these are the last ``steps`` of ``steps / denoise``, as ComfyUI's
                own schedulers have it.
            end: ``clean``, ``append`` or ``sigma_min``, see `sigmas_for`.
            artifact: a sampler, whose levels are then taken.
            strength: 0..1, the share of noise to begin with, see `sigmas_for`: all ``steps`` lie below that level, 0 is none of them.
            spacing_options: of the spacing, as ``key=value`` joined by colons.

        Raises:
            GridError: a spacing that the model's law does not have; another end beside levels that have their own; ``denoise`` or
                ``strength`` of a sampler artifact, which starts where it does; both of them below 1.
        """
        if denoise < 1 and strength < 1:
            raise GridError(
                f"denoise ({denoise:g}) counts steps and strength ({strength:g}) is a noise level: leave one of the two at 1, to begin once"
            )
        sampling = model.get_model_object("model_sampling")
        law = law_of(sampling)
        chosen = None if artifact is None else artifact.artifact
        if isinstance(chosen, Sampler):
            if denoise != 1:
                raise GridError(f"a sampler starts at its own level: denoise must be 1, got {denoise:g}; use a spacing for less")
            if strength != 1:
                raise GridError(
                    f"a sampler's numbers belong to its own levels: strength must be 1, got {strength:g}; use a spacing, and in Fewstep "
                    "Sampler a solver without the artifact"
                )
            return (sigmas_for(chosen, law=law),)
        if end != "clean" and end in ENDS and is_curve(spacing):
            raise GridError(
                f"the levels of {spacing} have an end of their own: leave end at clean, or say it in spacing_options, as end={end}"
            )
        if denoise <= 0 or strength == 0:
            return (torch.empty(0),)
        schedule, count = _schedule_of(sampling, law), int(steps / denoise)
        spacing = f"{spacing}:{spacing_options.strip().strip(':')}".rstrip(":")
        whole = sigmas_for(spacing, count, schedule=schedule, end=look_up(end, {e: e for e in ENDS}, "end"), law=law, strength=strength)
        return (whole[-(steps + 1) :],)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "FewstepArtifact": FewstepArtifact,
    "FewstepSampler": FewstepSampler,
    "FewstepSigmas": FewstepSigmas,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FewstepArtifact": "Fewstep Artifact",
    "FewstepSampler": "Fewstep Sampler",
    "FewstepSigmas": "Fewstep Sigmas",
}


# -- sampling -------------------------------------------------------------------------------------------------------------------------


def _sample(
    model: Any,  # noqa: ANN401 - ComfyUI's own wrapper of its model
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    law: str = "auto",
    **choice: Any,  # noqa: ANN401 - solver, sampler, statistics
) -> Tensor:
    """Sample as ComfyUI's sampler functions do, with the law of the model and noise from the seed in ``extra_args``."""
    known: dict[str, Law] = {"eps": "eps", "flow": "flow"}
    seeds = _seeds((extra_args or {}).get("seed"), len(x))
    return sample_fewstep(
        model, x, sigmas, extra_args, callback, disable, law=known.get(law) or law_of(_sampling_of(model)), seeds=seeds, **choice
    )


def _seeds(seed: int | None, count: int) -> Tensor:
    """Return one seed per sample of a batch from ComfyUI's single seed, with no seed in common with the next one's."""
    generator = torch.Generator().manual_seed(0 if seed is None else int(seed))
    return torch.stack([torch.randint(2**62, (), generator=generator) for _ in range(count)]) if count else torch.empty(0)


def _sampling_of(model: Any) -> Any:  # noqa: ANN401
    """Return the ``model_sampling`` behind a sampler function's model, patched where ComfyUI knows of a patch.

    Raises:
        FewstepError: the model has none.
    """
    guider = getattr(model, "inner_model", None)
    patcher = getattr(guider, "model_patcher", None)
    if patcher is not None:
        return patcher.get_model_object("model_sampling")
    found = getattr(getattr(guider, "inner_model", None), "model_sampling", None)
    if found is None:
        raise FewstepError("this model does not say what its sigmas are: choose law eps or flow instead of auto")
    return found


def law_of(sampling: Any) -> Law:  # noqa: ANN401
    """Return the law of a ComfyUI ``model_sampling``: ``flow`` for ``CONST``, where ``x = (1 - sigma) x0 + sigma eps``, else ``eps``.

    Raises:
        FewstepError: outside ComfyUI.
    """
    return "flow" if isinstance(sampling, _comfy("comfy.model_sampling").CONST) else "eps"


def _schedule_of(sampling: Any, law: Law) -> NoiseSchedule:  # noqa: ANN401
    """Return the noise law in whose time a spacing is laid out.

    * A flow model: the shift is where its table has the middle of time, ``u = shift / (1 + shift)``, whatever it is called there.
    * A table of levels at discrete times: a `DiscreteVP`, so that the levels are those that the network knows.
    * Else, and for a table that stands still at its ends (Stable Cascade's), the range alone.
    """
    low, high, table = float(sampling.sigma_min), float(sampling.sigma_max), getattr(sampling, "sigmas", None)
    if law == "flow":
        middle = 0.5 if table is None or len(table) < 2 else float(table[len(table) // 2 - 1])
        end = RectifiedFlow(middle / (1 - middle))
        t = end.t_of_lam(torch.tensor([(1 - s) / s for s in (low, high)], dtype=torch.float64).log())
        return RectifiedFlow(end.shift, t_min=float(t[0]), t_max=float(t[1]))
    if table is not None and hasattr(sampling, "num_timesteps") and bool((torch.diff(table) > 0).all()):
        return DiscreteVP.from_alphas_cumprod(1 / (1 + table.detach().cpu().double() ** 2))
    return VarianceExploding(low, high)


# -- what ComfyUI has -----------------------------------------------------------------------------------------------------------------


def _comfy(name: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FewstepError(f"{name} exists only inside ComfyUI: elsewhere use fewstep.integrations.kdiffusion") from error


def _folders() -> dict[str, tuple[str, Path]]:
    """Return the kind and folder of every artifact by its name, below ``models/fewstep`` and the paths of ``extra_model_paths.yaml``."""
    paths = _comfy("folder_paths")
    if FOLDER not in paths.folder_names_and_paths:
        paths.add_model_folder_path(FOLDER, str(Path(paths.models_dir) / FOLDER))
    found: dict[str, tuple[str, Path]] = {}
    for root in map(Path, paths.get_folder_paths(FOLDER)):
        for folder, _, files in os.walk(root, followlinks=True):  # people link model folders
            kind = next((kind for kind in KINDS if f"{kind}.json" in files), None)
            if kind is not None:
                found.setdefault(Path(folder).relative_to(root).as_posix(), (kind, Path(folder)))
    return found


def _folder(name: str) -> tuple[str, Path]:
    found = _folders()
    if not found:
        raise ArtifactError(f"no artifact below ComfyUI's models/{FOLDER}: put a sampler's or statistics' folder there")
    return look_up(name, found, "artifact", ArtifactError)
