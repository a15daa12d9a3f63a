"""Other libraries' width pruning of a LLaMA model, each run as its own documentation says.

Every baseline prunes to exactly the widths that the engine takes at the same ratio, and gets the
same calibration windows if it uses any. Where a library refuses a cut or makes another one,
`BaselineFailed` is raised with a reason that the table shows.

- `optipfair` 0.4.2 prunes the neurons of gated MLPs: `prune_model(pruning_type="MLP_GLU")`, by
  weights only (MAW, its default) or, given a `dataloader`, by weights and activations. It has no
  attention pruning. It removes whole layers, which also takes their KV cache: `DEPTH`, the last
  layers (its default) or those that `analyze_layer_importance` finds least important.
- `torch-pruning` 1.5.2 follows its `examples/LLMs`: `MetaPruner` with `num_heads`, whole heads and
  not their dims, by group magnitude or, with gradients of the calibration text, by first-order
  Taylor terms. Three things differ from the example. The layers that write to the residual stream
  are ignored, as only width inside the modules is compared here. The graph is traced through
  `output_transform`, because today's transformers also return a cache, and with eager attention,
  because it cannot follow grouped queries through torch's own. 1.5.2 is the last version whose
  graph of a LLaMA attention is finite; 1.5.3 to 1.6.1 loop for ever on it (issue 527 there).
  Under grouped-query attention it removes query heads and keeps all key-value heads, and where one
  query head would be left in each group it cuts nothing without a warning; both are reported here.

Packages on PyPI that were examined and left out: `nvidia-modelopt` (its width pruning of language
models is for Megatron models only), `fmchisel` (OSSCAR; wants torch below 2.8, transformers 4 and
numpy 1), `torch-kirigami` (cannot capture a `LlamaForCausalLM` of transformers 5), `tinyedgellm`
(GPT-2 attention only, pulls onnxruntime and bitsandbytes), `llmcompressor` and `sparseml` (zeros in
place, no narrower matrices), `textpruner` (BERT-like encoders). LLM-Pruner, FLAP and SliceGPT are
not published there; packages of these names are something else.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from transact_core.data.windows import Windows
from transact_core.models.architecture import Architecture
from transact_core.pruning.plan import Widths

if TYPE_CHECKING:
    from benchmarks.cuts import Cut

BATCH_WINDOWS = 4
"""Windows in a batch of the libraries that take a `dataloader`."""
TRACED_TEXT = "Hello world."
"""The input with which Torch-Pruning's example traces the model."""


class BaselineFailed(Exception):
    """The library cannot make the cut; the reason, without a full stop, for the table."""


Make = Callable[[LlamaForCausalLM, PreTrainedTokenizerBase, Windows, Widths], LlamaForCausalLM]


@dataclass(frozen=True)
class Baseline:
    """A pruning method of a library, and the cuts that its documentation covers."""

    make: Make
    offers: Callable[["Cut"], bool]

    def __call__(
        self,
        dense: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Windows,
        target: Widths,
    ) -> LlamaForCausalLM:
        """A pruned model with the widths of `target`; the dense model is not changed.

        `make` alone changes the model in place, as these libraries do.

        Raises:
            BaselineFailed: the library refused, or left other widths than it was asked for.
            ImportError: the library is not installed.
        """
        return self.make(copy.deepcopy(dense), tokenizer, calibration, target)


# --- optipfair -------------------------------------------------------------------------------


def optipfair_neurons(data_driven: bool) -> Make:
    """Prunes GLU neurons by MAW, or by MAW times activation norms."""

    def make(
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Windows,
        target: Widths,
    ) -> LlamaForCausalLM:
        optipfair = _optipfair()
        width = model.config.intermediate_size
        model = optipfair.prune_model(
            model,
            pruning_type="MLP_GLU",
            neuron_selection_method="MAW",
            # It rounds the number of removed neurons down.
            pruning_percentage=100 * (width - target.intermediate_size + 0.5) / width,
            dataloader=_batches(calibration) if data_driven else None,
            show_progress=False,
        )
        return _checked(model, target)

    return make


def optipfair_layers(data_driven: bool) -> Make:
    """Removes the share of whole layers that leaves the KV cache of `target`."""

    def make(
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Windows,
        target: Widths,
    ) -> LlamaForCausalLM:
        optipfair = _optipfair()
        groups, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
        kept = round(layers * target.num_key_value_heads / groups)
        if data_driven:
            scores = optipfair.analyze_layer_importance(
                model, _batches(calibration), show_progress=False
            )
            least = sorted(scores, key=scores.get)[: layers - kept]
            chosen = {"layer_indices": least}
        else:
            chosen = {"num_layers_to_remove": layers - kept}
        model = optipfair.prune_model(model, pruning_type="DEPTH", show_progress=False, **chosen)
        if len(model.model.layers) != kept:
            raise BaselineFailed(f"it left {len(model.model.layers)} layers instead of {kept}")
        return model

    return make


def _optipfair():
    import optipfair

    # Importing it sets up logging for the whole process.
    logging.getLogger("optipfair").setLevel(logging.WARNING)
    return optipfair


