"""Width pruning of language models, from the command line.

Results go to stdout, progress and warnings to stderr. An error that the user can correct is one
line on stderr and exit status 2.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from transact_core import start_app
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import (
    disk_trouble,
    read_text,
    require_free_output,
    require_new_file,
    staged_file,
)
from transact_core.base.generators import WithResult
from transact_core.data.corpus import MIXED, describe, read_corpus
from transact_core.data.windows import (
    Windows,
    WindowSpec,
    context_length_of,
    evaluation_windows,
    make_windows,
    read_texts,
)
from transact_core.experiments.bench import Bench, Choices, model_report
from transact_core.experiments.cut_spec import (
    BenchSpec,
    CutSpec,
    bench_with,
    decide_spec,
    open_bench,
)
from transact_core.experiments.harness import HarnessTask
from transact_core.experiments.sweep import MeasureAll, Pair, known_points, one_by_one, sweep
from transact_core.experiments.task_data import open_tasks
from transact_core.experiments.tasks import (
    Contestant,
    contestant_of,
    run_tasks,
    tasks_report,
    tasks_table,
)
from transact_core.export.compression import (
    Compression,
    describe_compression,
    read_compression,
    require_same_model,
    require_same_text,
    training_commands,
    version_warnings,
)
from transact_core.export.folder import compress_to_folder, evaluation_report, report
from transact_core.export.gguf import (
    FilePlan,
    default_multiples,
    export_gguf,
    source_file_named,
    vocabulary_for,
)
from transact_core.export.gguf_types import QUANTIZATIONS, quantization
from transact_core.export.iterative import prune_and_tune, require_resumed
from transact_core.export.model_card import add_gguf_to_card, kept_bare
from transact_core.export.modeling_file import FILE
from transact_core.export.publish import publish, require_publishable
from transact_core.export.task_table import record_tasks, require_output_folder
from transact_core.export.tune import Tuned, TuneSpec, tune
from transact_core.forward.in_llama_cpp import evaluate_gguf, measure_gguf_latency
from transact_core.forward.latency import LatencyPoint, measure_latency
from transact_core.forward.perplexity import evaluate
from transact_core.forward.writing import written_texts
from transact_core.importance.scores import IMPORTANCES, Evidence, score
from transact_core.models.devices import dtype_name, resolve_device
from transact_core.models.footprint import footprint
from transact_core.models.gguf import read_gguf_text
from transact_core.models.llama_cpp import require_llama_cpp, runtime_name
from transact_core.models.load import LoadedModel, fingerprint, load_model
from transact_core.pruning.closed_form import RECOVERIES, require_recovery
from transact_core.pruning.plan import GRANULARITIES, WIDTHS, parse_ratio, plan_notices
from transact_core.training.loop import LEARNING_RATES, Settings, Standing
from transact_core.training.objective import LOSSES
from transact_core.training.student import METHODS
from transact_core.workers import on_ray

# tqdm's monitor thread redraws slow bars at any time, even in the middle of an error message.
tqdm.monitor_interval = 0

EXIT_USER_ERROR = 2
"""Exit status after an error that the user can correct, as argparse has it."""
EXIT_INTERRUPTED = 130
"""Exit status after SIGINT or SIGTERM, as shells have it: 128 and the number of SIGINT."""


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

_SOURCE = (
    "builtin (Python's own reference), builtin-code (source code of its standard library), a .txt, "
    ".md, .jsonl or .parquet file, FILE:COLUMN, hub:DATASET[:CONFIG[:SPLIT[:COLUMN]]], "
    "generated[:TOKENS[:SEED]] (written by the model), or several with + between them (windows "
    "dealt evenly)"
)
_TEXT_DEFAULTS = WindowSpec()


def _parser() -> argparse.ArgumentParser:
    parser = start_app.Parser(prog=_program(), description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        parser_class=start_app.Parser,
        metavar="COMMAND",
        title="commands",
    )

    def command(
        name: str, run: Callable[[argparse.Namespace], None], what: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
        )
        added.set_defaults(run=run)
        return added

    prune = command("prune", _prune, "cut a model, measure it and write it as a checkpoint folder")
    _add_model(prune)
    _add_offload(prune)
    for ratio, width in (("--mha-ratio", "attention"), ("--mlp-ratio", "MLP")):
        prune.add_argument(
            ratio,
            required=True,
            metavar="R",
            help=f"fraction of the {width} width to remove, from 0 to below 1",
        )
    _add_output_folder(prune)
    _add_choices(prune)
    _add_calibration(prune)
    _add_evaluation(prune, several=True)
    prune.add_argument(
        "--tune-tokens",
        type=_positive,
        metavar="N",
        help="train after each of the --steps, on N tokens in all, from what the dense model says "
        "(default: no training)",
    )
    prune.add_argument(
        "--tune-text",
        metavar="SOURCE",
        help=f"text that is trained on then: {_SOURCE} (default: {TuneSpec.text})",
    )
    prune.add_argument(
        "--resume",
        action="store_true",
        help="with --tune-tokens: go on with the run that was interrupted; it is kept beside "
        "--output",
    )
    prune.add_argument(
        "--gguf",
        metavar="TYPE,…",
        help="also write GGUF files for llama.cpp, DIR-TYPE.gguf beside the folder, and measure "
        f"them there; types: {', '.join(QUANTIZATIONS)} (default: none)",
    )
    prune.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="publish folder and GGUF files as this model of the hub, in a private repository "
        "unless it exists or --public is given; the token is that of `hf auth login` or HF_TOKEN "
        "(default: not published)",
    )
    prune.add_argument("--public", action="store_true", help="make a new repository public")
    _add_modeling_file(prune)
    _add_json(prune, "print what report.json holds instead of a table")

    apply = command(
        "apply", _apply, "carry out a compression.json: the same choices, repaired and measured"
    )
    apply.add_argument(
        "compression",
        type=Path,
        metavar="compression.json",
        help="the file, as an output folder or the app has it",
    )
    _add_offload(apply)
    _add_output_folder(apply)
    apply.add_argument(
        "--model",
        metavar="M",
        help="where the model is on this machine; the SHA-256 of its weights must be the recorded "
        "one (default: the recorded place)",
    )
    for text, again in (("calibration", ""), ("evaluation", "; given again, the other texts'")):
        apply.add_argument(
            f"--{text}",
            dest=f"{text}s" if again else text,
            action="append" if again else "store",
            metavar="SOURCE",
            help=f"where the {text} text is on this machine; its SHA-256 must be the recorded one "
            f"(default: the recorded source{again})",
        )
    _add_modeling_file(apply)
    _add_json(apply, "print what report.json holds instead of a table")

    measure = command("evaluate", _evaluate, "measure the perplexity of a model")
    _add_model(measure)
    _add_offload(measure)
    _add_evaluation(measure, several=True)
    _add_runtime(measure)
    _add_json(measure, "print JSON, with the fields of report.json, instead of a sentence")

    analyze = command("analyze", _analyze, "score every head and channel of a model")
    _add_model(analyze)
    _add_offload(analyze)
    analyze.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE.parquet",
        help="new file for the scores, a row for every unit",
    )
    _add_importance(analyze)
    _add_calibration(analyze)
    _add_sequence_length(analyze)
    _add_seed(analyze)

    points = command("sweep", _sweep, "measure every pair of a grid of ratios")
    _add_model(points)
    _add_offload(points)
    for ratio, width in (("--mha-ratio", "attention"), ("--mlp-ratio", "MLP")):
        points.add_argument(
            ratio,
            required=True,
            metavar="R,R,…",
            help=f"fractions of the {width} width to remove, each from 0 to below 1, with commas "
            "between them",
        )
    points.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE.csv",
        help="file for the points: a new one, or that of the same sweep interrupted earlier, which "
        "is then continued",
    )
    _add_choices(points)
    _add_calibration(points)
    _add_evaluation(points)
    _add_ray(points, "points")

    gguf = command("gguf", _gguf, "write a model as a GGUF file, quantised, for llama.cpp")
    _add_model(gguf)
    gguf.add_argument(
        "--quantization", required=True, metavar="TYPE", help=f"one of {', '.join(QUANTIZATIONS)}"
    )
    gguf.add_argument(
        "--output", required=True, type=Path, metavar="FILE.gguf", help="new file for the model"
    )
    gguf.add_argument(
        "--imatrix",
        default=_TEXT_DEFAULTS.calibration,
        metavar="SOURCE",
        help="text for the importance matrix, which says how large the inputs of each matrix are "
        f"and is used below Q8_0: {_SOURCE}; none for none",
    )
    _add_calibration_tokens(gguf)
    _add_sequence_length(gguf)
    _add_threads(gguf)

    latency = command("latency", _latency, "time prefill and decoding of a model, or of two")
    _add_model(latency)
    latency.add_argument(
        "--against",
        metavar="M",
        help="a second model, which takes turns with the first (default: none)",
    )
    for option, default, what in (
        ("--prompt-tokens", 256, "tokens of the prompt"),
        ("--new-tokens", 64, "tokens that are generated after it"),
        ("--repeats", 5, "counted repeats, after one that is not counted"),
    ):
        latency.add_argument(option, type=_positive, default=default, metavar="N", help=what)
    _add_runtime(latency)
    _add_json(latency, "print JSON instead of a table")

    _add_tasks_command(command)
    _add_tune_command(command)

    # Run by __main__ already, before torch is imported; here for the list of commands.
    start_app.add_arguments(command("app", start_app.run, start_app.WHAT))
    return parser


def _program() -> str:
    """How this process was started: by the installed command or as a module."""
    installed = Path(sys.argv[0]).stem == "transact"
    return "transact" if installed else "python -m transact_core"


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is a negative number")
    return value


def _layers(text: str) -> tuple[int, ...]:
    """Indices of layers, with commas between them."""
    return tuple(sorted({_not_negative(part) for part in text.split(",")}))


def _layer_widths(text: str) -> tuple[tuple[int, int], ...]:
    """Query heads and channels of each layer, as 6:1024,9:1536."""
    found = []
    for part in text.split(","):
        heads, colon, channels = part.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form HEADS:CHANNELS")
        found.append((_positive(heads), _positive(channels)))
    return tuple(found)


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
        "--model",
        required=True,
        metavar="M",
        help="builtin, a checkpoint folder, a .gguf file or a hub id such as owner/name",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="where to compute: cpu, cuda:1, …; auto takes the first GPU where there is one, and "
        "all of them for a model that does not fit into one; cuda:0,cuda:1 lays its layers over "
        "these two",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="what to compute in; auto is float32 on a CPU and bfloat16 on a GPU",
    )


def _add_offload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--offload",
        action="store_const",
        const="always",
        default="auto",
        help="leave the model's layers on disk and read them one at a time, in each pass over the "
        "model: the same results in less memory and more time (default: where the model does not "
        "fit into the free memory)",
    )


def _add_ray(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help=f"share the {what} among the workers of a Ray cluster: auto for the one that this "
        "machine is a node of, HOST:PORT as `ray start` names it, or local for this machine alone; "
        "needs `make ray` (default: measured here, one after the other)",
    )
    parser.add_argument(
        "--ray-threads",
        type=_positive,
        metavar="N",
        help="CPUs and threads of each worker, on which the last digits depend; a worker has a GPU "
        "besides where there are any (default: 1)",
    )


def _add_output_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="new or empty folder for the pruned model; it appears whole or not at all",
    )


def _add_modeling_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--modeling-file",
        action="store_true",
        help=f"where layers have widths of their own: also write {FILE}, by which transformers "
        "loads the folder with trust_remote_code, and where all layers keep as many query heads "
        "the block configuration that vLLM's DeciLM reads (default: no code is written)",
    )


def _add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=what)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    defaults = Choices()
    parser.add_argument(
        "--granularity",
        default=defaults.granularity,
        choices=[*GRANULARITIES, "auto"],
        help="what is removed from attention: as many query-heads from every KV group, whole "
        "kv-groups, or dimensions of every head (head-dims); auto measures all three on held-out "
        "calibration windows and takes the best",
    )
    _add_importance(parser)
    parser.add_argument(
        "--recovery",
        default=defaults.recovery,
        choices=RECOVERIES,
        help="repair on the calibration text: least-squares refits o_proj and down_proj, bias adds "
        "the mean of what was removed, none leaves the bare cut",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=defaults.steps,
        metavar="K",
        help="number of steps in which the cut is made; before each, units are scored again on "
        "the model as pruned and repaired so far",
    )
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="choose each module's units on the stream of the model as pruned before it; with "
        "the importance reconstruction",
    )
    parser.add_argument(
        "--widths",
        default=defaults.widths,
        choices=WIDTHS,
        help="uniform cuts all layers alike; allocated gives each layer widths of its own, as many "
        "heads and channels in all; traded as many parameters, heads against channels. For these, "
        "what each layer's cut does to the predictions is measured on held-out windows of several "
        "kinds of text. by-hand takes those of --layer-widths, whatever the ratios",
    )
    parser.add_argument(
        "--layer-widths",
        dest="by_hand",
        type=_layer_widths,
        default=defaults.by_hand,
        metavar="H:C,…",
        help="the query heads and MLP channels that each layer keeps, with --widths by-hand",
    )
    parser.add_argument(
        "--keep-layers",
        type=_layers,
        default=defaults.keep_layers,
        metavar="N,…",
        help="layers that are not cut, counted from 0, where widths are allocated or traded "
        "(default: none)",
    )
    parser.add_argument(
        "--multiple-of",
        type=_positive,
        metavar="N",
        help="round the MLP width to a multiple of N channels; runtimes like 8, 32, 64 or 256 "
        "(default: 1; with --gguf 256 where that is near the ratio, else 32)",
    )
    parser.add_argument(
        "--head-dim-multiple-of",
        type=_positive,
        metavar="N",
        help="with head-dims, round the width of a head to a multiple of N dimensions (default: 1; "
        "with --gguf 32)",
    )
    parser.add_argument(
        "--save-dtype",
        choices=["float32", "float16", "bfloat16"],
        help="dtype of the saved weights, in which they are measured (default: that of the stored "
        "weights; float16 from a quantised GGUF)",
    )
    _add_seed(parser)


def _add_importance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--importance",
        default=Choices.importance,
        choices=list(IMPORTANCES),
        help="what a unit is scored by, the lowest being removed: its activation (TransAct), "
        "activation times output weights (activation-weight, Wanda), the variance of what it "
        "writes (fluctuation, FLAP), the loss to first order (taylor, LLM-Pruner), what a refit "
        "of the others misses (reconstruction), its weights (magnitude), or by lot (random)",
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="S",
        help="seed of all random draws, from 0 to 2^63 - 1",
    )


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        default=_TEXT_DEFAULTS.calibration,
        metavar="SOURCE",
        help=f"text that units are scored and repaired on: {_SOURCE}",
    )
    _add_calibration_tokens(parser)


def _add_calibration_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration-tokens",
        type=_positive,
        default=_TEXT_DEFAULTS.calibration_tokens,
        metavar="N",
        help="number of calibration tokens, cut into whole windows",
    )


def _add_evaluation(parser: argparse.ArgumentParser, several: bool = False) -> None:
    more = "; given again, perplexity is measured on that text too" if several else ""
    parser.add_argument(
        "--evaluation",
        dest="evaluations",
        action="append" if several else _One,
        metavar="SOURCE",
        help=f"text that perplexity is measured on: {_SOURCE}; where it is the calibration text "
        f"too, evaluation has its beginning and calibration what follows{more} "
        f"(default: {_TEXT_DEFAULTS.evaluation})",
    )
    parser.add_argument(
        "--evaluation-tokens",
        type=_positive,
        default=_TEXT_DEFAULTS.evaluation_tokens,
        metavar="N",
        help="number of evaluation tokens, cut into whole windows",
    )
    _add_sequence_length(parser)


class _One(argparse.Action):
    """A list of the one value that was given last."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [values])


