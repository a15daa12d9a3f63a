"""LLaMA, in all its versions, and what was trained in its shape (SmolLM2, Yi, TinyLlama)."""

from transact_core.models.families.description import AsGguf, Family

FAMILY = Family(
    model_type="llama",
    title="LLaMA",
    class_name="LlamaForCausalLM",
    divides_hidden_size=True,
    # llama.cpp's converter writes Mistral under that name too.
    gguf="llama",
    as_gguf=AsGguf(),
    as_llama=lambda layers: {},
)
