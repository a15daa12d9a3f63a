"""Phi-3: a LLaMA that keeps queries, keys and values in one matrix, and gate and up in another."""

from transact_core.models.families.description import AsGguf, Family

FAMILY = Family(
    model_type="phi3",
    title="Phi-3",
    class_name="Phi3ForCausalLM",
    attention_inputs={"qkv_proj": ("queries", "keys", "values")},
    mlp_inputs={"gate_up_proj": ("channels", "channels")},
    bias_fields=(),
    as_gguf=AsGguf(
        architecture="phi3",
        in_pairs=False,
        rope_factors=False,
        any_attention_width=False,
        attention_bias=False,
        mlp_bias=False,
    ),
    llama_cpp=None,
    ctranslate2=None,
)
