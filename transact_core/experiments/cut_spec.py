"""A cut as a value: all that decides what it costs, to be kept or carried out elsewhere.

A specification holds names and numbers, no weights and no texts, so it can be pickled for another
process or another machine that finds the same model and texts under the same names.
"""

from dataclasses import dataclass, field

import torch

from transact_core.base.errors import Progress, silent
from transact_core.data.windows import (
    Texts,
    WindowSpec,
    context_length_of,
    make_windows,
    read_texts,
)
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.results import decided, measured
from transact_core.experiments.sweep import Pair
from transact_core.forward.writing import written_texts
from transact_core.models.load import BUILTIN, LoadedModel, Offload, load_model
from transact_core.pruning.plan import Decision


@dataclass(frozen=True)
class BenchSpec:
    """Which model on which windows: what a `Bench` is opened from."""

    model: str = BUILTIN
    """A source, as `load_model` reads it."""
    device: str = "auto"
    dtype: str = "auto"
    windows: WindowSpec = field(default_factory=WindowSpec)
    save_dtype: str | None = None
    """Dtype of the pruned weights; None for that of the source."""
    seed: int = 0
    offload: Offload = "auto"


@dataclass(frozen=True)
class CutSpec:
    """One cut of one model on its texts."""

    bench: BenchSpec
    cut: Pair | Decision
    """The two ratios, from which the choices decide, or what was decided already."""
    choices: Choices = field(default_factory=Choices)
    """Of a cut that was decided already, only the recovery is looked at."""
    threads: int | None = None
    """Number of threads, on which the last bits depend; None for what the process has."""


def open_bench(spec: BenchSpec, progress: Progress = silent) -> Bench:
    """Reads the texts, loads the model and makes the windows; nothing is measured.

    Raises:
        TransActError: the model or a text cannot be read, or they do not fit each other.
    """
    torch.manual_seed(spec.seed)
    # Texts are read first: a wrong name is found before a large model is loaded.
    texts = read_texts(spec.windows)
    loaded = load_model(spec.model, spec.device, spec.dtype, progress, spec.offload)
    return bench_with(loaded, spec.windows, texts, spec.save_dtype, spec.seed, progress)


def bench_with(
    loaded: LoadedModel,
    spec: WindowSpec,
    texts: Texts,
    save_dtype: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Bench:
    """The bench of a model and texts that are read already; nothing is measured.

    Raises:
        TransActError: a text cannot be tokenised for this model, or is too short.
    """
    texts = written_texts(texts, loaded, progress)
    windows = make_windows(
        spec,
        loaded.tokenizer,
        loaded.architecture.vocab_size,
        context_length_of(loaded.model.config),
        texts,
        progress,
    )
    return Bench(loaded, *windows, save_dtype=save_dtype, seed=seed)


def decide_spec(bench: Bench, spec: CutSpec, progress: Progress = silent) -> Decision:
    """What is kept by this specification, on a bench that was opened from its `bench`.

    Raises:
        TransActError: as `decide` does.
    """
    if isinstance(spec.cut, Decision):
        return spec.cut
    return decided(bench, *spec.cut, spec.choices, progress)


def carry_out_on(bench: Bench, spec: CutSpec, progress: Progress = silent) -> Measurement:
    """Like `carry_out_spec`, on a bench that was opened from the specification's `bench`."""
    decision = decide_spec(bench, spec, progress)
    return measured(bench, decision, spec.choices.recovery, progress)


def carry_out_spec(spec: CutSpec, progress: Progress = silent) -> Measurement:
    """Loads, decides, cuts, repairs and measures; what is kept from earlier is not done again.

    Raises:
        TransActError: as `open_bench`, `decide` and `compress` do.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    return carry_out_on(open_bench(spec.bench, progress), spec, progress)