def _add_sequence_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sequence-length",
        type=_positive,
        default=_TEXT_DEFAULTS.sequence_length,
        metavar="L",
        help="tokens of one window; each window is fed alone",
    )


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime",
        choices=["transformers", "llama.cpp"],
        default="transformers",
        help="what computes: transformers, or llama.cpp, which takes .gguf files and builtin",
    )
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads that llama.cpp computes with (default: OMP_NUM_THREADS, or all cores)",
    )


def _add_tasks_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    tasks = command("tasks", _tasks, "measure a model, or two on the same questions, by tasks")
    _add_model(tasks)
    tasks.add_argument(
        "--against",
        metavar="M",
        help="another model that answers the same questions; differences are model minus this one "
        "(default: none)",
    )
    tasks.add_argument(
        "--tasks",
        metavar="NAME,…",
        help="stock tasks of lm-evaluation-harness; default (common sense and last words) or paper "
        "(as the TransAct paper ran them); continuation and last_word, made of --text, need no "
        "data (default: those that need no data, or with --task-data the suite default)",
    )
    tasks.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="questions of each task, drawn with the seed (default: all)",
    )
    tasks.add_argument(
        "--few-shot",
        type=_not_negative,
        metavar="K",
        help="examples shown before each question (default: none, or the paper's)",
    )
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="DIR",
        help="folder of files TASK.jsonl, with the columns of the stock tasks, in place of the hub "
        "(default: none)",
    )
    tasks.add_argument(
        "--text",
        default=_TEXT_DEFAULTS.evaluation,
        metavar="SOURCE",
        help=f"text that continuation and last_word are made of: {_SOURCE}",
    )
    tasks.add_argument(
        "--record",
        action="store_true",
        help="write the figures into report.json and the model card of --model too, an output "
        "folder of prune; --against is then the dense model",
    )
    tasks.add_argument(
        "--output", type=Path, metavar="tasks.json", help="new file for the figures (default: none)"
    )
    _add_ray(tasks, "questions")
    _add_seed(tasks)
    _add_json(tasks, "print what tasks.json holds instead of a table")


