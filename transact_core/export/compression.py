"""`compression.json`: all that is needed to make a pruned model again.

It holds choices, not matrices. Repaired weights are computed again from the calibration text, so
the SHA-256 of that text and the number of threads are recorded.
"""

import platform
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator

from transact_core import __version__
from transact_core.base.errors import TransActError
from transact_core.base.files import read_text
from transact_core.data.corpus import describe
from transact_core.data.windows import Windows
from transact_core.experiments.bench import Bench
from transact_core.models.devices import dtype_name
from transact_core.models.load import LoadedModel
from transact_core.pruning.closed_form import RecoveryName, require_recovery
from transact_core.pruning.plan import (
    Data,
    Decision,
    Granularity,
    PruningPlan,
    Step,
    WidthsName,
)

SCHEMA_VERSION = 2
"""Of the files that are written; those of version 1 are read as well, see `_upgraded`."""
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ModelReference(Data):
    source: str
    weight_files: dict[str, Sha256]


class TextReference(Data):
    source: str
    sha256: Sha256
    tokens: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)] = 0
    """Tokens at the text's beginning that something else takes."""
    parts: tuple["TextReference", ...] = ()
    """Of a mix, what was taken of each text."""


class Environment(Data):
    """Machine and software that the last bits of a result depend on."""

    device: str
    gpu: str = ""
    """Its model and the version of CUDA, of a GPU."""
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: Annotated[int, Field(ge=1)]
    cpu_capability: str
    packages: dict[str, str]


class Watched(Data):
    """Means over the scored tokens of a held-out text, in nats."""

    kl: float
    nll: float


class Evaluated(Data):
    step: Annotated[int, Field(ge=0)]
    texts: dict[str, Watched]


class Training(Data):
    """One training of the cut, as it was; it is repeated by `tune_command`, and not bit for bit."""

    teacher: ModelReference
    weight_files: dict[str, Sha256]
    """Of the model that was trained; empty where it was a cut that was trained at once."""
    shot: Annotated[int, Field(ge=1)] | None = None
    """After which of several cuts it was trained, where cuts and trainings take turns."""
    method: Literal["full", "lora"]
    loss: Literal["kl", "kl+ce", "ce"]
    rank: Annotated[int, Field(ge=1)] | None = None
    """Of LoRA's matrices."""
    teacher_top: Annotated[int, Field(ge=1)] | None = None
    """How many of the teacher's most likely tokens were written down; None with it in memory."""
    text: TextReference
    """What was taken of it; where it is less than was trained on, it was read again."""
    tokens: Annotated[int, Field(ge=1)]
    """As asked for."""
    trained_tokens: Annotated[int, Field(ge=0)]
    """Until the training ended."""
    best_step: Annotated[int, Field(ge=0)]
    """Whose weights these are; 0 where none were better than those that it began with."""
    sequence_length: Annotated[int, Field(ge=2)]
    windows_per_step: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    held_out: tuple[TextReference, ...]
    dense_nll: dict[str, float]
    losses: tuple[float, ...]
    """By step."""
    evaluated: tuple[Evaluated, ...]
    why_ended: str
    seconds: Annotated[float, Field(ge=0)]
    processes: Annotated[int, Field(ge=1)] = 1
    environment: Environment


