"""A prompt continued token by token, each with the time it took, and tokens back to text."""

import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from transact_core.base.errors import TransActError, first_line
from transact_core.data.token_ids import encode

UNFINISHED = "\ufffd"
"""What a tokenizer writes for the bytes of a character whose other bytes are yet to come."""
MOST_BYTES = 4
"""Of a character in UTF-8: a token more cannot complete it."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken."""

    temperature: float = 0.0
    """0 takes the likeliest."""
    top_p: float = 1.0
    """Draws among the likeliest tokens that hold this much probability."""
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """A generated token; `seconds` of the first are those of the whole prompt."""

    id: int
    seconds: float


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, vocab_size: int
) -> list[int]:
    """Token ids of a prompt, as the user's turn of a conversation where `chat` is asked for.

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


def end_tokens(model: LlamaForCausalLM) -> frozenset[int]:
    """The tokens after which the model has nothing more to say."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def require_prompt_fits(model: LlamaForCausalLM, prompt: list[int]) -> None:
    """Refuses a prompt that leaves no room in the model's context for a token."""
    longest = model.config.max_position_embeddings
    if len(prompt) >= longest:
        raise TransActError(
            f"The prompt has {len(prompt):,} tokens and the model's context only {longest:,}; "
            "shorten it."
        )


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    ends: frozenset[int] = frozenset(),
) -> Iterator[Token]:
    """Continues a prompt with a KV cache, a token at a time as they are asked for.

    It ends after a token of `ends`, which is given too, or where the context is full. The tokens
    are those of transformers' own `generate` with the same settings.

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
        ids = _next(logits.float(), sampling, draw)
        token = int(ids)  # waits for the device, so the time is that of the work
        yield Token(token, time.perf_counter() - start)
        if token in ends:
            return


def _next(logits: torch.Tensor, sampling: Sampling, draw: torch.Generator) -> torch.Tensor:
    """The next token of shape (1, 1) from logits of shape (1, vocabulary)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=draw)


def in_turns(streams: Mapping[Hashable, Iterator[Token]]) -> Iterator[tuple[Hashable, Token]]:
    """A token of each stream in turn, with the stream's name, until all have ended."""
    running = dict(streams)
    while running:
        for name, stream in list(running.items()):
            token = next(stream, None)
            if token is None:
                del running[name]
            else:
                yield name, token


def tokens_per_second(tokens: list[Token]) -> float | None:
    """Of decoding, without the first token, which took the prompt's pass; None without others."""
    seconds = sum(token.seconds for token in tokens[1:])
    return (len(tokens) - 1) / seconds if seconds else None


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: bool = False) -> str:
    """Text of token ids; with `special`, special tokens are written out."""
    return tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int]]:
    """Text of each token with 1, or of several that only together make a character with their
    number; joined, the texts are that of all ids.

    Each is decoded after the piece before it, since some tokenizers write a word's space only
    where something precedes it.
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