def _add_tune_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    spec, settings = TuneSpec("", Path()), Settings()
    tune = command("tune", _tune, "train a cut, from what the dense model says of the next token")
    _add_model(tune)
    _add_output_folder(tune)
    tune.add_argument(
        "--teacher",
        metavar="M",
        help="the dense model (default: the one that compression.json of --model names)",
    )
    tune.add_argument(
        "--text",
        action="append",
        metavar="SOURCE",
        help=f"text to train on, of any length: {_SOURCE}; given again, windows are dealt evenly. "
        "What judged or calibrated the cut is left out "
        f"(default: {spec.text})",
    )
    tune.add_argument(
        "--tokens",
        type=_positive,
        default=settings.tokens,
        metavar="N",
        help="tokens to train on; a shorter text is read again",
    )
    tune.add_argument(
        "--method",
        default=settings.method,
        choices=METHODS,
        help="all weights but the embedding, or small matrices beside them that are merged at the "
        "end (lora, which needs the extra `tune`)",
    )
    tune.add_argument(
        "--loss",
        default=settings.loss,
        choices=LOSSES,
        help="divergence from the dense model (kl), loss on the text (ce), or half of each",
    )
    tune.add_argument(
        "--held-out",
        action="append",
        metavar="SOURCE",
        help="text that is watched beside a held-out part of each training text, and decides which "
        "weights are best (default: texts of another kind than --text)",
    )
    tune.add_argument(
        "--held-out-tokens",
        type=_positive,
        default=spec.held_out_tokens,
        metavar="N",
        help="tokens of each text that is watched",
    )
    rates = ", ".join(f"{rate:g} with {method}" for method, rate in LEARNING_RATES.items())
    tune.add_argument(
        "--learning-rate", type=float, metavar="R", help=f"the highest (default: {rates})"
    )
    tune.add_argument(
        "--rank",
        type=_positive,
        default=settings.rank,
        metavar="R",
        help="of LoRA's matrices",
    )
    tune.add_argument(
        "--windows-per-step",
        type=_positive,
        default=settings.windows_per_step,
        metavar="N",
        help="windows that one step of the optimiser averages over",
    )
    tune.add_argument(
        "--evaluate-every",
        type=_positive,
        metavar="STEPS",
        help="steps from one look at the held-out texts to the next (default: 16 looks)",
    )
    tune.add_argument(
        "--evaluation",
        metavar="SOURCE",
        help="where the evaluation text of --model is on this machine (default: as recorded)",
    )
    tune.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="folder in which the dense model's most likely tokens are written down once, so that "
        "training holds one model and later ones need no pass of it (default: in memory)",
    )
    tune.add_argument(
        "--teacher-top",
        type=_positive,
        default=spec.teacher_top,
        metavar="K",
        help="with --teacher-cache: how many tokens of each distribution",
    )
    tune.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="new folder for LoRA's matrices, as peft has them (default: not kept)",
    )
    tune.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training that was interrupted; it is kept beside --output",
    )
    tune.add_argument(
        "--finish",
        action="store_true",
        help="with --resume: train no further, and write the best weights so far",
    )
    tune.add_argument(
        "--report-to",
        default=spec.report_to,
        choices=["none", "tensorboard", "wandb", "trackio"],
        help="where losses are sent too; the package must be installed",
    )
    _add_sequence_length(tune)
    _add_seed(tune)
    _add_json(tune, "print what report.json holds instead of a table")


