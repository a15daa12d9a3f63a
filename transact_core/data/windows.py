"""A corpus to windows of token ids; calibration and evaluation never share a token."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import INTERRUPTIONS, Progress, TransActError, silent
from transact_core.data.corpus import Corpus


@dataclass(frozen=True)
class Windows:
    """Windows of token ids taken from one corpus.

    `ids` has shape (windows, sequence_length). `tokens` counts what is fed to the model.
    """

    source: str
    sha256: str
    ids: torch.Tensor = field(repr=False)
    notices: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def sequence_length(self) -> int:
        return self.ids.shape[1]

    def __len__(self) -> int:
        return self.ids.shape[0]


def tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """The whole corpus as one row of token ids, with the tokenizer's own special tokens.

    Raises:
        TransActError: the tokenizer fails, or makes ids that the model has no embedding for.
    """
    try:
        ids = tokenizer(corpus.text, return_tensors="pt", verbose=False)["input_ids"][0].long()
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        raise TransActError(
            f"The tokenizer cannot split {corpus.source} ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); its files may be damaged."
        ) from None
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise TransActError(
            f"The tokenizer makes the id {int(ids.max())} and the model's vocabulary ends at "
            f"{vocab_size - 1}: tokenizer and model do not belong together."
        )
    return ids


def calibration_and_evaluation(
    calibration: Corpus,
    evaluation: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    calibration_tokens: int,
    evaluation_tokens: int,
    sequence_length: int,
    progress: Progress = silent,
) -> tuple[Windows, Windows]:
    """Calibration and evaluation windows; from one text, evaluation has the beginning.

    Raises:
        TransActError: a text is shorter than the windows it must fill.
    """
    progress("Tokenising the text", 0, 2)
    evaluation_ids = tokenise(evaluation, tokenizer, vocab_size)
    evaluation_windows = _windows(evaluation, evaluation_ids, evaluation_tokens, sequence_length)
    progress("Tokenising the text", 1, 2)
    if calibration.sha256 == evaluation.sha256:
        calibration_ids = evaluation_ids[evaluation_windows.tokens :]
    else:
        calibration_ids = tokenise(calibration, tokenizer, vocab_size)
    calibration_windows = _windows(
        calibration, calibration_ids, calibration_tokens, sequence_length
    )
    progress("Tokenising the text", 2, 2)
    return calibration_windows, evaluation_windows


def evaluation_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    tokens: int,
    sequence_length: int,
) -> Windows:
    """Evaluation windows alone."""
    return _windows(corpus, tokenise(corpus, tokenizer, vocab_size), tokens, sequence_length)


def _windows(corpus: Corpus, ids: torch.Tensor, tokens: int, sequence_length: int) -> Windows:
    if sequence_length < 2:
        raise TransActError("The sequence length must be at least 2 tokens.")
    if tokens < sequence_length:
        raise TransActError(
            f"{tokens:,} tokens are fewer than one window of {sequence_length:,}; "
            "ask for more tokens or a shorter sequence length."
        )
    if ids.numel() < sequence_length:
        raise TransActError(
            f"The text {corpus.source} gives {ids.numel():,} tokens here, fewer than one window of "
            f"{sequence_length:,}; choose a longer text, fewer evaluation tokens or a shorter "
            "sequence length."
        )
    notices = corpus.notices
    if ids.numel() < tokens:
        notices = (
            *notices,
            f"The text {corpus.source} gives {ids.numel():,} tokens where {tokens:,} were asked "
            "for; all of them are used.",
        )
    count = min(tokens, ids.numel()) // sequence_length
    return Windows(
        source=corpus.source,
        sha256=corpus.sha256,
        ids=ids[: count * sequence_length].reshape(count, sequence_length),
        notices=notices,
    )
