"""What cannot be pruned, said by name: models of other families and of other kinds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transact_core.base.errors import TransActError
from transact_core.models.families.table import FAMILIES
from transact_core.models.layer_widths import BLOCK_CLASS, FIELD, MODELING_CLASS

EXPERT_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_num_experts",
    "ffn_config",
)
"""Fields by which the configurations of mixtures of experts are known."""
ENCODER_FIELDS = (
    "vision_config",
    "audio_config",
    "audio_encoder_config",
    "speech_config",
    "text_config",
    "vision_tower",
)
"""Fields by which those of models are known that read more than text."""
RECURRENT_FIELDS = (
    "chunkwise_kernel",
    "conv_L_cache",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_conv_kernel_dim",
    "lru_width",
    "mamba_d_conv",
    "mamba_d_state",
    "mamba_num_heads",
    "rescale_every",
    "ssm_cfg",
    "state_size",
    "time_mix_extra_dim",
)
"""Fields by which those of models are known that have recurrent layers, alone or among others."""
WHY_NOT = dict.fromkeys(
    ("olmo2", "olmo3"),
    "normalises the queries and keys of all heads together, so that no head can be removed without "
    "a change to the others",
)
"""What stands in the way of dense models of attention and MLP that people try, by `model_type`."""


def known_families() -> str:
    """The families that can be pruned, as a list in words."""
    *others, last = [family.title for family in FAMILIES.values()]
    return f"{', '.join(others)} and {last}"


def kind_of(raw: Mapping[str, Any]) -> str | None:
    """What kind of model a `config.json` describes, where it is no dense decoder of attention and
    MLP; words that follow "is". Judged by its fields, so that new names need no new words."""
    if any(raw.get(name) for name in ENCODER_FIELDS):
        return "a multimodal model"
    if raw.get("is_encoder_decoder") is True:
        return "a model of an encoder and a decoder"
    kinds = raw.get("layer_types")
    others = isinstance(kinds, list) and not all(map(_is_attention, kinds))
    if others or any(raw.get(name) for name in RECURRENT_FIELDS):
        return "a hybrid of attention with other layers, or has no attention at all"
    if any(raw.get(name) for name in EXPERT_FIELDS) and raw.get("is_moe") is not False:
        return "a mixture of experts"
    return None


def _is_attention(kind: object) -> bool:
    """Whether an entry of `layer_types` is a layer whose tokens attend to one another."""
    return isinstance(kind, str) and kind.endswith("attention") and "linear" not in kind


def require_known_family(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuses a `config.json` that is not that of a causal language model of a known family.

    Raises:
        TransActError: it names another class or `model_type`; the sentence says what kind of model
            it is, and what can be pruned.
    """
    named = raw.get("architectures")
    named = named[0] if isinstance(named, list) and named else named
    kind = raw.get("model_type", "llama")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    with_widths = FIELD in raw and named in (MODELING_CLASS, BLOCK_CLASS)
    if family and (not named or named == family.class_name or with_widths):
        return
    if not named or named == "LlamaForCausalLM":
        named = f"model of the type {kind}"
    named = " ".join(str(named).split())
    what = kind_of(raw)
    why = f"is {what}" if what else WHY_NOT.get(kind) if isinstance(kind, str) else None
    article = "an" if named[0] in "AEIO" else "a"
    raise TransActError(
        f"{folder} holds {article} {named}{f', which {why}' if why else ''}; only dense causal "
        f"language models of the families {known_families()} can be pruned here."
    )
