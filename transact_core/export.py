"""What leaves: the checkpoint folder, `compression.json`, `report.json`, the model card.

`compression.json` holds choices, not matrices: the repaired weights are computed again from the
calibration text, which is why the text's fingerprint and the number of threads belong in it.
"""

import json
import platform
import re
import shlex
import time
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from transformers import LlamaForCausalLM

from transact_core import __version__
from transact_core.bench import Bench, Measurement, measure, model_report
from transact_core.checkpoint import CheckpointWriter
from transact_core.corpora import Windows, describe
from transact_core.devices import dtype_name
from transact_core.errors import Progress, TransActError, silent
from transact_core.evaluation import Evaluation
from transact_core.files import (
    read_text,
    require_disk_space,
    require_free_output,
    staged_folder,
)
from transact_core.folders import read_checkpoint
from transact_core.footprint import Footprint
from transact_core.models import LoadedModel
from transact_core.plan import Data, Decision, Granularity, PruningPlan, Step
from transact_core.recovery import LayerFit, RecoveryName, recover, require_recovery
from transact_core.runtimes import Reading, readings_of_cut
from transact_core.surgery import Cut

SCHEMA_VERSION = 1
BESIDE_WEIGHTS_BYTES = 50_000_000
"""Room for the tokenizer, compression.json and the rest of an output folder."""
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
    """What the last bits of a result depend on."""

    device: str
    dtype: Literal["float32", "float16", "bfloat16"]
    threads: Annotated[int, Field(ge=1)]
    cpu_capability: str
    packages: dict[str, str]


class Compression(Data):
    """`compression.json`: all that is needed to make a pruned model again."""

    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelReference
    plan: PruningPlan
    recovery: RecoveryName
    steps: Annotated[int, Field(ge=1)] = 1
    earlier_steps: tuple[Step, ...] = ()
    """The pruned models on the way to the plan, told for the reader; the plan stands on its own."""
    sequential: bool = False
    """Whether units were chosen module by module, each on the stream of what was pruned before."""
    granularity_losses: dict[Granularity, float] = Field(default_factory=dict)
    """Held-out loss of each granularity tried, where `auto` chose."""
    calibration: TextReference
    evaluation: TextReference
    sequence_length: Annotated[int, Field(ge=2)]
    save_dtype: Literal["float32", "float16", "bfloat16"]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    environment: Environment

    def to_json(self) -> str:
        """Indented, with each list of indices on one line."""
        indented = self.model_dump_json(indent=1)
        return re.sub(r"\[[\d,\s]+\]", lambda found: "".join(found[0].split()), indented) + "\n"


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

    Files are told apart by their contents; where they lie and what they are called may differ.
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


def report(bench: Bench, measurement: Measurement) -> dict[str, dict]:
    """What `report.json` holds."""
    return {
        "dense": model_report(bench.dense_footprint, bench.dense().perplexity),
        "pruned": model_report(measurement.footprint, measurement.perplexity),
        "evaluation": evaluation_report(bench.evaluation, measurement.evaluation),
    }


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
    """Refuses an output that the disk has no room for; called before an hour of computing too."""
    require_disk_space(output, cost.weight_bytes + BESIDE_WEIGHTS_BYTES)


def write_checkpoint(
    output: Path,
    model: LlamaForCausalLM,
    bench: Bench,
    measurement: Measurement,
    compression: Compression,
) -> None:
    """Writes the output folder of a model at hand, whole or not at all.

    Raises:
        TransActError: the folder is not empty, cannot be written, or the disk is too full.
    """
    require_free_output(output)
    require_room(output, measurement.footprint)
    with staged_folder(output) as folder:
        writer = CheckpointWriter(folder, getattr(torch, compression.save_dtype))
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight" or not model.config.tie_word_embeddings:
                writer.add(name, tensor)
        writer.finish(model)
        _write_beside(folder, bench, measurement, compression)


def _write_beside(
    folder: Path, bench: Bench, measurement: Measurement, compression: Compression
) -> None:
    """What an output folder holds beside weights and configurations."""
    result = report(bench, measurement)
    bench.loaded.tokenizer.save_pretrained(folder)
    (folder / "compression.json").write_text(compression.to_json())
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    loaded = bench.loaded
    others = readings_of_cut(compression.plan, loaded.architecture, loaded.model.config)
    card = model_card(loaded.name, compression, result, others, kept_bare(measurement.fits))
    (folder / "README.md").write_text(card)


def compress_to_folder(
    output: Path, bench: Bench, compression: Compression, progress: Progress = silent
) -> Measurement:
    """Carries out a compression straight into its output folder, whole or not at all.

    Layers are cut, repaired, written and let go of one after the other, and the dense model is
    released before what was written is loaded and measured: beside the dense weights there is one
    layer, one residual stream and a shard. The weights are those that `bench.compress` makes.

    Raises:
        TransActError: as `bench.compress` and `write_checkpoint` do.
    """
    plan, recovery = compression.plan, compression.recovery
    require_free_output(output)
    require_room(output, bench.footprint(plan, recovery))
    bench.dense(progress)
    start = time.perf_counter()
    device, dtype = bench.loaded.device, bench.loaded.dtype
    with staged_folder(output) as folder:
        fits = _write_layers(folder, bench, compression, progress)
        bench.release_model()
        model = read_checkpoint(folder, dtype).to(device)
        model.eval().requires_grad_(False)
        measurement = measure(bench, model, plan, recovery, fits, start, progress)
        _write_beside(folder, bench, measurement, compression)
    return measurement


