"""The model card, the README.md of an output folder."""

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transact_core.base.errors import TransActError
from transact_core.base.files import disk_trouble, staged_file
from transact_core.data.corpus import describe
from transact_core.export.compression import Compression, apply_command
from transact_core.export.licence import front_matter_lines, licence_lines, name_under_licence
from transact_core.export.runtimes import Reading
from transact_core.models.licence import Licence
from transact_core.models.load import BUILTIN, is_hub_id
from transact_core.models.stock_class import explanation
from transact_core.pruning.closed_form import LayerFit

if TYPE_CHECKING:
    from transact_core.export.gguf import WrittenFile


def kept_bare(fits: Sequence[LayerFit]) -> str | None:
    """One sentence where modules keep the bare cut, as no repair did better on held-out text."""
    kept = sum(fit.is_bare for fit in fits)
    if not kept:
        return None
    return (
        f"{kept} of {len(fits)} cut modules keep their bare cut: on held-out calibration windows "
        "no repair did better."
    )


def _cell(text: str) -> str:
    """A name that may hold anything, as a cell of a table."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def model_card(
    name: str,
    compression: Compression,
    result: dict[str, Any],
    others: Sequence[Reading],
    unrepaired: str | None,
    blocks: str | None = None,
    licence: Licence | None = None,
    source_type: str = "llama",
    by_code: str = "",
) -> str:
    """The output folder's README.md.

    `others` is how other runtimes read the model, `unrepaired` what `kept_bare` says of it, and
    `blocks` what `block_advice` does. `source_type` is the dense model's `model_type`;
    `by_code` how other programs load it by the code beside it.
    """
    dense, pruned = result["dense"], result["pruned"]

    def row(label: str, key: str, scale: float = 1, digits: int = 0) -> str:
        before, after = dense[key] / scale, pruned[key] / scale
        return f"| {label} | {before:,.{digits}f} | {after:,.{digits}f} | {after / before:.1%} |"

    # Names of folders and files may hold anything; a model card is shown as a page.
    name = escape(" ".join(name_under_licence(name, licence).split()), quote=False)
    plan, evaluation = compression.plan, result["evaluation"]
    repairs = f" {unrepaired}" if unrepaired else ""
    model_class = pruned["model_class"]
    reason = explanation(model_class, source_type)
    why = f",\n{reason}" if reason else ""
    sentences = [reading.sentence for reading in others] + ([blocks] if blocks else [])
    read = "\n".join(f"- {sentence}" for sentence in sentences)
    loading = _loading(model_class, why, pruned.get("layers"), by_code)
    keeps = compression.keep_layers
    whole = f", layers {', '.join(map(str, keeps))} kept whole" if keeps else ""
    own = "" if compression.widths == "uniform" else f"widths `{compression.widths}`{whole},\n"
    made = f"{own}calibrated"
    others = [
        f"| Perplexity on {_cell(describe(text['source']))} | {text['dense']['perplexity']:,.2f} | "
        f"{text['pruned']['perplexity']:,.2f} | "
        f"{text['pruned']['perplexity'] / text['dense']['perplexity']:.1%} |"
        for text in result.get("other_texts", [])
    ]
    rows = "\n".join(
        [
            row("Parameters (M)", "parameters", 1e6, 1),
            row("Weights (MB)", "weight_bytes", 1e6, 1),
            row("KV cache per token (kB)", "kv_bytes_per_token", 1e3, 1),
            row(f"FLOPs per token at {dense['context_length']} (M)", "flops_per_token", 1e6),
            row("Attention width", "mha_width"),
            row("MLP width", "mlp_width"),
            row("Perplexity", "perplexity", 1, 2),
            *others,
        ]
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, transact]
metrics: [perplexity]
{_origin_lines(compression)}{front_matter_lines(licence)}---

# {name}, pruned

{name} with width removed inside its attention and MLP modules. {loading}

| | dense | pruned | pruned / dense |
| --- | ---: | ---: | ---: |
{rows}

Perplexity: {evaluation["scored_tokens"]:,} scored tokens of {describe(evaluation["source"])}
(SHA-256 `{evaluation["sha256"]}`), windows of {evaluation["sequence_length"]} tokens, each scored
alone. It says nothing about other texts or about tasks.

Cut: `mha_ratio` {plan.mha_ratio:g}, `mlp_ratio` {plan.mlp_ratio:g}, granularity
`{plan.granularity}`, importance `{plan.importance}`, recovery `{compression.recovery}`, {made}
on {compression.calibration.tokens:,} tokens of {describe(compression.calibration.source)}.{repairs}
All choices are in `compression.json`; `{apply_command()}` makes this folder again.

In other runtimes, as tried with small models of such cuts:

{read}

Method: Shen et al., *Pruning Large Language Models to Intra-module Low-rank Architecture with
Transitional Activations*, Findings of ACL 2024, arXiv 2407.05690.

{licence_lines(licence)}
"""


