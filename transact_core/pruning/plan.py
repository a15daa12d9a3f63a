"""From scores and two ratios to a plan: which units each layer keeps.

A plan is pure data. Sliders write it, charts read it, surgery executes it, and export saves it.
Nothing else decides what is cut.

A ratio is met as nearly as whole units (heads, key-value groups, pairs of dims, channels) and the
requested multiples allow. The number of heads need not divide `hidden_size`: `models.stock_class`
has a class for those that do not.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field

from transact_core.base.errors import TransActError
from transact_core.importance.rotary_pairs import PairEffects
from transact_core.importance.scores import Scores
from transact_core.models.architecture import Architecture, LayerWidths

Granularity = Literal["query-heads", "kv-groups", "head-dims"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
WidthsName = Literal["uniform", "allocated", "traded", "by-hand"]
"""How widths are given to layers: the same ones to all; to each its own, as many heads and channels
in all as a uniform cut keeps; as many parameters in all, heads traded against channels; or those
that are named for each layer."""
WIDTHS: tuple[WidthsName, ...] = get_args(WidthsName)
ByHand = tuple[tuple[int, int], ...]
"""The query heads and the channels that each layer keeps."""
RATIO_DIGITS = 4
"""Decimals of a ratio that is worked out from widths."""
Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0)]


class Data(BaseModel):
    """Frozen data that refuses unknown fields by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Widths:
    """The widths that the ratios lead to, the same in every layer."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int | None = None
    """None is the dense model's."""

    def applied_to(self, architecture: Architecture, with_biases: bool = False) -> Architecture:
        """What the cut leaves; `with_biases` as `surgery.prune` takes it."""
        cut = replace(
            architecture,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            head_dim=self.head_dim or architecture.head_dim,
        )
        if not with_biases:
            return cut
        return replace(
            cut,
            attention_bias=cut.attention_bias or cut.mha_width < architecture.mha_width,
            mlp_bias=cut.mlp_bias or cut.intermediate_size < architecture.intermediate_size,
        )


class LayerPlan(Data):
    """Ascending indices of what one layer keeps; for narrower heads also which dims of them."""

    kept_heads: tuple[Index, ...]
    kept_channels: tuple[Index, ...]
    slot_pairs: tuple[tuple[Index, ...], ...] = ()
    """For each key-value head the rotary pair of queries and keys that goes into each slot."""
    value_dims: tuple[tuple[Index, ...], ...] = ()
    """For each key-value head the dims of its values that stay, ascending."""


