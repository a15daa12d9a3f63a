"""A folder with a cut to a folder with the cut trained: what `tune` and the page *Recover* call.

The training runs in a folder beside the output, `DIR.training`, which is removed once the output is
written. What is written is a stock checkpoint, as `prune` writes it, with the training recorded.
"""

import json
import math
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.files import (
    read_text,
    require_free_output,
    sha256_of_text,
    staged_folder,
)
from transact_core.data.conversations import has_chat_template
from transact_core.data.corpus import (
    BUILTIN_TEXT,
    GENERATED,
    Corpus,
    describe,
    read_corpus,
)
from transact_core.data.packing import Pieces, open_sources, pack
from transact_core.data.windows import (
    Windows,
    context_length_of,
    count_used,
    evaluation_windows,
)
from transact_core.experiments.trained_cut import TrainedCut
from transact_core.export.compression import (
    Compression,
    Evaluated,
    ModelReference,
    Training,
    Watched,
    environment_of,
    read_compression,
    text_reference,
    tokens_used,
    tune_command,
)
from transact_core.export.folder import require_room
from transact_core.export.licence import keep_licence
from transact_core.export.task_table import TRAINED_HEADING
from transact_core.export.tokenizer_files import save_tokenizer
from transact_core.forward.perplexity import evaluate
from transact_core.forward.writing import written
from transact_core.models.checkpoint_writer import CheckpointWriter
from transact_core.models.devices import dtype_name, resolve_device
from transact_core.models.footprint import footprint
from transact_core.models.load import LoadedModel, load_model
from transact_core.pruning.surgery import round_weights
from transact_core.training.loop import (
    TRAINING_TEXT,
    Curve,
    HeldOut,
    Settings,
    Standing,
    Trained,
    identity,
    train,
    windows_at_once,
)
from transact_core.training.memory import require_memory
from transact_core.training.state import Work
from transact_core.training.student import Student, make_student, require_method
from transact_core.training.teacher import LiveTeacher, Teacher
from transact_core.training.teacher_cache import TOP, Shape, TeacherCache

WORK_SUFFIX = ".training"
"""Of the folder beside the output in which a training is kept."""
HELD_OUT_SEED = 999_983
"""Of texts that the model writes to be watched; another one than users choose for training."""


@dataclass(frozen=True)
class TuneSpec:
    """A training as a value: names and numbers, to be pickled for a worker."""

    model: str
    """The folder of the cut."""
    output: Path
    teacher: str | None = None
    """A source; None for the one that `compression.json` names."""
    text: str = BUILTIN_TEXT
    """A source, as `read_corpus` reads it, of any length."""
    held_out: tuple[str, ...] = ()
    """Sources to be watched beside the held-out parts of the training text; none for the defaults
    of `_other_kinds`."""
    held_out_tokens: int = 4096
    """Of each text that is watched."""
    sequence_length: int = 512
    settings: Settings = field(default_factory=Settings)
    device: str = "auto"
    dtype: str = "auto"
    """What the teacher computes in; the student is trained in float32, on a GPU with bfloat16
    products."""
    evaluation: str | None = None
    """Where the first evaluation text is on this machine; None for the recorded source."""
    resume: bool = False
    finish: bool = False
    """Whether to train no further and to write the best so far."""
    report_to: str = "none"
    teacher_cache: Path | None = None
    """A folder in which what the dense model says is written down, and found again."""
    teacher_top: int = TOP
    """How many of its most likely tokens are written down."""
    adapter: Path | None = None
    """A new folder for LoRA's adapters, written beside the merged model."""


@dataclass(frozen=True)
class Tuned:
    """What a training gave."""

    output: Path
    improved: bool
    sentence: str
    report: dict[str, Any]
    """`report.json` of the output; empty where the input had none."""


def open_texts(spec: TuneSpec) -> tuple[list[Pieces], list[Corpus]]:
    """The training text and those named to be watched, before anything is loaded.

    Raises:
        TransActError: a setting cannot be, or a text cannot be read.
    """
    require_method(spec.settings.method)
    spec.settings.require(spec.sequence_length)
    return open_sources(spec.text), [read_corpus(name) for name in spec.held_out]


