"""Token ids of a short text, such as a prompt, that the model has embeddings for."""

from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import INTERRUPTIONS, TransActError


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    vocab_size: int,
    name: str = "The text",
    add_special_tokens: bool = True,
) -> list[int]:
    """Token ids of a text, each of which has a row in an embedding of `vocab_size` rows.

    A tokenizer can have more tokens than its model has embeddings, as after tokens were added and
    the embedding was not resized; and it can fail in ways that are no `Exception`.

    Args:
        name: What the text is called at the beginning of an error's sentence.

    Raises:
        TransActError: the tokenizer fails, or the text has a token that the model does not have.
    """
    try:
        ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise TransActError(
            f"{name} cannot be split into tokens ({type(error).__name__}: {reason}); the "
            "tokenizer's files may be damaged."
        ) from None
    unknown = next((token for token in ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise TransActError(
            f"{name} has the token {tokenizer.convert_ids_to_tokens(unknown)!r} with the id "
            f"{unknown}, and the model has embeddings for the ids 0 to {vocab_size - 1} only: its "
            "tokenizer has more tokens than its embedding. Write it without that token."
        )
    return ids
