"""Log-likelihoods of given continuations, each after its context.

Answers to one question share its text, so they share its forward pass: a row holds the tokens that
all of them begin with once, then the rest of each as a branch that sees the beginning and itself.
Every token has the position that it would have in a row of its own, so the numbers are those of
separate rows but for rounding. The LM head runs on the scored positions alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.forward.layers import logits_of
from transact_core.forward.perplexity import require_losses, tokens_at_once

TOKENS_AT_ONCE = 256
"""Tokens that run through the model at a time on a CPU, padding included. On the built-in model 128
to 512 take the least time: what a layer computes of them stays in the processor's cache. It is also
how long a cancelled run goes on. A single row is run in one piece however long it is."""
TOKENS_AT_ONCE_ON_DEVICE = 8192
"""The same elsewhere: on a GPU, which needs many to be busy."""
LONGEST_SHARED_ROW = 2048
"""Tokens of the longest row that branches. Attention is computed for all pairs of tokens of a row,
also for those of branches that do not see each other, so longer rows would cost more than they
save."""
MASKED_ATTENTIONS = ("sdpa", "eager")
"""The implementations of attention in transformers that take a mask of four dimensions."""


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after its context, as token ids; neither may be empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def fed(self, max_length: int) -> tuple[int, ...]:
        """The tokens that the model reads: at most `max_length`, the beginning being cut off.

        The last token is predicted and not read.
        """
        return (self.context + self.continuation)[-(max_length + 1) :][:-1]


@dataclass(frozen=True)
class Answer:
    """What a model makes of one continuation."""

    log_likelihood: float
    """Sum over the tokens of the continuation, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most probable one at its place."""


@dataclass
class _Row:
    """Tokens that are fed together, and which of their outputs predict what."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    """0 for what all requests of the row begin with, another number for the rest of each."""
    scored: list[tuple[tuple[int, int], list[int], tuple[int, ...]]] = field(default_factory=list)
    """Each request's group and place in it, the indices of the tokens whose outputs predict its
    continuation, and the continuation."""


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Request]],
    max_length: int,
    progress: Progress = silent,
    stage: str = "Scoring answers",
) -> list[list[Answer]]:
    """The log-likelihood of every continuation, in the order given.

    Requests of one group, such as the answers to one question, share the forward pass over the
    tokens that all of them begin with. `max_length` is the number of tokens that the model sees at
    most; longer contexts lose their beginning. `progress` is called before each forward pass, with
    the number of requests done, and may raise to stop.

    Raises:
        TransActError: a request has no context or no continuation, a continuation is longer than
            `max_length`, or a log-likelihood is not a number.
    """
    for request in (request for group in groups for request in group):
        _require_scorable(request, max_length)
    share = shares_contexts(model)
    rows = [
        row
        for index, group in enumerate(groups)
        for row in _rows(index, [request.fed(max_length) for request in group], group, share)
    ]
    answers: dict[tuple[int, int], Answer] = {}
    total = sum(len(group) for group in groups)
    at_once = TOKENS_AT_ONCE if model.device.type == "cpu" else TOKENS_AT_ONCE_ON_DEVICE
    for batch in _batches(rows, at_once):
        progress(stage, len(answers), total)
        answers |= _score(model, batch)
    progress(stage, total, total)
    return [
        [answers[index, place] for place in range(len(group))] for index, group in enumerate(groups)
    ]


def shares_contexts(model: PreTrainedModel) -> bool:
    """Whether requests can share a row of this model.

    The mask of such a row replaces the one that the layers would have, so all of them must attend
    to everything before a token, by an implementation that takes a mask.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        full = getattr(config, "sliding_window", None) is None
    else:
        full = set(kinds) <= {"full_attention"}
    return full and config._attn_implementation in MASKED_ATTENTIONS


def _require_scorable(request: Request, max_length: int) -> None:
    if not request.context or not request.continuation:
        raise TransActError("A context and its continuation must hold a token each.")
    if len(request.continuation) > max_length:
        raise TransActError(
            f"An answer of {len(request.continuation):,} tokens is longer than the {max_length:,} "
            "that the model sees at once; leave this task out for this model."
        )


# --- rows ------------------------------------------------------------------------------------


