"""How long a prompt and each token after it take, for two or more models in turns.

Every repeat measures all models, the order turned round from one repeat to the next, so that what
else the machine does falls on all of them alike. Weights stay in the dtype and on the device they
were loaded in.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from transformers import DynamicCache, LlamaForCausalLM

from transact_core.base.errors import Progress, TransActError, silent

WARM_UP = 1
"""Repeats that are run and not counted: first calls allocate and choose kernels."""


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work, repeated."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the repeats; both the one there is where there is but one."""
        if len(self.seconds) == 1:
            return self.seconds * 2
        lower, _, upper = quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


@dataclass(frozen=True)
class LatencyPoint:
    """One model at one length of prompt."""

    model: str
    length: int
    """Tokens of the prompt."""
    prefill: Timing
    """Of the whole prompt, in one pass."""
    decode: Timing
    """Of one token after it, the mean of each repeat's tokens."""
    working_bytes: int | None
    """Most memory taken beside the weights; None where the device does not tell, as a CPU."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.length / self.prefill.median

    @property
    def decode_tokens_per_second(self) -> float:
        return 1 / self.decode.median


def require_lengths_fit(model: LlamaForCausalLM, lengths: Sequence[int], decode: int) -> None:
    """Refuses lengths that leave no room in the model's context for the tokens to decode."""
    longest = model.config.max_position_embeddings - decode
    if max(lengths, default=0) > longest:
        raise TransActError(
            f"A prompt of {max(lengths):,} tokens does not fit the model's context of "
            f"{model.config.max_position_embeddings:,} with {decode} to decode; "
            f"the longest is {longest:,}."
        )


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, LlamaForCausalLM],
    text: torch.Tensor,
    lengths: Sequence[int],
    decode: int = 16,
    repeats: int = 5,
    progress: Progress = silent,
) -> Iterator[LatencyPoint]:
    """Times every model at every length, all models at one length before the next.

    The prompts are the beginnings of `text`, ids of shape (tokens,), repeated where it is short.
    The `decode` tokens after a prompt are its likeliest ones.

    Raises:
        TransActError: a length does not fit the models' context.
    """
    for model in models.values():
        require_lengths_fit(model, lengths, decode)
    done, total = 0, len(lengths) * (WARM_UP + repeats) * len(models)
    for length in lengths:
        prompt = text.repeat(-(-length // len(text)))[:length][None]
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        memory: dict[str, int | None] = {}
        for repeat in range(WARM_UP + repeats):
            for name in reversed(models) if repeat % 2 else models:
                progress(f"Timing prompts of {length:,} tokens", done, total)
                done += 1
                *seconds, taken = _run(models[name], prompt, decode)
                if repeat >= WARM_UP:
                    runs[name].append(tuple(seconds))
                    memory[name] = taken
        for name in models:
            prefill, per_token = zip(*runs[name], strict=True)
            yield LatencyPoint(name, length, Timing(prefill), Timing(per_token), memory[name])
    progress("Timing prompts", total, total)


def _run(
    model: LlamaForCausalLM, prompt: torch.Tensor, decode: int
) -> tuple[float, float, int | None]:
    """Seconds of the prompt, seconds of a token after it, bytes taken beside what was there."""
    device = model.device
    ids, cache = prompt.to(device), DynamicCache(config=model.config)
    before = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    clock = [_now(device)]
    for count in (1, decode):
        for _ in range(count):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        clock.append(_now(device))
    taken = None if before is None else torch.cuda.max_memory_allocated(device) - before
    return clock[1] - clock[0], (clock[2] - clock[1]) / decode, taken


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
