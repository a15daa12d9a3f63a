"""Checkpoint folders from the model hub.

The token is the one that `huggingface_hub` finds: `HF_TOKEN`, or the login that `hf auth login`
stored.
"""

from pathlib import Path

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from transact_core.base.errors import TransActError, first_line
from transact_core.models.licence import LICENCE_FILES

FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", *LICENCE_FILES)
"""Patterns of the files that are fetched: configurations, weights, tokenizer and licence."""


def download(hub_id: str) -> Path:
    """The folder of a model's files in the hub's cache, fetched where they are not there yet.

    Raises:
        TransActError: the model does not exist, is not accessible, or the hub cannot be reached.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FETCHED)))
    except Exception as error:
        message = access_refusal(hub_id, error) or (
            f"{hub_id} could not be fetched from the hub ({first_line(error)}); check the id and "
            "the network, or download it elsewhere and name its folder."
        )
        raise TransActError(message) from None


def access_refusal(hub_id: str, error: BaseException, kind: str = "model") -> str | None:
    """The message where the hub refused access; None where the error is of another kind.

    `kind` is what the id names, `model` or `dataset`. The hub answers 401 for what is private as
    for what does not exist, so that the message names both.
    """
    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, HfHubHTTPError):
        answer = answer.__cause__
    if answer is None:
        return None
    status = answer.response.status_code
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token of that account"
    has_token = get_token() is not None
    if isinstance(answer, GatedRepoError):
        if has_token:
            return (
                f"{hub_id} is gated, and the account of the present token has no access to it: "
                f"accept its licence at {page}, or wait until access is granted."
            )
        return f"{hub_id} is gated: accept its licence at {page}, then {log_in}."
    if isinstance(answer, RepositoryNotFoundError) or status in (401, 403):
        if has_token:
            return (
                f"The hub has no {kind} {hub_id} that the present token may read; check the id, "
                f"and if the {kind} is private, {log_in}."
            )
        return (
            f"The hub has no public {kind} {hub_id}; check the id, and if the {kind} is private, "
            f"{log_in}."
        )
    return None