def tune(spec: TuneSpec, progress: Progress = silent) -> Iterator[Standing | str]:
    """Trains, and writes the output folder whole or not at all; returns `Tuned`.

    Yields notices, a sentence each, and where the training stands after each step.

    Raises:
        TransActError: anything that the user can correct, before training where that can be seen.
    """
    settings = spec.settings
    # Texts are read before models are loaded: a wrong name costs no wait.
    training_text, watched = open_texts(spec)
    if spec.adapter is not None:
        if settings.method != "lora":
            raise TransActError("Only the method lora has adapters; leave out --adapter.")
        require_free_output(spec.adapter)
    require_free_output(spec.output)
    work = Work(work_folder(spec.output))
    if work.begun and not spec.resume:
        raise interrupted(work.folder)
    folder = Path(spec.model)
    compression, report = _recorded(folder)
    source = spec.teacher or (compression.model.source if compression else None)
    if source is None:
        raise TransActError(
            f"{spec.model} has no compression.json that names its dense model; name it by "
            "--teacher."
        )
    judged = _evaluation_texts(report, spec.evaluation)

    place = _device(spec.device)
    student_model = load_model(spec.model, place, "float32", progress)
    dense = load_model(source, place, spec.dtype, progress)
    for loaded in (student_model, dense):
        loaded.require_one_device("Training")
    require_same_vocabulary(student_model, dense)
    yield from [*student_model.notices, *dense.notices]
    watched = [written(text, dense, progress) for text in watched]
    for text in judged:
        text["corpus"] = written(text["corpus"], dense, progress)
    if compression and sorted(compression.model.weight_files.values()) != sorted(
        dense.weight_files.values()
    ):
        yield f"The teacher {source} is not the model that this cut was made of."
    teacher: Teacher = LiveTeacher(dense.model)

    used = tokens_used(compression) if compression else {}
    texts = [_evaluation_windows(text, dense) for text in judged]
    for windows in texts:
        count_used(used, windows)
    training, held_out = yield from windows_to_train_on(
        spec, training_text, watched, dense, used, judged, progress
    )
    device = student_model.device
    require_memory(
        student_model.architecture,
        settings.method,
        settings.rank,
        windows_at_once(spec.sequence_length, device) * spec.sequence_length,
        device,
    )
    texts_by_name = {TRAINING_TEXT: training, **{text.name: text.windows for text in held_out}}
    if spec.teacher_cache is not None:
        teacher = yield from _written_down(spec, dense, texts_by_name, progress)
        # Training holds one model; what is still asked of the dense one are its names.
        dense = dense.release()
    same = identity(settings, training, held_out, student_model.weight_files, dense.weight_files)
    same["teacher_top"] = spec.teacher_top if spec.teacher_cache else None
    student = make_student(student_model.model, settings.method, settings.rank, settings.seed)
    trained: Trained = yield from train(
        student,
        teacher,
        training,
        held_out,
        settings,
        work,
        same,
        progress,
        spec.finish,
        spec.report_to,
    )
    # Of several processes one writes, once all have read the best weights.
    processes = PartialState(cpu=device.type == "cpu")
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return Tuned(spec.output, trained.improved, trained.sentence, {})
    record = training_record(spec, trained, training, held_out, student_model, dense)
    tuned = _write(
        spec, student, student_model, trained, record, compression, report, texts, progress
    )
    shutil.rmtree(work.folder, ignore_errors=True)
    return tuned


