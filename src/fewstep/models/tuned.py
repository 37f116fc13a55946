"""The record of a student: its teacher, and the sampler that it was tuned for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fewstep.runtime.artifact import Count, Number, Record, read_record, write_whole

__all__ = ["Tuned"]

BESIDE, BELOW = "../", "./"


@dataclass(frozen=True)
class TunedRecord(Record):
    """The fields of ``tuned.json``, see `Tuned`."""

    FORMAT = "fewstep-tuned"

    teacher: str
    fingerprint: str
    guidance: Number | None
    solver: str | None
    nfe: Count | None
    form: str


@dataclass(frozen=True)
class Tuned:
    """The record of a student's teacher and of the sampler that it was tuned for: ``tuned.json`` in the model's folder.

    Attributes:
        teacher: a bundled name or a folder. The file names one beside or in the model's own relative to it, so both can be moved together.
        fingerprint: the teacher's.
        guidance: the scale at which the teacher sampled, and the tuned model itself is sampled without; None where it is told the scale.
        solver: the solver that it was tuned for, on the grid of ``optimized/``; None where it is sampled by any, as its teacher is.
        nfe: the network evaluations that it was tuned for, or None.
        form: how it was made: mean, score, operator, flow-map, guided, progressive or matching.
    """

    teacher: str
    fingerprint: str
    guidance: float | None
    solver: str | None
    nfe: int | None
    form: str

    @property
    def halved(self) -> bool:
        """Whether it was made by progressive distillation, so that its steps may be halved again."""
        return self.form == "progressive"

    @property
    def own_steps(self) -> bool:
        """Whether its answers are for its own steps of `solver` alone: it was halved, or makes several passes that match a distribution."""
        return self.halved or (self.form == "matching" and self.solver == "lcm")

    def save(self, folder: Path) -> None:
        """Write ``tuned.json``, whole or not at all."""
        meta = {"format": TunedRecord.FORMAT, "version": TunedRecord.VERSION, **asdict(self)}
        if Path(self.teacher).is_absolute() and Path(self.teacher).parent == folder.resolve().parent:
            meta["teacher"] = BESIDE + Path(self.teacher).name
        elif Path(self.teacher).is_absolute() and Path(self.teacher).parent == folder.resolve():
            meta["teacher"] = BELOW + Path(self.teacher).name
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
        meta = read_record(path, TunedRecord)
        near = meta.teacher.startswith((BESIDE, BELOW))
        teacher = str((folder / meta.teacher).resolve()) if near else meta.teacher
        return cls(teacher, meta.fingerprint, meta.guidance, meta.solver, meta.nfe, meta.form)
