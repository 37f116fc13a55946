"""The pipeline that a command or the page names: how it is loaded, and what it is called with."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.integrations.diffusers.pipeline_calls import read_calls
from fewstep.integrations.diffusers.pipeline_folders import is_pipeline, load_pipeline
from fewstep.integrations.diffusers.pipelines import PipelineModel, from_pipeline, is_called_directly
from fewstep.runtime.artifact import named_path, read_json
from fewstep.runtime.errors import ModelError, look_up
from fewstep.runtime.front_door import at_least, check_fields, checked_class
from fewstep.runtime.process import default_device

__all__ = ["PipelineOptions", "loaded_pipeline", "open_pipeline", "prompted", "prompted_pipeline", "takes_prompts"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


@checked_class
@dataclass(frozen=True)
class PipelineOptions:
    """Options of a pipeline: the calls of its folder, and how it is held in memory.

    Args:
        prompts: a text file for a text-to-image or text-to-video pipeline, one prompt on each line.
        calls: a file of JSON lines for any pipeline, the arguments of one call on each; pictures by their paths.
        height: of a pipeline's pictures, in pixels.
        width: of a pipeline's pictures, in pixels.
        frames: of a pipeline's videos.
        dtype: of a pipeline's weights: float32, float16 or bfloat16.
        offload: a pipeline's weights to the CPU while they are not used: model or sequential.
    """

    prompts: Path | None = None
    calls: Path | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    dtype: str | None = None
    offload: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(self, height=1, width=1, frames=1)
        if self.dtype is not None:
            look_up(self.dtype, DTYPES, "dtype of a pipeline", ModelError)
        if self.offload is not None:
            look_up(self.offload, OFFLOADS, "way to offload a pipeline", ModelError)
        if self.prompts is not None and self.calls is not None:
            raise ModelError("give one of --prompts and --calls: a call says its own prompt")

    @property
    def given(self) -> list[str]:
        """The options that were typed."""
        return [f"--{name}" for name, value in asdict(self).items() if value is not None]


def open_pipeline(source: str, asked: PipelineOptions, guidance: float | None) -> PipelineModel:
    """Load a pipeline from its folder as a model.

    Args:
        source: the folder.
        asked: the options.
        guidance: the guidance scale that was typed, for the calls of a pipeline that is led by them.

    Raises:
        ModelError: see `load_pipeline` and `from_pipeline`; guidance beside calls, which say their own.
    """
    pipe = loaded_pipeline(source, asked)
    said: dict[str, Any] = {"height": asked.height, "width": asked.width, "num_frames": asked.frames}
    if asked.calls is not None:
        if guidance is not None:
            raise ModelError("the calls of a pipeline say their own guidance_scale: leave --guidance out")
        return from_pipeline(pipe, calls=read_calls(asked.calls), **said)
    return from_pipeline(pipe, asked.prompts, guidance_scale=1.0 if guidance is None else guidance, **said)


def loaded_pipeline(source: str, asked: PipelineOptions) -> Any:  # noqa: ANN401 - a diffusers pipeline
    """Load a pipeline from its folder, on the device that commands compute on.

    Raises:
        ModelError: see `load_pipeline`.
    """
    pipe = load_pipeline(source, dtype=None if asked.dtype is None else DTYPES[asked.dtype])
    if asked.offload is not None:
        getattr(pipe, OFFLOADS[asked.offload])(device=default_device())
    elif default_device().type != "cpu":
        pipe.to(default_device())
    return pipe


# -- one prompt, on the page --------------------------------------------------------------------------------------------


def takes_prompts(source: str) -> bool:
    """Return whether a name is the folder of a pipeline with a text encoder; nothing of it is loaded."""
    return is_pipeline(source) and any(part.startswith("text_encoder") for part in read_json(named_path(source) / "model_index.json"))


def prompted_pipeline(source: str) -> Any:  # noqa: ANN401
    """Load a pipeline that takes prompts and whose network is called directly.

    Raises:
        ModelError: its own calls lead it, and make the pictures; see `load_pipeline`.
    """
    kind = read_json(named_path(source) / "model_index.json").get("_class_name")
    if not isinstance(kind, str) or not is_called_directly(kind):
        raise ModelError(
            f"{source} holds a {str(kind)[:80]}, which is led by its own calls: the page shows Stable Diffusion 1, 2, XL and 3 and Flux; "
            "use fewstep.from_pipeline(pipe, calls=[...]) in Python, or fewstep fit --calls"
        )
    return loaded_pipeline(source, PipelineOptions())


def prompted(pipe: Any, prompt: str) -> PipelineModel:  # noqa: ANN401
    """Return such a pipeline as a model of one prompt, at the guidance scale that its own call has by default.

    Raises:
        ModelError: see `from_pipeline`.
    """
    model = from_pipeline(pipe, [prompt])
    scale = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    return model if model.null_label is None else replace(model, guidance_scale=float(scale))  # Flux's network takes it as an input
