"""What each family allows, in words, as the Method page and the README list it."""

from transact_core.models.families.description import Family


def narrower_heads(family: Family) -> str:
    """Whether `head-dims` can be had; `pruning.rope` refuses it where it cannot."""
    if family.head_norms:
        return "no: fewer dims would change the norm of each head's queries and keys"
    if "q_proj" not in family.attention_inputs:
        return "no: queries, keys and values are one matrix"
    if family.rotates_field:
        return "only where all layers rotate: the others have no rotary pairs to choose from"
    return "yes"


def biases(family: Family) -> str:
    """Whether the recovery `bias` can be had; `stock_class.require_biases` refuses it where not."""
    if {"attention_bias", "mlp_bias"} <= set(family.bias_fields):
        return "yes"
    if family.as_llama:
        return "without a sliding window, saved as a `LlamaForCausalLM`"
    return "no: the class has not both biases on its output projections"


def gguf_files(family: Family) -> str:
    """Whether such models are read from GGUF files."""
    if family.gguf:
        return "yes"
    return "yes, as LLaMA" if family.as_llama and not family.rotates_field else "no"


def written_files(family: Family) -> str:
    """Whether such models are written as GGUF files; `export.gguf` refuses the others."""
    kind = family.as_gguf
    if kind is None:
        return "no"
    if family.as_llama and not family.rotates_field and family.gguf is None:
        return "yes, as LLaMA, without a sliding window"
    conditions = []
    if kind.unrotated:
        conditions.append(f"where one layer in {kind.unrotated} does not rotate, or all do")
    if not kind.any_attention_width and not kind.or_llama:
        conditions.append("cuts of the MLP")
    if "attention_bias" in family.bias_fields and not kind.attention_bias and not kind.unrotated:
        conditions.append("without biases")
    if not kind.rope_factors and not kind.or_llama:
        conditions.append("with default or linear frequencies")
    return ", ".join(conditions) or "yes"


def table(families: list[Family]) -> str:
    """A Markdown table with a row for each family."""
    columns = ("family", "`model_type`", "`head-dims`", "recovery `bias`")
    head = f"| {' | '.join((*columns, 'read from GGUF', 'written as GGUF'))} |"
    rows = [
        f"| {family.title} | `{family.model_type}` | {narrower_heads(family)} | {biases(family)} "
        f"| {gguf_files(family)} | {written_files(family)} |"
        for family in families
    ]
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *rows])