def _loading(
    model_class: str, why: str, layers: Sequence[dict[str, int]] | None, by_code: str
) -> str:
    """How the model is loaded; `layers` are the widths of each where they differ."""
    if layers is None:
        return f"""It is a stock `{model_class}`{why}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""
    rows = "\n".join(
        f"| {index} | {each['num_attention_heads']} | {each['num_key_value_heads']} | "
        f"{each['intermediate_size']:,} |"
        for index, each in enumerate(layers)
    )
    return f"""Its layers have widths
of their own, which `config.json` says by transformers' `per_layer_config`.
**Stock transformers 5.23 does not load it by itself**: its `{model_class}` refuses such a
configuration. This program opens it:

```python
from transact_core.models.load import load_model

loaded = load_model(".")
model, tokenizer = loaded.model, loaded.tokenizer
```

`python -m transact_core gguf` writes it as a GGUF file of the architecture `deci`, which stock
llama.cpp runs.{by_code}

| layer | query heads | key-value heads | MLP channels |
| ---: | ---: | ---: | ---: |
{rows}"""


BUILTIN_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's id of the built-in model."""


def _origin_lines(compression: Compression) -> str:
    """The lines of the front matter that name base model and data sets of the hub."""
    source = compression.model.source
    on_hub = is_hub_id(source) and not os.path.exists(source)
    base = BUILTIN_BASE if source == BUILTIN else source if on_hub else None
    texts = (compression.calibration, compression.evaluation, *compression.other_texts)
    named = [text.source.split(":")[1] for text in texts if text.source.startswith("hub:")]
    lines = [f"base_model: {json.dumps(base)}\n"] if base else []
    if named:
        lines.append(f"datasets: {json.dumps(list(dict.fromkeys(named)))}\n")
    return "".join(lines)


TAGS = "tags: [pruned, transact]"
GGUF_HEADING = "## GGUF files"


def gguf_section(files: Sequence[tuple["WrittenFile", float]], runtime: str) -> str:
    """The model card's section about GGUF files, each with its perplexity in llama.cpp."""
    rows = "\n".join(
        f"| `{escape(file.path.name, quote=False)}` | {file.quantization} | "
        f"{file.bytes / 1e6:,.1f} | {perplexity:,.2f} |"
        for file, perplexity in files
    )
    texts = {file.imatrix for file, _ in files if file.imatrix}
    said = (
        f"\nTypes below Q8_0 have an importance matrix, measured on {describe(texts.pop())}."
        if texts
        else ""
    )
    return f"""{GGUF_HEADING}

Made by the same program, read by {runtime}, and measured there on the same evaluation tokens.{said}

| file | type | MB | perplexity |
| --- | --- | ---: | ---: |
{rows}
"""


def add_gguf_to_card(
    folder: Path, files: Sequence[tuple["WrittenFile", float]], runtime: str
) -> None:
    """Adds the section about GGUF files to the model card of an output folder, or renews it.

    Raises:
        TransActError: the card cannot be written.
    """
    path = folder / "README.md"
    try:
        before, _, _ = path.read_text(encoding="utf-8").partition(f"\n{GGUF_HEADING}\n")
        with staged_file(path) as staging:
            tagged = before.replace(f"\n{TAGS}\n", f"\n{TAGS[:-1]}, gguf]\n", 1)
            card = f"{tagged.rstrip()}\n\n{gguf_section(files, runtime)}"
            staging.write_text(card, encoding="utf-8")
    except OSError as error:
        raise TransActError(
            f"The model card {path} was not written: {disk_trouble(error) or error.strerror}."
        ) from None
