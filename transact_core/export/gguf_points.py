"""Models as GGUF files of every type, measured in llama.cpp: what decides which file to take away.

A point is one file: its exact size, its losses on the evaluation windows, and, where times are
wanted, prefill and decoding in turns with the dense F16 file. Points are kept with the other
results, under a key that names the weights, the type and the windows; the files themselves are
temporary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from transact_core.base.cache import digest, remembered, sha256_of_tokens
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import temporary_folder
from transact_core.data.windows import Windows
from transact_core.experiments import results
from transact_core.experiments.bench import Bench
from transact_core.experiments.trained_cut import Subject, TrainedCut, subject_identity
from transact_core.export.gguf import (
    Description,
    Fallback,
    FilePlan,
    ImatrixSource,
    WrittenFile,
    describe,
    export_gguf,
    plan_file,
    vocabulary_for,
)
from transact_core.export.gguf_types import QUANTIZATIONS, Quantization, quantization
from transact_core.export.gguf_vocabulary import Entry
from transact_core.forward.imatrix import Imatrix, importance_matrix
from transact_core.forward.in_llama_cpp import evaluate_gguf, measure_gguf_latency
from transact_core.forward.perplexity import Evaluation
from transact_core.models.architecture import Architecture
from transact_core.models.footprint import footprint
from transact_core.models.llama_cpp import require_llama_cpp, runtime_name
from transact_core.models.load import LoadedModel
from transact_core.models.stock_class import StockModel
from transact_core.planning.preview import Structure
from transact_core.pruning.plan import PruningPlan, Widths
from transact_core.pruning.surgery import config_of_cut

PROMPT, NEW = 256, 64
"""Tokens of the paper's phone measurement: of the prompt, and generated after it."""
REPEATS = 3
"""Timed runs of each file, after one that is not counted."""
REFERENCE = "F16"
"""The type of the dense file that others are timed against."""
FILES_VERSION = 1
"""Version of what is written into the files; part of the key of every point."""


@dataclass(frozen=True)
class PlannedFile:
    """What a file of one type will be, before it is written."""

    quantization: str
    bytes: int
    """Exact."""
    embedding_bytes: int
    """Of embedding and LM head, which pruning leaves as they are."""
    fallbacks: tuple[Fallback, ...]


