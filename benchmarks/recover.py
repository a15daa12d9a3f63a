"""What training gives back: methods, losses and a written-down teacher, and what a step costs.

    python -m benchmarks.recover --model CUT --text SOURCE --tokens 32768 --folder runs --resume
    python -m benchmarks.recover --model CUT --throughput

CUT is an output folder of `prune`. The first form trains it in each of the ways of `VARIANTS`, one
after the other, into folders under `--folder`, and prints a table of every held-out look; with
`--resume` it goes on where it was stopped, in the middle of a training too. The second form times
steps of the training and plain passes in turns, and prints medians of the ratios within a round: a
machine that slows down slows both.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from transact_core.base.errors import TransActError
from transact_core.base.files import staged_file
from transact_core.data.packing import open_sources, pack
from transact_core.data.windows import Windows
from transact_core.export.compression import Training, read_compression
from transact_core.export.tune import TuneSpec, tune, work_folder
from transact_core.models.devices import dtype_name
from transact_core.models.load import load_model
from transact_core.training import loop
from transact_core.training.loop import TRAINING_TEXT, Settings
from transact_core.training.student import METHODS, make_student
from transact_core.training.teacher import LiveTeacher, Teacher
from transact_core.training.teacher_cache import Shape, TeacherCache

VARIANTS: dict[str, dict[str, str | bool]] = {
    "full, kl": {"method": "full", "loss": "kl"},
    "lora, kl": {"method": "lora", "loss": "kl"},
    "full, ce": {"method": "full", "loss": "ce"},
    "full, kl+ce": {"method": "full", "loss": "kl+ce"},
    "full, kl, teacher's top 64": {"method": "full", "loss": "kl", "cached": True},
}
PACED_WINDOWS = 4
"""Windows of one timed step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    try:
        chosen = _parser().parse_args(arguments)
        if chosen.throughput:
            throughput(chosen)
        else:
            table(chosen)
    except TransActError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; --resume goes on.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recover", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", required=True, metavar="CUT")
    parser.add_argument("--teacher", metavar="M")
    parser.add_argument("--text", default="builtin", metavar="SOURCE")
    parser.add_argument("--held-out", action="append", default=[], metavar="SOURCE")
    parser.add_argument("--held-out-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--tokens", type=int, default=32_768, metavar="N")
    parser.add_argument("--evaluate-every", type=int, metavar="STEPS")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="L")
    parser.add_argument(
        "--variants", default="; ".join(VARIANTS), help="those to run, with semicolons between"
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/recover"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


# --- the table -------------------------------------------------------------------------------


def table(chosen: argparse.Namespace) -> None:
    """Trains in every way that is asked for, and prints what each look at the texts showed."""
    names = [name.strip() for name in chosen.variants.split(";")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise TransActError(f"{unknown[0]!r} is none of {'; '.join(VARIANTS)}.")
    trainings = {}
    for name in names:
        trainings[name] = _trained(chosen, name)
        print(markdown(trainings), flush=True)
    with staged_file(chosen.folder / "recover.md") as staging:
        staging.write_text(markdown(trainings), encoding="utf-8")


def _trained(chosen: argparse.Namespace, name: str) -> Training:
    """The record of one training, made now or found from an earlier run."""
    variant = VARIANTS[name]
    output = chosen.folder / name.replace(", ", "-").replace("'s ", "-").replace(" ", "-")
    if not (output / "compression.json").is_file():
        if work_folder(output).exists() and not chosen.resume:
            raise TransActError(f"{work_folder(output)} is there already; go on with --resume.")
        spec = TuneSpec(
            model=chosen.model,
            output=output,
            teacher=chosen.teacher,
            text=chosen.text,
            held_out=tuple(chosen.held_out),
            held_out_tokens=chosen.held_out_tokens,
            sequence_length=chosen.sequence_length,
            settings=Settings(
                method=variant["method"],
                loss=variant["loss"],
                tokens=chosen.tokens,
                evaluate_every=chosen.evaluate_every,
            ),
            teacher_cache=chosen.folder / "teacher" if variant.get("cached") else None,
            resume=True,
        )
        chosen.folder.mkdir(parents=True, exist_ok=True)
        for told in tune(spec):
            if isinstance(told, str):
                print(told, file=sys.stderr)
            elif told.evaluated is not None:
                looks = json.dumps({key: text.kl for key, text in told.evaluated.texts.items()})
                print(f"{name}: step {told.step} of {told.steps}, KL {looks}", file=sys.stderr)
    return read_compression(output / "compression.json").trainings[-1]


def markdown(trainings: dict[str, Training]) -> str:
    """A row for each look at each held-out text: divergence, and perplexity over the dense one."""
    lines = [
        "| trained by | tokens | held-out text | KL, nats | × dense | lost nats back | seconds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, training in trainings.items():
        per_step = training.windows_per_step * training.sequence_length
        first = training.evaluated[0].texts
        for look in training.evaluated:
            for text, watched in look.texts.items():
                dense = training.dense_nll[text]
                lost = first[text].nll - dense
                share = f"{(first[text].nll - watched.nll) / lost:.1%}" if lost > 0 else ""
                lines.append(
                    f"| {name} | {look.step * per_step:,} | {Path(text).name} | {watched.kl:.4f} | "
                    f"{math.exp(watched.nll - dense):.3f} | {share} | {training.seconds:,.0f} |"
                )
    return "\n".join([*lines, ""])


# --- throughput ------------------------------------------------------------------------------


def throughput(chosen: argparse.Namespace) -> None:
    """Times steps beside a plain forward and backward of the student and a forward of the teacher.

    The plain student computes the usual loss over all logits with gradients for the same weights,
    without an optimiser; the plain teacher's logits are thrown away.
    """
    cut = load_model(chosen.model, dtype="float32")
    source = (
        chosen.teacher or read_compression(Path(chosen.model) / "compression.json").model.source
    )
    dense = load_model(source)
    tokens = PACED_WINDOWS * chosen.sequence_length
    training = pack(
        open_sources(chosen.text),
        dense.tokenizer,
        dense.architecture.vocab_size,
        tokens,
        chosen.sequence_length,
    )
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(chosen.sequence_length, dense.architecture.vocab_size)
        cache = TeacherCache(Path(folder), dense.weight_files, dtype_name(dense.dtype), shape)
        cache.write(dense.model, {TRAINING_TEXT: training})
        for method in METHODS:
            try:
                student = make_student(cut.model, method)
            except TransActError as error:
                print(error, file=sys.stderr)
                continue
            live = _stepper(student, LiveTeacher(dense.model), training)
            cached = _stepper(student, cache, training)
            plain_student = _plain_student(student, training)
            plain_teacher = _plain_teacher(dense.model, training)
            rounds = []
            for _ in range(chosen.rounds + 1):
                passes = (plain_student, plain_teacher, live, cached)
                rounds.append([_seconds(run) for run in passes])
            # The first round warms up.
            with_teacher = statistics.median((s + t) / step for s, t, step, _ in rounds[1:])
            alone = statistics.median(s / step for s, _, _, step in rounds[1:])
            pace = tokens / statistics.median(step for _, _, step, _ in rounds[1:])
            print(
                f"{method}: {with_teacher:.2f} of a plain pass of student and teacher, with the "
                f"cache {alone:.2f} of the student's alone; {pace:,.0f} tokens a second"
            )


def _stepper(student, teacher: Teacher, training: Windows) -> Callable[[], object]:
    settings = Settings(method=student.method, windows_per_step=PACED_WINDOWS)
    accelerator = loop.make_accelerator(student.model.device, "none", Path())
    weights = student.trained()
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=loop.BETAS, weight_decay=0.0)
    module = loop.Objective(student, settings.loss)
    module, optimizer = accelerator.prepare(module, optimizer)
    rows = list(range(PACED_WINDOWS))
    return lambda: loop.take_step(
        module, optimizer, accelerator, teacher, training, rows, settings, 10, 0
    )


def _plain_student(student, training: Windows) -> Callable[[], object]:
    def run() -> None:
        for ids in training.ids.long().to(student.model.device):
            logits = student.model(ids[None], use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits, ids[1:]).backward()
        student.model.zero_grad()

    return run


def _plain_teacher(model, training: Windows) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        for ids in training.ids.long().to(model.device):
            model(ids[None], use_cache=False)

    return run


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
