"""What a cut breaks, text by text: the damage to each token, with what both models expected.

The measure is that of `forward.token_damage`. Several texts of different kinds show whether a
repair that was fitted on one of them holds on the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, silent
from transact_core.data.corpus import Corpus
from transact_core.data.windows import Windows, context_length_of, evaluation_windows
from transact_core.experiments.side_by_side import DENSE, PRUNED
from transact_core.forward.generation import decode, pieces
from transact_core.forward.token_damage import TokenDamage, measure_token_damage
from transact_core.models.load import LoadedModel

Guesses = tuple[tuple[str, float], ...]
"""Texts of next tokens with their probabilities, the most probable first."""


@dataclass(frozen=True)
class DamagedPiece:
    """One token of a text, or the tokens that make one character, and what was expected there."""

    window: int
    text: str
    tokens: int
    damage: float
    """Kullback–Leibler divergence in nats; of several tokens their sum."""
    dense_nll: float
    pruned_nll: float
    dense_guesses: Guesses
    """Of the piece's first token."""
    pruned_guesses: Guesses


@dataclass(frozen=True)
class TextDamage:
    """The damage to one text."""

    source: str
    tokens: int
    """Tokens fed, in windows of the bench's sequence length, each fed alone."""
    mean: float
    """Nats a token."""
    error: float
    """Standard error of the mean, over windows; NaN with one."""
    worst_share: float
    """The part of all damage that the worst fifth of the tokens carries."""
    pieces: tuple[DamagedPiece, ...] = field(repr=False)
    """In the order of the text, without the first token of each window, which nothing predicts."""


def damage_of_texts(
    models: Mapping[str, PreTrainedModel],
    loaded: LoadedModel,
    texts: Sequence[Corpus],
    tokens: int,
    sequence_length: int,
    progress: Progress = silent,
) -> Iterator[TextDamage]:
    """The damage to the beginning of each text, one after the other.

    `models` are by `DENSE` and `PRUNED`; `loaded` is the dense one with its tokenizer.

    Raises:
        TransActError: a text is shorter than a window, or as `measure_token_damage` does.
    """
    windows = [
        evaluation_windows(
            text,
            loaded.tokenizer,
            loaded.architecture.vocab_size,
            tokens,
            sequence_length,
            context_length_of(loaded.model.config),
        )
        for text in texts
    ]
    for place, of_text in enumerate(windows, start=1):
        stage = "Comparing predictions"
        if len(windows) > 1:
            stage += f", text {place} of {len(windows)}"
        damage = measure_token_damage(
            models[DENSE], models[PRUNED], of_text, progress=progress, stage=stage
        )
        yield TextDamage(
            of_text.source,
            of_text.tokens,
            damage.mean,
            damage.error,
            damage.worst_share(),
            tuple(_pieces(loaded, of_text, damage)),
        )


def _pieces(loaded: LoadedModel, windows: Windows, damage: TokenDamage) -> Iterator[DamagedPiece]:
    known: dict[int, str] = {}

    def guesses(ids: torch.Tensor, probabilities: torch.Tensor) -> Guesses:
        for token in ids.tolist():
            if token not in known:
                known[token] = decode(loaded.tokenizer, [token], special=True)
        return tuple(
            (known[token], probability)
            for token, probability in zip(ids.tolist(), probabilities.tolist(), strict=True)
        )

    for window, ids in enumerate(windows.ids.tolist()):
        end = 0
        for text, count in pieces(loaded.tokenizer, ids):
            start, end = end, end + count
            # Entry t is about token t + 1; the first token of a window is predicted by nothing.
            entries = slice(max(start, 1) - 1, end - 1)
            if end < 2:
                continue
            yield DamagedPiece(
                window,
                text,
                entries.stop - entries.start,
                damage.divergence[window, entries].sum().item(),
                damage.dense_nll[window, entries].sum().item(),
                damage.pruned_nll[window, entries].sum().item(),
                guesses(
                    damage.dense_guesses[window, entries.start],
                    damage.dense_probabilities[window, entries.start],
                ),
                guesses(
                    damage.pruned_guesses[window, entries.start],
                    damage.pruned_probabilities[window, entries.start],
                ),
            )
