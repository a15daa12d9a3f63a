"""From a model and a plan to a pruned model of a stock class.

Width is removed by selecting rows and columns of weight matrices. The result computes exactly what
the dense model computes with the removed channels set to zero. Tensors that are not cut are shared
with the dense model, which is never written to.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn

from transact_core.forward.layers import layers_of
from transact_core.forward.waists import head_rows
from transact_core.models.architecture import Architecture
from transact_core.models.families.description import Block
from transact_core.models.families.table import family_of
from transact_core.models.layer_widths import narrow_layers
from transact_core.models.placement import hand_on, layout_of
from transact_core.models.stock_class import StockConfig, StockModel, config_for
from transact_core.pruning.plan import LayerPlan, PruningPlan, kept_groups
from transact_core.pruning.rope import narrowed_rope, require_narrowable


@torch.no_grad()
def prune(model: StockModel, plan: PruningPlan, with_biases: bool = False) -> StockModel:
    """Cuts every layer by the plan; tensors that are not cut are shared with `model`.

    `with_biases` adds the biases that the recovery `bias` writes into. Stock configurations have
    biases on all projections of a module or on none, so the other projections get zeros.

    Raises:
        TransActError: the plan does not fit the model.
    """
    cut = Cut(model, plan, with_biases)
    for layer_index in range(len(plan.layers)):
        cut.make_layer(layer_index)
    return cut.pruned


class Cut:
    """A cut made one layer at a time, so that finished layers can be released.

    `pruned` is the pruned model; its layers have no weights until `make_layer` is called for them.
    """

    @torch.no_grad()
    def __init__(self, model: StockModel, plan: PruningPlan, with_biases: bool = False) -> None:
        self.dense, self.plan = model, plan
        self.architecture = Architecture.from_config(model.config)
        plan.check(self.architecture)
        left = plan.applied_to(self.architecture, with_biases)
        self.left = left
        self.pruned = _empty_like(model, left, plan.slots)
        outer = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not name.startswith("model.layers.")
        }
        self.pruned.load_state_dict(outer, strict=False, assign=True)
        self.pruned.tie_weights()
        self.pruned.eval().requires_grad_(False)

    @torch.no_grad()
    def make_layer(self, layer_index: int) -> None:
        """Gives one layer its weights; tensors that are not cut are shared with the dense model."""
        _fill(self.pruned.model.layers[layer_index], self._tensors(layer_index))

    def drop_layer(self, layer_index: int) -> None:
        """Releases the weights of a finished layer."""
        self.pruned.model.layers[layer_index] = nn.Identity()

    @torch.no_grad()
    def remake_module(self, plan: PruningPlan, layer_index: int, module: str) -> None:
        """Cuts one module ("mha" or "mlp") of one layer again, by a plan of the same widths."""
        self.plan = plan
        name = {"mha": "self_attn", "mlp": "mlp"}[module]
        made = self.pruned.model.layers[layer_index].get_submodule(name)
        _fill(made, _under(self._tensors(layer_index), name + "."))

    def _tensors(self, layer_index: int) -> dict[str, torch.Tensor]:
        plan, layer = self.plan, self.plan.layers[layer_index]
        with layers_of(self.dense).borrow(layer_index) as dense:
            tensors = dict(dense.state_dict(keep_vars=True))
        if plan.cuts_module(layer_index, "mha", self.architecture):
            cut_heads = narrow_attention if plan.head_dim else cut_attention
            parts = _under(tensors, "self_attn.")
            tensors |= _prefixed("self_attn.", cut_heads(parts, layer, self.architecture))
        if plan.cuts_module(layer_index, "mlp", self.architecture):
            parts = _under(tensors, "mlp.")
            tensors |= _prefixed("mlp.", cut_mlp(parts, layer, self.architecture))
        for name, shape in self.left.layer_tensors(layer_index).items():
            if name.endswith(".bias") and name not in tensors:
                weight = tensors[name.removesuffix("bias") + "weight"]
                tensors[name] = nn.Parameter(weight.new_zeros(shape))
        return tensors


def _fill(made: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    made.load_state_dict(tensors, strict=True, assign=True)
    made.requires_grad_(False)


@torch.no_grad()
def cast(model: StockModel, dtype: torch.dtype) -> StockModel:
    """The model with its weights in another dtype; tensors of that dtype already are shared."""
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return _filled(_empty_like(model, Architecture.from_model(model)), tensors)


def _filled(empty: StockModel, tensors: dict[str, torch.Tensor]) -> StockModel:
    empty.load_state_dict(tensors, strict=True, assign=True)
    empty.tie_weights()
    return empty.eval().requires_grad_(False)


def _empty_like(
    model: StockModel, architecture: Architecture, slots: tuple[int, ...] = ()
) -> StockModel:
    """A model of these widths without weights, of the stock class that holds them."""
    config = config_of_cut(model, architecture, slots)
    rotary = model.model.rotary_emb
    if slots:
        rotary = type(rotary)(config).to(rotary.inv_freq.device)
    with torch.device("meta"):
        pruned = family_of(config.model_type).model_class(config)
        if not architecture.uniform:
            narrow_layers(pruned, architecture)
    # Buffers are no part of the state dict, so they come from outside the meta device.
    for name, _ in list(pruned.named_buffers()):
        place, _, own_name = name.rpartition(".")
        pruned.get_submodule(place)._buffers[own_name] = model.get_buffer(name)
    pruned.model.rotary_emb = rotary
    pruned.generation_config = copy.deepcopy(model.generation_config)
    if layout_of(model):
        # Each layer is cut where the dense one lies.
        hand_on(pruned)
    return pruned


def config_of_cut(
    model: StockModel, architecture: Architecture, slots: tuple[int, ...] = ()
) -> StockConfig:
    """The configuration of a cut of `model` that leaves these widths and rotary pairs.

    Raises:
        TransActError: no stock class holds it.
    """
    config = config_for(model.config, architecture)
    if slots:
        require_narrowable(config)
        rotary = model.model.rotary_emb
        frequencies = rotary.inv_freq[list(slots)]
        config.rope_parameters = narrowed_rope(config, frequencies, rotary.attention_scaling)
    return config


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: nn.Parameter(tensor) for name, tensor in tensors.items()}


def cut_attention(
    tensors: dict[str, torch.Tensor], layer: LayerPlan, architecture: Architecture
) -> dict[str, torch.Tensor]:
    """Keeps the rows of Q, K, V and the columns of O that belong to the kept heads."""
    queries = head_rows(layer.kept_heads, architecture.head_dim)
    keys = head_rows(kept_groups(layer.kept_heads, architecture), architecture.head_dim)
    kept: dict[Block, torch.Tensor] = {"queries": queries, "keys": keys, "values": keys}
    cut = _select_rows(tensors, architecture.family.attention_inputs, kept, architecture)
    return {**cut, "o_proj.weight": _select_columns(tensors["o_proj.weight"], queries)}


def narrow_attention(
    tensors: dict[str, torch.Tensor], layer: LayerPlan, architecture: Architecture
) -> dict[str, torch.Tensor]:
    """Keeps, in every head, the rotary pairs of Q and K in their slots and the dims of V and O.

    Most families' attention divides scores by sqrt(head_dim), so queries are scaled by
    sqrt(narrow head_dim / dense head_dim) to keep the scores' scale.
    """
    queries_per_group = architecture.queries_per_group
    pairs = torch.tensor(layer.slot_pairs)
    rotated = torch.cat([pairs, pairs + architecture.head_dim // 2], dim=1)
    values = torch.tensor(layer.value_dims)
    family = architecture.family

    def rows(dims: torch.Tensor, repeats: int = 1) -> torch.Tensor:
        """Row indices of these dims in every head; `dims` has a row for each key-value head."""
        dims = dims.repeat_interleave(repeats, dim=0)
        starts = torch.arange(len(dims))[:, None] * architecture.head_dim
        return (starts + dims).flatten()

    kept: dict[Block, torch.Tensor] = {
        "queries": rows(rotated, queries_per_group),
        "keys": rows(rotated),
        "values": rows(values),
    }
    cut = _select_rows(tensors, family.attention_inputs, kept, architecture)
    if family.attention_multiplier is None:
        scale = math.sqrt(rotated.shape[1] / architecture.head_dim)
        queries = {
            name: tensor * scale for name, tensor in cut.items() if name.startswith("q_proj")
        }
        cut |= queries
    columns = rows(values, queries_per_group)
    return {**cut, "o_proj.weight": _select_columns(tensors["o_proj.weight"], columns)}


def cut_mlp(
    tensors: dict[str, torch.Tensor], layer: LayerPlan, architecture: Architecture
) -> dict[str, torch.Tensor]:
    """Keeps the rows of gate and up and the columns of down that belong to the kept channels."""
    kept = torch.tensor(layer.kept_channels)
    cut = _select_rows(tensors, architecture.family.mlp_inputs, {"channels": kept}, architecture)
    return {**cut, "down_proj.weight": _select_columns(tensors["down_proj.weight"], kept)}


def _select_rows(
    tensors: dict[str, torch.Tensor],
    projections: Mapping[str, tuple[Block, ...]],
    kept: Mapping[Block, torch.Tensor],
    dense: Architecture,
) -> dict[str, torch.Tensor]:
    """The kept rows of projections, and of their biases; `kept` counts in each block from 0."""
    sizes, cut = dense.block_rows(0), {}
    for projection, blocks in projections.items():
        start, rows = 0, []
        for block in blocks:
            rows.append(kept[block] + start)
            start += sizes[block]
        chosen = torch.cat(rows).to(tensors[f"{projection}.weight"].device)
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name in tensors:
                cut[name] = tensors[name][chosen]
    return cut


def _select_columns(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return matrix[:, kept.to(matrix.device)]


@torch.no_grad()
def round_weights(model: StockModel, dtype: torch.dtype) -> None:
    """Rounds the weights to values that `dtype` can hold; their own dtype stays as it is.

    Perplexity is measured on the weights as saved. Parameters that change are replaced and never
    written to, since they may be shared with the dense model.
    """
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            rounded = weight.to(dtype).to(weight.dtype)
            if not torch.equal(rounded, weight):
                setattr(module, name, nn.Parameter(rounded, requires_grad=False))
    model.tie_weights()