def _rows(
    group: int, fed: Sequence[tuple[int, ...]], requests: Sequence[Request], share: bool
) -> Iterator[_Row]:
    """One row for a group, or one for each of its requests where they do not share one."""
    places = range(len(requests))
    common = _common_beginning(fed) if share else 0
    together = common + sum(len(tokens) - common for tokens in fed)
    shared = share and len(fed) > 1 and together <= LONGEST_SHARED_ROW
    for members in [places] if shared else [[place] for place in places]:
        row = _Row()
        for place in members:
            tokens, continuation = fed[place], requests[place].continuation
            known = common if place != members[0] else 0
            start = len(row.tokens)
            row.tokens += tokens[known:]
            row.positions += range(known, len(tokens))
            branch = place + 1 if shared else 0
            row.branches += [
                0 if position < common else branch for position in range(known, len(tokens))
            ]
            predicting = range(len(tokens) - len(continuation), len(tokens))
            indices = [
                position if position < common else start + position - known
                for position in predicting
            ]
            row.scored.append(((group, place), indices, continuation))
        yield row


def _common_beginning(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many items all sequences begin with in common."""
    # What the first and the last in lexical order begin with, all between them do.
    first, last = min(sequences), max(sequences)
    pairs = zip(first, last, strict=False)
    different = (index for index, (one, other) in enumerate(pairs) if one != other)
    return next(different, min(len(first), len(last)))


def _batches(rows: Sequence[_Row], tokens_at_once: int) -> Iterator[list[_Row]]:
    """Rows of similar lengths, the longest first, at most so many tokens with padding, or one."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > tokens_at_once:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


# --- one forward pass ------------------------------------------------------------------------


def _score(model: PreTrainedModel, rows: list[_Row]) -> dict[tuple[int, int], Answer]:
    """The answers of some rows by group and place, from one forward pass."""
    longest = len(rows[0].tokens)

    def padded(values: list[list[int]], padding: int) -> torch.Tensor:
        filled = [row + [padding] * (longest - len(row)) for row in values]
        return torch.tensor(filled, device=model.device)

    tokens = padded([row.tokens for row in rows], 0)
    mask: dict[str, torch.Tensor] = {}
    if any(branch for row in rows for branch in row.branches):
        # Padding is one more branch, which nobody else sees.
        branches = padded([row.branches for row in rows], -1)
        mask = {
            "attention_mask": _mask(branches, model.dtype),
            "position_ids": padded([row.positions for row in rows], 0),
        }
    states = model.model(input_ids=tokens, use_cache=False, **mask).last_hidden_state

    indices = [
        number * longest + index
        for number, row in enumerate(rows)
        for _, predicting, _ in row.scored
        for index in predicting
    ]
    targets = [token for row in rows for _, _, continuation in row.scored for token in continuation]
    log_probabilities, greedy = _token_scores(
        model,
        states.flatten(0, 1),
        torch.tensor(indices, device=model.device),
        torch.tensor(targets, device=model.device),
    )
    answers, start = {}, 0
    for who, _, continuation in (scored for row in rows for scored in row.scored):
        end = start + len(continuation)
        answers[who] = Answer(
            float(log_probabilities[start:end].sum()), bool(greedy[start:end].all())
        )
        start = end
    return answers


def _mask(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to attention scores, shape (rows, 1, tokens, tokens).

    A token sees those before it that all requests share or that are of its own branch.
    """
    keys, queries = branches[:, None, :], branches[:, :, None]
    visible = ((keys == 0) | (keys == queries)).tril()
    hidden = torch.zeros(visible.shape, dtype=dtype, device=branches.device)
    return hidden.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _token_scores(
    model: PreTrainedModel, states: torch.Tensor, indices: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each target, and whether it is the most probable token.

    `states` is what the LM head reads, shape (tokens, hidden_size); `indices` says which of them
    predicts each target. The results, of the shape of `targets`, lie on the CPU. Each state is read
    once, however many targets it predicts, and at most `LOGITS_AT_ONCE` logits are held at a time.
    """
    used, which = indices.unique(return_inverse=True)
    at_once = tokens_at_once(model)
    scores = torch.empty(len(targets), device=states.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=states.device)
    for start in range(0, len(used), at_once):
        logits = logits_of(model, states[used[start : start + at_once]]).float()
        here = ((which >= start) & (which < start + at_once)).nonzero()[:, 0]
        state, target = which[here] - start, targets[here]
        scores[here] = logits[state, target] - logits.logsumexp(dim=-1)[state]
        greedy[here] = logits.argmax(dim=-1)[state] == target
    return require_losses(scores.cpu()), greedy.cpu()