def _batches(calibration: Windows) -> DataLoader:
    items = [
        {"input_ids": window, "attention_mask": torch.ones_like(window)}
        for window in calibration.ids
    ]
    return DataLoader(items, batch_size=BATCH_WINDOWS)


# --- Torch-Pruning ---------------------------------------------------------------------------


def torch_pruning(taylor: bool) -> Make:
    """Prunes query heads and MLP channels through the dependency graph."""

    def make(
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Windows,
        target: Widths,
    ) -> LlamaForCausalLM:
        import torch_pruning as tp

        importance = (
            tp.importance.GroupTaylorImportance()
            if taylor
            else tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
        )
        dense = Architecture.from_config(model.config)
        if dense.queries_per_group > 1 and target.num_key_value_heads < dense.num_key_value_heads:
            raise BaselineFailed("it leaves key-value heads alone under grouped queries")
        attention = model.config._attn_implementation
        model.requires_grad_(True)
        model.set_attn_implementation("eager")
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=tokenizer(TRACED_TEXT, return_tensors="pt")["input_ids"].to(
                model.device
            ),
            output_transform=lambda output: output.logits,
            importance=importance,
            global_pruning=False,
            prune_num_heads=True,
            prune_head_dims=False,
            num_heads=_head_counts(model, dense),
            **_ratios(model, dense, target),
        )
        model.set_attn_implementation(attention)
        if taylor:
            _backward(model, calibration)
        for group in pruner.step(interactive=True):
            group.prune()
        model.zero_grad()
        _write_config(model)
        return _checked(model.requires_grad_(False), target)

    return make


def _head_counts(model: LlamaForCausalLM, dense: Architecture) -> dict[torch.nn.Module, int]:
    counts = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        counts[attention.q_proj] = dense.num_attention_heads
        counts[attention.k_proj] = counts[attention.v_proj] = dense.num_key_value_heads
    return counts


def _ratios(model: LlamaForCausalLM, dense: Architecture, target: Widths) -> dict[str, object]:
    """The pruner's ratios for `target`, and the layers that it must not change."""
    ignored = [model.lm_head, model.model.embed_tokens]
    for layer in model.model.layers:
        ignored += [layer.self_attn.o_proj, layer.mlp.down_proj]
        if target.intermediate_size == dense.intermediate_size:
            ignored += [layer.mlp.gate_proj, layer.mlp.up_proj]
    heads = dense.num_attention_heads
    # Heads to remove are rounded up and channels to keep down, so half a unit makes both exact.
    head_ratio = max(0.0, (heads - target.num_attention_heads - 0.5) / heads)
    channel_ratio = 1 - (target.intermediate_size + 0.5) / dense.intermediate_size
    return {
        "ignored_layers": ignored,
        "head_pruning_ratio": head_ratio,
        # Without a ratio of channels it looks at no group at all, heads included.
        "pruning_ratio": channel_ratio if channel_ratio > 0 else head_ratio,
    }


def _backward(model: LlamaForCausalLM, calibration: Windows) -> None:
    for window in calibration.ids.to(model.device):
        model(window[None], labels=window[None], use_cache=False).loss.backward()


def _write_config(model: LlamaForCausalLM) -> None:
    config, first = model.config, model.model.layers[0]
    config.intermediate_size = first.mlp.gate_proj.out_features
    config.num_attention_heads = first.self_attn.q_proj.out_features // config.head_dim
    config.num_key_value_heads = first.self_attn.k_proj.out_features // config.head_dim
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = (
            config.num_attention_heads // config.num_key_value_heads
        )


# --- shared ----------------------------------------------------------------------------------


def _checked(model: LlamaForCausalLM, target: Widths) -> LlamaForCausalLM:
    head_dim = model.config.head_dim
    wanted = (
        target.num_attention_heads * head_dim,
        target.num_key_value_heads * head_dim,
        target.intermediate_size,
    )
    for layer_index, layer in enumerate(model.model.layers):
        left = (
            layer.self_attn.q_proj.out_features,
            layer.self_attn.k_proj.out_features,
            layer.mlp.gate_proj.out_features,
        )
        if left != wanted:
            raise BaselineFailed(
                f"it left widths {left} of queries, keys and MLP in layer {layer_index} "
                f"where {wanted} were asked for"
            )
    return model.eval()


def _only_mlp(cut: "Cut") -> bool:
    return not cut.mha_ratio


def _only_kv_cache(cut: "Cut") -> bool:
    return cut.narrows_kv_cache


def _all(cut: "Cut") -> bool:
    return True


BASELINES = {
    "optipfair: MAW": Baseline(optipfair_neurons(False), _only_mlp),
    "optipfair: MAW with data": Baseline(optipfair_neurons(True), _only_mlp),
    "optipfair: last layers": Baseline(optipfair_layers(False), _only_kv_cache),
    "optipfair: least layers with data": Baseline(optipfair_layers(True), _only_kv_cache),
    "Torch-Pruning: magnitude": Baseline(torch_pruning(False), _all),
    "Torch-Pruning: Taylor": Baseline(torch_pruning(True), _all),
}