# --- commands --------------------------------------------------------------------------------


def _prune(chosen: argparse.Namespace) -> None:
    mha_ratio = parse_ratio(chosen.mha_ratio, "--mha-ratio")
    mlp_ratio = parse_ratio(chosen.mlp_ratio, "--mlp-ratio")
    require_free_output(chosen.output)
    files = _gguf_files_of_folder(chosen)
    if chosen.push_to_hub:
        require_publishable(chosen.push_to_hub)
    bench_spec = _bench_spec(chosen)
    if chosen.tune_tokens is not None:
        _prune_and_tune(chosen, bench_spec, (mha_ratio, mlp_ratio))
        return
    if chosen.tune_text is not None:
        raise TransActError("--tune-text is trained on with --tune-tokens; name how many.")
    if chosen.resume:
        raise TransActError("--resume goes on with --tune-tokens; a cut alone is made anew.")
    with _Bar() as progress:
        bench = _open(bench_spec, progress)
        if files:
            bench.loaded.require_whole("Writing a GGUF file")
            _choose_multiples(chosen, bench, mlp_ratio)
        spec = CutSpec(bench_spec, (mha_ratio, mlp_ratio), _choices(chosen))
        vocabulary = vocabulary_for(bench.loaded) if files else ()
        decision = decide_spec(bench, spec, progress)
        for sentence in filter(None, (decision.why, decision.how_allocated)):
            tqdm.write(sentence, file=sys.stderr)
        if decision.widths not in ("traded", "by-hand"):
            _warn_all(plan_notices(decision.plan, bench.loaded.architecture))
        compression = describe_compression(bench, decision, spec.choices.recovery)
        _carry_out(bench, compression, chosen, progress)
        if files:
            loaded = load_model(str(chosen.output), chosen.device, chosen.dtype, progress)
            written = export_gguf(
                files,
                loaded,
                bench.calibration,
                vocabulary,
                chosen.output.name,
                progress,
                told=_tell_plan,
            )
            figures = []
            for file in written:
                measured = evaluate_gguf(file.path, bench.evaluation, None, progress)
                figures.append((file, measured.perplexity))
                tqdm.write(
                    f"{file.path}: {file.bytes:,} bytes, perplexity {measured.perplexity:.4f} in "
                    f"{runtime_name()}",
                    file=sys.stderr,
                )
            add_gguf_to_card(chosen.output, figures, runtime_name())
        if chosen.push_to_hub:
            published = publish(
                chosen.push_to_hub,
                chosen.output,
                list(files.values()),
                chosen.public,
                progress=progress,
            )
            tqdm.write(f"Published at {published.address}.", file=sys.stderr)


