"""The functions that a worker can be asked for.

Each is called with the worker's `OpenModels`, a progress callback, and what a `Task` names: specs,
choices and measured points, all of which can be pickled. What a bench measures on the way is handed
back beside the result (`tasks.Outcome.learned`).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress
from transact_core.base.files import require_free_output, require_new_file, temporary_folder
from transact_core.data.corpus import read_corpus
from transact_core.experiments.allocate import Laws, filled, loss_laws
from transact_core.experiments.bench import Bench, Choices, Measurement, compress
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.experiments.head_probe import (
    WithoutHead,
    attention_pattern,
    sample,
    without_head,
)
from transact_core.experiments.premise import Disturbed, disturb_all_layers, disturb_layer_by_layer
from transact_core.experiments.results import decided, measured
from transact_core.experiments.side_by_side import (
    DENSE,
    PRUNED,
    Prompt,
    Said,
    TokenLosses,
    compare_in_llama_cpp,
    prompt_of,
)
from transact_core.experiments.side_by_side import compare as compare_models
from transact_core.experiments.sweep import Pair, point_at
from transact_core.experiments.task_data import TaskChoice
from transact_core.experiments.tasks import Standing, contestant_of, run_tasks
from transact_core.experiments.text_damage import TextDamage, damage_of_texts
from transact_core.experiments.trained_cut import Subject, subject_identity
from transact_core.export.compression import describe_compression
from transact_core.export.folder import require_room, write_checkpoint
from transact_core.export.gguf import WrittenFile
from transact_core.export.gguf_points import (
    FilePoint,
    PlannedFile,
    bytes_by_widths,
    measure_files,
    planned_files,
    write_gguf,
)
from transact_core.export.task_table import record_tasks
from transact_core.export.tune import TuneSpec, open_texts, tune
from transact_core.forward.generation import Sampling
from transact_core.forward.in_llama_cpp import FileFigures, evaluate_gguf, measure_gguf_latency
from transact_core.forward.latency import LatencyPoint, measure_latency, require_lengths_fit
from transact_core.forward.perplexity import token_losses
from transact_core.models.llama_cpp import llama_cpp_version, require_llama_cpp
from transact_core.planning.duration import Feed, evaluation_flops
from transact_core.planning.preview import Structure
from transact_core.pruning.plan import ByHand, PruningPlan
from transact_core.training import loop
from transact_core.workers.open_models import OpenModels, TaskRun

PIECE_SECONDS = 20.0
"""How long a run of tasks goes on, after which others who wait have their turn."""
TASK_RUNS_KEPT = 12
"""Runs of tasks that wait for their next piece; one that was dropped begins with kept blocks."""
TIMED_STEPS = 2
"""Steps of a training that are timed where its budget is a time."""
PACE_TOKENS = 64
"""Length of the pass that is timed where the dense model's losses are kept from an earlier run."""


class _TooLong(Exception):
    """Raised by a progress callback to stop work that was to be done only if it takes no time."""


class StageTimer:
    """Passes progress on, and times the work from its first report to its last."""

    def __init__(self, report: Progress) -> None:
        self._report, self._began = report, None
        self.seconds: float | None = None
        """None where nothing was reported: nothing was measured then."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        elif done == total:
            self.seconds = now - self._began
        self._report(stage, done, total)


# --- a bench ---------------------------------------------------------------------------------


def open_bench(models: OpenModels, report: Progress, spec: BenchSpec) -> Bench:
    """The bench with the statistics and the default scores, without its model."""
    bench = models.bench(spec, report)
    bench.statistics(report)
    bench.scores(Choices().importance)
    return bench.without_model()


def measure_dense(models: OpenModels, report: Progress, spec: BenchSpec) -> float:
    """Measures the dense model on every text; gives the FLOPs a second that it was seen to do."""
    bench, timer = models.bench(spec, report), StageTimer(report)
    bench.dense(timer)
    bench.measure_dense(report)
    return measured_pace(bench, timer.seconds)


def prepare(models: OpenModels, report: Progress, spec: BenchSpec, choices: Choices) -> None:
    """Measures what every plan with these choices needs."""
    models.bench(spec, report).prepare(choices, report)


def learn(
    models: OpenModels, report: Progress, spec: BenchSpec, choices: Choices, only_kept: bool
) -> None:
    """Measures what predictions with these choices need; with `only_kept` looks it up only."""

    def allowed(stage: str, done: int, total: int) -> None:
        # Only what measures reports.
        if only_kept:
            raise _TooLong
        report(stage, done, total)

    with suppress(_TooLong):
        models.bench(spec, report).damage(choices, allowed)


def price(models: OpenModels, report: Progress, spec: BenchSpec, choices: Choices) -> Laws:
    """What the cut of each layer's module alone does to the predictions, by its error."""
    return loss_laws(models.bench(spec, report), choices, report)


