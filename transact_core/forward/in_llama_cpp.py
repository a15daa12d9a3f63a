"""GGUF files measured in llama.cpp: perplexity by the contract's windows, latency, memory."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.generation import Sampling, Token, next_token
from transact_core.forward.latency import LatencyPoint, in_turns
from transact_core.forward.perplexity import Evaluation, require_losses
from transact_core.models.llama_cpp import LlamaCpp, OpenedFile, running, runtime_name


@dataclass(frozen=True)
class FileFigures:
    """What one GGUF file took in llama.cpp besides time for tokens."""

    file_bytes: int
    load_seconds: float
    peak_bytes: int | None
    """The most memory that its process held, mapped weights included; None where the system does
    not say."""
    threads: int
    runtime: str
    """llama.cpp and the package it came in."""


@dataclass(frozen=True)
class GgufLatency:
    """Latency points of several files, and the figures of each file by its name."""

    points: tuple[LatencyPoint, ...]
    files: dict[str, FileFigures]


def evaluate_gguf(
    path: Path, windows: Windows, threads: int | None = None, progress: Progress = silent
) -> Evaluation:
    """What `forward.perplexity.evaluate` measures, from llama.cpp's own logits.

    Attention is computed unfused and with keys and values in float32, so that of the same weights
    both runtimes give the same losses; llama.cpp's defaults differ by some hundredths in a logit.

    Raises:
        TransActError: llama.cpp is not installed, cannot read the file, or its losses are no
            numbers.
    """
    stage = "Measuring perplexity in llama.cpp"
    losses = []
    with running(threads) as runtime:
        progress(stage, 0, len(windows))
        opened = runtime.open(path, windows.sequence_length, exact=True)
        _require_vocabulary(path, opened, windows)
        for done, window in enumerate(windows.ids.numpy(), start=1):
            losses.append(torch.from_numpy(runtime.losses(window).copy()))
            progress(stage, done, len(windows))
    return Evaluation(nll=require_losses(torch.stack(losses)))


def measure_gguf_latency(
    files: Mapping[str, Path],
    text: torch.Tensor,
    lengths: Sequence[int],
    decode: int = 64,
    repeats: int = 5,
    threads: int | None = None,
    progress: Progress = silent,
) -> GgufLatency:
    """Times every file at every length, as `forward.latency.measure_latency` times models.

    All files are open at once, each in a process of its own, and take turns. llama.cpp computes
    with its defaults here, as a user would run it.

    Raises:
        TransActError: llama.cpp is not installed or cannot read a file.
    """
    with ExitStack() as stack:
        runtimes, opened = {}, {}
        for done, (name, path) in enumerate(files.items()):
            progress("Loading into llama.cpp", done, len(files))
            runtimes[name] = stack.enter_context(running(threads))
            opened[name] = runtimes[name].open(path, max(lengths) + decode)
            if int(text.max()) >= opened[name].vocab_size:
                raise TransActError(
                    f"{path} has {opened[name].vocab_size:,} tokens, fewer than the prompt names; "
                    "compare files of one tokenizer."
                )
        progress("Loading into llama.cpp", len(files), len(files))

        def runner(name: str):
            def run(prompt: torch.Tensor) -> tuple[float, float, None]:
                return (*runtimes[name].time(prompt.numpy(), decode), None)

            return run

        points = tuple(
            in_turns({name: runner(name) for name in files}, text, lengths, repeats, progress)
        )
        return GgufLatency(
            points,
            {
                name: FileFigures(
                    file_bytes=path.stat().st_size,
                    load_seconds=opened[name].seconds,
                    peak_bytes=runtimes[name].peak_bytes(),
                    threads=runtimes[name].threads,
                    runtime=runtime_name(),
                )
                for name, path in files.items()
            },
        )


def generate_in_llama_cpp(
    runtime: LlamaCpp,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    ends: frozenset[int] = frozenset(),
) -> Iterator[Token]:
    """Continues a prompt by the model that is open, as `forward.generation.generate` does.

    The runtime must have been opened for as many tokens as the prompt and the new ones.
    """
    draw = torch.Generator().manual_seed(sampling.seed)
    ids, position = list(prompt), 0
    for _ in range(max_new_tokens):
        start = time.perf_counter()
        logits = torch.from_numpy(runtime.feed(np.array(ids), position).copy())
        position += len(ids)
        ids = [int(next_token(logits[None], sampling, draw))]
        yield Token(ids[0], time.perf_counter() - start)
        if ids[0] in ends:
            return


def logits_in_llama_cpp(path: Path, windows: np.ndarray, threads: int | None = None) -> Iterator:
    """Logits of each window fed alone, shape (tokens, vocabulary), computed as `evaluate_gguf`."""
    with running(threads) as runtime:
        runtime.open(path, windows.shape[1], exact=True)
        for window in windows:
            yield runtime.logits(window)


def _require_vocabulary(path: Path, opened: OpenedFile, windows: Windows) -> None:
    if int(windows.ids.max()) >= opened.vocab_size:
        raise TransActError(
            f"{path} has {opened.vocab_size:,} tokens, and the text has one with the id "
            f"{int(windows.ids.max()):,}: it was cut by another tokenizer."
        )
