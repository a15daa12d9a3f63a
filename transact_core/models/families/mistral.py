"""Mistral: a LLaMA without biases whose attention may reach back a fixed number of tokens only."""

from transact_core.models.families.description import AsGguf, Family, InCTranslate2

FAMILY = Family(
    model_type="mistral",
    title="Mistral",
    class_name="MistralForCausalLM",
    bias_fields=(),
    as_gguf=AsGguf(),
    as_llama=lambda layers: {"sliding_window": None},
    ctranslate2=InCTranslate2(
        any_attention_width=True, needs_unknown_token=True, refuses_longer_texts=True
    ),
)
