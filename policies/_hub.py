"""To and from the Hugging Face hub, with the arguments that models there have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaptive.calibration import CertificateError

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def located(
    name: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    **download: Any,
) -> Path:
    """Return a local path: what is there, or a download of the files from a hub repository.

    Parameters
    ----------
    name : str or Path
        A path, or ``namespace/name`` of a repository. What exists on disk comes first; a `Path`
        is never looked for on the hub.
    files : sequence of str
        What to download.
    revision : str, optional
        Branch, tag or commit.
    token : str or bool, optional
    **download
        As for ``huggingface_hub.snapshot_download`` (``cache_dir``, ``force_download``,
        ``local_files_only``).

    Raises
    ------
    CertificateError
        If there is neither.
    """
    if Path(name).exists() or isinstance(name, Path) or not _REPOSITORY.fullmatch(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(files), **download
        )
    except (OSError, ValueError) as error:  # every error of the hub is one of the two
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CertificateError(
            f"{name!r} is neither a path here nor a readable repository on the hub: {reason}"
        ) from error
    return Path(found)


def pushed(
    save: Callable[[Path], object],
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
) -> str:
    """Upload what ``save`` writes into a folder, in one commit; return the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="adaptive-control")
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(name, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        save(Path(folder))
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)
