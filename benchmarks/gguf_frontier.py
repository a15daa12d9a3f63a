"""The frontier of GGUF files: dense and pruned, each in each type, measured in llama.cpp.

    python -m benchmarks.gguf_frontier --output frontier.csv --markdown frontier.md --resume
    python -m benchmarks.gguf_frontier --models "dense;MLP 1024" --types F16,Q4_0 --no-latency …
    python -m benchmarks.gguf_frontier --trained runs/6-heads-trained --trained runs/mlp-trained …

A row is a file: its exact size, perplexity from llama.cpp's own logits, and, in turns with the
dense F16 file, prefill and decode tokens a second, their ratio to that file's, peak memory and load
time. Cuts are repaired by least squares on the calibration text; perplexity is of the evaluation
text. Folders of cuts of the built-in model that were trained, as `tune` writes them, are measured
beside the cuts. With --resume the rows of an earlier run with the same settings are kept.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from transact_core.base.errors import TransActError
from transact_core.base.files import staged_file
from transact_core.data.windows import WindowSpec
from transact_core.experiments.bench import Bench, Choices
from transact_core.experiments.cut_spec import BenchSpec, CutSpec, decide_spec, open_bench
from transact_core.experiments.trained_cut import TrainedCut
from transact_core.export.compression import describe_compression, read_compression
from transact_core.export.folder import compress_to_folder
from transact_core.export.gguf import export_gguf, vocabulary_for
from transact_core.export.gguf_points import times_in_turns
from transact_core.export.gguf_types import QUANTIZATIONS
from transact_core.export.tune import read_trained_cut
from transact_core.forward.imatrix import importance_matrix
from transact_core.forward.in_llama_cpp import evaluate_gguf
from transact_core.forward.perplexity import evaluate
from transact_core.models.llama_cpp import default_threads, runtime_name
from transact_core.models.load import BUILTIN, load_model

DENSE = "dense"
CUTS: dict[str, tuple[float, float, Choices]] = {
    "MLP 1024": (0.0, 1 / 3, Choices(multiple_of=256)),
    "6 heads": (1 / 3, 0.0, Choices()),
    "6 heads, MLP 1024": (1 / 3, 1 / 3, Choices(multiple_of=256)),
    "6 heads, MLP 1088": (1 / 3, 0.3, Choices(multiple_of=32)),
    "head_dim 32, MLP 1280": (
        0.5,
        1 / 6,
        Choices(granularity="head-dims", multiple_of=256, head_dim_multiple_of=32),
    ),
}
"""Ratios and choices of the cuts of the built-in model, by what they leave of it."""


@dataclass(frozen=True)
class Row:
    """One file. Times are medians, their ratios to the dense F16 file measured in turns."""

    model: str
    type: str
    imatrix: bool
    bytes: int
    perplexity: float
    perplexity_transformers: float
    """Of the weights before quantisation."""
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    peak_bytes: int | None = None
    load_seconds: float | None = None


def trained_cuts(folders: list[Path]) -> dict[str, TrainedCut]:
    """The trained cuts in these folders, by the names of their rows.

    Raises:
        TransActError: a folder holds none, or one that is not of the built-in model.
    """
    found = {}
    for folder in folders:
        trained = read_trained_cut(folder)
        if read_compression(folder / "compression.json").model.source != BUILTIN:
            raise TransActError(f"{folder} holds no cut of the built-in model.")
        found[f"{folder.resolve().name}, {trained.words}"] = trained
    if len(found) < len(folders):
        raise TransActError("Two of the trained folders have the same name; rename one.")
    return found


def folder_of(name: str, place: Path, spec: BenchSpec) -> Path | None:
    """The checkpoint folder of a cut, made where it is not there yet; None for the dense model."""
    if name == DENSE:
        return None
    folder = place / _slug(name)
    if not folder.is_dir():
        bench = open_bench(spec)
        mha_ratio, mlp_ratio, choices = CUTS[name]
        decision = decide_spec(bench, CutSpec(spec, (mha_ratio, mlp_ratio), choices))
        compression = describe_compression(bench, decision, choices.recovery)
        compress_to_folder(folder, bench, compression)
    return folder


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def rows_of(
    name: str,
    trained: TrainedCut | None,
    types: list[str],
    place: Path,
    spec: BenchSpec,
    chosen: argparse.Namespace,
) -> Iterator[Row]:
    """Writes and measures one model in each of these types; a row as soon as it is measured."""
    folder = trained.folder if trained else folder_of(name, place, spec)
    gc.collect()
    bench = open_bench(spec)
    vocabulary = vocabulary_for(bench.loaded)
    reference = place / "dense-F16.gguf"
    if not reference.exists():
        export_gguf({"F16": reference}, bench.loaded, vocabulary=vocabulary, name=DENSE)
    if folder is None:
        stock = bench.dense().perplexity
        loaded = bench.loaded
    else:
        loaded = load_model(str(folder))
        # What its report says is of the text that a trained cut was measured on before.
        stock = (
            evaluate(loaded.model, bench.evaluation).perplexity
            if trained
            else json.loads((folder / "report.json").read_text())["pruned"]["perplexity"]
        )
    imatrix = importance_matrix(loaded.model, bench.calibration)
    for kind in types:
        path = place / f"{_slug(name)}-{kind}.gguf"
        (file,) = export_gguf(
            {kind: path}, loaded, bench.calibration, vocabulary, name, imatrix=imatrix
        )
        measured = evaluate_gguf(path, bench.evaluation, chosen.threads)
        row = Row(
            name,
            file.quantization,
            file.imatrix is not None,
            file.bytes,
            measured.perplexity,
            stock,
        )
        if not chosen.no_latency:
            row = with_latency(row, path, reference, bench, chosen)
        print(row, flush=True)
        if path != reference:
            path.unlink()
        yield row


def with_latency(
    row: Row, path: Path, reference: Path, bench: Bench, chosen: argparse.Namespace
) -> Row:
    """The row with the times of its file, in turns with the reference."""
    times = times_in_turns(path, reference, bench.evaluation, chosen.repeats, chosen.threads)
    return replace(
        row,
        prefill_tokens_per_second=times.prefill_tokens_per_second,
        decode_tokens_per_second=times.decode_tokens_per_second,
        prefill_speedup=times.prefill_speedup,
        decode_speedup=times.decode_speedup,
        peak_bytes=times.peak_bytes,
        load_seconds=times.load_seconds,
    )


def markdown(table: pd.DataFrame) -> str:
    """The rows as a table, from the largest file to the smallest."""
    lines = [
        "| model | type | MB | perplexity | prefill × | decode × | prefill tok/s | decode tok/s "
        "| peak MB | load s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def cell(value: float | None, digits: int, scale: float = 1) -> str:
        return "" if pd.isna(value) else f"{value / scale:,.{digits}f}"

    for row in table.sort_values("bytes", ascending=False).itertuples():
        lines.append(
            f"| {row.model} | {row.type}{' with imatrix' if row.imatrix else ''} "
            f"| {row.bytes / 1e6:,.1f} | {row.perplexity:,.3f} "
            f"| {cell(row.prefill_speedup, 2)} | {cell(row.decode_speedup, 2)} "
            f"| {cell(row.prefill_tokens_per_second, 1)} "
            f"| {cell(row.decode_tokens_per_second, 1)} "
            f"| {cell(row.peak_bytes, 0, 1e6)} | {cell(row.load_seconds, 2)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what is asked for and not there yet; writes CSV and Markdown after every row."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gguf_frontier", description=__doc__.splitlines()[0]
    )
    defaults = WindowSpec()
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and files")
    parser.add_argument("--models", default="all", metavar="NAME;NAME")
    parser.add_argument(
        "--trained",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a trained cut of the built-in model; given again, another one",
    )
    parser.add_argument("--types", default=",".join(QUANTIZATIONS), metavar="TYPE,TYPE")
    parser.add_argument("--evaluation", default=defaults.evaluation, metavar="SOURCE")
    parser.add_argument("--calibration", default=defaults.calibration, metavar="SOURCE")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--resume", action="store_true")
    chosen = parser.parse_args()
    names = [DENSE, *CUTS] if chosen.models == "all" else chosen.models.split(";")
    try:
        trained = trained_cuts(chosen.trained)
    except TransActError as error:
        raise SystemExit(str(error)) from None
    spec = BenchSpec(
        windows=WindowSpec(
            chosen.calibration, chosen.evaluation, evaluation_tokens=chosen.evaluation_tokens
        )
    )
    settings = {
        "evaluation": chosen.evaluation,
        "calibration": chosen.calibration,
        "evaluation_tokens": chosen.evaluation_tokens,
        "threads": chosen.threads,
        "latency": not chosen.no_latency,
        "runtime": runtime_name(),
    }
    beside = chosen.output.with_name(f"{chosen.output.name}.json")
    # Two runs may have other trained cuts, but not two under one name.
    weights = {name: cut.training for name, cut in trained.items()}
    table = pd.DataFrame(columns=list(Row.__dataclass_fields__))
    if chosen.resume and chosen.output.exists():
        before = json.loads(beside.read_text())
        earlier = before.pop("trained", {})
        if before != settings or any(earlier.get(name, it) != it for name, it in weights.items()):
            raise SystemExit(f"{chosen.output} was made with other settings; name another output.")
        table, weights = pd.read_csv(chosen.output), earlier | weights
    chosen.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(chosen.threads)
    beside.write_text(json.dumps({**settings, "trained": weights}, indent=1) + "\n")
    for name in (*names, *trained):
        known = set(table.loc[table["model"] == name, "type"])
        types = [kind for kind in chosen.types.split(",") if kind not in known]
        made = rows_of(name, trained.get(name), types, chosen.folder, spec, chosen)
        for row in made if types else ():
            new = pd.DataFrame([asdict(row)])
            table = new if table.empty else pd.concat([table, new], ignore_index=True)
            with staged_file(chosen.output) as staging:
                table.to_csv(staging, index=False)
            if chosen.markdown:
                chosen.markdown.write_text(markdown(table))
    print(markdown(table))


if __name__ == "__main__":
    main()
