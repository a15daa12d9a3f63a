"""Prefill and decode latency of several models, measured in alternation.

Every repeat measures all models, in an order that is reversed from one repeat to the next, so that
other load on the machine affects all of them alike. Weights keep their dtype and device.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from transformers import DynamicCache, PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.models.placement import devices_of

WARM_UP = 1
"""Repeats that are run first and not counted, since they allocate memory and choose kernels."""


@dataclass(frozen=True)
class Timing:
    """Times of repeated runs of the same work, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the repeats; a single repeat is both."""
        if len(self.seconds) == 1:
            return self.seconds * 2
        lower, _, upper = quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


@dataclass(frozen=True)
class LatencyPoint:
    """The latency of one model at one prompt length."""

    model: str
    length: int
    """Length of the prompt in tokens."""
    prefill: Timing
    """Time of one forward pass over the whole prompt."""
    decode: Timing
    """Time per token after the prompt: for each repeat, the mean over its decoded tokens."""
    working_bytes: int | None
    """Peak memory on top of the weights, in bytes; None on devices that do not report it (CPUs)."""

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.length / self.prefill.median

    @property
    def decode_tokens_per_second(self) -> float:
        return 1 / self.decode.median


def require_lengths_fit(model: PreTrainedModel, lengths: Sequence[int], decode: int) -> None:
    """Raises a TransActError if a prompt and the tokens to decode do not fit the context."""
    longest = model.config.max_position_embeddings - decode
    if max(lengths, default=0) > longest:
        raise TransActError(
            f"A prompt of {max(lengths):,} tokens does not fit the model's context of "
            f"{model.config.max_position_embeddings:,} with {decode} to decode; "
            f"the longest is {longest:,}."
        )


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, PreTrainedModel],
    text: torch.Tensor,
    lengths: Sequence[int],
    decode: int = 16,
    repeats: int = 5,
    progress: Progress = silent,
) -> Iterator[LatencyPoint]:
    """Times every model at every length; all models at one length before the next length.

    A prompt is the beginning of `text`, which has shape (tokens,) and is repeated if it is too
    short. After each prompt, `decode` tokens are decoded greedily.

    Raises:
        TransActError: a length does not fit the models' context.
    """
    for model in models.values():
        require_lengths_fit(model, lengths, decode)

    def runner(model: PreTrainedModel) -> Runner:
        return lambda prompt: _run(model, prompt[None], decode)

    runners = {name: runner(model) for name, model in models.items()}
    yield from in_turns(runners, text, lengths, repeats, progress)


Runner = Callable[[torch.Tensor], tuple[float, float, int | None]]
"""Runs one prompt, token ids of shape (tokens,); gives the seconds of the prompt, the seconds of
each token after it, and the peak bytes on top of those before."""


def in_turns(
    runners: Mapping[str, Runner],
    text: torch.Tensor,
    lengths: Sequence[int],
    repeats: int,
    progress: Progress,
) -> Iterator[LatencyPoint]:
    """The points of every runner at every length, each repeat in the order reversed."""
    done, total = 0, len(lengths) * (WARM_UP + repeats) * len(runners)
    for length in lengths:
        prompt = text.repeat(-(-length // len(text)))[:length]
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        memory: dict[str, int | None] = {}
        for repeat in range(WARM_UP + repeats):
            for name in reversed(runners) if repeat % 2 else runners:
                progress(f"Timing prompts of {length:,} tokens", done, total)
                done += 1
                *seconds, working_bytes = runners[name](prompt)
                if repeat >= WARM_UP:
                    runs[name].append(tuple(seconds))
                    memory[name] = working_bytes
        for name in runners:
            prefill, per_token = zip(*runs[name], strict=True)
            yield LatencyPoint(name, length, Timing(prefill), Timing(per_token), memory[name])
    progress("Timing prompts", total, total)


def _run(
    model: PreTrainedModel, prompt: torch.Tensor, decode: int
) -> tuple[float, float, int | None]:
    """Seconds of the prompt, seconds per token after it, and peak bytes on top of those before."""
    device, devices = model.device, devices_of(model)
    ids, cache = prompt.to(device), DynamicCache(config=model.config)
    before = None
    if device.type == "cuda":
        for each in devices:
            torch.cuda.reset_peak_memory_stats(each)
        before = sum(map(torch.cuda.memory_allocated, devices))
    clock = [_now(device)]
    for count in (1, decode):
        for _ in range(count):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        clock.append(_now(device))
    taken = None
    if before is not None:
        taken = sum(map(torch.cuda.max_memory_allocated, devices)) - before
    return clock[1] - clock[0], (clock[2] - clock[1]) / decode, taken


def _now(device: torch.device) -> float:
    """The clock in seconds, read after the device has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
