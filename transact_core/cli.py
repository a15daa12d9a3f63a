"""The command line: `python -m transact_core COMMAND`.

Results go to stdout, progress and logs to stderr. What the user can mend is one line on stderr and
exit status 2.
"""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

import pandas as pd
import torch
from tqdm import tqdm

from transact_core.base.errors import Progress, TransActError
from transact_core.base.files import disk_trouble, read_text, require_free_output, staged_file
from transact_core.data.corpus import BUILTIN_TEXT, describe, read_corpus
from transact_core.data.windows import calibration_and_evaluation, evaluation_windows
from transact_core.experiments.bench import Bench, Choices, model_report
from transact_core.experiments.results import decided
from transact_core.experiments.sweep import Pair, known_points, sweep
from transact_core.export.compression import (
    Compression,
    describe_compression,
    read_compression,
    require_same_model,
    require_same_text,
    version_warnings,
)
from transact_core.export.folder import compress_to_folder, evaluation_report, report
from transact_core.export.model_card import kept_bare
from transact_core.forward.perplexity import evaluate
from transact_core.importance.scores import IMPORTANCES, Evidence, score
from transact_core.models.devices import dtype_name
from transact_core.models.footprint import footprint
from transact_core.models.load import LoadedModel, load_model
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, parse_ratio, plan_notices

