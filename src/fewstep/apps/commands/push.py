"""``fewstep push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.apps.console import console
from fewstep.core.statistics import ModelStatistics
from fewstep.models.formats.folders import holds_model
from fewstep.runtime.errors import ArtifactError
from fewstep.sampling.sampler import Sampler

__all__ = ["push"]


def push(
    folder: Annotated[Path, typer.Argument(help="Of a saved sampler or of statistics.")],
    repository: Annotated[str, typer.Argument(help="On the Hugging Face hub: owner/name.")],
    *,
    subfolder: Annotated[str | None, typer.Option(help="Where in the repository; by default its top.")] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, only you see it.")] = False,
) -> None:
    """Put a saved sampler or statistics on the hub."""
    kind = ModelStatistics if (folder / "statistics.json").exists() else Sampler
    if holds_model(folder) and kind is Sampler and not (folder / "sampler.json").exists():
        raise ArtifactError(
            f"{folder} holds a model, and push takes a sampler or statistics: name one of those in it, or put the model on the hub by "
            "huggingface_hub.upload_folder"
        )
    pictures = sorted(folder.glob("*.png"))
    address = kind.load(folder).push_to_hub(repository, subfolder=subfolder, pictures=pictures, private=private or None)
    console.print(f'pushed: {address}\nnext: fewstep.{kind.__name__}.from_pretrained("{repository}")')
