"""One row of the table: make a pruned model, save it, reload it by stock transformers, measure it.

The table runs `python -m benchmarks.row` for each row, so that every row has its own process and
its own peak memory. Seconds and peak memory cover making the model (scoring, cutting, repairing,
and whatever else the method does), not saving and measuring it. Seconds leave out loading too.
"""

import argparse
import dataclasses
import json
import math
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks.baselines import BASELINES, BaselineFailed
from benchmarks.cuts import DENSE, PUBLISHED, Row, rows
from benchmarks.memory import peak_memory
from transact_core.base.errors import TransActError, first_line
from transact_core.base.files import cache_folder
from transact_core.data.windows import Windows, WindowSpec, make_windows, read_texts
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.decide import decide
from transact_core.export.compression import describe_compression
from transact_core.export.folder import write_checkpoint
from transact_core.forward.perplexity import evaluate
from transact_core.models.checkpoint_writer import mend_generation_config
from transact_core.models.load import LoadedModel, load_model
from transact_core.pruning.plan import head_counts
from transact_core.pruning.surgery import cast, round_weights

RELOADED_TOLERANCE = 1e-3
"""Largest difference in mean NLL, in nats per token, between a model and its reloaded copy."""


@dataclass(frozen=True)
class Setup:
    """Model, texts and windows that all rows share."""

    model: str
    calibration: str
    evaluation: str
    calibration_tokens: int
    evaluation_tokens: int
    sequence_length: int
    share_measurements: bool = False
    """Rows share measurements of the dense model; `seconds` then leaves out those made before."""


@dataclass(frozen=True)
class Result:
    """A row's figures for the table. Missing figures are None, and `note` says why."""

    perplexity: float | None = None
    parameters: int | None = None
    kv_bytes_per_token: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    reloaded_by_stock: str = ""
    note: str = ""


def load(setup: Setup) -> tuple[LoadedModel, Windows, Windows]:
    """The dense model, calibration windows and evaluation windows."""
    spec = WindowSpec(
        setup.calibration,
        setup.evaluation,
        setup.calibration_tokens,
        setup.evaluation_tokens,
        setup.sequence_length,
    )
    texts = read_texts(spec)
    loaded = load_model(setup.model)
    windows = make_windows(spec, loaded.tokenizer, loaded.architecture.vocab_size, texts=texts)
    return loaded, *windows


def make_row(row: Row, loaded: LoadedModel, calibration: Windows, evaluation: Windows) -> Result:
    """Makes, saves, reloads and measures one row. A baseline changes the loaded model in place.

    A method that refuses the cut or fails gives a result with a note and no figures.
    """
    dtype = loaded.source_dtype
    try:
        start = time.perf_counter()
        model, save, note = _make(row, loaded, calibration)
        seconds = time.perf_counter() - start
    except (TransActError, BaselineFailed) as error:
        return Result(note=f"refused: {error}")
    except ImportError as error:
        return Result(note=f"not installed: {error.name or error}")
    except Exception as error:
        return Result(note=f"failed: {type(error).__name__}: {first_line(error)[:300]}")
    peak = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        try:
            save(output)
            measured, reason = _reloaded(output, model, evaluation, dtype)
        except Exception as error:
            measured, reason = None, first_line(error)[:300]
        reloaded = measured is not None
        if measured is None:
            measured = _rounded(model, dtype)
            note = "; ".join(part for part in (note, f"measured in memory: {reason}") if part)
        return Result(
            perplexity=evaluate(measured, evaluation).perplexity,
            parameters=measured.num_parameters(),
            kv_bytes_per_token=kv_bytes_per_token(measured, dtype),
            seconds=0.0 if row.method == DENSE else seconds,
            peak_memory_bytes=peak,
            reloaded_by_stock="yes" if reloaded else "no",
            note=note,
        )


