"""A corpus to windows of token ids; calibration and evaluation never share a token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from transact_core.base.errors import INTERRUPTIONS, Progress, TransActError, silent
from transact_core.data.corpus import BUILTIN_TEXT, Corpus, for_model, read_corpus, texts_of


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
class TextUse:
    """How many tokens of one text were taken, from where they begin."""

    source: str
    sha256: str
    tokens: int
    skipped: int = 0
    """Tokens before them that something else takes."""


@dataclass(frozen=True)
class Windows:
    """Windows of token ids taken from one corpus, or dealt from the texts of a mix.

    `ids` has shape (windows, sequence_length). `tokens` counts what is fed to the model.
    """

    source: str
    sha256: str
    ids: torch.Tensor = field(repr=False)
    notices: tuple[str, ...] = ()
    uses: tuple[TextUse, ...] = ()
    """What was taken of each text."""

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
    known: dict[str, torch.Tensor] = {}

    def ids_of(text: Corpus) -> torch.Tensor:
        if text.sha256 not in known:
            known[text.sha256] = tokenise(text, tokenizer, vocab_size)
        return known[text.sha256]

    used: dict[str, int] = {}
    windows = []
    for text in evaluated:
        windows.append(
            _windows(text, ids_of, spec.evaluation_tokens, spec.sequence_length, context_length)
        )
        count_used(used, windows[-1])
        progress("Tokenising the text", len(windows), len(texts))
    calibrated = _windows(
        calibration,
        ids_of,
        spec.calibration_tokens,
        spec.sequence_length,
        context_length,
        used,
    )
    progress("Tokenising the text", len(texts), len(texts))
    return calibrated, *windows


def count_used(used: dict[str, int], windows: Windows) -> None:
    """Notes in `used`, by SHA-256, how far into each text the windows go, in tokens."""
    for use in windows.uses:
        end = use.skipped + use.tokens
        used[use.sha256] = max(used.get(use.sha256, 0), end)


def evaluation_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    tokens: int,
    sequence_length: int,
    context_length: int | None = None,
    used: Mapping[str, int] | None = None,
) -> Windows:
    """Windows of one text alone, from its beginning.

    `used` says, by SHA-256, how many tokens at the beginning of a text something else takes; these
    are left out.

    Raises:
        TransActError: the text is shorter than a window.
    """
    corpus = for_model(corpus, tokenizer)
    return _windows(
        corpus,
        lambda text: tokenise(text, tokenizer, vocab_size),
        tokens,
        sequence_length,
        context_length,
        used,
    )


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
        # Of a long text, transformers' own conversion to a tensor takes as long as the splitting.
        encoded = tokenizer(
            corpus.text,
            verbose=False,
            add_special_tokens=not corpus.has_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
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
    ids_of: Callable[[Corpus], torch.Tensor],
    tokens: int,
    sequence_length: int,
    context_length: int | None,
    used: Mapping[str, int] | None = None,
) -> Windows:
    """Windows of a corpus, dealt evenly from the texts of a mix; `used` as `evaluation_windows`."""
    if sequence_length < 2:
        raise TransActError("The sequence length must be at least 2 tokens.")
    if tokens < sequence_length:
        raise TransActError(
            f"{tokens:,} tokens are fewer than one window of {sequence_length:,}; "
            "ask for more tokens or a shorter sequence length."
        )
    wanted = tokens // sequence_length
    texts = texts_of(corpus)
    skipped = [(used or {}).get(text.sha256, 0) for text in texts]
    rows = []
    for text, start in zip(texts, skipped, strict=True):
        ids = ids_of(text)[start:]
        if ids.numel() < sequence_length:
            raise TransActError(
                f"The text {text.source} gives {ids.numel():,} tokens here, fewer than one window "
                f"of {sequence_length:,}; choose a longer text, fewer evaluation tokens or a "
                "shorter sequence length."
            )
        count = min(wanted, ids.numel() // sequence_length)
        rows.append(ids[: count * sequence_length].reshape(count, sequence_length))
    dealt = deal([len(part) for part in rows], wanted)
    taken = [sum(part == index for part, _ in dealt) for index in range(len(rows))]
    notices = corpus.notices
    available = sum(part.numel() for part in rows)
    # What is left over behind the last whole window of one text is not missed.
    if len(dealt) < wanted or (len(rows) == 1 and ids.numel() < tokens):
        given = ids.numel() if len(rows) == 1 else available
        notices = (
            *notices,
            f"The text {corpus.source} gives {given:,} tokens where {tokens:,} were asked "
            "for; all of them are used.",
        )
    elif len(rows) > 1:
        short = [
            text.source for text, count in zip(texts, taken, strict=True) if count < max(taken) - 1
        ]
        if short:
            notices = (
                *notices,
                f"The text {short[0]} is too short for its share of the mix; the others make up "
                "for it.",
            )
    if context_length is not None and sequence_length > context_length:
        notices = (
            *notices,
            f"Windows of {sequence_length:,} tokens are longer than the {context_length:,} that "
            "the model was trained to see at once (max_position_embeddings): what is measured "
            "beyond that says little about the model; choose a shorter sequence length.",
        )
    return Windows(
        source=corpus.source,
        sha256=corpus.sha256,
        ids=torch.stack([rows[part][row] for part, row in dealt]),
        notices=notices,
        uses=tuple(
            TextUse(text.source, text.sha256, count * sequence_length, start)
            for text, count, start in zip(texts, taken, skipped, strict=True)
        ),
    )


def deal(available: Sequence[int], wanted: int) -> list[tuple[int, int]]:
    """Which windows of which text are taken, as pairs of indices: one of each text in turn.

    `available` counts the windows of each text. Once a text has none left, the others go on, so
    that fewer than `wanted` come out only where all together have fewer.
    """
    dealt: list[tuple[int, int]] = []
    row = 0
    while len(dealt) < wanted and row < max(available):
        dealt += [(text, row) for text, count in enumerate(available) if row < count]
        row += 1
    return dealt[:wanted]