def _prune_and_tune(
    chosen: argparse.Namespace, bench_spec: BenchSpec, ratios: tuple[float, float]
) -> None:
    """Cuts and trains by turns, the tokens split over the steps."""
    if chosen.gguf or chosen.push_to_hub:
        raise TransActError(
            "With --tune-tokens a folder is written and no more; give it to gguf, or publish it, "
            "afterwards."
        )
    # Looked at again where the work is done; here before a model is loaded.
    require_resumed(chosen.output, chosen.resume)
    choices = _choices(chosen)
    spec = TuneSpec(
        model=chosen.model,
        output=chosen.output,
        text=chosen.tune_text or TuneSpec.text,
        sequence_length=chosen.sequence_length,
        settings=Settings(tokens=chosen.tune_tokens, seed=chosen.seed),
        resume=chosen.resume,
    )
    with _Bar() as progress:
        bench = _open(bench_spec, progress)
        bench.loaded.require_one_device("Training")
        running = WithResult(prune_and_tune(chosen.output, bench, ratios, choices, spec, progress))
        for told in running:
            _tell_training(told)
    result = report(bench, running.result)
    print(json.dumps(result, indent=1) if chosen.json else _table(result, chosen.output))


def _apply(chosen: argparse.Namespace) -> None:
    compression = read_compression(chosen.compression)
    require_free_output(chosen.output)
    for sentence in version_warnings(compression):
        _warn(sentence)
    if compression.trainings:
        _warn(
            "the cut that this file describes was trained. What is made now is the cut alone; "
            f"{training_commands(compression)} trains again, not bit for bit."
        )
    # Sums are split among threads, so the last bits depend on their number.
    torch.set_num_threads(compression.environment.threads)
    torch.manual_seed(compression.seed)
    with _Bar() as progress:
        # Nothing here but the bench holds the dense model, which is released on the way.
        bench = _recorded_bench(compression, chosen, progress)
        _carry_out(bench, compression, chosen, progress)


def _tune(chosen: argparse.Namespace) -> None:
    chosen.text = MIXED.join(chosen.text or [TuneSpec.text])
    chosen.held_out = tuple(chosen.held_out or ())
    chosen.settings = _fields_of(Settings, chosen)
    spec: TuneSpec = _fields_of(TuneSpec, chosen)
    # Of several processes that train together, one tells.
    alone = int(os.environ.get("RANK", "0")) == 0
    with _Bar() if alone else nullcontext(silent) as progress:
        training = WithResult(tune(spec, progress))
        for told in training:
            if alone:
                _tell_training(told)
    if not alone:
        return
    tuned: Tuned = training.result
    tqdm.write(tuned.sentence, file=sys.stderr)
    if chosen.json:
        print(json.dumps(tuned.report, indent=1))
    elif tuned.report:
        print(_table(tuned.report, spec.output))
    else:
        print(f"Written to {spec.output}")


def _tell_training(told: Standing | str) -> None:
    """A notice, or a look at the held-out texts, as a line on stderr."""
    if isinstance(told, str):
        _warn(told)
    elif told.evaluated is not None:
        texts = []
        for name, watched in told.evaluated.texts.items():
            share = told.share_back[name]
            back = "" if share is None else f", {share:.0%} of the lost nats back"
            texts.append(f"{describe(name)}: KL {watched.kl:.4f}{back}")
        loss = "" if told.loss is None else f"loss {told.loss:.4f}; "
        left = "" if told.seconds_left is None else f"; {told.seconds_left / 60:.0f} minutes left"
        line = f"Step {told.step} of {told.steps}, {told.tokens:,} tokens: {loss}"
        tqdm.write(f"{line}{'; '.join(texts)}{left}", file=sys.stderr)