def fill(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    ratios: Pair,
    choices: Choices,
    fixed: Mapping[str, Mapping[int, int]],
    laws: Laws | None,
) -> tuple[Laws, ByHand]:
    """The widths of least loss where some are fixed and the ratios are the budget, and by what.

    What single layers lose is measured where no `laws` are given.
    """
    bench = models.bench(spec, report)
    laws = laws or loss_laws(bench, choices, report)
    return laws, filled(bench, *ratios, choices, laws, fixed, report)


def measured_pace(bench: Bench, seconds: float | None) -> float:
    """FLOPs a second on this model, where its evaluation took so long; else a short pass is timed.

    The model must be at hand.
    """
    shape, windows = bench.loaded.architecture, bench.evaluation
    feed = Feed(windows.tokens, windows.sequence_length)
    if seconds is None:
        ids = windows.ids[0, :PACE_TOKENS].to(bench.loaded.device)
        feed = Feed(len(ids), len(ids))
        # The first pass after loading reads the weights from disk.
        token_losses(bench.loaded.model, ids[:2])
        began = time.perf_counter()
        token_losses(bench.loaded.model, ids)
        seconds = time.perf_counter() - began
    return evaluation_flops(shape, feed) / max(seconds, 1e-6)


# --- cuts ------------------------------------------------------------------------------------


def cut(
    models: OpenModels, report: Progress, spec: BenchSpec, ratios: Pair, choices: Choices
) -> Measurement:
    """The point of a cut; a model made for it is kept until the next cut, for an export."""
    bench = models.bench(spec, report)

    def compress_and_hold(
        bench: Bench, plan: PruningPlan, recovery: str, progress: Progress
    ) -> tuple[PreTrainedModel, Measurement]:
        models.let_go()
        model, point = compress(bench, plan, recovery, progress)
        models.hold(spec, point, model)
        return model, point

    decision = decided(bench, *ratios, choices, report)
    return measured(bench, decision, choices.recovery, report, compress_and_hold)


def curve_point(
    models: OpenModels, report: Progress, spec: BenchSpec, ratios: Pair, choices: Choices
) -> Measurement:
    """The point of a curve; its model is not kept."""
    return point_at(models.bench(spec, report), ratios, choices, report)


def curve_on_ray(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    bench: Bench,
    pairs: Sequence[Pair],
    choices: Choices,
    address: str,
) -> Iterator[Measurement | str]:
    """The points of a curve, measured on a Ray cluster by workers with as many threads as this one.

    `bench` is the one of the specification, opened elsewhere; this process holds no model. Points
    come as they are measured, and between them sentences on what the user should know.
    """
    # Imported late: it hands tasks of this module out.
    from transact_core.workers.on_ray import on_cluster

    said: list[str] = []
    report("Looking for the Ray cluster", 0, 1)
    weights = bench.loaded.weight_files
    with on_cluster(address, torch.get_num_threads(), said.append) as cluster:
        shared = cluster.open(spec, bench, weights, choices, len(pairs), report)
        # So that the server learns what was measured for it.
        models.adopt(spec, shared)
        for point in cluster.measure(shared, list(pairs), choices, report):
            yield from said
            said.clear()
            yield point
    yield from said


