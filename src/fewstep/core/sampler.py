"""The `Sampler` artifact: a solver on a grid as data, in a folder that can be shared and runs without the solver's code."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fewstep.core.errors import ArtifactError, GridError, ModelError
from fewstep.core.grid import TimeGrid
from fewstep.core.schedule import NoiseSchedule, schedule_from_config
from fewstep.core.tableau import Nodes, Solver, Tableau, tabulate

__all__ = ["Sampler", "check_writable", "read_json", "write_whole"]

VERSION = 1


@dataclass(frozen=True, eq=False)
class Sampler:
    """A tableau with its grid and where it came from.

    ``solver`` and ``options`` name the formulas, for the reader and for whoever rebuilds it on another grid;
    running it needs the tableau alone. ``card`` holds provenance: model fingerprint, command, quality rows.
    """

    tableau: Tableau
    grid: TimeGrid
    schedule: NoiseSchedule
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, solver: Solver, grid: TimeGrid, schedule: NoiseSchedule, **card: Any) -> Sampler:  # noqa: ANN401
        """Put a solver on a grid."""
        options = asdict(solver) if is_dataclass(solver) else {}
        return cls(tabulate(solver, solver.nodes(grid, schedule)), grid, schedule, type(solver).__name__, options, card)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return self.tableau.nodes.evaluations

    def save(self, folder: str | Path) -> Path:
        """Write ``sampler.json``, ``sampler.safetensors`` and a ``README.md`` card; each appears whole or not at all.

        Raises:
            ArtifactError: the folder cannot be written, or the options or the card are not JSON-able.
        """
        folder = Path(folder)
        tensors = {f"nodes.{name}": value for name, value in self.tableau.nodes._asdict().items()}
        tensors |= {name: getattr(self.tableau, name) for name in ("record", "update", "bias", "noise")}
        tensors["grid"] = self.grid.t
        data = save_tensors({name: value.detach().clone().contiguous() for name, value in tensors.items()})  # clone: sigma may be t
        meta = {
            "format": "fewstep-sampler",
            "version": VERSION,
            "solver": self.solver,
            "options": dict(self.options),
            "nfe": self.nfe,
            "schedule": self.schedule.to_config(),
            "sha256": hashlib.sha256(data).hexdigest(),
            "card": dict(self.card),
        }
        try:
            text = json.dumps(meta, indent=1) + "\n"
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"the options and the card of a sampler must be plain JSON values: {error}") from error
        write_whole(folder / "sampler.safetensors", data)
        write_whole(folder / "README.md", self._readme().encode())
        write_whole(folder / "sampler.json", text.encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Sampler:
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged, or of a newer version.
        """
        folder = Path(folder)
        meta = read_json(folder / "sampler.json")
        if meta.get("format") != "fewstep-sampler" or meta.get("version") != VERSION:
            raise ArtifactError(
                f"{folder / 'sampler.json'} is {meta.get('format')!r} version {meta.get('version')!r}; this fewstep reads "
                f"'fewstep-sampler' version {VERSION}"
            )
        path = folder / "sampler.safetensors"
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != meta["sha256"]:
                raise ArtifactError(f"{path} is damaged: its checksum is not the one in sampler.json; fetch or make the sampler again")
            tensors = load_tensors(data)
            nodes = Nodes(*(tensors[f"nodes.{name}"] for name in Nodes._fields))
            tableau = Tableau(nodes, *(tensors[name] for name in ("record", "update", "bias", "noise")))
            schedule = schedule_from_config(meta["schedule"])
            return cls(tableau, TimeGrid(tensors["grid"]), schedule, meta["solver"], dict(meta["options"]), dict(meta["card"]))
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, GridError, ModelError) as error:
            raise ArtifactError(f"{folder} is not a whole sampler: {error!r}; fetch or make it again") from error

    def _readme(self) -> str:
        sigmas = ", ".join(f"{s:.4g}" for s in torch.exp(-self.tableau.nodes.lam).tolist())
        facts = "\n".join(f"- {key}: {value}" for key, value in self.card.items())
        return f"""# A fewstep sampler: {self.solver}, {self.nfe} evaluations

- options: {json.dumps(dict(self.options))}
- noise levels sigma/alpha: {sigmas}
{facts}

```python
import fewstep
sampler = fewstep.Sampler.load("path/to/this/folder")
images = fewstep.sample(denoiser, sampler, x_T)
```
"""


def write_whole(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever sees half of it.

    Args:
        content: the bytes, or a function that writes the file at the path it is given.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}; choose a folder that you may write to") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Fail before long work, not after it, if nothing can be written to a folder that may not exist yet.

    Raises:
        ArtifactError: the nearest existing parent is a file, or may not be written to.
    """
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "may not be written to" if parent.is_dir() else "is a file"
        raise ArtifactError(f"cannot write {folder}: {parent} {what}; choose a folder that you may write to")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArtifactError: it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value