def _recorded_bench(
    compression: Compression, chosen: argparse.Namespace, progress: Progress
) -> Bench:
    """The bench that a compression was made on, its model and texts checked by their SHA-256."""
    environment = compression.environment
    device = environment.device
    try:
        resolve_device(device)
    except TransActError:
        _warn(
            f"this compression was made on the device {device}, which is not here; the last bits "
            "will differ."
        )
        device = "cpu"
    recorded = (compression.evaluation, *compression.other_texts)
    named = chosen.evaluations or []
    if len(named) > len(recorded):
        raise TransActError(
            f"--evaluation is given {len(named)} times and this compression was measured on "
            f"{len(recorded)} of its texts; name no more than those."
        )
    sources = [*named, *(text.source for text in recorded[len(named) :])]
    spec = WindowSpec(
        chosen.calibration or compression.calibration.source,
        sources[0],
        compression.calibration.tokens,
        # A text that was shorter than asked for gives the same windows again.
        max(text.tokens for text in recorded),
        compression.sequence_length,
        tuple(sources[1:]),
    )
    texts = read_texts(spec)
    model = chosen.model or compression.model.source
    loaded = load_model(model, device, environment.dtype, progress, chosen.offload)
    require_same_model(compression, loaded)
    if environment.gpu and device != "cpu" and environment.gpu != loaded.hardware:
        _warn(
            f"this compression was made on {environment.gpu}, and here is {loaded.hardware}; the "
            "last bits may differ."
        )
    compression.plan.check(loaded.architecture)
    bench = bench_with(loaded, spec, texts, compression.save_dtype, compression.seed, progress)
    require_same_text("calibration", compression.calibration, bench.calibration)
    for text, windows in zip(recorded, bench.evaluated, strict=True):
        require_same_text("evaluation", text, windows)
    _warn_all(bench.notices)
    return bench


def _carry_out(
    bench: Bench, compression: Compression, chosen: argparse.Namespace, progress: Progress
) -> None:
    """Writes the output folder, and prints what was measured."""
    measurement = compress_to_folder(
        chosen.output, bench, compression, progress, chosen.modeling_file
    )
    if unrepaired := kept_bare(measurement.fits):
        _warn(unrepaired)
    if chosen.modeling_file and compression.plan.uniform:
        _warn("All layers have the same widths, so no modeling file is needed or written.")
    result = report(bench, measurement)
    print(json.dumps(result, indent=1) if chosen.json else _table(result, chosen.output))


def _gguf_files_of_folder(chosen: argparse.Namespace) -> dict[str, Path]:
    """The GGUF files that `prune --gguf` asks for, by type; all of them new."""
    names = [quantization(name).name for name in chosen.gguf.split(",")] if chosen.gguf else []
    folder = chosen.output.absolute()
    files = {name: folder.with_name(f"{folder.name}-{name}.gguf") for name in names}
    for path in files.values():
        require_new_file(path, needs_folder=False)
    if files:
        require_llama_cpp()
    return files


def _choose_multiples(chosen: argparse.Namespace, bench: Bench, mlp_ratio: float) -> None:
    """Sets the multiples that were not asked for to those that llama.cpp's types take."""
    multiple_of, head_dim_multiple_of = default_multiples(bench.loaded.architecture, mlp_ratio)
    for name, multiple in (
        ("multiple_of", multiple_of),
        ("head_dim_multiple_of", head_dim_multiple_of),
    ):
        if getattr(chosen, name) is None:
            setattr(chosen, name, multiple)
            option = name.replace("_", "-")
            tqdm.write(f"For the GGUF files: --{option} {multiple}.", file=sys.stderr)


def _tell_plan(plan: FilePlan) -> None:
    tqdm.write(
        f"{plan.quantization.name} will take {plan.bytes:,} bytes, of which embedding and LM head "
        f"are {plan.embedding_bytes:,}.",
        file=sys.stderr,
    )
    _warn_all([fallback.sentence for fallback in plan.fallbacks])


def _gguf(chosen: argparse.Namespace) -> None:
    require_new_file(chosen.output)
    name = quantization(chosen.quantization).name
    if not quantization(name).is_float:
        require_llama_cpp()
    with _Bar() as progress:
        windows = None
        spec = WindowSpec(
            calibration=chosen.imatrix,
            calibration_tokens=chosen.calibration_tokens,
            sequence_length=chosen.sequence_length,
        )
        wanted = chosen.imatrix != "none" and quantization(name).wants_imatrix
        texts = read_texts(spec) if wanted else None
        loaded = load_model(chosen.model, chosen.device, chosen.dtype, progress)
        if wanted:
            windows, _ = make_windows(
                spec,
                loaded.tokenizer,
                loaded.architecture.vocab_size,
                context_length_of(loaded.model.config),
                written_texts(texts, loaded, progress),
                progress,
            )
            _warn_all(windows.notices)
        _warn_all(loaded.notices)
        (written,) = export_gguf(
            {name: chosen.output},
            loaded,
            windows,
            progress=progress,
            threads=chosen.threads,
            told=_tell_plan,
        )
    print(f"{written.bytes:,} bytes of {written.quantization} in {written.path}")


def _evaluate_in_llama_cpp(chosen: argparse.Namespace) -> None:
    if len(chosen.evaluations or []) > 1:
        raise TransActError("--runtime llama.cpp takes one --evaluation; run it for each text.")
    path = source_file_named(chosen.model)
    text = read_gguf_text(path)
    windows = evaluation_windows(
        read_corpus((chosen.evaluations or [_TEXT_DEFAULTS.evaluation])[0]),
        text.tokenizer,
        text.vocab_size,
        chosen.evaluation_tokens,
        chosen.sequence_length,
        text.context_length,
    )
    _warn_all(text.notices + windows.notices)
    with _Bar() as progress:
        measured = evaluate_gguf(path, windows, chosen.threads, progress)
    result = {
        "model": {"perplexity": measured.perplexity, "file_bytes": path.stat().st_size},
        "evaluation": evaluation_report(windows, measured),
        "runtime": runtime_name(),
    }
    if chosen.json:
        print(json.dumps(result, indent=1))
    else:
        print(
            f"Perplexity {measured.perplexity:.4f} over {measured.scored_tokens:,} scored tokens "
            f"of {describe(windows.source)}, in {runtime_name()}"
        )


