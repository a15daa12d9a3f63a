"""Text generation with a KV cache, token by token and timed, and decoding of tokens to text."""

import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from transact_core.base.errors import TransActError, first_line
from transact_core.data.token_ids import encode

UNFINISHED = "\ufffd"
"""The replacement character, which a tokenizer writes for an incomplete UTF-8 sequence."""
MOST_BYTES = 4
"""Longest UTF-8 sequence of a character, in bytes. More tokens than this cannot complete one."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled."""

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus sampling: draws among the most likely tokens with this total probability."""
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """A generated token and its time. The time of the first includes the pass over the prompt."""

    id: int
    seconds: float


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, vocab_size: int
) -> list[int]:
    """Token ids of a prompt; with `chat`, of the prompt as a user's turn in the chat template.

    Raises:
        TransActError: the prompt is empty, the tokenizer's chat template cannot be applied, or
            there is a token that an embedding of `vocab_size` rows does not have.
    """
    if not text.strip():
        raise TransActError("The prompt is empty; write something to go on from.")
    if not chat:
        return encode(tokenizer, text, vocab_size, "The prompt")
    try:
        turns = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template's own code raises
        reason = first_line(error)
        raise TransActError(
            f"The chat template of this model cannot be applied ({reason}); switch it off."
        ) from None
    name = "The prompt in the model's chat template"
    return encode(tokenizer, rendered, vocab_size, name, add_special_tokens=False)


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The ids of the model's end-of-sequence tokens, which may be none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def require_prompt_fits(model: PreTrainedModel, prompt: list[int]) -> None:
    """Raises a TransActError if the model's context has no room for a token after the prompt."""
    longest = model.config.max_position_embeddings
    if len(prompt) >= longest:
        raise TransActError(
            f"The prompt has {len(prompt):,} tokens and the model's context only {longest:,}; "
            "shorten it."
        )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    ends: frozenset[int] = frozenset(),
) -> Iterator[Token]:
    """Continues a prompt with a KV cache; each token is computed when the iterator is advanced.

    It ends after yielding a token of `ends`, or when the context is full. The tokens are those of
    transformers' own `generate` with the same settings.

    Raises:
        TransActError: the prompt does not fit the model's context.
    """
    require_prompt_fits(model, prompt)
    sampling = sampling or Sampling()
    draw = torch.Generator(model.device).manual_seed(sampling.seed)
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt], device=model.device)
    room = model.config.max_position_embeddings - len(prompt)
    for _ in range(min(max_new_tokens, room)):
        start = time.perf_counter()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        ids = next_token(logits.float(), sampling, draw)
        token = int(ids)  # waits for the device, so that its work is timed
        yield Token(token, time.perf_counter() - start)
        if token in ends:
            return


def next_token(logits: torch.Tensor, sampling: Sampling, draw: torch.Generator) -> torch.Tensor:
    """The next token of shape (1, 1) from logits of shape (1, vocabulary)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=draw)


def in_turns(streams: Mapping[Hashable, Iterator[Token]]) -> Iterator[tuple[Hashable, Token]]:
    """Takes one token of each stream in turn, with the stream's name, until all have ended."""
    running = dict(streams)
    while running:
        for name, stream in list(running.items()):
            token = next(stream, None)
            if token is None:
                del running[name]
            else:
                yield name, token


def tokens_per_second(tokens: list[Token]) -> float | None:
    """Decoding speed, without the first token, whose time is the prompt's; None if it is alone."""
    seconds = sum(token.seconds for token in tokens[1:])
    return (len(tokens) - 1) / seconds if seconds else None


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: bool = False) -> str:
    """Text of token ids; special tokens are left out unless `special` is set."""
    return tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int]]:
    """The text of each token, and how many tokens it is made of; joined, the text of all ids.

    A piece has several tokens where only together they make a character. Each piece is decoded
    together with the piece before it, because some tokenizers write the space before a word only
    if something precedes it.
    """
    found: list[tuple[str, int]] = []
    before = start = 0
    for end in range(1, len(ids) + 1):
        context = decode(tokenizer, ids[before:start], special=True)
        text = decode(tokenizer, ids[before:end], special=True)[len(context) :]
        if text.endswith(UNFINISHED) and end < len(ids) and end - start < MOST_BYTES:
            continue
        found.append((text, end - start))
        before, start = start, end
    return found
