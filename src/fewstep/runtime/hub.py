"""Artifacts on the Hugging Face hub: the same folders, pushed as one commit and fetched through the hub's own cache.

``huggingface_hub`` (the extra ``hub``) is imported when something is pushed or fetched. Only an artifact's own files travel, and none is a
pickle; whoever loads what was fetched still checks its checksum.
"""

from __future__ import annotations

import glob
import importlib
import json
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from fewstep.runtime.artifact import named_path
from fewstep.runtime.errors import ArtifactError, first_line

__all__ = ["HUB_ID", "Shared", "fetch", "header", "loading", "push", "snapshot"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
T = TypeVar("T", bound="Shared")
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".webp")


def header(card: Mapping[str, Any], *tags: str) -> str:
    """Return the YAML block at the top of a model card, by which the hub files it.

    ``license`` is given only where the card says one, ``base_model`` where it names a hub id (as ``base_model``, or ``of``).

    Args:
        card: provenance of the artifact.
        tags: further tags.
    """
    lines = ["library_name: fewstep", "tags:", *(f"- {tag}" for tag in ("fewstep", "diffusion", *tags))]
    if card.get("license"):
        lines.append(f"license: {json.dumps(str(card['license']))}")  # a JSON string is a YAML string
    base = next((str(card[key]) for key in ("base_model", "of") if HUB_ID.fullmatch(str(card.get(key, "")))), None)
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join(["---", *lines, "---", "", ""])


def loading(repo_id: str, subfolder: str | None, revision: str | None) -> str:
    """Return the call ``from_pretrained(...)`` that loads an artifact pushed there, for its card."""
    options: dict[str, Any] = {"subfolder": subfolder, "revision": revision}
    said = [json.dumps(repo_id), *(f"{name}={json.dumps(value)}" for name, value in options.items() if value)]
    return f"from_pretrained({', '.join(said)})"


def push(
    write: Callable[[Path], Any],
    repo_id: str,
    *,
    subfolder: str | None,
    pictures: Sequence[str | Path],
    private: bool | None,
    revision: str | None,
    commit_message: str,
    token: str | bool | None,
) -> str:
    """Commit the files that ``write(folder)`` writes, with the pictures, to a repository; return the address of the commit.

    Args:
        write: writes the files into the folder it is called with.
        repo_id: ``owner/name``; the repository is made if there is none.
        subfolder: where in the repository.
        pictures: files to put beside them.
        private, revision, commit_message, token: as ``huggingface_hub`` has them.

    Raises:
        ArtifactError: without ``huggingface_hub``; a picture that is none; or a refusal of the hub, or no way to it.
    """
    below = _below(subfolder)
    for picture in map(Path, pictures):
        if picture.suffix.lower() not in PICTURES or not picture.is_file():
            raise ArtifactError(f"{picture} is not a picture that can be pushed: give files of {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for picture in map(Path, pictures):
            shutil.copyfile(picture, folder / picture.name)
        with _hub(f"push to {repo_id}", revision) as hub:
            api = hub.HfApi(token=token, library_name="fewstep")
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            files = [hub.CommitOperationAdd((below / path.name).as_posix(), path) for path in sorted(folder.iterdir())]
            return str(api.create_commit(repo_id, files, commit_message=commit_message, revision=revision).commit_url)


def fetch(
    source: str | Path,
    kind: str,
    *,
    subfolder: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    """Return the folder of an artifact: one on this machine as it is, else that of a hub repository, downloaded into the cache.

    Args:
        source: a folder or a hub id.
        kind: of the artifact.
        subfolder: where in the repository or folder.
        revision, token, cache_dir, local_files_only: as ``huggingface_hub`` has them.

    Raises:
        ArtifactError: without ``huggingface_hub``; no such repository, revision or artifact in it; or the hub cannot be reached.
    """
    below = _below(subfolder)
    if isinstance(source, Path) or named_path(source).is_dir():
        return Path(source, below)
    names = [(below / name).as_posix() for name in (f"{kind}.json", f"{kind}.safetensors", "README.md")]
    how: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    root = snapshot(source, f"a {kind}", [glob.escape(name) for name in names], **how)
    if not Path(root, names[0]).is_file():
        where = f"its folder {subfolder}" if subfolder else "its top folder: if it has several in folders of their own, pass subfolder="
        raise ArtifactError(f"cannot fetch a {kind} from {source}: there is no {kind}.json in {where}")
    return Path(root, below)


def snapshot(source: str, what: str, patterns: Sequence[str], *, revision: str | None = None, **how: Any) -> Path:  # noqa: ANN401
    """Return the folder with the files of a hub repository that match the patterns, downloaded into the cache.

    Args:
        source: a hub id.
        what: how errors call the files.
        patterns: of their names.
        revision: of the repository.
        how: options of ``huggingface_hub.snapshot_download``.

    Raises:
        ArtifactError: as `fetch`.
    """
    with _hub(f"fetch {what} from {source}", revision) as hub:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns), library_name="fewstep", **how))