@dataclass(frozen=True)
class Times:
    """What running a file took, medians of its timed runs."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_speedup: float
    """Over the dense F16 file, timed in turns with it."""
    decode_speedup: float
    peak_bytes: int | None
    """The most memory that the process held; None where the system does not say."""
    load_seconds: float
    threads: int


@dataclass(frozen=True)
class FilePoint:
    """One model in one type, measured in llama.cpp."""

    model: str
    """`dense`, or what is left of it."""
    quantization: str
    imatrix: bool
    bytes: int
    evaluation: Evaluation = field(repr=False)
    stock_perplexity: float
    """Of the weights before quantisation, in transformers."""
    mha_width: int
    mlp_width: int
    runtime: str
    measured: str
    """The day, as YYYY-MM-DD."""
    recovery: str | None = None
    """None for the dense model, like the two fields below."""
    granularity: str | None = None
    importance: str | None = None
    times: Times | None = None
    trained_on: str | None = None
    """The source that the cut was trained on; None for one that was not, and for the dense model.
    With how many tokens stands in `model`."""

    @property
    def perplexity(self) -> float:
        return self.evaluation.perplexity

    @property
    def is_dense(self) -> bool:
        return self.recovery is None

    @property
    def name(self) -> str:
        """Model and type, which together name one file of a bench."""
        return f"{self.model} · {self.quantization}"


# --- planning --------------------------------------------------------------------------------


def planned_files(
    bench: Bench,
    plan: PruningPlan | None,
    recovery: str,
    name: str,
    with_imatrix: bool = True,
    types: Sequence[str] = tuple(QUANTIZATIONS),
) -> list[PlannedFile]:
    """What the files of a cut will be, in every type; of the dense model where there is no plan.

    Nothing is cut and nothing written; the dense model must be at hand. `name` is what the files
    call the model.

    Raises:
        TransActError: llama.cpp cannot be given this model.
    """
    loaded = bench.loaded
    if plan is None:
        entries = vocabulary(bench)
        description = describe(loaded, loaded.model.config, loaded.architecture, entries, name)
    else:
        left = plan.applied_to(loaded.architecture, with_biases=recovery == "bias")
        description = _description_of_cut(bench, left, plan.slots, name)
    plans = [_planned(bench, description, quantization(each), with_imatrix) for each in types]
    return [
        PlannedFile(each.quantization.name, each.bytes, each.embedding_bytes, each.fallbacks)
        for each in plans
    ]


def _description_of_cut(
    bench: Bench, left: Architecture, slots: tuple[int, ...], name: str
) -> Description:
    """What the file of a cut says of it that leaves these widths and rotary pairs."""
    config = config_of_cut(bench.loaded.model, left, slots)
    left = replace(left, model_type=config.model_type)
    return describe(bench.loaded, config, left, vocabulary(bench), name)


def _planned(
    bench: Bench, description: Description, chosen: Quantization, with_imatrix: bool
) -> FilePlan:
    """The file, with an importance matrix of the calibration where that is wanted."""
    source = ImatrixSource(bench.calibration.source, len(bench.calibration))
    return plan_file(description, chosen, source if with_imatrix and chosen.wants_imatrix else None)


NAME_ROOM = 200
"""Bytes that are left for a model's name in its file, where the sizes of many cuts are compared."""