class Compression(Data):
    """`compression.json`: all that is needed to make a pruned model again."""

    schema_version: Literal[2] = SCHEMA_VERSION
    model: ModelReference
    plan: PruningPlan
    recovery: RecoveryName
    steps: Annotated[int, Field(ge=1)] = 1
    earlier_steps: tuple[Step, ...] = ()
    """The pruned models on the way to the plan, for the reader; the plan does not need them."""
    sequential: bool = False
    """Whether each module's units were chosen on the residual stream of the model pruned so far."""
    widths: WidthsName = "uniform"
    """How widths were given to layers; the plan says which these are."""
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Layers that were to stay whole."""
    granularity_losses: dict[Granularity, float] = Field(default_factory=dict)
    """Held-out loss in nats a token of each granularity that `auto` tried."""
    calibration: TextReference
    evaluation: TextReference
    other_texts: tuple[TextReference, ...] = ()
    """Further texts that perplexity was measured on."""
    sequence_length: Annotated[int, Field(ge=2)]
    save_dtype: Literal["float32", "float16", "bfloat16"]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    environment: Environment
    trainings: tuple[Training, ...] = ()
    """What the cut was trained on afterwards, in order; `apply` does not repeat it."""

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, given: Any) -> Any:
        """Reads a file of version 1 too."""
        if isinstance(given, dict) and given.get("schema_version") == 1:
            return _upgraded(given)
        return given

    def to_json(self) -> str:
        """Indented, with each list of indices on one line."""
        indented = self.model_dump_json(indent=1)
        return re.sub(r"\[[\d,\s]+\]", lambda found: "".join(found[0].split()), indented) + "\n"


def _upgraded(stored: dict[str, Any]) -> dict[str, Any]:
    """Version 1 as version 2 says it: `multiple_of` was the multiple of head_dim too.

    Choices are the same, so that the same plan is carried out. Its head counts, all of which
    divide hidden_size, are still accepted by `PruningPlan.check`.
    """
    upgraded = {**stored, "schema_version": 2}
    plan = stored.get("plan")
    if isinstance(plan, dict):
        narrows = plan.get("granularity") == "head-dims"
        multiple = plan.get("multiple_of", 1) if narrows else 1
        upgraded["plan"] = {**plan, "head_dim_multiple_of": multiple}
    return upgraded


def describe_compression(bench: Bench, decision: Decision, recovery: str) -> Compression:
    """The compression that `bench.compress` carries out by this decision's plan, as data."""
    require_recovery(recovery)
    loaded = bench.loaded
    return Compression(
        model=ModelReference(source=loaded.source, weight_files=loaded.weight_files),
        plan=decision.plan,
        recovery=recovery,
        steps=decision.steps,
        earlier_steps=decision.earlier_steps,
        sequential=decision.sequential,
        widths=decision.widths,
        keep_layers=decision.keep_layers,
        granularity_losses=decision.granularity_losses,
        calibration=text_reference(bench.calibration),
        evaluation=text_reference(bench.evaluation),
        other_texts=tuple(map(text_reference, bench.others)),
        sequence_length=bench.evaluation.sequence_length,
        save_dtype=bench.save_dtype,
        seed=bench.seed,
        environment=environment_of(loaded),
    )


def environment_of(loaded: LoadedModel) -> Environment:
    """This machine and its software, as a model computes on it."""
    return Environment(
        device=loaded.device.type,
        gpu="" if loaded.device.type == "cpu" else loaded.hardware,
        dtype=dtype_name(loaded.dtype),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        packages=package_versions(),
    )


def text_reference(windows: Windows) -> TextReference:
    """What was taken of which text."""
    parts = [
        TextReference(source=use.source, sha256=use.sha256, tokens=use.tokens, skipped=use.skipped)
        for use in windows.uses
    ]
    if len(parts) == 1:
        return parts[0]
    return TextReference(
        source=windows.source, sha256=windows.sha256, tokens=windows.tokens, parts=tuple(parts)
    )


def tokens_used(compression: Compression) -> dict[str, int]:
    """By SHA-256 of a text, how far into it what decided or judged a cut goes, in tokens."""
    used: dict[str, int] = {}
    references = [compression.evaluation, compression.calibration]
    for training in compression.trainings:
        references += training.held_out
    for reference in references:
        for part in reference.parts or (reference,):
            skipped = part.skipped
            if reference is compression.calibration and part.sha256 in used:
                # Files of earlier versions do not say what was skipped.
                skipped = max(skipped, used[part.sha256])
            used[part.sha256] = max(used.get(part.sha256, 0), skipped + part.tokens)
    return used


def package_versions() -> dict[str, str]:
    """Versions that results depend on, local build tags such as `+cpu` included."""
    return {
        "python": platform.python_version(),
        "transact_core": __version__,
        **{package: version(package) for package in PACKAGES},
    }


