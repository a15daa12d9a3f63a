"""The output folder: checkpoint, tokenizer, `compression.json`, `report.json` and the model card.

The folder appears whole or not at all: it is written beside its final name and then renamed.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from transact_core.base.errors import Progress, silent
from transact_core.base.files import require_disk_space, require_free_output, staged_folder
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench, Measurement, measure, model_report
from transact_core.export.compression import Compression
from transact_core.export.licence import keep_licence
from transact_core.export.model_card import kept_bare, model_card
from transact_core.export.modeling_file import add_modeling_file
from transact_core.export.runtimes import block_advice, readings_of_cut
from transact_core.export.tokenizer_files import save_tokenizer
from transact_core.forward.layers import weights_of
from transact_core.forward.perplexity import Evaluation
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import (
    open_checkpoint,
    read_architecture,
    read_checkpoint,
    spread_checkpoint,
)
from transact_core.models.checkpoint_writer import CheckpointWriter
from transact_core.models.footprint import Footprint
from transact_core.models.placement import layout_of
from transact_core.models.stock_class import StockModel, family_for
from transact_core.pruning.on_disk import write_layers
from transact_core.pruning.plan import PruningPlan

BESIDE_WEIGHTS_BYTES = 50_000_000
"""Bytes kept free for the tokenizer, compression.json and the rest of an output folder."""


def report(bench: Bench, measurement: Measurement) -> dict[str, Any]:
    """What `report.json` holds; `other_texts` where perplexity was measured on more than one."""
    result = {
        "dense": model_report(bench.dense_footprint, bench.dense().perplexity),
        "pruned": {
            **model_report(measurement.footprint, measurement.perplexity),
            "model_class": model_class_of(bench, measurement.plan, measurement.recovery),
            **_layers_of(bench, measurement.plan),
        },
        "evaluation": evaluation_report(bench.evaluation, measurement.evaluation),
    }
    others = [
        {
            **evaluation_report(windows, evaluation),
            "dense": {"perplexity": bench.dense(windows=windows).perplexity},
            "pruned": {"perplexity": evaluation.perplexity},
        }
        for windows, evaluation in zip(bench.others, measurement.others, strict=True)
    ]
    return result | ({"other_texts": others} if others else {})


def model_class_of(bench: Bench, plan: PruningPlan, recovery: str) -> str:
    """The name of the stock class that a cut is saved as."""
    loaded = bench.loaded
    cut = plan.applied_to(loaded.architecture, with_biases=recovery == "bias")
    return family_for(cut, loaded.model.config).class_name


def _layers_of(bench: Bench, plan: PruningPlan) -> dict[str, list[dict[str, int]]]:
    """The widths of each layer, `layers` of `report.json`; nothing where all have the same."""
    left = plan.applied_to(bench.loaded.architecture)
    return {} if left.uniform else {"layers": [vars(each) for each in left.layers]}


def evaluation_report(windows: Windows, evaluation: Evaluation) -> dict[str, str | int]:
    """`evaluation` of `report.json`."""
    return {
        "source": windows.source,
        "sha256": windows.sha256,
        "tokens": windows.tokens,
        "scored_tokens": evaluation.scored_tokens,
        "sequence_length": windows.sequence_length,
    }


def require_room(output: Path, cost: Footprint) -> None:
    """Refuses an output that the disk has no room for; also called before the computing begins."""
    require_disk_space(output, cost.weight_bytes + BESIDE_WEIGHTS_BYTES)


def write_checkpoint(
    output: Path,
    model: StockModel,
    bench: Bench,
    measurement: Measurement,
    compression: Compression,
    modeling_file: bool = False,
) -> None:
    """Writes the output folder of a model, whole or not at all.

    With `modeling_file`, code for other programs lies beside widths of single layers.

    Raises:
        TransActError: the folder is not empty, cannot be written, or the disk is too full.
    """
    require_free_output(output)
    require_room(output, measurement.footprint)
    with staged_folder(output) as folder:
        writer = CheckpointWriter(folder, getattr(torch, compression.save_dtype))
        writer.add_weights(weights_of(model), model)
        writer.finish(model, Architecture.from_model(model))
        _write_beside(
            folder, bench, measurement, compression, bench.loaded.tokenizer, modeling_file
        )


def _write_beside(
    folder: Path,
    bench: Bench,
    measurement: Measurement,
    compression: Compression,
    tokenizer: PreTrainedTokenizerBase,
    modeling_file: bool,
) -> None:
    """Writes everything but weights and configurations into an output folder."""
    result = report(bench, measurement)
    by_code = add_modeling_file(folder, read_architecture(folder)) if modeling_file else ""
    save_tokenizer(tokenizer, folder, bench.loaded.folder)
    (folder / "compression.json").write_text(compression.to_json())
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    loaded = bench.loaded
    others = readings_of_cut(
        compression.plan,
        loaded.architecture,
        loaded.model.config,
        with_biases=compression.recovery == "bias",
        unknown_token=tokenizer.unk_token is not None,
    )
    card = model_card(
        loaded.name,
        compression,
        result,
        others,
        kept_bare(measurement.fits),
        block_advice(compression.plan, loaded.architecture),
        loaded.licence,
        loaded.model.config.model_type,
        by_code,
    )
    keep_licence(loaded.licence, folder, loaded.folder)
    (folder / "README.md").write_text(card)


def compress_to_folder(
    output: Path,
    bench: Bench,
    compression: Compression,
    progress: Progress = silent,
    modeling_file: bool = False,
) -> Measurement:
    """Carries out a compression straight into its output folder, whole or not at all.

    Layers are cut, repaired, written and released one after the other, and the dense model is
    released before the written checkpoint is loaded and measured. Peak memory is the dense weights
    (one layer and the next where they are on disk, and so are then those of the written model), one
    layer, one residual stream and one shard. The weights are those that `bench.compress` makes.
    `modeling_file` is as for `write_checkpoint`.

    Raises:
        TransActError: as `bench.compress` and `write_checkpoint` do.
    """
    plan, recovery = compression.plan, compression.recovery
    require_free_output(output)
    require_room(output, bench.footprint(plan, recovery))
    bench.measure_dense(progress)
    start = time.perf_counter()
    device, dtype = bench.loaded.device, bench.loaded.dtype
    of_layers = layout_of(bench.loaded.model)
    # It is written last, when the model and with it the bench's tokenizer are released.
    tokenizer = bench.loaded.tokenizer
    with staged_folder(output) as folder:
        save_dtype = getattr(torch, compression.save_dtype)
        fits = write_layers(
            folder, bench.loaded.model, plan, bench.calibration, recovery, save_dtype, progress
        )
        # It goes with the model, and is written beside the pruned one.
        tokenizer = bench.loaded.tokenizer
        bench.release_model()
        if bench.loaded.offloaded:
            model = open_checkpoint(folder, dtype, device)
        elif of_layers:
            model = spread_checkpoint(folder, dtype, device, of_layers)
        else:
            model = read_checkpoint(folder, dtype, device=device)
        measurement = measure(bench, model, plan, recovery, fits, start, progress)
        _write_beside(folder, bench, measurement, compression, tokenizer, modeling_file)
    return measurement