def _device(name: str) -> str:
    """The device of this process: each of several has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and resolve_device(name).type == "cuda" else name


def _written_down(
    spec: TuneSpec, dense: LoadedModel, texts: Mapping[str, Windows], progress: Progress
) -> Iterator[str]:
    """The dense model, written down for these texts; yields what that takes."""
    shape = Shape(
        spec.sequence_length,
        dense.architecture.vocab_size,
        min(spec.teacher_top, dense.architecture.vocab_size),
    )
    cache = TeacherCache(spec.teacher_cache, dense.weight_files, dtype_name(dense.dtype), shape)
    missing = cache.missing(texts)
    yield (
        f"The {shape.top} most likely tokens of the dense model are written down for {missing:,} "
        f"windows, in {shape.bytes_of(missing) / 1e6:,.1f} MB in {cache.folder}."
        if missing
        else f"The dense model is written down already, in {cache.folder}."
    )
    # Of several processes the first writes, and the others find it written.
    with PartialState(cpu=dense.device.type == "cpu").main_process_first():
        cache.write(dense.model, texts, progress)
    return cache


def work_folder(output: Path) -> Path:
    """Where the training that leads to an output is kept until it has ended."""
    return output.with_name(output.name + WORK_SUFFIX)


def interrupted(work: Path) -> TransActError:
    """The refusal of an output beside which an interrupted training is kept."""
    return TransActError(
        f"{work} holds a training that was interrupted; go on with --resume, or remove that folder."
    )


def require_same_vocabulary(student: LoadedModel, teacher: LoadedModel) -> None:
    """Refuses a teacher whose tokens are not the student's.

    Raises:
        TransActError: the vocabularies differ.
    """
    sizes = student.architecture.vocab_size, teacher.architecture.vocab_size
    if sizes[0] != sizes[1] or student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise TransActError(
            f"The teacher {teacher.source} has another vocabulary ({sizes[1]:,} tokens) than "
            f"{student.source} ({sizes[0]:,}): what it says of the next token means nothing to the "
            "student; name the dense model that the cut was made of."
        )


# --- texts -----------------------------------------------------------------------------------


def windows_to_train_on(
    spec: TuneSpec,
    training_text: Sequence[Pieces],
    watched: Sequence[Corpus],
    dense: LoadedModel,
    used: dict[str, int],
    judged: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> Generator[str, None, tuple[Windows, list[HeldOut]]]:
    """The windows that are trained on, and the texts that are watched; yields notices.

    `used` says, by SHA-256, how many tokens of a text something else takes, and learns what is
    watched.
    """
    sources = [(written(beginning, dense, progress), rest) for beginning, rest in training_text]
    beginnings = [beginning for beginning, _ in sources]
    held_out = _held_out_texts(spec, beginnings, watched, dense, used, judged, progress)
    training = pack(
        sources,
        dense.tokenizer,
        dense.architecture.vocab_size,
        spec.settings.tokens,
        spec.sequence_length,
        used,
        progress,
    )
    yield from dict.fromkeys(
        [*training.notices, *(notice for text in held_out for notice in text.windows.notices)]
    )
    return training, held_out


def _held_out_texts(
    spec: TuneSpec,
    beginnings: Sequence[Corpus],
    watched: Sequence[Corpus],
    dense: LoadedModel,
    used: dict[str, int],
    judged: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> list[HeldOut]:
    """The texts that are watched; `used` learns what they take."""
    corpora = {text.sha256: text for text in beginnings}
    others = list(watched) or _other_kinds(spec, beginnings, judged, dense, progress)
    corpora |= {text.sha256: text for text in others}
    held_out = []
    for text in corpora.values():
        windows = evaluation_windows(
            text,
            dense.tokenizer,
            dense.architecture.vocab_size,
            max(spec.held_out_tokens, spec.sequence_length),
            spec.sequence_length,
            context_length_of(dense.model.config),
            used,
        )
        held_out.append(HeldOut(text.source, windows))
    for text in held_out:
        count_used(used, text.windows)
    return held_out


def _other_kinds(
    spec: TuneSpec,
    beginnings: Sequence[Corpus],
    judged: Sequence[Mapping[str, Any]],
    dense: LoadedModel,
    progress: Progress,
) -> list[Corpus]:
    """Texts of another kind than the training text, where the user names none.

    Of several training texts each is another kind than the others. To a single one Python's own
    reference is added, or where that is the training text another evaluation text, or else one that
    the dense model writes. Of a chat model answers through its template are watched too.
    """
    known = {text.sha256 for text in beginnings}
    others = []
    if len(known) == 1:
        candidates = [read_corpus(BUILTIN_TEXT), *(text["corpus"] for text in judged)]
        others = [text for text in candidates if text.sha256 not in known][:1]
        if not others:
            others = [_by_the_model(spec, "plain", dense, progress)]
    if has_chat_template(dense.tokenizer):
        others.append(_by_the_model(spec, "chat", dense, progress))
    return others


def _by_the_model(spec: TuneSpec, kind: str, dense: LoadedModel, progress: Progress) -> Corpus:
    """A text by the dense model, a little longer than what is watched of it."""
    tokens = max(spec.held_out_tokens, spec.sequence_length) + spec.sequence_length
    wanted = f"{GENERATED}:{tokens}:{HELD_OUT_SEED}:{kind}"
    return written(read_corpus(wanted), dense, progress)


def _evaluation_texts(report: Mapping[str, Any], first_source: str | None) -> list[dict[str, Any]]:
    """The texts of `report.json`, read again, with how many tokens of them were evaluated.

    Raises:
        TransActError: one cannot be read, or is another text by now.
    """
    if not report:
        return []
    texts = []
    for index, text in enumerate([report["evaluation"], *report.get("other_texts", [])]):
        source = first_source if index == 0 and first_source else text["source"]
        corpus = read_corpus(source)
        texts.append(
            {name: text[name] for name in ("sha256", "tokens", "sequence_length")}
            | {"corpus": corpus, "source": source}
        )
    return texts


def _evaluation_windows(text: Mapping[str, Any], dense: LoadedModel) -> Windows:
    """The windows that the cut was measured on.

    Raises:
        TransActError: the text is another one than was recorded.
    """
    windows = evaluation_windows(
        text["corpus"],
        dense.tokenizer,
        dense.architecture.vocab_size,
        text["tokens"],
        text["sequence_length"],
    )
    if (windows.sha256, windows.tokens) != (text["sha256"], text["tokens"]):
        raise TransActError(
            f"The evaluation text {text['source']} is not the one that the cut was measured with "
            f"(SHA-256 {text['sha256'][:12]}…), so that the training could not be judged by it; "
            "name the right one by --evaluation."
        )
    return windows


# --- what is written -------------------------------------------------------------------------


def _recorded(folder: Path) -> tuple[Compression | None, dict[str, Any]]:
    """`compression.json` and `report.json` of a folder; None and empty where it has none."""
    compression = None
    if (folder / "compression.json").is_file():
        compression = read_compression(folder / "compression.json")
    report: dict[str, Any] = {}
    if compression is not None:
        try:
            report = json.loads(read_text(folder / "report.json"))
        except (OSError, ValueError):
            raise TransActError(
                f"{folder / 'report.json'} cannot be read; prune writes it beside "
                "compression.json, and what was measured before training stands there."
            ) from None
    return compression, report


def training_record(
    spec: TuneSpec,
    trained: Trained,
    training: Windows,
    held_out: Sequence[HeldOut],
    student: LoadedModel,
    dense: LoadedModel,
    shot: int | None = None,
) -> Training:
    """What `compression.json` says of a training; `shot` counts from 1 where it is one of several
    between cuts."""
    curve, settings = trained.curve, spec.settings
    return Training(
        teacher=ModelReference(source=dense.source, weight_files=dense.weight_files),
        weight_files=student.weight_files if shot is None else {},
        shot=shot,
        method=settings.method,
        loss=settings.loss,
        teacher_top=spec.teacher_top if spec.teacher_cache else None,
        rank=settings.rank if settings.method == "lora" else None,
        text=text_reference(training),
        tokens=settings.tokens,
        trained_tokens=len(curve.losses) * settings.windows_per_step * spec.sequence_length,
        best_step=trained.step,
        sequence_length=spec.sequence_length,
        windows_per_step=settings.windows_per_step,
        learning_rate=settings.highest_rate,
        seed=settings.seed,
        held_out=tuple(text_reference(text.windows) for text in held_out),
        dense_nll=curve.dense_nll,
        losses=tuple(curve.losses),
        evaluated=tuple(
            Evaluated(
                step=found.step,
                texts={
                    name: Watched(kl=text.kl, nll=text.nll) for name, text in found.texts.items()
                },
            )
            for found in curve.evaluated
        ),
        why_ended=trained.why,
        seconds=curve.seconds,
        processes=PartialState(cpu=student.device.type == "cpu").num_processes,
        environment=environment_of(student),
    )


def _write(
    spec: TuneSpec,
    student: Student,
    loaded: LoadedModel,
    trained: Trained,
    record: Training,
    compression: Compression | None,
    report: dict[str, Any],
    texts: Sequence[Windows],
    progress: Progress,
) -> Tuned:
    """The output folder, whole or not at all, measured on the weights as they are saved."""
    save_dtype = compression.save_dtype if compression else dtype_name(loaded.source_dtype)
    dtype = getattr(torch, save_dtype)
    require_room(spec.output, footprint(loaded.architecture, save_dtype))
    if spec.adapter is not None:
        with staged_folder(spec.adapter) as folder:
            student.save_adapter(folder)
    # Where nothing got better, the weights are the input's own, to the last bit.
    model = student.merged() if trained.improved else loaded.model
    with torch.no_grad():
        round_weights(model, dtype)
    result = _trained_report(model, report, texts, progress)
    sentence = trained.sentence
    with staged_folder(spec.output) as folder:
        writer = CheckpointWriter(folder, dtype)
        writer.add_weights(model.state_dict().items(), model)
        writer.finish(model, loaded.architecture)
        save_tokenizer(loaded.tokenizer, folder, loaded.folder)
        keep_licence(loaded.licence, folder, loaded.folder)
        if compression is not None:
            whole = compression.model_copy(update={"trainings": (*compression.trainings, record)})
            (folder / "compression.json").write_text(whole.to_json())
            (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
        else:
            (folder / "training.json").write_text(record.model_dump_json(indent=1) + "\n")
        card = _card(spec, record, sentence, result)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Tuned(spec.output, trained.improved, sentence, result)


def _trained_report(
    model: torch.nn.Module,
    report: dict[str, Any],
    texts: Sequence[Windows],
    progress: Progress,
) -> dict[str, Any]:
    """`report.json` with the trained model as `pruned`, and the cut as `before_training`."""
    if not report:
        return {}
    measured = [evaluate(model, windows, progress).perplexity for windows in texts]
    # What was measured of the cut, by tasks say, is not true of the trained model.
    result = {name: report[name] for name in ("dense", "pruned", "evaluation")}
    result["before_training"] = report.get("before_training", report["pruned"])
    result["pruned"] = {**report["pruned"], "perplexity": measured[0]}
    others = [
        {
            **text,
            "pruned": {"perplexity": perplexity},
            "before_training": text.get("before_training", text["pruned"]),
        }
        for text, perplexity in zip(report.get("other_texts", []), measured[1:], strict=True)
    ]
    return result | ({"other_texts": others} if others else {})


def _card(spec: TuneSpec, record: Training, sentence: str, result: dict[str, Any]) -> str:
    """The model card of the cut, with a section on the training."""
    path = Path(spec.model) / "README.md"
    before = read_text(path).rstrip() if path.is_file() else f"# {Path(spec.model).name}, trained"
    before = before.partition(f"\n{TRAINED_HEADING}\n")[0].rstrip()
    lines = [TRAINED_HEADING, "", sentence]
    if result:
        lines += [
            "What stands above was measured before the training. Since then:",
            "",
            "| perplexity on | dense | cut | trained |",
            "| --- | ---: | ---: | ---: |",
        ]
        for text in figures_by_text(result):
            cells = " | ".join(f"{figure:,.2f}" for figure in (text.dense, text.cut, text.trained))
            lines.append(f"| {describe(text.source).replace('|', ' ')} | {cells} |")
    lines += [
        "",
        f"Method `{record.method}`, loss `{record.loss}`, {record.trained_tokens:,} tokens of "
        f"{describe(record.text.source)}, learning rate {record.learning_rate:g}, seed "
        f"{record.seed}. The curve is in `compression.json`. Trained again with the following, "
        "which does not give the same bits on every machine:",
        "",
        f"    {tune_command(record)}",
        "",
    ]
    return f"{before}\n\n" + "\n".join(lines)


# --- what was written, read again ------------------------------------------------------------


@dataclass(frozen=True)
class TextFigures:
    """Perplexity of three models on one evaluation text."""

    source: str
    dense: float
    cut: float
    trained: float

    @property
    def share_back(self) -> float | None:
        """Which share of the nats that the cut lost is back; None where none were."""
        lost = math.log(self.cut / self.dense)
        return math.log(self.cut / self.trained) / lost if lost > 0 else None


def figures_by_text(report: Mapping[str, Any]) -> list[TextFigures]:
    """The figures in `report.json` of a trained folder, the first evaluation text's first."""
    rows = [{"source": report["evaluation"]["source"], **report}, *report.get("other_texts", [])]
    return [
        TextFigures(
            row["source"],
            *(row[side]["perplexity"] for side in ("dense", "before_training", "pruned")),
        )
        for row in rows
    ]