def read_compression(path: Path) -> Compression:
    """Reads and checks a `compression.json`.

    Raises:
        TransActError: not readable, not JSON, or a field is missing, unknown or contradictory;
            the sentence names it.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        raise TransActError(f"{path} cannot be read.") from None
    return parse_compression(text, str(path))


def parse_compression(text: str, where: str = "compression.json") -> Compression:
    """Like `read_compression`, from a string."""
    try:
        return Compression.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].rstrip(".")
        if first["type"] == "extra_forbidden":
            reason = "this field is not known to this version"
        raise TransActError(f"{where} cannot be used: {name}: {reason}.") from None


def require_same_model(compression: Compression, loaded: LoadedModel) -> None:
    """Refuses a model whose weight files are not those that were pruned.

    Files are compared by their contents; their folders and names may differ.
    """
    if sorted(compression.model.weight_files.values()) != sorted(loaded.weight_files.values()):
        raise TransActError(
            f"The weights of {loaded.source} are not those that this compression was made for "
            f"({compression.model.source}): their SHA-256 differ; name the right model by --model."
        )


def require_same_text(kind: str, reference: TextReference, windows: Windows) -> None:
    """Refuses a text that is not the one recorded, or one too short to be."""
    if reference.sha256 != windows.sha256 or reference.tokens != windows.tokens:
        raise TransActError(
            f"The {kind} text {windows.source} is not the one this compression was made with "
            f"({describe(reference.source)}, SHA-256 {reference.sha256[:12]}…); "
            f"name the right one by --{kind}."
        )


def version_warnings(compression: Compression) -> list[str]:
    """One sentence for each package whose version is not the recorded one."""
    here = package_versions()
    return [
        f"{package} is {here.get(package, 'absent')} here and was {recorded} when this was made; "
        "the last bits may differ."
        for package, recorded in compression.environment.packages.items()
        if here.get(package) != recorded
    ]


def reproduce_command(compression: Compression, output: str = "out") -> str:
    """The command line that makes this compression again from its ratios."""
    plan = compression.plan
    options = {
        "--model": compression.model.source,
        "--device": compression.environment.device,
        "--dtype": compression.environment.dtype,
        "--mha-ratio": plan.mha_ratio,
        "--mlp-ratio": plan.mlp_ratio,
        "--granularity": plan.granularity,
        "--importance": plan.importance,
        "--recovery": compression.recovery,
        "--steps": compression.steps,
        "--multiple-of": plan.multiple_of,
        "--head-dim-multiple-of": plan.head_dim_multiple_of,
        "--calibration": compression.calibration.source,
        "--calibration-tokens": compression.calibration.tokens,
        "--evaluation": compression.evaluation.source,
        "--evaluation-tokens": compression.evaluation.tokens,
        "--sequence-length": compression.sequence_length,
        "--save-dtype": compression.save_dtype,
        "--seed": compression.seed,
        "--output": output,
    }
    words = [word for name, value in options.items() for word in (name, str(value))]
    words += [word for text in compression.other_texts for word in ("--evaluation", text.source)]
    words += ["--sequential"] if compression.sequential else []
    if compression.widths != "uniform":
        words += ["--widths", compression.widths]
    if compression.keep_layers:
        words += ["--keep-layers", ",".join(map(str, compression.keep_layers))]
    if compression.widths == "by-hand":
        kept = [(len(layer.kept_heads), len(layer.kept_channels)) for layer in plan.layers]
        words += ["--layer-widths", ",".join(f"{heads}:{channels}" for heads, channels in kept)]
    return shlex.join(["python", "-m", "transact_core", "prune", *words])


def training_commands(compression: Compression, output: str = "trained") -> str:
    """The command lines that repeat the trainings, or cuts and trainings where they took turns."""
    trainings = compression.trainings
    if all(training.shot is None for training in trainings):
        return " and then ".join(tune_command(training) for training in trainings)
    first = trainings[0]
    words = {
        "--tune-tokens": sum(training.tokens for training in trainings if training.shot),
        "--tune-text": first.text.source,
    }
    more = shlex.join([word for name, value in words.items() for word in (name, str(value))])
    return f"{reproduce_command(compression, output)} {more}"


def tune_command(training: Training, model: str = "out", output: str = "trained") -> str:
    """The command line that trains as it was trained, on the cut in the folder `model`."""
    options = {
        "--model": model,
        "--teacher": training.teacher.source,
        "--text": training.text.source,
        "--tokens": training.tokens,
        "--method": training.method,
        "--loss": training.loss,
        "--learning-rate": training.learning_rate,
        "--windows-per-step": training.windows_per_step,
        "--sequence-length": training.sequence_length,
        "--seed": training.seed,
        "--output": output,
    }
    if training.teacher_top is not None:
        options |= {"--teacher-cache": "teacher", "--teacher-top": training.teacher_top}
    if training.rank is not None:
        options["--rank"] = training.rank
    if len(training.evaluated) > 1:
        options["--evaluate-every"] = training.evaluated[1].step
    if training.held_out:
        options["--held-out-tokens"] = training.held_out[0].tokens
    words = [word for name, value in options.items() for word in (name, str(value))]
    own = {part.source for part in training.text.parts or (training.text,)}
    for text in training.held_out:
        words += ["--held-out", text.source] if text.source not in own else []
    return shlex.join(["python", "-m", "transact_core", "tune", *words])


def apply_command(output: str = "out", file: str = "compression.json") -> str:
    """The command line that carries out a downloaded `compression.json`."""
    return shlex.join(["python", "-m", "transact_core", "apply", file, "--output", output])