# Its thread redraws slow bars from outside, in the middle of an error's line if it comes to that.
tqdm.monitor_interval = 0

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TransActError(message[0].upper() + message[1:] + "; see --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        chosen = _parser().parse_args(arguments)
        chosen.run(chosen)
    except TransActError as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except torch.OutOfMemoryError:
        print("Error: the GPU's memory is used up; use --device cpu.", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("Interrupted; nothing was left half-written.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


# --- arguments -------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m transact_core", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    prune = commands.add_parser("prune", help="cut a model and write the checkpoint folder")
    _add_model(prune)
    prune.add_argument("--mha-ratio", required=True, metavar="R", help="0 to under 1")
    prune.add_argument("--mlp-ratio", required=True, metavar="R", help="0 to under 1")
    prune.add_argument("--output", required=True, type=Path, metavar="DIR")
    _add_choices(prune)
    _add_texts(prune)
    prune.add_argument("--json", action="store_true", help="print what report.json holds")
    prune.set_defaults(run=_prune)

    apply = commands.add_parser("apply", help="carry out a compression.json")
    apply.add_argument("compression", type=Path, metavar="compression.json")
    apply.add_argument("--output", required=True, type=Path, metavar="DIR")
    apply.add_argument("--model", metavar="M", help="where the model is on this machine")
    apply.add_argument("--calibration", metavar="SOURCE")
    apply.add_argument("--evaluation", metavar="SOURCE")
    apply.add_argument("--json", action="store_true", help="print what report.json holds")
    apply.set_defaults(run=_apply)

    measure = commands.add_parser("evaluate", help="measure perplexity")
    _add_model(measure)
    _add_evaluation(measure)
    measure.add_argument("--json", action="store_true", help="print JSON")
    measure.set_defaults(run=_evaluate)

    analyze = commands.add_parser("analyze", help="score every head and channel")
    _add_model(analyze)
    analyze.add_argument("--output", required=True, type=Path, metavar="FILE.parquet")
    analyze.add_argument("--importance", default="activation", choices=list(IMPORTANCES))
    _add_calibration(analyze)
    analyze.add_argument("--sequence-length", type=_positive, default=512, metavar="L")
    analyze.add_argument("--seed", type=_seed, default=0)
    analyze.set_defaults(run=_analyze)

    points = commands.add_parser("sweep", help="measure a grid of ratios")
    _add_model(points)
    points.add_argument("--mha-ratio", required=True, metavar="R,R,…")
    points.add_argument("--mlp-ratio", required=True, metavar="R,R,…")
    points.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE.csv",
        help="a new file, or that of the same sweep, stopped: it goes on where it was",
    )
    _add_choices(points)
    _add_texts(points)
    points.set_defaults(run=_sweep)
    return parser


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _seed(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to 2^63 - 1")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="builtin, a folder, a .gguf file or a hub id"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--dtype", default="auto", help="auto (float32 on a CPU, bfloat16 on a GPU) or a dtype"
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    defaults = Choices()
    parser.add_argument(
        "--granularity", default=defaults.granularity, choices=[*GRANULARITIES, "auto"]
    )
    parser.add_argument("--importance", default=defaults.importance, choices=list(IMPORTANCES))
    parser.add_argument("--recovery", default=defaults.recovery, choices=RECOVERIES)
    parser.add_argument("--steps", type=_positive, default=defaults.steps, metavar="K")
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="choose each module's units on the stream of the model as pruned before it; with "
        "the importance reconstruction",
    )
    parser.add_argument("--multiple-of", type=_positive, default=defaults.multiple_of, metavar="N")
    parser.add_argument(
        "--head-dim-multiple-of",
        type=_positive,
        default=defaults.head_dim_multiple_of,
        metavar="N",
        help="what head_dim is rounded to by head-dims",
    )
    parser.add_argument("--save-dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--seed", type=_seed, default=0)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    _add_calibration(parser)
    _add_evaluation(parser)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", default=BUILTIN_TEXT, metavar="SOURCE")
    parser.add_argument("--calibration-tokens", type=_positive, default=8192, metavar="N")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--evaluation", default=BUILTIN_TEXT, metavar="SOURCE")
    parser.add_argument("--evaluation-tokens", type=_positive, default=4096, metavar="N")
    parser.add_argument("--sequence-length", type=_positive, default=512, metavar="L")


# --- commands --------------------------------------------------------------------------------


def _prune(chosen: argparse.Namespace) -> None:
    mha_ratio = parse_ratio(chosen.mha_ratio, "--mha-ratio")
    mlp_ratio = parse_ratio(chosen.mlp_ratio, "--mlp-ratio")
    require_free_output(chosen.output)
    with _Bar() as progress:
        bench = _bench(chosen, progress)
        decision = decided(bench, mha_ratio, mlp_ratio, _choices(chosen), progress)
        if decision.why:
            tqdm.write(decision.why, file=sys.stderr)
        _warn_all(plan_notices(decision.plan, bench.loaded.architecture))
        compression = describe_compression(bench, decision, chosen.recovery)
        _carry_out(bench, compression, chosen, progress)


def _apply(chosen: argparse.Namespace) -> None:
    compression = read_compression(chosen.compression)
    require_free_output(chosen.output)
    for sentence in version_warnings(compression):
        _warn(sentence)
    environment = compression.environment
    # Sums are split among threads, so the last bits depend on their number.
    torch.set_num_threads(environment.threads)
    torch.manual_seed(compression.seed)
    device = environment.device
    if device == "cuda" and not torch.cuda.is_available():
        _warn("this compression was made on a GPU and none is here; the last bits will differ.")
        device = "cpu"
    with _Bar() as progress:
        loaded = load_model(
            chosen.model or compression.model.source, device, environment.dtype, progress
        )
        require_same_model(compression, loaded)
        compression.plan.check(loaded.architecture)
        calibration = read_corpus(chosen.calibration or compression.calibration.source)
        evaluation = read_corpus(chosen.evaluation or compression.evaluation.source)
        windows = calibration_and_evaluation(
            calibration,
            evaluation,
            loaded.tokenizer,
            loaded.architecture.vocab_size,
            compression.calibration.tokens,
            compression.evaluation.tokens,
            compression.sequence_length,
            progress,
        )
        require_same_text("calibration", compression.calibration, windows[0])
        require_same_text("evaluation", compression.evaluation, windows[1])
        bench = Bench(loaded, *windows, save_dtype=compression.save_dtype)
        # The bench releases the dense weights before it measures, so nothing else may hold them.
        del loaded
        _carry_out(bench, compression, chosen, progress)


def _carry_out(
    bench: Bench,
    compression: Compression,
    chosen: argparse.Namespace,
    progress: Progress,
) -> None:
    measurement = compress_to_folder(chosen.output, bench, compression, progress)
    if told := kept_bare(measurement.fits):
        _warn(told)
    result = report(bench, measurement)
    print(json.dumps(result, indent=1) if chosen.json else _table(result, chosen.output))


def _evaluate(chosen: argparse.Namespace) -> None:
    with _Bar() as progress:
        loaded = _load(chosen, progress)
        windows = evaluation_windows(
            read_corpus(chosen.evaluation),
            loaded.tokenizer,
            loaded.architecture.vocab_size,
            chosen.evaluation_tokens,
            chosen.sequence_length,
        )
        _warn_all(windows.notices)
        measured = evaluate(loaded.model, windows, progress)
    cost = footprint(loaded.architecture, dtype_name(loaded.source_dtype))
    result = {
        "model": model_report(cost, measured.perplexity),
        "evaluation": evaluation_report(windows, measured),
    }
    if chosen.json:
        print(json.dumps(result, indent=1))
    else:
        print(
            f"Perplexity {measured.perplexity:.4f} over {measured.scored_tokens:,} scored tokens "
            f"of {describe(windows.source)}"
        )


def _analyze(chosen: argparse.Namespace) -> None:
    _require_new_file(chosen.output)
    with _Bar() as progress:
        loaded = _load(chosen, progress)
        windows = evaluation_windows(
            read_corpus(chosen.calibration),
            loaded.tokenizer,
            loaded.architecture.vocab_size,
            chosen.calibration_tokens,
            chosen.sequence_length,
        )
        _warn_all(windows.notices)
        evidence = Evidence(loaded.model, windows, loaded.architecture, chosen.seed, progress)
        frame = score(chosen.importance, evidence).to_frame(chosen.importance)
    _write_file(chosen.output, lambda path: frame.to_parquet(path, index=False))
    print(f"{len(frame):,} scores in {chosen.output}")


def _sweep(chosen: argparse.Namespace) -> None:
    pairs = list(
        product(
            [parse_ratio(ratio, "--mha-ratio") for ratio in chosen.mha_ratio.split(",")],
            [parse_ratio(ratio, "--mlp-ratio") for ratio in chosen.mlp_ratio.split(",")],
        )
    )
    output, choices = chosen.output, _choices(chosen)
    before = _lines_of_sweep(output, pairs)
    with _Bar() as progress:
        bench = _bench(chosen, progress)
        known = known_points(bench, pairs, choices, progress)
        rows = {pair: point.row() for pair, point in known.items()}
        if not _without_seconds(before) <= _without_seconds(_as_csv(rows, pairs).splitlines()):
            raise TransActError(
                f"The points in {output} were not measured here with this model, these texts and "
                "these choices; name a new file."
            )
        notices: list[str] = []
        for measurement in sweep(bench, pairs, choices, progress):
            notices += plan_notices(measurement.plan, bench.loaded.architecture)
            rows[measurement.plan.mha_ratio, measurement.plan.mlp_ratio] = measurement.row()
            text = _as_csv(rows, pairs)
            _write_file(output, lambda path, text=text: path.write_text(text))
        _warn_all(notices)
    print(f"{len(pairs)} points in {output}")


# --- pieces ----------------------------------------------------------------------------------


class _Bar:
    """Progress as one bar a stage on stderr, with time left."""

    def __enter__(self) -> Progress:
        self._bar: tqdm | None = None
        self._stage = ""
        return self._show

    def _show(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or (stage, total) != (self._stage, self._bar.total):
            self._close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=stage, file=sys.stderr, mininterval=0.5)
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *_: object) -> None:
        self._close()


def _load(chosen: argparse.Namespace, progress: Progress) -> LoadedModel:
    loaded = load_model(chosen.model, chosen.device, chosen.dtype, progress)
    _warn_all(loaded.notices)
    return loaded


def _bench(chosen: argparse.Namespace, progress: Progress) -> Bench:
    torch.manual_seed(chosen.seed)
    # Texts are read first: a wrong name is found before a large model is loaded.
    calibration = read_corpus(chosen.calibration)
    evaluation = read_corpus(chosen.evaluation)
    loaded = _load(chosen, progress)
    windows = calibration_and_evaluation(
        calibration,
        evaluation,
        loaded.tokenizer,
        loaded.architecture.vocab_size,
        chosen.calibration_tokens,
        chosen.evaluation_tokens,
        chosen.sequence_length,
        progress,
    )
    _warn_all(windows[0].notices + windows[1].notices)
    return Bench(loaded, *windows, save_dtype=chosen.save_dtype, seed=chosen.seed)


def _choices(chosen: argparse.Namespace) -> Choices:
    return Choices(
        **{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Choices)}
    )


