"""Texts of any length to windows that a model is trained on.

A text is read and tokenised piece by piece, and no further than its windows are wanted, so that
data sets which no memory could hold can be trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.corpus import (
    MIXED,
    Corpus,
    for_model,
    mix,
    mixed_sources,
    read_corpora,
    shortened_notice,
)
from transact_core.data.windows import TextUse, Windows, tokenise

Pieces = tuple[Corpus, Iterator[Corpus]]
"""The beginning of a text, which tells its SHA-256, and what follows it."""


def open_sources(source: str) -> list[Pieces]:
    """The beginnings of the texts of a source, a mix or a single one; no more is read yet.

    Raises:
        TransActError: as `read_corpus` does.
    """
    opened = []
    for part in mixed_sources(source):
        corpora = read_corpora(part)
        opened.append((next(corpora), corpora))
    if len(opened) > 1:
        mix([beginning for beginning, _ in opened])  # refuses the same text twice
    return opened


def pack(
    sources: Sequence[Pieces],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    tokens: int,
    sequence_length: int,
    used: Mapping[str, int] | None = None,
    progress: Progress = silent,
) -> Windows:
    """Windows dealt evenly from the texts, `tokens` in all or as many as there are.

    A text is one run of tokens, its documents following each other, as in calibration. `used` says,
    by SHA-256, how many tokens at a text's beginning something else takes. Ids are int32, half of
    what torch has them in.

    Raises:
        TransActError: a text gives no window, or cannot be read.
    """
    used = used or {}
    wanted = max(1, tokens // sequence_length)
    beginnings = [for_model(beginning, tokenizer) for beginning, _ in sources]
    skipped = [used.get(text.sha256, 0) for text in beginnings]
    streams = [
        _windows_of(chain([beginning], rest), skip, tokenizer, vocab_size, sequence_length)
        for beginning, (_, rest), skip in zip(beginnings, sources, skipped, strict=True)
    ]
    dealt: list[torch.Tensor] = []
    counts = [0] * len(streams)
    running = list(range(len(streams)))
    while running and len(dealt) < wanted:
        for index in list(running):
            if len(dealt) == wanted:
                break
            window = next(streams[index], None)
            if window is None:
                if not counts[index]:
                    raise TransActError(
                        f"The text {beginnings[index].source} is too short to train on: behind the "
                        f"{skipped[index]:,} tokens that are used for something else it has no "
                        f"window of {sequence_length:,} tokens; name a longer text or a shorter "
                        "sequence length."
                    )
                running.remove(index)
                continue
            dealt.append(window)
            counts[index] += 1
        progress("Reading the text", len(dealt), wanted)
    joined = mix(beginnings) if len(beginnings) > 1 else beginnings[0]
    # More than the beginning of a text is used here.
    notices = tuple(
        notice
        for text in beginnings
        for notice in text.notices
        if notice != shortened_notice(text.source)
    )
    if len(dealt) < wanted:
        notices = (
            *notices,
            f"The text {joined.source} gives {len(dealt) * sequence_length:,} tokens to train on "
            f"where {wanted * sequence_length:,} were asked for; it is read again, shuffled anew.",
        )
    return Windows(
        source=MIXED.join(text.source for text in beginnings),
        sha256=joined.sha256,
        ids=torch.stack(dealt),
        notices=notices,
        uses=tuple(
            TextUse(text.source, text.sha256, count * sequence_length, skip)
            for text, count, skip in zip(beginnings, counts, skipped, strict=True)
        ),
    )


def _windows_of(
    corpora: Iterator[Corpus],
    skip: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    sequence_length: int,
) -> Iterator[torch.Tensor]:
    left = torch.empty(0, dtype=torch.int32)
    for corpus in corpora:
        ids = tokenise(for_model(corpus, tokenizer), tokenizer, vocab_size).int()
        skip, ids = max(0, skip - len(ids)), ids[skip:]
        ids = torch.cat([left, ids])
        whole = len(ids) // sequence_length * sequence_length
        yield from ids[:whole].reshape(-1, sequence_length)
        left = ids[whole:]