def _below(subfolder: str | None) -> PurePosixPath:
    path = PurePosixPath((subfolder or "").replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ArtifactError(f"subfolder is a path inside the repository, got {subfolder!r}")
    return path


@contextmanager
def _hub(doing: str, revision: str | None) -> Generator[Any, None, None]:
    """Give ``huggingface_hub``, and turn its errors into an `ArtifactError` that says what to do."""
    try:
        hub, errors = importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ArtifactError(f"cannot {doing}: huggingface_hub is not installed; pip install 'fewstep[hub]'") from error
    # HfHubHTTPError stands below the base error of the HTTP library in use, which also has the errors of a connection
    refusals = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__, errors.OfflineModeIsEnabled)
    try:
        yield hub
    except refusals as error:
        raise ArtifactError(f"cannot {doing}: {_why(error, errors, revision)}") from error


def _why(error: BaseException, errors: Any, revision: str | None) -> str:  # noqa: ANN401 - a module that may not be there
    cause = error.__cause__
    if cause is not None and isinstance(cause, errors.HfHubHTTPError):
        return _why(cause, errors, revision)
    reasons: tuple[tuple[Any, str], ...] = (
        (errors.GatedRepoError, "its owner asks for an agreement first: accept it on the repository's page, then log in or pass token="),
        (
            errors.RepositoryNotFoundError,
            "there is no such repository, or it is private: check the name, log in (hf auth login) or pass token=",
        ),
        (errors.RevisionNotFoundError, f"the repository has no revision {revision!r}"),
        (errors.LocalTokenNotFoundError, "there is no token: log in (hf auth login) or pass token="),
        (errors.HFValidationError, "that is neither a folder here nor the id of a repository, which reads owner/name"),
        (
            (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
            "it is not in the cache, and the hub was not asked or did not answer: check the network, local_files_only and HF_HUB_OFFLINE",
        ),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    first = first_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"you may not (the hub says {status}): log in (hf auth login) with a token that may, or pass token="
    if status is not None:
        return f"the hub says {first}"
    return f"{first}; check the network, and HF_ENDPOINT if you set it" if not isinstance(error, ValueError) else first


class Shared(ABC):
    """An artifact that can be pushed to the hub and loaded from there."""

    kind: ClassVar[str]  # of its files

    @classmethod
    @abstractmethod
    def load(cls: type[T], folder: str | Path) -> T:
        """Load the artifact from a folder."""

    @abstractmethod
    def _write(self, folder: Path, readme: str) -> Path: ...

    @abstractmethod
    def _readme(self, load: str, pictures: Sequence[str] = ()) -> str: ...

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        pictures: Sequence[str | Path] = (),
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Push the artifact to a repository of the Hugging Face hub as one commit.

        Args:
            repo_id: ``owner/name``; the repository is made if there is none.
            subfolder: where in the repository; by default its top folder, whose card is the repository's.
            pictures: files to put beside it, shown in the card.
            private, revision, token: as ``huggingface_hub`` has them; ``revision`` is a branch, made where there is none.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ArtifactError: without ``huggingface_hub``, or a refusal of the hub (with what to do).
        """
        readme = self._readme(loading(repo_id, subfolder, revision), [Path(picture).name for picture in pictures])
        message = commit_message or f"Upload fewstep {self.kind}"
        options: dict[str, Any] = {"private": private, "revision": revision, "commit_message": message, "token": token}
        return push(lambda folder: self._write(folder, readme), repo_id, subfolder=subfolder, pictures=pictures, **options)

    @classmethod
    def from_pretrained(
        cls: type[T],
        repo_id_or_folder: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> T:
        """Load the artifact from a folder, or from a repository of the Hugging Face hub, through the hub's cache.

        Args:
            repo_id_or_folder: ``owner/name``, or a folder.
            subfolder: where in the repository or folder.
            revision, token, cache_dir, local_files_only: as ``huggingface_hub`` has them.

        Raises:
            ArtifactError: as `load`; without ``huggingface_hub``; nothing there by that name, or the hub cannot be reached.
        """
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return cls.load(fetch(repo_id_or_folder, cls.kind, subfolder=subfolder, **options))