def _write_layers(
    folder: Path, bench: Bench, compression: Compression, progress: Progress
) -> tuple[LayerFit, ...]:
    """Cuts, repairs and writes the weights, a layer at a time; gives what the repairs did."""
    plan, recovery, dense = compression.plan, compression.recovery, bench.loaded.model
    cut = Cut(dense, plan, with_biases=recovery == "bias")
    writer = CheckpointWriter(folder, getattr(torch, compression.save_dtype))

    def write_layer(number: int) -> None:
        for name, tensor in cut.pruned.model.layers[number].state_dict().items():
            writer.add(f"model.layers.{number}.{name}", tensor)
        cut.drop_layer(number)

    fits: tuple[LayerFit, ...] = ()
    if recovery != "none" and plan.cuts_anything(bench.loaded.architecture):
        fits = recover(
            dense, cut.pruned, plan, bench.calibration, recovery, progress,
            cut.make_layer, write_layer,
        ).fits  # fmt: skip
    else:
        for number in range(len(plan.layers)):
            cut.make_layer(number)
            write_layer(number)
    progress("Writing the checkpoint", 0, 1)
    # Last, as what is added waits in memory until a shard is full.
    for name in bench.loaded.architecture.outer_tensors():
        writer.add(name, cut.pruned.get_parameter(name))
    writer.finish(cut.pruned)
    progress("Writing the checkpoint", 1, 1)
    return fits


def reproduce_command(compression: Compression, output: str = "out") -> str:
    """The command line that makes this compression again from its ratios."""
    plan = compression.plan
    options = {
        "--model": compression.model.source,
        "--mha-ratio": plan.mha_ratio,
        "--mlp-ratio": plan.mlp_ratio,
        "--granularity": plan.granularity,
        "--importance": plan.importance,
        "--recovery": compression.recovery,
        "--steps": compression.steps,
        "--multiple-of": plan.multiple_of,
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
    words += ["--sequential"] if compression.sequential else []
    return shlex.join(["python", "-m", "transact_core", "prune", *words])


def apply_command(output: str = "out", file: str = "compression.json") -> str:
    """The command line that carries out a downloaded `compression.json`."""
    return shlex.join(["python", "-m", "transact_core", "apply", file, "--output", output])


def kept_bare(fits: Sequence[LayerFit]) -> str | None:
    """One sentence where modules were not repaired, as no repair did better on unseen text."""
    kept = sum(fit.is_bare for fit in fits)
    if not kept:
        return None
    return (
        f"{kept} of {len(fits)} cut modules keep their bare cut: on calibration windows that it "
        "had not seen, no repair did better."
    )


def model_card(
    name: str,
    compression: Compression,
    result: dict[str, dict],
    others: Sequence[Reading],
    unrepaired: str | None,
) -> str:
    """The output folder's README.md.

    `others` is how other runtimes read the model, `unrepaired` what `kept_bare` says of it.
    """
    dense, pruned = result["dense"], result["pruned"]

    def row(label: str, key: str, scale: float = 1, digits: int = 0) -> str:
        before, after = dense[key] / scale, pruned[key] / scale
        return f"| {label} | {before:,.{digits}f} | {after:,.{digits}f} | {after / before:.1%} |"

    # Names of folders and files may hold anything; a model card is shown as a page.
    name = escape(" ".join(name.split()), quote=False)
    plan, evaluation = compression.plan, result["evaluation"]
    told = f" {unrepaired}" if unrepaired else ""
    read = "\n".join(f"- {each.sentence}" for each in others)
    rows = "\n".join(
        [
            row("Parameters (M)", "parameters", 1e6, 1),
            row("Weights (MB)", "weight_bytes", 1e6, 1),
            row("KV cache per token (kB)", "kv_bytes_per_token", 1e3, 1),
            row(f"FLOPs per token at {dense['context_length']} (M)", "flops_per_token", 1e6),
            row("Attention width", "mha_width"),
            row("MLP width", "mlp_width"),
            row("Perplexity", "perplexity", 1, 2),
        ]
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, transact]
---

# {name}, pruned

{name} with width removed inside its attention and MLP modules. It is a stock `LlamaForCausalLM`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

| | dense | pruned | pruned / dense |
| --- | ---: | ---: | ---: |
{rows}

Perplexity: {evaluation["scored_tokens"]:,} scored tokens of {describe(evaluation["source"])}
(SHA-256 `{evaluation["sha256"]}`), windows of {evaluation["sequence_length"]} tokens, each scored
alone. It says nothing about other texts or about tasks.

Cut: `mha_ratio` {plan.mha_ratio:g}, `mlp_ratio` {plan.mlp_ratio:g}, granularity
`{plan.granularity}`, importance `{plan.importance}`, recovery `{compression.recovery}`, calibrated
on {compression.calibration.tokens:,} tokens of {describe(compression.calibration.source)}.{told}
All choices are in `compression.json`; `{apply_command()}` makes this folder again.

In other runtimes, as tried with small models of such cuts:

{read}

Method: Shen et al., *Pruning Large Language Models to Intra-module Low-rank Architecture with
Transitional Activations*, Findings of ACL 2024, arXiv 2407.05690. The terms of the dense model's
licence hold for this one.
"""
