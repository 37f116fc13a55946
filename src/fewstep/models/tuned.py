"""The record of a student: its teacher, and the sampler that it was tuned for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fewstep.runtime.artifact import read_json, write_whole
from fewstep.runtime.errors import ArtifactError

__all__ = ["Tuned"]

FORMAT, VERSION = "fewstep-tuned", 1
BESIDE = "../"


@dataclass(frozen=True)
class Tuned:
    """The record of a student's teacher and of the sampler that it was tuned for: ``tuned.json`` in the model's folder.

    Attributes:
        teacher: a bundled name or a folder. The file names a folder beside the model's own relative to it, so both can be moved together.
        fingerprint: the teacher's.
        guidance: the scale at which the teacher sampled; the tuned model itself is sampled without.
        solver: the solver that it was tuned for, on the grid of ``optimized/``.
        nfe: the network evaluations that it was tuned for.
        form: how it was tuned: mean, score or operator.
    """

    teacher: str
    fingerprint: str
    guidance: float
    solver: str
    nfe: int
    form: str

    def save(self, folder: Path) -> None:
        """Write ``tuned.json``, whole or not at all."""
        meta = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if Path(self.teacher).is_absolute() and Path(self.teacher).parent == folder.resolve().parent:
            meta["teacher"] = BESIDE + Path(self.teacher).name
        write_whole(folder / "tuned.json", (json.dumps(meta, indent=1) + "\n").encode())

    @staticmethod
    def in_folder(folder: Path) -> bool:
        """Return whether a folder holds a finished student."""
        return (folder / "tuned.json").exists()

    @classmethod
    def load(cls, folder: Path) -> Tuned | None:
        """Read what `save` wrote, or None where a folder has none.

        Raises:
            ArtifactError: it is damaged or of another version.
        """
        path = folder / "tuned.json"
        if not path.exists():
            return None
        meta = read_json(path)
        if (meta.pop("format", None), meta.pop("version", None)) != (FORMAT, VERSION):
            raise ArtifactError(f"{path} is not {FORMAT!r} version {VERSION}: use the version of fewstep that wrote it, or tune again")
        if str(meta.get("teacher", "")).startswith(BESIDE):
            meta["teacher"] = str((folder / meta["teacher"]).resolve())
        try:
            return cls(**meta)
        except TypeError as error:
            raise ArtifactError(f"{path} is damaged ({error}): fetch or make it again") from error
