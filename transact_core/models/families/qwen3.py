"""Qwen3: a LLaMA whose heads' queries and keys are normalised before they are rotated."""

from transact_core.models.families.description import AsGguf, Family, InCTranslate2

FAMILY = Family(
    model_type="qwen3",
    title="Qwen3",
    class_name="Qwen3ForCausalLM",
    bias_fields=("attention_bias",),
    head_norms={"q_norm": "queries", "k_norm": "keys"},
    gguf="qwen3",
    as_gguf=AsGguf(
        architecture="qwen3",
        in_pairs=False,
        rope_factors=False,
        attention_bias=False,
        mlp_bias=False,
    ),
    ctranslate2=InCTranslate2(any_attention_width=True),
)
