"""Granite: a LLaMA with factors of its own at embeddings, logits, attention and residual stream."""

from transact_core.models.families.description import AsGguf, Family, InCTranslate2, InLlamaCpp

FAMILY = Family(
    model_type="granite",
    title="Granite",
    class_name="GraniteForCausalLM",
    residual_multiplier="residual_multiplier",
    attention_multiplier="attention_multiplier",
    as_gguf=AsGguf(
        architecture="granite",
        scales={
            "embedding_scale": "embedding_multiplier",
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
        },
    ),
    llama_cpp=InLlamaCpp(any_attention_width=False),
    ctranslate2=InCTranslate2(has_converter=False),
)
