"""The numbers of a small fixed computation, recorded together with the engine's version.

    python -m tests.trust.engine_numbers

records them anew in `engine-numbers.json`. It refuses to do so where the numbers changed and
`ENGINE_VERSION` did not: cached results of the version before would be taken for new ones.

Weights and tokens come from NumPy's generator, not from torch's, a tokenizer or a text, so that
they are the same on every machine. The tokens form a Markov chain and the MLP is wider than the
stream it reads, so that one channel can be predicted from others and repairs have something to fit.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transact_core.base import cache
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.decide import decide
from transact_core.importance.scores import IMPORTANCES
from transact_core.models.architecture import Architecture
from transact_core.models.load import LoadedModel
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, PruningPlan

FILE = Path(__file__).parent / "engine-numbers.json"
COMMAND = "python -m tests.trust.engine_numbers"
TOLERANCE = 1e-4
"""Of the largest number of a list. Other thread counts and instruction sets, which add in another
order, moved no number by more than 1e-5 of that but for those of the next line."""
TOLERANCE_OF_NARROW_HEADS = 1e-3
"""For `head-dims` with least squares, which is fitted in several rounds: losses moved by 2e-4."""
RATIOS = (0.34, 0.3)
"""Removed: two of six query heads, or one of three key-value groups; twelve of forty channels."""
VOCAB_SIZE, SEQUENCE_LENGTH = 64, 32

Numbers = dict[str, list[float]]


def make_bench() -> Bench:
    random = np.random.default_rng(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.from_numpy(random.standard_normal(tuple(weight.shape)))
            weight.copy_(1 + 0.1 * values if "norm" in name else 0.25 * values)
    loaded = LoadedModel(
        model=model,
        tokenizer=None,
        architecture=Architecture.from_config(config),
        source="engine/numbers",
        weight_files={"model.safetensors": "0" * 64},
        source_dtype=torch.float32,
    )
    chain = random.dirichlet(np.full(VOCAB_SIZE, 0.1), size=VOCAB_SIZE)
    windows = [
        Windows(name, "0" * 64, torch.from_numpy(_walk(random, chain, count)))
        for name, count in (("calibration", 64), ("evaluation", 16))
    ]
    return Bench(loaded, *windows)


def _walk(random: np.random.Generator, chain: np.ndarray, windows: int) -> np.ndarray:
    """Token ids of a Markov chain, shape (windows, SEQUENCE_LENGTH), int64."""
    ids = [int(random.integers(VOCAB_SIZE))]
    steps = random.random(windows * SEQUENCE_LENGTH - 1)
    thresholds = chain.cumsum(axis=1)
    for step in steps:
        ids.append(min(int(np.searchsorted(thresholds[ids[-1]], step)), VOCAB_SIZE - 1))
    return np.array(ids).reshape(windows, SEQUENCE_LENGTH)


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get("TRANSACT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRANSACT_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["TRANSACT_CACHE"]
            if before is not None:
                os.environ["TRANSACT_CACHE"] = before


def compute() -> Numbers:
    """Every kind of kept result, by name; computed without any kept result."""
    with _empty_cache():
        bench = make_bench()
        numbers = {"dense, NLL by window": _by_window(bench.dense().nll)}
        for importance in IMPORTANCES:
            scores = bench.scores(importance)
            numbers[f"scores, {importance}, heads"] = _flat(scores.heads)
            numbers[f"scores, {importance}, channels"] = _flat(scores.channels)
        for name, tensor in bench.pairs().to_tensors().items():
            numbers[f"rotary pairs, {name}"] = _flat(tensor)
        for granularity in GRANULARITIES:
            for recovery in RECOVERIES:
                choices = Choices(granularity, "reconstruction", recovery)
                numbers |= _cut(bench, choices)
                damage = bench.damage(choices)
                for module in ("mha", "mlp"):
                    errors = getattr(damage, module).errors
                    numbers[f"damage, {granularity}, {recovery}, {module}"] = _flat(errors)
        for name, choices in {
            "auto": Choices("auto", "activation"),
            "2 steps": Choices(importance="fluctuation", steps=2),
            "sequential": Choices(importance="reconstruction", sequential=True),
        }.items():
            decision = decide(bench, *RATIOS, choices)
            numbers[f"plan, {name}"] = _kept(decision.plan)
            if decision.granularity_losses:
                numbers[f"losses tried, {name}"] = list(decision.granularity_losses.values())
        return numbers


def _cut(bench: Bench, choices: Choices) -> Numbers:
    plan = bench.plan(*RATIOS, choices)
    model, measured = compress(bench, plan, choices.recovery)
    name = f"{choices.granularity}, {choices.recovery}"
    return {
        f"plan, {name}": _kept(plan),
        # Norms, as the basis of narrower values is known but for its signs.
        f"norms of weights, {name}": [
            weight.double().norm().item() for weight in model.parameters()
        ],
        f"errors of layers, {name}": [
            error for fit in measured.fits for error in (fit.bare_error, fit.recovered_error)
        ],
        f"NLL by window, {name}": _by_window(measured.evaluation.nll),
    }


def _kept(plan: PruningPlan) -> list[float]:
    """The indices that a plan keeps, one layer after the other."""
    kept = [*plan.slots]
    for layer in plan.layers:
        kept += layer.kept_heads + layer.kept_channels
        for pairs, dims in zip(layer.slot_pairs, layer.value_dims, strict=True):
            kept += pairs + dims
    return [float(index) for index in kept]


def _by_window(nll: torch.Tensor) -> list[float]:
    return _flat(nll.double().mean(dim=1))


def _flat(tensor: torch.Tensor) -> list[float]:
    return tensor.double().flatten().tolist()


def recorded() -> tuple[int, Numbers]:
    """The engine's version and the numbers that were recorded with it."""
    stored = json.loads(FILE.read_text())
    return stored["engine_version"], stored["numbers"]