def bytes_by_widths(
    bench: Bench, table: Structure, recovery: str, chosen: str
) -> dict[tuple[int, int], int]:
    """What a file of one type weighs at each pair of transitional widths (MHA, MLP), in bytes.

    A file weighs up to `NAME_ROOM` bytes less, as its name is shorter. What llama.cpp cannot be
    given is left out. An importance matrix is used where the type wants one.

    Raises:
        TransActError: llama.cpp cannot be given the dense model.
    """
    dense, kind = bench.loaded.architecture, quantization(chosen)

    def weighs(widths: Widths) -> int:
        left = widths.applied_to(dense, with_biases=recovery == "bias")
        # Which pairs stay is not known yet, and no matter: the file holds as many numbers.
        slots = tuple(range(left.head_dim // 2)) if left.head_dim < dense.head_dim else ()
        described = _description_of_cut(bench, left, slots, "x" * NAME_ROOM)
        return _planned(bench, described, kind, with_imatrix=True).bytes

    # Tensors of the MLP do not depend on the heads, so that not every pair has to be planned.
    whole, *_ = sizes = [weighs(option.widths) for option in table.mlp.options]
    saved = [whole - size for size in sizes]
    found = {}
    for heads in table.mha.options:
        with suppress(TransActError):
            with_heads = weighs(heads.widths)
            for channels, less in zip(table.mlp.options, saved, strict=True):
                found[heads.width, channels.width] = with_heads - less
    return found


_vocabularies: WeakKeyDictionary[Bench, tuple[Entry, ...]] = WeakKeyDictionary()


def vocabulary(bench: Bench) -> tuple[Entry, ...]:
    """The tokenizer's metadata; read once for each bench, as it takes seconds."""
    if bench not in _vocabularies:
        _vocabularies[bench] = vocabulary_for(bench.loaded)
    return _vocabularies[bench]


# --- writing ---------------------------------------------------------------------------------


def write_gguf(
    output: Path,
    bench: Bench,
    model: StockModel,
    subject: Subject | None,
    chosen: str,
    name: str,
    with_imatrix: bool = True,
    progress: Progress = silent,
) -> WrittenFile:
    """Writes a pruned model of a bench, or the dense one where `subject` is None, in one type.

    Raises:
        TransActError: as `export_gguf` does.
    """
    wanted = quantization(chosen)
    uses = with_imatrix and wanted.wants_imatrix
    if not wanted.is_float:
        require_llama_cpp()
    (written,) = export_gguf(
        {wanted.name: output},
        _as_loaded(bench, model, subject),
        bench.calibration if uses else None,
        vocabulary(bench),
        name,
        progress,
        torch.get_num_threads(),
        imatrix=_imatrix(bench, model, subject, progress) if uses else None,
    )
    return written


def _as_loaded(bench: Bench, model: StockModel, subject: Subject | None) -> LoadedModel:
    if subject is None:
        return bench.loaded
    return replace(
        bench.loaded,
        model=model,
        architecture=Architecture.from_model(model),
        source_dtype=getattr(torch, bench.save_dtype),
    )


def _imatrix(
    bench: Bench, model: StockModel, subject: Subject | None, progress: Progress
) -> Imatrix:
    """The importance matrix of a model, kept from an earlier run or measured now."""
    key = {"measured": "importance matrix", "model": _model_identity(bench, subject)}
    key["tokens"] = sha256_of_tokens(bench.calibration.ids)
    found = remembered(
        key,
        lambda: {
            name: torch.from_numpy(values)
            for name, values in importance_matrix(model, bench.calibration, progress).items()
        },
    )
    return {name: values.numpy() for name, values in found.items()}


# --- measuring -------------------------------------------------------------------------------


def measure_files(
    bench: Bench,
    open_model: Callable[[], StockModel],
    subject: Subject | None,
    types: Sequence[str],
    timed: bool,
    progress: Progress = silent,
) -> Iterator[FilePoint]:
    """Measures a model in each of these types; what is kept from earlier is not measured again.

    `open_model` gives the pruned model of `subject`, or the dense one where that is None; it is
    called where there is something to measure.

    Raises:
        TransActError: llama.cpp is not installed, or the model cannot be given to it.
    """
    with temporary_folder("gguf") as folder:
        for chosen in types:
            kept = find_point(bench, subject, chosen)
            if not is_complete(kept, timed):
                require_llama_cpp()
                model = open_model()
                kept = _measured(bench, model, subject, chosen, timed, folder, kept, progress)
                _keep(bench, subject, kept)
            yield kept


def is_complete(known: FilePoint | None, timed: bool) -> bool:
    """Whether a point has all that is asked for, its times too where it is to be `timed`."""
    return known is not None and (known.times is not None or not timed)


def _measured(
    bench: Bench,
    model: StockModel,
    subject: Subject | None,
    chosen: str,
    timed: bool,
    folder: Path,
    known: FilePoint | None,
    progress: Progress,
) -> FilePoint:
    threads = torch.get_num_threads()
    # The name is part of the file, which is not to be larger for having been trained.
    name = model_in_words(bench, subject, with_training=False)
    reference = folder / f"dense-{REFERENCE}.gguf"
    if timed and not reference.exists():
        dense = bench.loaded.model
        write_gguf(reference, bench, dense, None, REFERENCE, "dense", progress=progress)
    is_reference = timed and subject is None and chosen == REFERENCE
    path = reference if is_reference else folder / f"{chosen}.gguf"
    imatrix = quantization(chosen).wants_imatrix
    if not path.exists():
        write_gguf(path, bench, model, subject, chosen, name, progress=progress)
    times = None
    if timed:
        times = times_in_turns(path, reference, bench.evaluation, REPEATS, threads, progress)
    found = known.evaluation if known else evaluate_gguf(path, bench.evaluation, threads, progress)
    plan = subject and subject.plan
    shape = bench.loaded.architecture
    cut = plan.applied_to(shape) if plan else shape
    made = FilePoint(
        model=model_in_words(bench, subject),
        quantization=quantization(chosen).name,
        imatrix=imatrix,
        bytes=path.stat().st_size,
        evaluation=found,
        stock_perplexity=subject.perplexity if subject else bench.dense(progress).perplexity,
        mha_width=cut.mha_width,
        mlp_width=cut.intermediate_size,
        runtime=runtime_name(),
        measured=date.today().isoformat(),
        recovery=subject and subject.recovery,
        granularity=plan and plan.granularity,
        importance=plan and plan.importance,
        times=times,
        trained_on=subject.text if isinstance(subject, TrainedCut) else None,
    )
    if path != reference:
        path.unlink()
    return made


def times_in_turns(
    path: Path,
    reference: Path,
    windows: Windows,
    repeats: int,
    threads: int | None,
    progress: Progress = silent,
) -> Times:
    """Times a file in turns with the reference, on the windows' tokens; they may be one file."""
    files = {"this": path} | ({} if path == reference else {"reference": reference})
    ids = windows.ids.flatten()
    measured = measure_gguf_latency(files, ids, [PROMPT], NEW, repeats, threads, progress)
    by_name = {each.model: each for each in measured.points}
    mine, figures = by_name["this"], measured.files["this"]
    other = by_name.get("reference", mine)
    return Times(
        prefill_tokens_per_second=mine.prefill_tokens_per_second,
        decode_tokens_per_second=mine.decode_tokens_per_second,
        prefill_speedup=other.prefill.median / mine.prefill.median,
        decode_speedup=other.decode.median / mine.decode.median,
        peak_bytes=figures.peak_bytes,
        load_seconds=figures.load_seconds,
        threads=figures.threads,
    )


def model_in_words(bench: Bench, subject: Subject | None, with_training: bool = True) -> str:
    """What is left of the model, and how it was trained, in few words; `dense` for None."""
    if subject is None:
        return "dense"
    left = cut_in_words(bench.loaded.architecture, subject.plan)
    is_trained = isinstance(subject, TrainedCut)
    return f"{left}, {subject.words}" if is_trained and with_training else left


def cut_in_words(shape: Architecture, plan: PruningPlan) -> str:
    """What a plan leaves of each layer, in few words."""
    cut = plan.applied_to(shape)
    if not cut.uniform:
        left = footprint(cut, "float32")
        heads, channels = left.mha_width / cut.head_dim, left.mlp_width
        return f"widths by layer, on the mean {heads:.1f} heads, MLP {channels:,.0f}"
    parts = []
    if cut.num_attention_heads != shape.num_attention_heads:
        parts.append(f"{cut.num_attention_heads} heads")
    if cut.head_dim != shape.head_dim:
        parts.append(f"head_dim {cut.head_dim}")
    if cut.intermediate_size != shape.intermediate_size:
        parts.append(f"MLP {cut.intermediate_size:,}")
    return ", ".join(parts) or "not cut"


# --- keeping ---------------------------------------------------------------------------------


def find_point(bench: Bench, subject: Subject | None, chosen: str) -> FilePoint | None:
    """The kept measurement of a model in a type, or None."""
    found = results.find_file(_key(bench, subject, chosen))
    return None if found is None else _restored(*found)


def kept_points(bench: Bench) -> list[FilePoint]:
    """All kept points of this model on this evaluation text, from the largest file to the smallest.

    What is kept was measured with the number of threads that this process has.
    """
    found = [_restored(*each) for each in results.files_of(_group(bench))]
    return sorted(found, key=lambda each: (-each.bytes, each.name))


def _restored(record: dict[str, Any], nll: torch.Tensor) -> FilePoint:
    times = record.pop("times")
    del record["group"]
    return FilePoint(**record, evaluation=Evaluation(nll), times=times and Times(**times))


def _keep(bench: Bench, subject: Subject | None, made: FilePoint) -> None:
    record = asdict(replace(made, evaluation=None)) | {"group": _group(bench)}
    del record["evaluation"]
    results.keep_file(_key(bench, subject, made.quantization), record, made.evaluation.nll)


def _group(bench: Bench) -> str:
    """What the points of one model on one evaluation text have in common."""
    tokens = sha256_of_tokens(bench.evaluation.ids)
    return digest({"weights": _model_identity(bench, None), "evaluation": tokens})


def _key(bench: Bench, subject: Subject | None, chosen: str) -> str:
    wanted = quantization(chosen)
    calibration = sha256_of_tokens(bench.calibration.ids)
    return digest(
        {
            "model": _model_identity(bench, subject),
            "type": wanted.name,
            "imatrix": calibration if wanted.wants_imatrix else None,
            "evaluation": sha256_of_tokens(bench.evaluation.ids),
            "runtime": runtime_name(),
            "files": FILES_VERSION,
        }
    )


def _model_identity(bench: Bench, subject: Subject | None) -> dict[str, object]:
    if subject is not None:
        return subject_identity(bench, subject)
    left_out = ("calibration", "evaluation", "save_dtype", "seed")
    return {key: value for key, value in bench.identity.items() if key not in left_out}


# --- judging ---------------------------------------------------------------------------------


def verdict(points: Sequence[FilePoint]) -> list[str]:
    """What measured files say about pruning, for size and for each phase; nothing without both
    kinds.

    A pruned file is worth its size where no dense file is as small and as good.
    """
    dense = [each for each in points if each.is_dense]
    pruned = [each for each in points if not each.is_dense]
    if not dense or not pruned:
        return []

    def rivals(cut: FilePoint) -> list[FilePoint]:
        return [
            each for each in dense if each.bytes <= cut.bytes and each.perplexity <= cut.perplexity
        ]

    good = [cut for cut in pruned if not rivals(cut)]
    if good:
        best = min(good, key=lambda each: (each.bytes, each.perplexity))
        size = (
            f"For size, pruning pays in {len(good)} of {len(pruned)} pruned files, which no dense "
            f"file measured equals: such as {_weighed(best)}."
        )
    else:
        cut = min(pruned, key=lambda each: each.bytes)
        rival = min(rivals(cut), key=lambda each: each.bytes)
        size = (
            "For size, **do not prune, quantise**: for every pruned file there is a dense one that "
            f"is no larger and no worse, as {_weighed(rival)}, is for {_weighed(cut)}."
        )
    return [size, *_speed(dense, pruned)]


def _weighed(point: FilePoint) -> str:
    return f"{point.name} ({point.bytes / 1e6:,.1f} MB, perplexity {point.perplexity:,.2f})"


def _speed(dense: Sequence[FilePoint], pruned: Sequence[FilePoint]) -> list[str]:
    """The fastest files of both kinds, a sentence for each phase; nothing where none is timed."""
    sentences = []
    for what, phase in (("prefill_speedup", "prefill"), ("decode_speedup", "decoding")):
        timed = [[each for each in kind if each.times] for kind in (dense, pruned)]
        if not all(timed):
            return []
        whole, cut = (max(kind, key=lambda each: getattr(each.times, what)) for kind in timed)
        ratio = getattr(cut.times, what) / getattr(whole.times, what)
        gains = "pays" if ratio > 1 + UNCLEAR else "does not pay"
        sentences.append(
            f"For {phase}, pruning {gains}: the fastest pruned file, {cut.name} at perplexity "
            f"{cut.perplexity:,.2f}, is {ratio:.2f} times as fast as the fastest dense one, "
            f"{whole.quantization} at {whole.perplexity:,.2f}."
        )
    return sentences


UNCLEAR = 0.03
"""Ratios of times that are closer to 1 than this are taken for the same."""


def bench_command(file: str = "out.gguf", threads: int = 4) -> str:
    """llama.cpp's own bench, as the paper times phones: for a device that has the file."""
    return f"llama-bench -m {file} -p {PROMPT} -n {NEW} -t {threads} -r 5"
