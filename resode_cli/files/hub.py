"""To the Hugging Face hub: the files of an exported model, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from ..errors import ResodeError, UsageError, one_line
from ..sources.timm_models import offline_if_unreachable

CARD = "README.md"


def check_push(repository: str) -> None:
    """Refuse, before any work is done, what cannot be pushed.

    Raises UsageError for what is no name of a repository, ResodeError where no token says who pushes.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push {repository!r}: write OWNER/NAME, of letters, digits, '-', '_' and '.'") from error
    if huggingface_hub.get_token() is None:
        raise ResodeError("--push needs a token of the Hugging Face hub: `hf auth login`, or HF_TOKEN")


def push(repository: str, files: Mapping[str, Path | bytes], *, private: bool, force: bool) -> tuple[str, list[str]]:
    """The repository's address, and what to say. It is made where there is none.

    files: by their names there. private: of a new repository; an old one must be so. force: replace a model card too.
    Raises ResodeError, with the reason, where the hub cannot be reached or refuses.
    """
    api = huggingface_hub.HfApi(library_name="resode")
    notes = []
    try:
        with offline_if_unreachable():
            url = api.create_repo(repository, private=True if private else None, exist_ok=True)
            if private and not api.model_info(url.repo_id).private:
                raise ResodeError("it is there already, and public; without --private it takes the files")
            wanted = dict(files)
            if not force and CARD in wanted and api.file_exists(url.repo_id, CARD):
                del wanted[CARD]
                notes.append(f"{url.repo_id} keeps the {CARD} that it has; --force replaces it")
            operations = [
                huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=given)
                for name, given in wanted.items()
            ]
            api.create_commit(url.repo_id, operations, commit_message="Export of resode")
    except ResodeError as error:
        raise ResodeError(f"--push {repository}: {error}") from error
    except Exception as error:  # of many kinds, by the client's version
        raise ResodeError(f"--push {repository}: {_reason(error)}") from error
    return str(url), notes


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub cannot be reached from here"
    said = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return one_line(str(said).splitlines()[0][:200])