class PruningPlan(Data):
    mha_ratio: Ratio
    mlp_ratio: Ratio
    granularity: Granularity
    importance: str
    multiple_of: Annotated[int, Field(ge=1)] = 1
    """Of the MLP's width."""
    head_dim_multiple_of: Annotated[int, Field(ge=1)] = 1
    """Of the dims of narrower heads."""
    num_attention_heads: Annotated[int, Field(ge=1)] | None
    """Of every layer, like the two widths below; None where layers differ."""
    num_key_value_heads: Annotated[int, Field(ge=1)] | None
    intermediate_size: Annotated[int, Field(ge=1)] | None
    head_dim: Annotated[int, Field(ge=2)] | None = None
    """None is the dense model's."""
    slots: tuple[Index, ...] = ()
    """The rotary pairs whose frequencies narrower heads share, ascending."""
    layers: tuple[LayerPlan, ...]

    @property
    def uniform(self) -> bool:
        """Whether every layer is left with the same widths."""
        return None not in (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.intermediate_size,
        )

    @property
    def widths(self) -> Widths:
        """The widths of every layer.

        Raises:
            ValueError: layers differ, so that there are no such widths; see `layer_widths`.
        """
        if not self.uniform:
            raise ValueError("the layers of this plan have different widths")
        return Widths(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.intermediate_size,
            self.head_dim,
        )

    def layer_widths(self, architecture: Architecture) -> tuple[LayerWidths, ...]:
        """What each layer is left with; `architecture` is the dense model's."""
        return tuple(
            LayerWidths(
                num_attention_heads=len(layer.kept_heads),
                num_key_value_heads=len(kept_groups(layer.kept_heads, architecture)),
                intermediate_size=len(layer.kept_channels),
            )
            for layer in self.layers
        )

    def cuts_module(self, layer_index: int, module: str, architecture: Architecture) -> bool:
        """Whether one layer's "mha" or "mlp" loses width."""
        layer = self.layers[layer_index]
        if module == "mlp":
            return len(layer.kept_channels) < architecture.intermediate_size
        narrower = self.head_dim is not None and self.head_dim < architecture.head_dim
        return narrower or len(layer.kept_heads) < architecture.num_attention_heads

    def cuts_mha(self, architecture: Architecture) -> bool:
        return self._cuts("mha", architecture)

    def cuts_mlp(self, architecture: Architecture) -> bool:
        return self._cuts("mlp", architecture)

    def _cuts(self, module: str, architecture: Architecture) -> bool:
        layers = range(len(self.layers))
        return any(self.cuts_module(layer_index, module, architecture) for layer_index in layers)

    def cuts_anything(self, architecture: Architecture) -> bool:
        return self.cuts_mha(architecture) or self.cuts_mlp(architecture)

    def applied_to(self, architecture: Architecture, with_biases: bool = False) -> Architecture:
        """What the cut leaves; `with_biases` as `surgery.prune` takes it."""
        left = replace(architecture, head_dim=self.head_dim or architecture.head_dim)
        left = left.with_layers(self.layer_widths(architecture))
        if not with_biases:
            return left
        return replace(
            left,
            attention_bias=left.attention_bias or self.cuts_mha(architecture),
            mlp_bias=left.mlp_bias or self.cuts_mlp(architecture),
        )

    def check(self, architecture: Architecture) -> None:
        """Refuses a plan that this architecture cannot be cut by.

        Where layers differ, how ratios became widths is not repeated here: the plan's indices
        say what each layer keeps.

        Raises:
            TransActError: layers, heads or channels that do not exist, widths that contradict the
                indices or the ratios, or groups left with different numbers of queries.
        """
        if self.uniform:
            self._check_ratios(architecture)
        if len(self.layers) != architecture.num_hidden_layers:
            raise TransActError(
                f"The plan has {len(self.layers)} layers and the model has "
                f"{architecture.num_hidden_layers}."
            )
        if self.head_dim:
            _check_indices("slots", self.slots, self.head_dim // 2, architecture.head_dim // 2)
        for layer_index, layer in enumerate(self.layers):
            self._check_dims(layer_index, layer, architecture)
            _check_indices(
                f"kept_heads of layer {layer_index}",
                layer.kept_heads,
                self.num_attention_heads,
                architecture.num_attention_heads,
            )
            _check_indices(
                f"kept_channels of layer {layer_index}",
                layer.kept_channels,
                self.intermediate_size,
                architecture.intermediate_size,
            )
            self._check_groups(layer_index, layer, architecture)

    def _check_ratios(self, architecture: Architecture) -> None:
        asked = (
            self.mha_ratio,
            self.mlp_ratio,
            self.granularity,
            self.multiple_of,
            self.head_dim_multiple_of,
        )
        expected = widths(architecture, *asked)
        # Plans of schema 1 took only numbers of heads that divide hidden_size.
        if self.widths not in (expected, widths(architecture, *asked, dividing_hidden_size=True)):
            raise TransActError(
                f"The plan's widths {self.widths} contradict its ratios, which make {expected}."
            )

    def _check_groups(self, layer_index: int, layer: LayerPlan, architecture: Architecture) -> None:
        groups = kept_groups(layer.kept_heads, architecture)
        queries = {
            sum(head // architecture.queries_per_group == group for head in layer.kept_heads)
            for group in groups
        }
        wanted = self.num_key_value_heads
        if len(queries) != 1 or (wanted is not None and len(groups) != wanted):
            needed = "groups" if wanted is None else f"{wanted} groups"
            raise TransActError(
                f"The kept_heads of layer {layer_index} leave {len(groups)} key-value groups of "
                f"{sorted(queries)} queries, where every layer needs {needed} of one size."
            )

    def _check_dims(self, layer_index: int, layer: LayerPlan, architecture: Architecture) -> None:
        groups = architecture.num_key_value_heads if self.head_dim else 0
        pairs, width = (self.head_dim or 0) // 2, self.head_dim or 0
        for name, rows in (("slot_pairs", layer.slot_pairs), ("value_dims", layer.value_dims)):
            if len(rows) != groups:
                raise TransActError(
                    f"The {name} of layer {layer_index} are for {len(rows)} key-value heads, "
                    f"where {groups} are narrowed."
                )
        for row in layer.slot_pairs:
            _check_indices(
                f"slot_pairs of layer {layer_index}",
                tuple(sorted(row)),
                pairs,
                architecture.head_dim // 2,
            )
        for row in layer.value_dims:
            _check_indices(f"value_dims of layer {layer_index}", row, width, architecture.head_dim)


def _check_indices(what: str, kept: tuple[int, ...], width: int | None, dense_width: int) -> None:
    """Refuses indices that do not exist, or are not as many as `width`, None being any number."""
    if any(after <= before for before, after in pairwise(kept)):
        raise TransActError(f"The {what} are not in ascending order without repeats.")
    if kept and kept[-1] >= dense_width:
        raise TransActError(
            f"The {what} go up to {kept[-1]}, out of range: the model's last is {dense_width - 1}."
        )
    if not kept:
        raise TransActError(f"The {what} are none, where a layer keeps one at least.")
    if width is not None and len(kept) != width:
        raise TransActError(f"The {what} are {len(kept)}, where the plan's width is {width}.")


def kept_groups(kept_heads: tuple[int, ...], architecture: Architecture) -> tuple[int, ...]:
    """Key-value heads that the kept query heads read, ascending."""
    return tuple(sorted({head // architecture.queries_per_group for head in kept_heads}))


class Step(Data):
    """The pruned model of one intermediate step: its widths, and its perplexity after recovery."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    perplexity: float
    """Behind the training where there was one."""
    before_training: float | None = None
    """Perplexity after recovery, where it was trained then."""
    trained_tokens: int = 0

    @classmethod
    def of(
        cls,
        cut: Architecture,
        perplexity: float,
        before_training: float | None = None,
        trained_tokens: int = 0,
    ) -> "Step":
        """The step that left a model of these widths."""
        return cls(
            num_attention_heads=cut.num_attention_heads,
            num_key_value_heads=cut.num_key_value_heads,
            head_dim=cut.head_dim,
            intermediate_size=cut.intermediate_size,
            perplexity=perplexity,
            before_training=before_training,
            trained_tokens=trained_tokens,
        )


@dataclass(frozen=True)
class Decision:
    """A plan, and what was tried before it was chosen."""

    plan: PruningPlan
    granularity_losses: dict[Granularity, float] = field(default_factory=dict)
    """Mean NLL in nats on held-out calibration windows of each granularity that `auto` tried."""
    steps: int = 1
    """As requested; steps that would have cut nothing are not among the earlier steps."""
    earlier_steps: tuple[Step, ...] = ()
    sequential: bool = False
    """Whether each module's units were chosen on the residual stream of the model pruned so far."""
    widths: WidthsName = "uniform"
    """As requested; the plan says what each layer keeps."""
    keep_layers: tuple[int, ...] = ()
    """Layers that were to stay whole, as requested."""
    trial_divergences: tuple[float, ...] = ()
    """Divergence from the dense model, in nats a token, of each trial cut on held-out windows,
    where widths were allocated."""
    allocation_seconds: float | None = None
    """How long choosing the widths took; None where that was not done."""

    @property
    def by_hand(self) -> ByHand:
        """The widths that were named for each layer; empty where none were."""
        if self.widths != "by-hand":
            return ()
        return tuple(
            (len(layer.kept_heads), len(layer.kept_channels)) for layer in self.plan.layers
        )

    @property
    def how_allocated(self) -> str | None:
        """One sentence on the choice of the layers' widths; None where none was made."""
        if not self.trial_divergences:
            return None
        tried = ", ".join(f"{divergence:.3f}" for divergence in self.trial_divergences)
        return (
            f"The widths were {self.widths} in {self.allocation_seconds:.0f} seconds, the cut and "
            f"its repair not counted (divergence of the trial cuts on held-out windows, in nats a "
            f"token: {tried})."
        )

    @property
    def why(self) -> str | None:
        """One sentence on which granularity `auto` chose and why; None where it did not choose."""
        if not self.granularity_losses:
            return None
        losses = sorted(self.granularity_losses.items(), key=lambda item: item[1])
        tried = ", ".join(f"{name} {loss:.3f}" for name, loss in losses)
        return (
            f"auto takes {self.plan.granularity}: the lowest loss on held-out calibration windows "
            f"(nats a token: {tried})."
        )


def parse_ratio(text: str | float, name: str) -> float:
    """A ratio in [0, 1): the fraction of the width that is removed.

    Raises:
        TransActError: not a number, or outside that range.
    """
    try:
        ratio = float(text)
    except ValueError:
        raise TransActError(f"The {name} {text!r} is not a number.") from None
    if not (math.isfinite(ratio) and 0 <= ratio < 1):
        raise TransActError(
            f"The {name} {text} is outside [0, 1): 0 removes nothing, 0.5 removes half."
        )
    return ratio


def head_counts(
    architecture: Architecture, granularity: Granularity, dividing_hidden_size: bool = False
) -> list[int]:
    """Numbers of query heads that can be kept, ascending; the last is the dense model's.

    `query-heads` keeps all groups and the same number of queries in each; `kv-groups` keeps whole
    groups. Without grouping the two are the same. Those that no class can hold are left out; with
    `dividing_hidden_size` all that `LlamaConfig` refuses, as they were in schema 1.
    """
    groups, queries = architecture.num_key_value_heads, architecture.queries_per_group
    if granularity == "query-heads" and queries > 1:
        counts = [groups * kept for kept in range(1, queries + 1)]
    else:
        counts = [kept * queries for kept in range(1, groups + 1)]
    hidden_size, family = architecture.hidden_size, architecture.family
    return [
        count
        for count in counts
        if count == architecture.num_attention_heads
        or (family.allows_heads(count, hidden_size) and not dividing_hidden_size)
        or hidden_size % count == 0
    ]


def widths(
    architecture: Architecture,
    mha_ratio: float,
    mlp_ratio: float,
    granularity: Granularity,
    multiple_of: int = 1,
    head_dim_multiple_of: int = 1,
    dividing_hidden_size: bool = False,
) -> Widths:
    """The widths nearest to what the ratios ask for, the wider one on a tie.

    `multiple_of` is that of the MLP's width, `head_dim_multiple_of` that of narrower heads' dims;
    `dividing_hidden_size` as `head_counts` takes it.
    """
    heads = architecture.num_attention_heads
    groups = architecture.num_key_value_heads
    head_dim = None
    if granularity == "head-dims":
        allowed = head_dims(architecture, head_dim_multiple_of)
        nearest = _nearest(architecture.head_dim, mha_ratio, allowed) if mha_ratio else None
        head_dim = nearest if nearest != architecture.head_dim else None
    elif mha_ratio:
        counts = head_counts(architecture, granularity, dividing_hidden_size)
        heads = _nearest(heads, mha_ratio, counts)
        groups = _groups_of(architecture, granularity, heads)
    channels = architecture.intermediate_size
    if mlp_ratio:
        channels = _nearest(channels, mlp_ratio, channel_counts(architecture, multiple_of))
    return Widths(heads, groups, channels, head_dim)


def _groups_of(architecture: Architecture, granularity: Granularity, heads: int) -> int:
    """The key-value heads that stay where so many query heads do."""
    if granularity == "kv-groups" or architecture.queries_per_group == 1:
        return heads // architecture.queries_per_group
    return architecture.num_key_value_heads


def widths_of_layer(
    architecture: Architecture, granularity: Granularity, heads: int, channels: int
) -> LayerWidths:
    """What one layer is left with where it keeps so many query heads and channels."""
    return LayerWidths(heads, _groups_of(architecture, granularity, heads), channels)


def removed_by_hand(by_hand: ByHand, architecture: Architecture) -> tuple[float, float]:
    """The ratios that widths by hand amount to: the shares of all heads and of all channels that
    they remove, rounded to `RATIO_DIGITS`."""
    heads, channels = (sum(kept) for kept in zip(*by_hand, strict=True))
    layers = len(by_hand)
    return (
        round(1 - heads / (layers * architecture.num_attention_heads), RATIO_DIGITS),
        round(1 - channels / (layers * architecture.intermediate_size), RATIO_DIGITS),
    )


def head_dims(architecture: Architecture, multiple_of: int = 1) -> Sequence[int]:
    """The dims that narrower heads can have, ascending: even multiples of `multiple_of`.

    Where there is none up to the dense model's, that is the only one.
    """
    step = math.lcm(2, multiple_of)
    return range(step, architecture.head_dim + 1, step) or [architecture.head_dim]


def channel_counts(architecture: Architecture, multiple_of: int = 1) -> Sequence[int]:
    """The widths that a cut MLP can have, ascending: multiples of `multiple_of`.

    Where there is none up to the dense model's, that is the only one.
    """
    dense = architecture.intermediate_size
    return range(multiple_of, dense + 1, multiple_of) or [dense]


def layer_channel_counts(architecture: Architecture, multiple_of: int = 1) -> Sequence[int]:
    """The channels that a layer with a width of its own can keep, ascending: those of
    `channel_counts`, and all of them."""
    dense, counts = architecture.intermediate_size, channel_counts(architecture, multiple_of)
    return counts if counts[-1] == dense else [*counts, dense]


def nearest_width(allowed: Sequence[int], wanted: int | Fraction) -> int:
    """The nearest of ascending widths, the larger one on a tie."""
    above = bisect_left(allowed, wanted)
    around = allowed[max(0, above - 1) : above + 1]
    return min(around, key=lambda width: (abs(width - wanted), -width))


def _nearest(dense: int, ratio: float, allowed: Sequence[int]) -> int:
    """The width nearest to what a ratio leaves."""
    # The decimal the user wrote, not its binary neighbour, decides a tie.
    return nearest_width(allowed, dense * (1 - Fraction(str(ratio))))


def make_plan(
    architecture: Architecture,
    scores: Scores,
    importance: str,
    mha_ratio: float,
    mlp_ratio: float,
    granularity: Granularity = "query-heads",
    multiple_of: int = 1,
    pairs: PairEffects | None = None,
    head_dim_multiple_of: int = 1,
) -> PruningPlan:
    """Keeps the best-scored units: all layers get the same widths, each has its own indices.

    `pairs` is needed where `head-dims` makes the heads narrower: queries and keys keep the rotary
    pairs of most effect on attention, whatever the importance, and values their best-scored dims.
    Of equal scores the unit with the lower index is kept.
    """
    target = widths(
        architecture, mha_ratio, mlp_ratio, granularity, multiple_of, head_dim_multiple_of
    )
    heads = kept_heads(scores.heads, target, architecture)
    channels = best_first(scores.channels)[:, : target.intermediate_size].sort(dim=1).values
    slots: tuple[int, ...] = ()
    dims = [{} for _ in range(architecture.num_hidden_layers)]
    if target.head_dim:
        slots = pairs.slots(target.head_dim // 2)
        ordered = best_first(value_dim_scores(scores, architecture))
        values = ordered[..., : target.head_dim].sort(dim=2).values
        dims = [
            {"slot_pairs": layer_pairs, "value_dims": layer_values}
            for layer_pairs, layer_values in zip(
                pairs.assign(slots).tolist(), values.tolist(), strict=True
            )
        ]
    return PruningPlan(
        mha_ratio=mha_ratio,
        mlp_ratio=mlp_ratio,
        granularity=granularity,
        importance=importance,
        multiple_of=multiple_of,
        head_dim_multiple_of=head_dim_multiple_of,
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        intermediate_size=target.intermediate_size,
        head_dim=target.head_dim,
        slots=slots,
        layers=tuple(
            LayerPlan(
                kept_heads=layer_heads.nonzero().flatten().tolist(),
                kept_channels=layer_channels.tolist(),
                **layer_dims,
            )
            for layer_heads, layer_channels, layer_dims in zip(heads, channels, dims, strict=True)
        ),
    )


def plan_of_layers(
    uniform: PruningPlan,
    scores: Scores,
    layers: Sequence[LayerWidths],
    architecture: Architecture,
) -> PruningPlan:
    """The best-scored units where each layer has the widths given for it.

    `uniform` is the plan of the same ratios and choices with the same widths in every layer; it is
    given back where `layers` have just these.
    """
    if tuple(layers) == uniform.layer_widths(architecture):
        return uniform
    order = best_first(scores.channels)
    kept = []
    for layer_index, widths in enumerate(layers):
        heads = kept_heads(scores.heads[layer_index : layer_index + 1], widths, architecture)[0]
        channels = order[layer_index, : widths.intermediate_size].sort().values
        kept.append(
            LayerPlan(
                kept_heads=heads.nonzero().flatten().tolist(), kept_channels=channels.tolist()
            )
        )
    return uniform.model_copy(
        update={
            "layers": tuple(kept),
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "intermediate_size": None,
        }
    )


def kept_heads(
    scores: torch.Tensor, target: Widths | LayerWidths, architecture: Architecture
) -> torch.Tensor:
    """Which heads stay, shape (layers, num_attention_heads), bool."""
    grouped = scores.unflatten(1, (architecture.num_key_value_heads, -1))
    if target.num_key_value_heads == architecture.num_key_value_heads:
        queries = target.num_attention_heads // target.num_key_value_heads
        kept = torch.zeros_like(grouped, dtype=torch.bool)
        kept.scatter_(2, best_first(grouped)[..., :queries], True)
    else:
        groups = best_first(grouped.mean(dim=2))[..., : target.num_key_value_heads]
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, groups, True)
        kept = kept.unsqueeze(2).expand_as(grouped)
    return kept.flatten(1)


def value_dim_scores(scores: Scores, architecture: Architecture) -> torch.Tensor:
    """Of each key-value head's dims, shape (layers, num_key_value_heads, head_dim)."""
    groups = (architecture.num_key_value_heads, -1, architecture.head_dim)
    return scores.head_channels.unflatten(1, groups).mean(dim=2)


def best_first(scores: torch.Tensor) -> torch.Tensor:
    """Indices along the last axis in the order in which units are kept."""
    return scores.argsort(dim=-1, descending=True, stable=True)


# --- what a ratio becomes --------------------------------------------------------------------

MUCH_MORE = 1.5
"""A notice is given where a cut removes at least this many times the ratio that was asked for."""


def width_notices(
    architecture: Architecture,
    mha_ratio: float,
    mlp_ratio: float,
    granularity: Granularity,
    multiple_of: int = 1,
    head_dim_multiple_of: int = 1,
) -> list[str]:
    """One sentence for each ratio above 0 that removes nothing, or far more than was asked for.

    The arguments are those of `widths`.
    """
    taken = widths(
        architecture, mha_ratio, mlp_ratio, granularity, multiple_of, head_dim_multiple_of
    )
    channels = channel_counts(architecture, multiple_of)
    if granularity == "head-dims":
        dense, possible, unit = (
            architecture.head_dim,
            head_dims(architecture, head_dim_multiple_of),
            "dims of each head",
        )
        kept = taken.head_dim or dense
    else:
        dense, possible, unit = (
            architecture.num_attention_heads,
            head_counts(architecture, granularity),
            "query heads",
        )
        kept = taken.num_attention_heads
    sentences = (
        _notice("attention", mha_ratio, kept, dense, possible, f"{unit} by {granularity}"),
        _notice(
            "MLP",
            mlp_ratio,
            taken.intermediate_size,
            architecture.intermediate_size,
            channels,
            f"channels in multiples of {multiple_of}" if multiple_of > 1 else "channels",
        ),
    )
    return [sentence for sentence in sentences if sentence]


def plan_notices(plan: PruningPlan, architecture: Architecture) -> list[str]:
    """`width_notices` of the ratios that a plan was made for; `architecture` is the dense one."""
    return width_notices(
        architecture,
        plan.mha_ratio,
        plan.mlp_ratio,
        plan.granularity,
        plan.multiple_of,
        plan.head_dim_multiple_of,
    )


def _notice(
    module: str, ratio: float, kept: int, dense: int, possible: Sequence[int], units: str
) -> str | None:
    removed = 1 - kept / dense
    if ratio == 0 or 0 < removed < MUCH_MORE * ratio:
        return None
    asked = f"where {ratio:.1%} of its width was asked for"
    if removed:
        return (
            f"The {module} loses {removed:.1%} {asked}: the nearest possible width keeps "
            f"{kept:,} of {dense:,} {units}."
        )
    smaller = [count for count in possible if count < dense]
    if not smaller:
        return f"The {module} loses nothing {asked}: no fewer than all {dense:,} {units} can stay."
    return (
        f"The {module} loses nothing {asked}: the nearest possible width keeps all {dense:,} "
        f"{units}, the next one {smaller[-1]:,}."
    )
