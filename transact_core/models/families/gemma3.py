"""Gemma 3, its models of text: norms behind the modules too, and of each head's queries and keys.

All of them scale what follows by one plus a weight, which nothing here has to know.
"""

from transact_core.models.families.description import Family, InCTranslate2, InLlamaCpp, Norms

FAMILY = Family(
    model_type="gemma3_text",
    title="Gemma 3",
    class_name="Gemma3ForCausalLM",
    bias_fields=("attention_bias",),
    norms={
        "mha": Norms("input_layernorm", "post_attention_layernorm"),
        "mlp": Norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    },
    head_norms={"q_norm": "queries", "k_norm": "keys"},
    attention_multiplier="query_pre_attn_scalar",
    not_causal_field="use_bidirectional_attention",
    divides_hidden_size=True,
    llama_cpp=InLlamaCpp(unlimited=6, scale_is_of="query_pre_attn_scalar"),
    ctranslate2=InCTranslate2(
        any_attention_width=True, scale_is_of="query_pre_attn_scalar", refuses_longer_texts=True
    ),
)
