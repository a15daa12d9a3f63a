"""The dense and a pruned model on one prompt: their answers in turns, and where losses differ."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from transact_core.forward.in_llama_cpp import generate_in_llama_cpp
from transact_core.forward.perplexity import token_losses
from transact_core.models.llama_cpp import running
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
    models: Mapping[str, PreTrainedModel],
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
    ends = end_tokens(dense)
    streams = {
        name: generate(model, prompt.ids, max_new_tokens, sampling, ends)
        for name, model in models.items()
    }

    def losses(name: str, ids: list[int]) -> torch.Tensor:
        return token_losses(models[name], torch.tensor(ids, device=dense.device)).cpu()

    yield from compare_streams(streams, losses, tokenizer, prompt, max_new_tokens, progress)


def compare_in_llama_cpp(
    files: Mapping[str, Path],
    loaded: LoadedModel,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
    threads: int,
    progress: Progress,
) -> Iterator[Said | TokenLosses]:
    """The same of two GGUF files, both open in llama.cpp at once.

    Raises:
        TransActError: llama.cpp is not installed or cannot read a file.
    """
    longest = loaded.model.config.max_position_embeddings
    new_tokens = min(max_new_tokens, longest - len(prompt.ids))
    tokens = max(len(prompt.ids) + new_tokens, len(prompt.text_ids))
    with ExitStack() as stack:
        runtimes = {}
        for done, (name, path) in enumerate(files.items()):
            progress("Loading into llama.cpp", done, len(files))
            runtimes[name] = stack.enter_context(running(threads))
            runtimes[name].open(path, tokens)
        ends = end_tokens(loaded.model)
        streams = {
            name: generate_in_llama_cpp(runtime, prompt.ids, new_tokens, sampling, ends)
            for name, runtime in runtimes.items()
        }

        def losses(name: str, ids: list[int]) -> torch.Tensor:
            return torch.from_numpy(runtimes[name].losses(np.array(ids)).copy())

        yield from compare_streams(streams, losses, loaded.tokenizer, prompt, new_tokens, progress)


def compare_streams(
    streams: Mapping[str, Iterator[Token]],
    losses: Callable[[str, list[int]], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int,
    progress: Progress,
) -> Iterator[Said | TokenLosses]:
    """Takes the tokens of both models in turns, then scores the texts by both.

    `losses` gives a model's losses on token ids, in nats, shape (tokens − 1,).
    """
    made: dict[str, list[int]] = {name: [] for name in streams}
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
        by_model = {name: losses(name, ids) for name in streams}
        yield TokenLosses(on, pieces(tokenizer, ids), by_model, start)
    progress("Scoring the texts", 1, 1)
