"""The model card, the README.md of an output folder."""

from collections.abc import Sequence
from html import escape
from typing import Any

from transact_core.data.corpus import describe
from transact_core.export.compression import Compression, apply_command
from transact_core.export.licence import front_matter_lines, licence_lines, name_under_licence
from transact_core.export.runtimes import Reading
from transact_core.models.licence import Licence
from transact_core.models.stock_class import explanation
from transact_core.pruning.closed_form import LayerFit


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
) -> str:
    """The output folder's README.md.

    `others` is how other runtimes read the model, `unrepaired` what `kept_bare` says of it, and
    `blocks` what `block_advice` does. `source_type` is the dense model's `model_type`.
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
{front_matter_lines(licence)}---

# {name}, pruned

{name} with width removed inside its attention and MLP modules. It is a stock `{model_class}`{why}:

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
on {compression.calibration.tokens:,} tokens of {describe(compression.calibration.source)}.{repairs}
All choices are in `compression.json`; `{apply_command()}` makes this folder again.

In other runtimes, as tried with small models of such cuts:

{read}

Method: Shen et al., *Pruning Large Language Models to Intra-module Low-rank Architecture with
Transitional Activations*, Findings of ACL 2024, arXiv 2407.05690.

{licence_lines(licence)}
"""
