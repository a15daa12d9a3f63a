"""`prune --steps K --tune-tokens N`: cut and train by turns, and write the output folder."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from transact_core.base.errors import Progress, silent
from transact_core.base.files import require_free_output
from transact_core.base.generators import WithResult
from transact_core.data.packing import open_sources
from transact_core.data.windows import count_used
from transact_core.experiments.bench import Bench, Choices, Measurement, measure
from transact_core.experiments.iterative import Shot, prune_and_train, require_iterative
from transact_core.experiments.kept_shots import begun
from transact_core.export.compression import describe_compression
from transact_core.export.folder import write_checkpoint
from transact_core.export.tune import (
    TuneSpec,
    interrupted,
    training_record,
    windows_to_train_on,
    work_folder,
)
from transact_core.pruning.plan import Decision
from transact_core.pruning.surgery import round_weights
from transact_core.training.loop import Standing


def require_resumed(output: Path, resume: bool) -> None:
    """Refuses an output beside which an interrupted run is kept, unless it is to go on.

    Raises:
        TransActError: so; the sentence says how to go on.
    """
    if begun(work_folder(output)) and not resume:
        raise interrupted(work_folder(output))


def prune_and_tune(
    output: Path,
    bench: Bench,
    ratios: tuple[float, float],
    choices: Choices,
    spec: TuneSpec,
    progress: Progress = silent,
) -> Iterator[Standing | str]:
    """Takes all steps and writes the folder, whole or not at all; returns the `Measurement`.

    Of `spec` the training text, the held-out texts, the settings and `resume` are looked at. Until
    the folder is written, finished steps and the training under way are kept beside it.

    Raises:
        TransActError: as `prune_and_train`, `write_checkpoint` and `require_resumed` do.
    """
    require_iterative(choices)
    require_free_output(output)
    require_resumed(output, spec.resume)
    work = work_folder(output)
    start = time.perf_counter()
    dense = bench.loaded
    used: dict[str, int] = {}
    for windows in (*bench.evaluated, bench.calibration):
        count_used(used, windows)
    training, held_out = yield from windows_to_train_on(
        spec, open_sources(spec.text), [], dense, used, [], progress
    )
    bench.measure_dense(progress)
    shots: list[Shot] = []
    steps = WithResult(
        prune_and_train(bench, *ratios, choices, training, held_out, spec.settings, work, progress)
    )
    for told in steps:
        if isinstance(told, Shot):
            shots.append(told)
            yield (
                f"Step {len(shots)} of {choices.steps}: "
                f"{told.step.num_attention_heads} heads and {told.step.intermediate_size} "
                f"channels, perplexity {told.step.before_training:.4f}, and "
                f"{told.step.perplexity:.4f} after training on "
                f"{told.step.trained_tokens:,} tokens."
            )
        else:
            yield told
    model, plan = steps.result
    model.requires_grad_(False)
    round_weights(model, getattr(torch, bench.save_dtype))
    measurement: Measurement = measure(bench, model, plan, choices.recovery, (), start, progress)
    decision = Decision(
        plan, {}, steps=choices.steps, earlier_steps=tuple(shot.step for shot in shots)
    )
    compression = describe_compression(bench, decision, choices.recovery)
    records = tuple(
        training_record(
            replace(spec, settings=shot.settings),
            shot.trained,
            shot.training,
            held_out,
            dense,
            dense,
            number,
        )
        for number, shot in enumerate(shots, start=1)
    )
    compression = compression.model_copy(update={"trainings": records})
    write_checkpoint(output, model, bench, replace(measurement, decision=decision), compression)
    shutil.rmtree(work, ignore_errors=True)
    return measurement
