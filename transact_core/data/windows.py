"""A corpus to windows of token ids; calibration and evaluation never share a token."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from transact_core.base.errors import INTERRUPTIONS, Progress, TransActError, silent
from transact_core.data.corpus import BUILTIN_TEXT, Corpus, for_model, read_corpus


@dataclass(frozen=True)
class WindowSpec:
    """Which texts, and how many tokens of them; the defaults of the command line and of the app."""

    calibration: str = BUILTIN_TEXT
    """A source, as `read_corpus` reads it."""
    evaluation: str = BUILTIN_TEXT
    """A source; where it is the same text, evaluation has its beginning."""
    calibration_tokens: int = 8192
    evaluation_tokens: int = 4096
    sequence_length: int = 512
    """Tokens of one window; every window is fed to the model alone."""
    others: tuple[str, ...] = ()
    """Sources of further texts that perplexity is measured on, as the evaluation text is."""


Texts = tuple[Corpus, ...]
"""The calibration text, the evaluation text, and further texts that are evaluated on."""


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


def read_texts(spec: WindowSpec) -> Texts:
    """The texts of a specification; read before a model is loaded, a wrong name costs no wait.

    Raises:
        TransActError: as `read_corpus` does, or two texts that are evaluated on are the same.
    """
    sources = [source.strip() for source in (spec.calibration, spec.evaluation, *spec.others)]
    read = {source: read_corpus(source) for source in dict.fromkeys(sources)}
    texts = tuple(read[source] for source in sources)
    evaluated = [text.sha256 for text in texts[1:]]
    if len(set(evaluated)) < len(evaluated):
        raise TransActError("Each evaluation text is named once; two of these are the same text.")
    return texts


def make_windows(
    spec: WindowSpec,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    context_length: int | None = None,
    texts: Texts | None = None,
    progress: Progress = silent,
) -> tuple[Windows, ...]:
    """Calibration and evaluation windows, then those of the other texts that are evaluated on.

    Where the calibration text is one that is evaluated on, evaluation has its beginning. `texts`
    are those of the specification where they were read before. Where a window is longer than
    `context_length`, in tokens, a notice says so; see `context_length_of`.

    Raises:
        TransActError: a text cannot be read, or is shorter than the windows it must fill.
    """
    texts = texts or read_texts(spec)
    # One text is written for the model once, so that what is the same stays so.
    written = {id(text): for_model(text, tokenizer) for text in texts}
    calibration, *evaluated = (written[id(text)] for text in texts)
    progress("Tokenising the text", 0, len(texts))
    calibration_ids = None
    windows = []
    for text in evaluated:
        ids = tokenise(text, tokenizer, vocab_size)
        windows.append(
            _windows(text, ids, spec.evaluation_tokens, spec.sequence_length, context_length)
        )
        if text.sha256 == calibration.sha256:
            calibration_ids = ids[windows[-1].tokens :]
        progress("Tokenising the text", len(windows), len(texts))
    if calibration_ids is None:
        calibration_ids = tokenise(calibration, tokenizer, vocab_size)
    calibrated = _windows(
        calibration, calibration_ids, spec.calibration_tokens, spec.sequence_length, context_length
    )
    progress("Tokenising the text", len(texts), len(texts))
    return calibrated, *windows


def evaluation_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    tokens: int,
    sequence_length: int,
    context_length: int | None = None,
) -> Windows:
    """Windows of one text alone, from its beginning.

    Raises:
        TransActError: the text is shorter than a window.
    """
    corpus = for_model(corpus, tokenizer)
    ids = tokenise(corpus, tokenizer, vocab_size)
    return _windows(corpus, ids, tokens, sequence_length, context_length)


def context_length_of(config: PreTrainedConfig) -> int:
    """How many tokens the model was trained, or stretched, to see at once.

    `max_position_embeddings`, which counts what `llama3`, `longrope` and most `yarn` models were
    stretched to. Models stretched by `linear` and `dynamic` factors, and some by `yarn`, give the
    length before; for these the longer one is taken, as nothing tells them from the others.
    """
    length = config.max_position_embeddings
    # Where kinds of layers have their own, the length is written out.
    rope = config.rope_parameters or {}
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") in ("linear", "dynamic"):
        length *= factor
    elif rope.get("rope_type") == "yarn":
        length = max(length, (rope.get("original_max_position_embeddings") or 0) * factor)
    return int(length)


def tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """The whole corpus as one row of token ids, with the tokenizer's own special tokens.

    A chat template writes the special tokens itself, and none is added to its text.

    Raises:
        TransActError: the tokenizer fails, or makes ids that the model has no embedding for.
    """
    try:
        encoded = tokenizer(
            corpus.text,
            return_tensors="pt",
            verbose=False,
            add_special_tokens=not corpus.has_special_tokens,
        )
        ids = encoded["input_ids"][0].long()
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


def _windows(
    corpus: Corpus,
    ids: torch.Tensor,
    tokens: int,
    sequence_length: int,
    context_length: int | None,
) -> Windows:
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
    if context_length is not None and sequence_length > context_length:
        notices = (
            *notices,
            f"Windows of {sequence_length:,} tokens are longer than the {context_length:,} that "
            "the model was trained to see at once (max_position_embeddings): what is measured "
            "beyond that says little about the model; choose a shorter sequence length.",
        )
    count = min(tokens, ids.numel()) // sequence_length
    return Windows(
        source=corpus.source,
        sha256=corpus.sha256,
        ids=ids[: count * sequence_length].reshape(count, sequence_length),
        notices=notices,
    )
