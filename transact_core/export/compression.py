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
from transact_core.pruning.plan import Data, Decision, Granularity, PruningPlan, Step

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
    tokens: Annotated[int, Field(ge=2)]


class Environment(Data):
    """Machine and software that the last bits of a result depend on."""

    device: str
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: Annotated[int, Field(ge=1)]
    cpu_capability: str
    packages: dict[str, str]


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
        granularity_losses=decision.granularity_losses,
        calibration=_text_reference(bench.calibration),
        evaluation=_text_reference(bench.evaluation),
        other_texts=tuple(map(_text_reference, bench.others)),
        sequence_length=bench.evaluation.sequence_length,
        save_dtype=bench.save_dtype,
        seed=bench.seed,
        environment=Environment(
            device=loaded.device.type,
            dtype=dtype_name(loaded.dtype),
            threads=torch.get_num_threads(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            packages=package_versions(),
        ),
    )


def _text_reference(windows: Windows) -> TextReference:
    return TextReference(source=windows.source, sha256=windows.sha256, tokens=windows.tokens)


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
    return shlex.join(["python", "-m", "transact_core", "prune", *words])


def apply_command(output: str = "out", file: str = "compression.json") -> str:
    """The command line that carries out a downloaded `compression.json`."""
    return shlex.join(["python", "-m", "transact_core", "apply", file, "--output", output])