def export(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    point: Measurement,
    folder: Path,
    tasks: dict[str, Any] | None = None,
    modeling_file: bool = False,
) -> Path:
    """Writes a checkpoint of a measured point, with its scores of tasks where there are any."""
    require_free_output(folder)
    require_room(folder, point.footprint)
    model = models.pruned(spec, point, report)
    report("Writing the checkpoint", 0, 1)
    bench = models.bench(spec, report)
    compression = describe_compression(bench, point.decision, point.recovery)
    write_checkpoint(folder, model, bench, point, compression, modeling_file)
    if tasks is not None:
        record_tasks(folder, tasks)
    return folder


def require_training(
    models: OpenModels, report: Progress, spec: BenchSpec, training: TuneSpec
) -> None:
    """Refuses settings that cannot be and texts that cannot be read, before a cut is written."""
    open_texts(training)


def training_pace(
    models: OpenModels, report: Progress, spec: BenchSpec, training: TuneSpec
) -> loop.Pace:
    """What the first steps of a training take; they are not kept.

    Of each text one window is watched.
    """
    settings, length = training.settings, training.sequence_length
    tokens = TIMED_STEPS * settings.windows_per_step * length
    first = replace(settings, tokens=tokens, evaluate_every=TIMED_STEPS)
    with temporary_folder("timed") as folder:
        timed = replace(
            training, output=folder / "timed", settings=first, held_out_tokens=length, resume=False
        )
        told = train_cut(models, report, spec, timed)
        standings = (each for each in told if isinstance(each, loop.Standing))
        return next(each.pace for each in standings if each.step == TIMED_STEPS)


def train_cut(
    models: OpenModels, report: Progress, spec: BenchSpec, training: TuneSpec
) -> Iterator[loop.Standing | str]:
    """Trains the cut in a folder and writes another one; its result is a `Tuned`.

    What it yields is where it stands after each step: loss, held-out divergences, share of the lost
    nats that is back, seconds left. Cancelled, it has kept its state, and goes on with `resume`;
    with `finish` as well it writes the best so far.
    """
    models.let_go()
    return (yield from tune(replace(training, device=spec.device, dtype=spec.dtype), report))


# --- both models -----------------------------------------------------------------------------


def read_prompt(
    models: OpenModels, report: Progress, spec: BenchSpec, text: str, chat: bool
) -> Prompt:
    """The token ids of a prompt, refused where the model cannot continue it."""
    return prompt_of(models.bench(spec, report).loaded, text, chat)


