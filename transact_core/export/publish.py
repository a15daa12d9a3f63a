"""An output folder and its GGUF files, published on the model hub.

Everything goes up in one commit, so that the repository has all of it or none. The token is the one
that is given, or that `huggingface_hub` finds; it is sent to the hub and appears nowhere else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from transact_core.base.errors import INTERRUPTIONS, Progress, TransActError, first_line, silent

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""OWNER/NAME as the hub takes it."""
MESSAGE = "Pruned with the TransAct workbench"


@dataclass(frozen=True)
class Publication:
    """What is on the hub now."""

    address: str
    files: tuple[str, ...]
    bytes: int


def require_publishable(repository: str, token: str | None = None) -> None:
    """Refuses, before anything is computed, what could not be published afterwards.

    Raises:
        TransActError: the name is none of the hub's, or there is no token.
    """
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise TransActError(
            f"{repository!r} is no name of a model on the hub; write it as OWNER/NAME."
        )
    if token is None and get_token() is None:
        raise TransActError(
            "Publishing needs a token of the hub that may write: log in with `hf auth login`, or "
            "set HF_TOKEN."
        )


def publish(
    repository: str,
    folder: Path,
    files: Sequence[Path] = (),
    public: bool = False,
    token: str | None = None,
    progress: Progress = silent,
) -> Publication:
    """Puts a folder's files, and further files beside them, into a repository on the hub.

    The repository is made where there is none, private unless `public`; one that exists stays as
    visible as it is.

    Raises:
        TransActError: the name, the token or the hub refuses it, or it cannot be reached.
    """
    require_publishable(repository, token)
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    paths |= {path.name: path for path in files}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    stage = f"Publishing {repository}"
    progress(stage, 0, 2)
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        progress(stage, 1, 2)
        additions = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
        api.create_commit(repository, additions, commit_message=MESSAGE)
    except INTERRUPTIONS:
        raise
    except Exception as error:
        raise TransActError(_refusal(repository, error, token or get_token())) from None
    progress(stage, 2, 2)
    return Publication(
        f"{constants.ENDPOINT}/{repository}",
        tuple(paths),
        sum(path.stat().st_size for path in paths.values()),
    )


def _refusal(repository: str, error: Exception, token: str | None) -> str:
    """Why the hub took nothing, in one sentence that does not hold the token."""
    status = None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
    if status in (401, 403):
        return (
            f"The hub does not let the present token write to {repository}; use a token of an "
            "account that may, with the right to write."
        )
    reason = " ".join(first_line(error).split())
    if token:
        reason = reason.replace(token, "…")
    return f"{repository} was not published ({reason}); no file of it is on the hub."
