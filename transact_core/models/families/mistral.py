"""Mistral: a LLaMA without biases whose attention may reach back a fixed number of tokens only."""

from transact_core.models.families.description import Family

FAMILY = Family(
    model_type="mistral",
    title="Mistral",
    class_name="MistralForCausalLM",
    bias_fields=(),
    as_llama=lambda layers: {"sliding_window": None},
)