def compare(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    subject: Subject,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[Said | TokenLosses]:
    """Continues a prompt by the dense and by a pruned model, and scores the texts by both."""
    both = _both_models(models, report, spec, subject)
    tokenizer = models.bench(spec, report).loaded.tokenizer
    yield from compare_models(both, tokenizer, prompt, max_new_tokens, sampling, report)


def require_lengths(
    models: OpenModels, report: Progress, spec: BenchSpec, lengths: Sequence[int], decode: int
) -> None:
    """Refuses lengths that do not fit the model's context."""
    require_lengths_fit(models.bench(spec, report).loaded.model, lengths, decode)


def time_both(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    point: Measurement,
    lengths: Sequence[int],
    decode: int,
    repeats: int,
) -> Iterator[LatencyPoint]:
    """Times the dense model and a point's at each length."""
    both = _both_models(models, report, spec, point)
    text = models.bench(spec, report).evaluation.ids.flatten()
    yield from measure_latency(both, text, lengths, decode, repeats, report)


def _both_models(
    models: OpenModels, report: Progress, spec: BenchSpec, subject: Subject
) -> dict[str, PreTrainedModel]:
    pruned = models.pruned(spec, subject, report)
    return {DENSE: models.bench(spec, report).loaded.model, PRUNED: pruned}


def damage_texts(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    subject: Subject,
    sources: Sequence[str],
    tokens: int,
) -> Iterator[TextDamage]:
    """How far a pruned model is from the dense one in its predictions, text by text."""
    # Texts are read before a cut may be made anew: a wrong name costs no wait.
    texts = [read_corpus(source) for source in sources]
    both = _both_models(models, report, spec, subject)
    yield from damage_of_texts(
        both, models.bench(spec, report).loaded, texts, tokens, spec.windows.sequence_length, report
    )


# --- tasks -----------------------------------------------------------------------------------


def require_tasks(models: OpenModels, report: Progress, spec: BenchSpec, choice: TaskChoice) -> int:
    """Refuses tasks that cannot be run, before a cut is made for them; how many there are."""
    return len(replace(choice, limit=1).open(report))


def answer(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    subject: Subject | None,
    choice: TaskChoice,
    name: str,
) -> Iterator[Standing]:
    """Goes on with the run of that name for `PIECE_SECONDS`: the standings of one block each.

    Both the pruned model and the dense one answer, or the dense one alone. Where the run is not
    under way here, it begins, and its kept blocks come at once. Gives the numbers of questions
    answered by now and of all.
    """
    run = models.task_runs.pop(name, None)
    if run is None:
        run = _begin_tasks(models, report, spec, subject, choice)
    run.report = report
    began = time.monotonic()
    for standing in run.standings:
        run.asked[standing.task] = standing.asked
        yield replace(standing, questions=())
        if time.monotonic() - began > PIECE_SECONDS:
            models.task_runs[name] = run
            while len(models.task_runs) > TASK_RUNS_KEPT:
                models.task_runs.popitem(last=False)
            break
    return sum(run.asked.values()), run.total


def _begin_tasks(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    subject: Subject | None,
    choice: TaskChoice,
) -> TaskRun:
    bench = models.bench(spec, report)
    tasks = choice.open(report)
    # Models are asked for anew at each block, so that others may take their room between pieces.
    dense = replace(
        contestant_of(bench.loaded), open=lambda progress: _model_of(models, progress, spec, None)
    )
    sides = [dense]
    if subject is not None:
        pruned = replace(
            dense,
            identity=subject_identity(bench, subject),
            open=lambda progress: _model_of(models, progress, spec, subject),
        )
        sides = [pruned, dense]
    run = TaskRun(iter(()), report, sum(len(task.items) for task in tasks))
    run.standings = run_tasks(tasks, *sides, progress=lambda *reported: run.report(*reported))
    return run


# --- GGUF files ------------------------------------------------------------------------------


def plan_gguf(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    plan: PruningPlan | None,
    recovery: str,
    name: str,
    with_imatrix: bool,
) -> list[PlannedFile]:
    """What the GGUF files of a cut will be in every type; nothing is cut for it."""
    report("Working out the sizes", 0, 1)
    bench = models.bench(spec, report)
    return planned_files(bench, plan, recovery, name, with_imatrix)


def gguf_bytes_by_widths(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    table: Structure,
    recovery: str,
    chosen: str,
) -> dict[tuple[int, int], int]:
    """What a file of one type weighs at each pair of widths that the sliders can take."""
    report("Working out the sizes", 0, 1)
    bench = models.bench(spec, report)
    return bytes_by_widths(bench, table, recovery, chosen)


def export_gguf(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    point: Measurement | None,
    chosen: str,
    name: str,
    with_imatrix: bool,
    output: Path,
) -> tuple[WrittenFile, float | None]:
    """Writes a GGUF file; with it its perplexity in llama.cpp, None where that is not installed."""
    require_new_file(output, needs_folder=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    bench = models.bench(spec, report)
    model = _model_of(models, report, spec, point)
    written = write_gguf(output, bench, model, point, chosen, name, with_imatrix, report)
    if llama_cpp_version() is None:
        return written, None
    found = evaluate_gguf(output, bench.evaluation, torch.get_num_threads(), report)
    return written, found.perplexity


def measure_gguf(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    subject: Subject | None,
    types: Sequence[str],
    timed: bool,
) -> Iterator[FilePoint]:
    """Measures a model as GGUF files of these types, kept ones without writing them again."""
    yield from measure_files(
        models.bench(spec, report),
        lambda: _model_of(models, report, spec, subject),
        subject,
        types,
        timed,
        report,
    )


def time_files(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    point: Measurement,
    chosen: str,
    lengths: Sequence[int],
    decode: int,
    repeats: int,
) -> Iterator[LatencyPoint | dict[str, FileFigures]]:
    """Times the dense model and a point's in llama.cpp, then says what the files took."""
    bench = models.bench(spec, report)
    with _both_files(models, report, spec, point, chosen) as files:
        measured = measure_gguf_latency(
            files,
            bench.evaluation.ids.flatten(),
            lengths,
            decode,
            repeats,
            torch.get_num_threads(),
            report,
        )
    yield from measured.points
    yield measured.files


def compare_files(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    subject: Subject,
    chosen: str,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[Said | TokenLosses]:
    """As `compare`, of both models as GGUF files in llama.cpp."""
    loaded = models.bench(spec, report).loaded
    threads = torch.get_num_threads()
    with _both_files(models, report, spec, subject, chosen) as files:
        yield from compare_in_llama_cpp(
            files, loaded, prompt, max_new_tokens, sampling, threads, report
        )


@contextmanager
def _both_files(
    models: OpenModels, report: Progress, spec: BenchSpec, subject: Subject, chosen: str
) -> Iterator[dict[str, Path]]:
    """The dense and a pruned model as temporary files of one type."""
    require_llama_cpp()
    both = _both_models(models, report, spec, subject)
    bench = models.bench(spec, report)
    with temporary_folder("gguf") as folder:
        files = {name: folder / f"{name}.gguf" for name in both}
        for name, path in files.items():
            own = subject if name == PRUNED else None
            write_gguf(path, bench, both[name], own, chosen, name, progress=report)
        yield files


def _model_of(
    models: OpenModels, report: Progress, spec: BenchSpec, subject: Subject | None
) -> PreTrainedModel:
    if subject is None:
        return models.bench(spec, report).loaded.model
    return models.pruned(spec, subject, report)


# --- probes of the dense model ---------------------------------------------------------------


def disturb_all(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    disturbance: str,
    strengths: Sequence[float],
    windows: int,
) -> Iterator[Disturbed]:
    """Disturbs all layers at once."""
    bench = models.bench(spec, report)
    yield from disturb_all_layers(bench, disturbance, strengths, windows, report)


def disturb_each(
    models: OpenModels,
    report: Progress,
    spec: BenchSpec,
    disturbance: str,
    strength: float,
    layers: Sequence[int],
    windows: int,
) -> Iterator[Disturbed]:
    """Disturbs one layer at a time."""
    bench = models.bench(spec, report)
    yield from disturb_layer_by_layer(bench, disturbance, strength, layers, windows, report)


def leave_out_head(
    models: OpenModels, report: Progress, spec: BenchSpec, layer: int, head: int
) -> WithoutHead:
    """Measures the dense model without one head."""
    return without_head(models.bench(spec, report), layer, head, report)


def attend(
    models: OpenModels, report: Progress, spec: BenchSpec, text: str, tokens: int, layer: int
) -> tuple[list[str], torch.Tensor]:
    """The tokens of a text, decoded one by one, and one layer's attention over them.

    The attention is that of `attention_pattern`. Where `text` is blank, the evaluation text is
    taken.
    """
    bench = models.bench(spec, report)
    window = sample(bench, text, tokens)
    labels = [bench.loaded.tokenizer.decode([token]) for token in window.ids[0].tolist()]
    return labels, attention_pattern(bench.loaded.model, window, layer, report)