def differences(now: Numbers, before: Numbers) -> dict[str, float]:
    """The largest difference of each list, relative to its largest number; infinite if it is
    missing, new or of another length. Names in sorted order."""
    found = {}
    for name in sorted(now.keys() | before.keys()):
        one, other = np.array(now.get(name, ())), np.array(before.get(name, ()))
        if one.shape != other.shape or name not in now or name not in before:
            found[name] = float("inf")
            continue
        scale = np.abs(other).max(initial=np.finfo(float).tiny)
        found[name] = float(np.abs(one - other).max(initial=0) / scale)
    return found


def tolerance(name: str) -> float:
    """The largest relative difference of a list that counts as rounding."""
    narrow = "head-dims, least-squares" in name
    return TOLERANCE_OF_NARROW_HEADS if narrow else TOLERANCE


def changed(now: Numbers, before: Numbers) -> list[str]:
    """Names of the recorded lists that are gone or differ by more than their tolerance.

    New lists, such as those of a new importance, are no change.
    """
    found = differences(now, before)
    # Written so that a NaN counts as a change.
    return [name for name in sorted(before) if not found[name] <= tolerance(name)]


def main() -> None:
    numbers = compute()
    if FILE.exists():
        version, before = recorded()
        different = changed(numbers, before)
        if different and version == cache.ENGINE_VERSION:
            sys.exit(
                f"Numbers changed ({', '.join(different[:5])}, {len(different)} in all) and "
                f"ENGINE_VERSION is still {version}: raise it in transact_core/base/cache.py, then "
                "record again."
            )
    stored = {"engine_version": cache.ENGINE_VERSION, "command": COMMAND, "numbers": numbers}
    text = json.dumps(stored, indent=1, sort_keys=True)
    FILE.write_text(text + "\n")
    print(f"{FILE}: {len(numbers)} lists, {len(text) / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