def _warn(sentence: str) -> None:
    tqdm.write(f"Warning: {sentence}", file=sys.stderr)


def _warn_all(sentences: Sequence[str]) -> None:
    for sentence in dict.fromkeys(sentences):
        _warn(sentence)


def _lines_of_sweep(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """The lines of a sweep's file that is to be gone on with; none where it is new.

    Raises:
        TransActError: it is none, or holds a point that is not asked for and would be lost.
    """
    if not path.exists():
        _require_new_file(path)
        return []
    try:
        header, *lines = read_text(path).splitlines()
        points = {
            (float(mha), float(mlp)) for mha, mlp, _ in (each.split(",", 2) for each in lines)
        }
    except (OSError, ValueError):
        header = ""
    if not header.startswith("mha_ratio,mlp_ratio,"):
        raise TransActError(f"The output {path} exists and is not a sweep's; name a new file.")
    if others := points - set(pairs):
        mha_ratio, mlp_ratio = min(others)
        raise TransActError(
            f"{path} holds a point at MHA {mha_ratio:g} and MLP {mlp_ratio:g}, which this sweep is "
            "not asked for; ask for it too, or name a new file."
        )
    return [header, *lines]


def _as_csv(rows: dict[Pair, dict[str, float]], pairs: Sequence[Pair]) -> str:
    return pd.DataFrame([rows[pair] for pair in pairs if pair in rows]).to_csv(index=False)


def _without_seconds(lines: Sequence[str]) -> set[str]:
    """Lines of a sweep's file without their last column, which is another each time."""
    return {line.rpartition(",")[0] for line in lines}


def _require_new_file(path: Path) -> None:
    if path.exists():
        raise TransActError(f"The output {path} exists; name a new file.")
    if not path.absolute().parent.is_dir():
        raise TransActError(f"The folder of {path} does not exist.")


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the file and renames, so that readers never see a part of it."""
    try:
        with staged_file(path) as staging:
            write(staging)
    except OSError as error:
        raise TransActError(
            f"{path} was not written: {disk_trouble(error) or error.strerror or error}."
        ) from None


def _table(result: dict[str, dict], output: Path) -> str:
    dense, pruned = result["dense"], result["pruned"]
    lines = [f"{'':24}{'dense':>16}{'pruned':>16}{'ratio':>9}"]
    for key, before in dense.items():
        after = pruned[key]
        digits = 4 if key == "perplexity" else 0
        lines.append(f"{key:24}{before:>16,.{digits}f}{after:>16,.{digits}f}{after / before:>9.3f}")
    return "\n".join([*lines, f"Written to {output}"])
