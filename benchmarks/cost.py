"""Time of scoring and of gathering second moments beside a plain forward pass; memory of `prune`.

    python -m benchmarks.cost                     # time: passes over the same tokens, interleaved
    python -m benchmarks.cost --gather transact_core.importance.elimination:eliminate
    python -m benchmarks.cost --peak-memory       # memory: on a model larger than the built-in one
    python -m benchmarks.cost --shape llama-2-7b --tokens 16384 --threads 2 [--against CHECKOUT]
                                                  # repair, scoring and damage: on one large layer

The plain pass runs the model without its LM head on the same batches in the same process. Each
round runs the plain pass and then the others. The median over rounds of the ratio within a round is
printed: a machine that slows down slows both passes of a round.
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import layer as one_layer
from benchmarks.memory import peak_memory_of
from transact_core.base.linalg import second_moments
from transact_core.data.corpus import read_corpus
from transact_core.data.windows import Windows, evaluation_windows
from transact_core.forward.statistics import collect
from transact_core.forward.stream import Stream
from transact_core.forward.waists import batches, output_projections
from transact_core.importance.elimination import weighted_rows
from transact_core.models.architecture import Architecture
from transact_core.models.devices import dtype_name
from transact_core.models.load import load_model

Pass = Callable[[LlamaForCausalLM, Windows], object]


@torch.inference_mode()
def plain_forward(model: LlamaForCausalLM, windows: Windows) -> None:
    """Every window through the model without its LM head."""
    for batch in batches(windows, model.device):
        model.model(batch, use_cache=False)


@torch.no_grad()
def gathering(model: LlamaForCausalLM, windows: Windows) -> None:
    """Gathers the weighted second moments of every transitional activation, for least squares.

    A module's output is linear in them, so cross moments need no pass of their own.
    """
    stream = Stream(model, windows)
    for layer_index, layer in enumerate(model.model.layers):
        for module, projection in output_projections(layer).items():
            rows = weighted_rows(stream, layer_index, module, model.config.rms_norm_eps)
            second_moments(rows, projection.in_features)


def ratios_to_plain(
    passes: dict[str, Pass], model: LlamaForCausalLM, windows: Windows, rounds: int
) -> dict[str, list[float]]:
    """Time of each pass divided by the plain pass's, one ratio a round, after a warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for round_index in range(-1, rounds):
        plain = _seconds(plain_forward, model, windows)
        for name, run in passes.items():
            ratio = _seconds(run, model, windows) / plain
            if round_index >= 0:
                found[name].append(ratio)
    return found


def _seconds(run: Pass, model: LlamaForCausalLM, windows: Windows) -> float:
    start = time.perf_counter()
    run(model, windows)
    return time.perf_counter() - start


def write_random_model(
    folder: Path,
    layers: int,
    hidden: int,
    seed: int = 0,
    tokenizer_of: str = "builtin",
    dtype: torch.dtype = torch.float16,
) -> Architecture:
    """Writes a checkpoint of random weights in the built-in model's proportions.

    One shard per layer is drawn and written at a time, so the whole model is never in memory.
    """
    tokenizer = load_model(tokenizer_of).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=dtype_name(dtype),
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    architecture = Architecture.from_config(config)
    outer = architecture.outer_tensors()
    shards = [outer] + [
        {
            f"model.layers.{layer}.{name}": shape
            for name, shape in architecture.layer_tensors(layer).items()
        }
        for layer in range(layers)
    ]
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    for shard, shapes in enumerate(shards, start=1):
        file = f"model-{shard:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=dtype)
            if name.endswith("norm.weight")
            else (0.02 * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": 2 * architecture.parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return architecture


def peak_of_prune(chosen: argparse.Namespace) -> str:
    """Runs the command line's `prune` on a random model and describes its peak memory."""
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        dense = Path(folder) / "dense"
        dense.mkdir()
        architecture = write_random_model(dense, chosen.layers, chosen.hidden)
        libraries = peak_memory_of("transact_core", ["prune", "--help"])
        options = {
            "--model": dense,
            "--output": Path(folder) / "pruned",
            "--mha-ratio": chosen.mha_ratio,
            "--mlp-ratio": chosen.mlp_ratio,
            "--importance": chosen.importance,
            "--recovery": chosen.recovery,
            "--calibration-tokens": chosen.tokens,
            "--evaluation-tokens": chosen.sequence_length,
            "--sequence-length": chosen.sequence_length,
        }
        words = [str(word) for option in options.items() for word in option]
        peak = peak_memory_of("transact_core", ["prune", *words])
    weights = 4 * architecture.parameters
    rest = peak - weights - libraries
    return (
        f"{architecture.parameters / 1e6:,.0f} M parameters, {weights / 1e6:,.0f} MB in float32; "
        f"peak {peak / 1e6:,.0f} MB, {peak / weights:.2f} × the weights; Python and its libraries "
        f"take {libraries / 1e6:,.0f} MB of it and everything else {rest / 1e6:,.0f} MB"
    )


def time_of_passes(chosen: argparse.Namespace) -> str:
    """Times scoring, gathering and each `--gather` pass, and describes the ratios."""
    loaded = load_model(chosen.model)
    windows = evaluation_windows(
        read_corpus(chosen.calibration),
        loaded.tokenizer,
        loaded.architecture.vocab_size,
        chosen.tokens,
        chosen.sequence_length,
    )
    passes: dict[str, Pass] = {"scoring": collect, "gathering": gathering}
    for name in chosen.gather:
        module, function = name.split(":")
        passes[name] = getattr(importlib.import_module(module), function)
    found = ratios_to_plain(passes, loaded.model, windows, chosen.rounds)
    lines = [
        f"time divided by that of a plain forward pass without LM head, {windows.tokens:,} tokens:"
    ]
    for name, ratios in found.items():
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(f"{name}: {statistics.median(ratios):.3f} × ({spread}, {len(ratios)} rounds)")
    return "\n".join(lines)


def main() -> None:
    """Prints the times, or with `--peak-memory` the memory."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="calibration tokens")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="L")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--calibration", default="builtin", metavar="SOURCE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--gather",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="time this too; it is called with the model and the windows",
    )
    parser.add_argument("--shape", choices=one_layer.SHAPES, help="time one random layer")
    parser.add_argument("--threads", type=int, default=2, help="with --shape")
    parser.add_argument(
        "--work",
        nargs="+",
        choices=one_layer.WORK,
        default=list(one_layer.WORK),
        help="with --shape",
    )
    parser.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="CHECKOUT",
        help="with --shape: measure the library of this checkout too, before this one's",
    )
    parser.add_argument("--peak-memory", action="store_true")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--hidden", type=int, default=1344, help="a multiple of 192")
    parser.add_argument("--mha-ratio", default="0.33")
    parser.add_argument("--mlp-ratio", default="0.3")
    parser.add_argument("--importance", default="activation")
    parser.add_argument("--recovery", default="least-squares")
    parser.add_argument("--folder", type=Path, help="where the models are written")
    chosen = parser.parse_args()
    if chosen.shape:
        checkouts = [*chosen.against, Path(__file__).parents[1]]
        measured = (chosen.shape, chosen.tokens, chosen.threads, checkouts, chosen.work)
        print(one_layer.table(*measured))
        return
    print(peak_of_prune(chosen) if chosen.peak_memory else time_of_passes(chosen))


if __name__ == "__main__":
    main()
