"""Granite: a LLaMA with factors of its own at embeddings, logits, attention and residual stream."""

from transact_core.models.families.description import Family, InCTranslate2, InLlamaCpp

FAMILY = Family(
    model_type="granite",
    title="Granite",
    class_name="GraniteForCausalLM",
    residual_multiplier="residual_multiplier",
    attention_multiplier="attention_multiplier",
    llama_cpp=InLlamaCpp(any_attention_width=False),
    ctranslate2=InCTranslate2(has_converter=False),
)