def _latency(chosen: argparse.Namespace) -> None:
    sources = [chosen.model, *([chosen.against] if chosen.against else [])]
    if len(set(sources)) < len(sources):
        raise TransActError("--model and --against name the same model; name two.")
    lengths, text = [chosen.prompt_tokens], read_corpus("builtin").text
    own: dict[str, dict] = {source: {} for source in sources}
    with _Bar() as progress:
        if chosen.runtime == "llama.cpp":
            files = {source: source_file_named(source) for source in sources}
            ids = read_gguf_text(files[chosen.model]).tokenizer(text, return_tensors="pt")
            measured = measure_gguf_latency(
                files,
                ids["input_ids"][0],
                lengths,
                chosen.new_tokens,
                chosen.repeats,
                chosen.threads,
                progress,
            )
            points: Sequence[LatencyPoint] = measured.points
            own = {name: dataclasses.asdict(figures) for name, figures in measured.files.items()}
        else:
            models = {
                source: load_model(source, chosen.device, chosen.dtype, progress)
                for source in sources
            }
            ids = models[chosen.model].tokenizer(text, return_tensors="pt")
            points = list(
                measure_latency(
                    {name: loaded.model for name, loaded in models.items()},
                    ids["input_ids"][0],
                    lengths,
                    chosen.new_tokens,
                    chosen.repeats,
                    progress,
                )
            )
            own = {name: {"threads": torch.get_num_threads()} for name in models}
    result = {
        "runtime": chosen.runtime,
        "prompt_tokens": chosen.prompt_tokens,
        "new_tokens": chosen.new_tokens,
        "repeats": chosen.repeats,
        "models": {
            point.model: {
                "prefill_seconds": point.prefill.median,
                "prefill_quartiles": point.prefill.quartiles,
                "prefill_tokens_per_second": point.prefill_tokens_per_second,
                "decode_seconds_per_token": point.decode.median,
                "decode_quartiles": point.decode.quartiles,
                "decode_tokens_per_second": point.decode_tokens_per_second,
                **own[point.model],
            }
            for point in points
        },
    }
    if chosen.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{'':40}{'prefill tok/s':>16}{'decode tok/s':>16}")
    for name, row in result["models"].items():
        print(
            f"{name[-40:]:40}{row['prefill_tokens_per_second']:>16,.1f}"
            f"{row['decode_tokens_per_second']:>16,.1f}"
        )


def _evaluate(chosen: argparse.Namespace) -> None:
    if chosen.runtime == "llama.cpp":
        _evaluate_in_llama_cpp(chosen)
        return
    with _Bar() as progress:
        loaded, texts = _load_with_windows(
            chosen,
            chosen.evaluations or [_TEXT_DEFAULTS.evaluation],
            chosen.evaluation_tokens,
            progress,
        )
        measured = [evaluate(loaded.model, windows, progress) for windows in texts]
    cost = footprint(loaded.architecture, dtype_name(loaded.source_dtype))
    reports = [
        evaluation_report(windows, losses) for windows, losses in zip(texts, measured, strict=True)
    ]
    result = {"model": model_report(cost, measured[0].perplexity), "evaluation": reports[0]}
    if len(texts) > 1:
        result["other_texts"] = [
            {**text, "perplexity": losses.perplexity}
            for text, losses in zip(reports[1:], measured[1:], strict=True)
        ]
    if chosen.json:
        print(json.dumps(result, indent=1))
        return
    for windows, losses in zip(texts, measured, strict=True):
        print(
            f"Perplexity {losses.perplexity:.4f} over {losses.scored_tokens:,} scored tokens "
            f"of {describe(windows.source)}"
        )


def _analyze(chosen: argparse.Namespace) -> None:
    require_new_file(chosen.output)
    with _Bar() as progress:
        loaded, (windows,) = _load_with_windows(
            chosen, [chosen.calibration], chosen.calibration_tokens, progress
        )
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
    if choices.widths == "by-hand":
        raise TransActError("Widths by hand are one cut, whatever the ratios; use prune for it.")
    before = _lines_of_sweep(output, pairs)
    with _Bar() as progress, _measuring(chosen, choices, len(pairs), progress) as (bench, measure):
        known = known_points(bench, pairs, choices, progress)
        rows = {pair: point.row() for pair, point in known.items()}
        if not _without_seconds(before) <= _without_seconds(_as_csv(rows, pairs).splitlines()):
            raise TransActError(
                f"The points in {output} were not measured here with this model, these texts and "
                "these choices; name a new file."
            )
        notices: list[str] = []
        for measurement in sweep(bench, pairs, choices, progress, measure):
            if choices.widths != "traded":
                notices += plan_notices(measurement.plan, bench.loaded.architecture)
            rows[measurement.plan.mha_ratio, measurement.plan.mlp_ratio] = measurement.row()
            text = _as_csv(rows, pairs)
            _write_file(output, lambda path, text=text: path.write_text(text))
        _warn_all(notices)
    print(f"{len(pairs)} points in {output}")


@contextmanager
def _measuring(
    chosen: argparse.Namespace, choices: Choices, points: int, progress: Progress
) -> Iterator[tuple[Bench, MeasureAll]]:
    """The bench of a sweep, and what measures its points: this process or a Ray cluster."""
    spec = _bench_spec(chosen)
    if not _asks_for_ray(chosen):
        yield _open(spec, progress), one_by_one
        return
    # What is wrong with the choices or the names is found before a cluster is asked.
    require_recovery(choices.recovery)
    on_ray.require_ray()
    texts = read_texts(spec.windows)
    weights = _fingerprints([spec.model], progress)[0]
    with on_ray.on_cluster(chosen.ray, chosen.ray_threads or 1, _warn) as cluster:
        bench = cluster.open(spec, texts, weights, choices, points, progress)
        _warn_all(bench.notices)
        yield bench, cluster.measure


def _asks_for_ray(chosen: argparse.Namespace) -> bool:
    """Whether a cluster is to do the work.

    Raises:
        TransActError: its workers' threads are named, and it is not.
    """
    if chosen.ray is None and chosen.ray_threads is not None:
        raise TransActError("--ray-threads is for workers of a cluster; name one with --ray.")
    return chosen.ray is not None