def _make(row: Row, loaded: LoadedModel, calibration: Windows):
    """The model, a function that saves it to a folder, and a note."""
    if row.method == DENSE:
        return loaded.model, _save_stock(loaded.model, loaded), ""
    if row.method in BASELINES:
        target = row.cut.target(loaded.architecture)
        model = BASELINES[row.method].make(loaded.model, loaded.tokenizer, calibration, target)
        return model, _save_stock(model, loaded), ""
    mha_ratio, choices = row.cut.mha_ratio, row.choices
    if row.method == PUBLISHED:
        mha_ratio = published_mha_ratio(row, loaded)
        choices = Choices(row.cut.granularity, "activation", "none")
    # `compress` also evaluates. Two tokens make that take no time, and keep the evaluation text
    # from the engine.
    unused = dataclasses.replace(calibration, ids=calibration.ids[:1, :2])
    bench = Bench(loaded, calibration, unused)
    bench.statistics()
    decision = decide(bench, mha_ratio, row.cut.mlp_ratio, choices)
    plan = decision.plan
    model, measurement = compress(bench, plan, choices.recovery)
    note = f"chose {plan.granularity}" if plan.granularity != choices.granularity else ""

    def save(output: Path) -> None:
        compression = describe_compression(bench, decision, choices.recovery)
        write_checkpoint(output, model, bench, measurement, compression)

    return model, save, note


def published_mha_ratio(row: Row, loaded: LoadedModel) -> float:
    """The ratio at which the engine keeps as many heads as TransAct: `ceil(target / head_dim)`."""
    architecture = loaded.architecture
    if not row.cut.mha_ratio:
        return 0.0
    heads = architecture.num_attention_heads
    wanted = math.ceil(round(heads * (1 - row.cut.mha_ratio), 6))
    possible = head_counts(architecture, row.cut.granularity)
    return 1 - min(count for count in possible if count >= wanted) / heads


def _save_stock(model: LlamaForCausalLM, loaded: LoadedModel):
    def save(output: Path) -> None:
        stored = model if model is not loaded.model else cast(model, loaded.source_dtype)
        stored = stored.to(loaded.source_dtype)
        mend_generation_config(stored)
        stored.save_pretrained(output)
        loaded.tokenizer.save_pretrained(output)

    return save


@torch.inference_mode()
def _reloaded(
    folder: Path, made: LlamaForCausalLM, evaluation: Windows, dtype: torch.dtype
) -> tuple[LlamaForCausalLM | None, str]:
    """The model as stock transformers loads it, or None and how it differs from the one made."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            return None, f"{kind.replace('_', ' ')} on reloading"
    first = dataclasses.replace(evaluation, ids=evaluation.ids[:1])
    model = model.to(made.device)
    change = evaluate(model, first).mean_nll - evaluate(_rounded(made, dtype), first).mean_nll
    if not abs(change) < RELOADED_TOLERANCE:
        return None, f"reloaded, it differs by {change:.3g} nats a token"
    return model, ""


def _rounded(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    model = model.float()
    round_weights(model, dtype)
    return model


def kv_bytes_per_token(model: LlamaForCausalLM, dtype: torch.dtype) -> int:
    """Bytes of K and V of all layers, from the widths of their projections."""
    widths = (
        layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features
        for layer in model.model.layers
    )
    return sum(widths) * dtype.itemsize


@contextmanager
def _own_measurements():
    """An empty cache, but for the converted models: no measurements of earlier rows."""
    with tempfile.TemporaryDirectory() as folder:
        models = cache_folder() / "models"
        models.mkdir(parents=True, exist_ok=True)
        (Path(folder) / "models").symlink_to(models.absolute())
        before = os.environ.get("TRANSACT_CACHE")
        os.environ["TRANSACT_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRANSACT_CACHE"]
            else:
                os.environ["TRANSACT_CACHE"] = before


def find_row(cut: str, method: str) -> Row:
    return next(row for row in rows() if row.key == (cut, method))


def main() -> None:
    """Makes the row named on the command line and writes its result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row", description=main.__doc__)
    parser.add_argument("setup", help="Setup as JSON")
    parser.add_argument("cut")
    parser.add_argument("method")
    parser.add_argument("output", type=Path)
    chosen = parser.parse_args()
    setup = Setup(**json.loads(chosen.setup))
    row = find_row(chosen.cut, chosen.method)
    torch.manual_seed(0)
    if setup.share_measurements:
        result = make_row(row, *load(setup))
    else:
        with _own_measurements():
            result = make_row(row, *load(setup))
    chosen.output.write_text(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
