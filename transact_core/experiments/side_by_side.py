"""The dense and a pruned model on one prompt: their answers in turns, and where losses differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from transact_core.base.errors import Progress
from transact_core.forward.generation import (
    Sampling,
    Token,
    decode,
    encode_prompt,
    end_tokens,
    generate,
    in_turns,
    pieces,
    require_prompt_fits,
)
from transact_core.forward.perplexity import token_losses
from transact_core.models.load import LoadedModel

DENSE, PRUNED = "dense", "pruned"
CONTINUATION, TEXT = "continuation", "text"
"""What losses are measured on: the prompt and the dense model's answer, and the text as it is."""


@dataclass(frozen=True)
class Prompt:
    """What is continued, as token ids."""

    ids: list[int]
    """In the chat template where that was asked for."""
    text_ids: list[int]
    """Of the text alone."""


@dataclass(frozen=True)
class Said:
    """One more token of a model's answer."""

    model: str
    token: Token
    text: str
    """The answer up to this token."""


@dataclass(frozen=True)
class TokenLosses:
    """Both models' losses on one text, in nats, on each token after the first."""

    on: str
    """`CONTINUATION` or `TEXT`."""
    pieces: list[tuple[str, int]]
    """The text in pieces, each with its number of tokens, as `generation.pieces` gives them."""
    losses: dict[str, torch.Tensor]
    """By model, shape (tokens − 1,)."""
    start: int = 1
    """Index of the first token that is shown."""


def prompt_of(loaded: LoadedModel, text: str, chat: bool) -> Prompt:
    """The token ids of a prompt.

    Raises:
        TransActError: it is empty, too long or cannot be tokenised for this model, or the chat
            template cannot be applied.
    """
    tokenizer, rows = loaded.tokenizer, loaded.architecture.vocab_size
    ids = encode_prompt(tokenizer, text, chat, rows)
    require_prompt_fits(loaded.model, ids)
    return Prompt(ids, encode_prompt(tokenizer, text, False, rows))


def compare(
    models: Mapping[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
    progress: Progress,
) -> Iterator[Said | TokenLosses]:
    """Continues a prompt by both models, token by token in turns, then scores the texts by both.

    `models` are by `DENSE` and `PRUNED`.
    """
    dense = models[DENSE]
    streams = {
        name: generate(model, prompt.ids, max_new_tokens, sampling, end_tokens(dense))
        for name, model in models.items()
    }
    made: dict[str, list[int]] = {name: [] for name in models}
    progress("Generating", 0, max_new_tokens)
    for name, token in in_turns(streams):
        made[name].append(token.id)
        yield Said(name, token, decode(tokenizer, made[name]))
        progress("Generating", max(map(len, made.values())), max_new_tokens)
    progress("Scoring the texts", 0, 1)
    texts = {CONTINUATION: (prompt.ids + made[DENSE], len(prompt.ids))}
    if len(prompt.text_ids) > 1:
        texts[TEXT] = prompt.text_ids, 1
    for on, (ids, start) in texts.items():
        tensor = torch.tensor(ids, device=dense.device)
        losses = {name: token_losses(model, tensor).cpu() for name, model in models.items()}
        yield TokenLosses(on, pieces(tokenizer, ids), losses, start)
    progress("Scoring the texts", 1, 1)
