"""Qwen2 and Qwen2.5: a LLaMA with biases on queries, keys and values, and none elsewhere."""

from transact_core.models.families.description import AsGguf, Family, InLlamaCpp

FAMILY = Family(
    model_type="qwen2",
    title="Qwen2",
    class_name="Qwen2ForCausalLM",
    bias_fields=(),
    always_biased=("q_proj", "k_proj", "v_proj"),
    gguf="qwen2",
    as_gguf=AsGguf(
        architecture="qwen2",
        in_pairs=False,
        rope_factors=False,
        any_attention_width=False,
        or_llama=True,
        attention_bias=False,
        mlp_bias=False,
    ),
    llama_cpp=InLlamaCpp(any_attention_width=False),
)
