"""One random layer of a large model's shape: repair, scoring and damage over a plain forward pass.

    python -m benchmarks.cost --shape llama-2-7b --threads 2
    python -m benchmarks.cost --shape small --tokens 8192 --threads 1 --against FOLDER

`FOLDER` is another checkout of this project, say of an older commit: its library is measured in the
same run, and both stand in one table. Each kind of work runs in a process of its own, so that its
peak memory is its own, and is divided by the mean of the plain passes before and after it in that
process: in seconds of the processor, which others on the machine change little, and by the clock.
This file is run as a script with the measured checkout on PYTHONPATH, and uses only what
the library of either has.

Weights are random, but the activations are not all alike: the embeddings' variance falls with the
inverse of the dimension's number, so that waists are correlated; tokens are as frequent as Zipf's
law says; and the rows that write the waists have sizes spread over an order of magnitude.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SHAPES = {
    "small": (2048, 5632, 16, 16, 128),
    "llama-2-7b": (4096, 11008, 32, 32, 128),
    "llama-3-8b": (4096, 14336, 32, 8, 128),
}
"""Hidden size, width of the MLP, query heads, key-value heads, and head_dim."""
WORK = ("repair", "scoring", "damage")
RATIO = 0.3
VOCAB_SIZE = 8192


def table(shape: str, tokens: int, threads: int, checkouts: list[Path], work: list[str]) -> str:
    """Measures the work by the library of each checkout; a table in Markdown."""
    lines = [
        f"One layer of {shape}, {tokens:,} tokens, {threads} threads, {RATIO:.0%} off each module:",
        "",
        "| work | library | plain pass | × plain pass | by the clock | memory at the peak |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in work:
        for checkout in checkouts:
            found = _in_process(checkout, shape, name, tokens, threads)
            lines.append(
                f"| {name} | {checkout.name} | {found['plain']:.1f} s | {found['ratio']:.2f} × | "
                f"{found['by_clock']:.2f} × | {found['memory'] / 1e6:,.0f} MB |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _in_process(checkout: Path, shape: str, work: str, tokens: int, threads: int) -> dict:
    command = [sys.executable, __file__, shape, work, str(tokens), str(threads)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _measure(shape: str, work: str, tokens: int, threads: int) -> dict[str, float]:
    """The plain pass in seconds of the processor, the ratios, and the memory that the work adds."""
    import torch

    from transact_core.data.windows import Windows
    from transact_core.forward.waists import batches
    from transact_core.importance.elimination import eliminate
    from transact_core.importance.scores import Scores
    from transact_core.models.architecture import Architecture
    from transact_core.planning.damage import kept_first, measure_curves
    from transact_core.pruning.closed_form import recover
    from transact_core.pruning.plan import make_plan
    from transact_core.pruning.surgery import prune

    torch.set_num_threads(threads)
    model = make_layer(shape)
    architecture = Architecture.from_config(model.config)
    generator = torch.Generator().manual_seed(1)
    frequencies = 1 / torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    length = min(512, tokens)
    drawn = torch.multinomial(frequencies, tokens, replacement=True, generator=generator)
    windows = Windows("random", "0" * 64, drawn.view(-1, length))
    units = (
        architecture.num_attention_heads,
        architecture.num_attention_heads * architecture.head_dim,
        architecture.intermediate_size,
    )
    scores = Scores(
        *(torch.rand(1, count, generator=generator, dtype=torch.float64) for count in units)
    )

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches(windows, model.device):
            model.model(batch, use_cache=False)

    def repair() -> None:
        plan = make_plan(architecture, scores, "random", RATIO, RATIO)
        fits = recover(model, prune(model, plan), plan, windows, "least-squares").fits
        for fit in fits:
            told = f"{fit.module} {fit.bare_error:.4f} {fit.recovered_error:.4f} {fit.ridge}"
            print(told, file=sys.stderr)

    def scoring() -> None:
        eliminate(model, windows)

    def damage() -> None:
        found = measure_curves(model, windows, kept_first(scores, architecture))
        for name, errors in found.items():
            eighths = errors[0][:: max(1, errors.shape[1] // 8)]
            print(name, [f"{error:.4f}" for error in eighths.tolist()], file=sys.stderr)

    run = {"repair": repair, "scoring": scoring, "damage": damage}[work]
    plain_before = _seconds(plain)
    _forget_peak()
    before = _resident("VmRSS")
    worked = _seconds(run)
    memory = _resident("VmHWM") - before
    plain_after = _seconds(plain)
    clock, processor = (sum(passes) / 2 for passes in zip(plain_before, plain_after, strict=True))
    return {
        "plain": processor,
        "ratio": worked[1] / processor,
        "by_clock": worked[0] / clock,
        "memory": memory,
    }


def make_layer(shape: str):
    """A causal language model of one random layer, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, channels, heads, groups, head_dim = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1)
                continue
            weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
            if "embed" in name:
                weight.mul_(torch.arange(1, hidden + 1).rsqrt() * 4)
            if name.endswith(("up_proj.weight", "v_proj.weight")):
                sizes = torch.randn(len(weight), 1, generator=generator)
                weight.mul_(torch.exp(0.7 * sizes))
            if name.endswith("gate_proj.weight"):
                weight.mul_(2)
    return model.eval().requires_grad_(False)


def _forget_peak() -> None:
    """Lets the peak of resident memory begin anew; Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident(which: str) -> int:
    """Bytes of memory: "VmRSS" now, "VmHWM" at the peak; Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) * 1024


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("tokens", type=int)
    parser.add_argument("threads", type=int)
    print(json.dumps(_measure(*vars(parser.parse_args()).values())))