def read_trained(folder: Path) -> tuple[Training, Trained, list[TextFigures]]:
    """The last training of a folder that `tune` wrote from a cut's, and what it gave.

    Raises:
        TransActError: the folder is damaged, or its last training is none of a whole cut.
    """
    compression, report = _recorded(folder)
    if compression is None or not compression.trainings or "before_training" not in report:
        raise TransActError(f"{folder} holds no trained cut.")
    record = compression.trainings[-1]
    curve = Curve.from_json(record.model_dump(mode="json"))
    return record, Trained(curve, record.why_ended), figures_by_text(report)


def read_trained_cut(folder: Path) -> TrainedCut:
    """The model in a folder of a trained cut, by whatever command it was written.

    Raises:
        TransActError: the folder is damaged, or its cut was not trained.
    """
    compression, report = _recorded(folder)
    if compression is None or not compression.trainings:
        raise TransActError(f"{folder} holds no trained cut.")
    trainings = compression.trainings
    # How long it took decides nothing.
    records = [
        training.model_copy(update={"seconds": 0.0}).model_dump_json() for training in trainings
    ]
    return TrainedCut(
        folder,
        compression.plan,
        compression.recovery,
        report["pruned"]["perplexity"],
        sum(training.trained_tokens for training in trainings),
        trainings[-1].text.source,
        sha256_of_text("\n".join(records)),
    )