def _fingerprints(sources: Sequence[str], progress: Progress) -> list[dict[str, str]]:
    """The weight files that each model must have on every machine of a cluster."""
    progress("Fingerprinting the weights", 0, 1)
    found = [fingerprint(source) for source in sources]
    progress("Looking for the Ray cluster", 0, 1)
    return found


@contextmanager
def _answering(
    chosen: argparse.Namespace, tasks: Sequence[HarnessTask], progress: Progress
) -> Iterator[list[Contestant]]:
    """Who answers the questions of tasks: models loaded here, or ones whose answers were kept as
    they came from a Ray cluster."""
    sources = [source for source in (chosen.model, chosen.against) if source is not None]
    if not _asks_for_ray(chosen):
        loaded = [load_model(source, chosen.device, chosen.dtype, progress) for source in sources]
        _warn_all([notice for model in loaded for notice in model.notices])
        yield list(map(contestant_of, loaded))
        return
    on_ray.require_ray()
    weights = _fingerprints(sources, progress)
    specs = [BenchSpec(source, chosen.device, chosen.dtype) for source in sources]
    with on_ray.on_cluster(chosen.ray, chosen.ray_threads or 1, _warn) as cluster:
        yield cluster.answer(specs, weights, tasks, progress)


def _tasks(chosen: argparse.Namespace) -> None:
    if chosen.output is not None:
        require_new_file(chosen.output)
    if chosen.record:
        require_output_folder(Path(chosen.model))
    with _Bar() as progress:
        tasks = open_tasks(
            chosen.tasks,
            chosen.limit,
            chosen.few_shot,
            chosen.task_data,
            chosen.text,
            chosen.seed,
            progress,
        )
        with _answering(chosen, tasks, progress) as contestants:
            standings = {
                standing.task: standing
                for standing in run_tasks(tasks, *contestants, progress=progress)
            }
    result = tasks_report(standings, chosen.seed, chosen.limit)
    if chosen.output is not None:
        _write_file(
            chosen.output, lambda path: path.write_text(json.dumps(result, indent=1) + "\n")
        )
    if chosen.record:
        record_tasks(Path(chosen.model), result)
    print(json.dumps(result, indent=1) if chosen.json else tasks_table(standings.values()))


# --- pieces ----------------------------------------------------------------------------------


class _Bar:
    """Progress on stderr: one bar for each stage, with the time left."""

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


def _load_with_windows(
    chosen: argparse.Namespace, sources: Sequence[str], tokens: int, progress: Progress
) -> tuple[LoadedModel, list[Windows]]:
    """The model, and windows from the beginning of each text alone."""
    corpora = [read_corpus(source) for source in sources]
    loaded = load_model(chosen.model, chosen.device, chosen.dtype, progress, chosen.offload)
    texts = [
        evaluation_windows(
            corpus,
            loaded.tokenizer,
            loaded.architecture.vocab_size,
            tokens,
            chosen.sequence_length,
            context_length_of(loaded.model.config),
        )
        for corpus in written_texts(corpora, loaded, progress)
    ]
    _warn_all([*loaded.notices, *(notice for windows in texts for notice in windows.notices)])
    return loaded, texts


def _bench_spec(chosen: argparse.Namespace) -> BenchSpec:
    return BenchSpec(
        model=chosen.model,
        device=chosen.device,
        dtype=chosen.dtype,
        windows=_window_spec(chosen),
        save_dtype=chosen.save_dtype,
        seed=chosen.seed,
        offload=chosen.offload,
    )


def _window_spec(chosen: argparse.Namespace) -> WindowSpec:
    evaluation, *others = chosen.evaluations or [_TEXT_DEFAULTS.evaluation]
    return WindowSpec(
        chosen.calibration,
        evaluation,
        chosen.calibration_tokens,
        chosen.evaluation_tokens,
        chosen.sequence_length,
        tuple(others),
    )


def _open(spec: BenchSpec, progress: Progress) -> Bench:
    bench = open_bench(spec, progress)
    _warn_all(bench.notices)
    return bench


def _choices(chosen: argparse.Namespace) -> Choices:
    return _fields_of(Choices, chosen)


def _fields_of(kind: type, chosen: argparse.Namespace) -> Any:
    """The dataclass `kind` from the options that are named as its fields and were given."""
    values = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if value is not None})


def _warn(sentence: str) -> None:
    tqdm.write(f"Warning: {sentence}", file=sys.stderr)


def _warn_all(sentences: Sequence[str]) -> None:
    for sentence in dict.fromkeys(sentences):
        _warn(sentence)


def _lines_of_sweep(path: Path, pairs: Sequence[Pair]) -> list[str]:
    """The lines of the file of an interrupted sweep, its header first; none for a new file.

    Raises:
        TransActError: the file is not a sweep's, or holds a point that this sweep is not asked for
            and that would be lost.
    """
    if not os.path.exists(path):
        require_new_file(path)
        return []
    try:
        header, *lines = read_text(path).splitlines()
        points = {
            (float(mha), float(mlp)) for mha, mlp, _ in (line.split(",", 2) for line in lines)
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
    """Lines of a sweep's file without their last column, which differs from run to run."""
    return {line.rpartition(",")[0] for line in lines}


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file and renames it, so that readers never see a part of it."""
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
    for text in result.get("other_texts", []):
        before, after = (text[side]["perplexity"] for side in ("dense", "pruned"))
        lines.append(
            f"{'perplexity on another':24}{before:>16,.4f}{after:>16,.4f}"
            f"{after / before:>9.3f}  {describe(text['source'])}"
        )
    return "\n".join([*lines, f"Written to {output}"])
