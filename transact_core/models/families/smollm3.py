"""SmolLM3: a LLaMA of which some layers, every fourth by default, rotate nothing."""

from transact_core.models.families.description import AsGguf, Family, InCTranslate2, InLlamaCpp

FAMILY = Family(
    model_type="smollm3",
    title="SmolLM3",
    class_name="SmolLM3ForCausalLM",
    rotates_field="no_rope_layers",
    # Its defaults turn the rotation off in every fourth layer.
    as_llama=lambda layers: {
        "sliding_window": None,
        "use_sliding_window": False,
        "no_rope_layers": [1] * layers,
        "layer_types": ["full_attention"] * layers,
    },
    as_gguf=AsGguf(
        architecture="smollm3",
        rope_factors=False,
        attention_bias=False,
        mlp_bias=False,
        unrotated=4,
    ),
    llama_cpp=InLlamaCpp(biases=False, unrotated=4),
    ctranslate2=InCTranslate2(has_converter=False),
)
