"""Choices that cannot be made from one set of scores.

These are the choice of a granularity (`auto`), cuts in several steps, and units chosen module by
module on the residual stream of the model pruned so far. Each ends in one plan; what was tried
before is recorded beside it. Carrying out a plan does not need that record, so a stored plan is
applied without deciding again.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.experiments.allocate import (
    allocated_plan,
    plan_by_hand,
    require_allocatable,
)
from transact_core.experiments.bench import Bench, Choices
from transact_core.forward.layers import layers_of
from transact_core.forward.perplexity import Evaluation, evaluate, losses_behind_layers
from transact_core.forward.waists import head_rows
from transact_core.importance.elimination import eliminate_module
from transact_core.importance.scores import Evidence, Scores, score
from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import recover_by_layers, require_recovery
from transact_core.pruning.on_disk import repaired_cut
from transact_core.pruning.plan import (
    GRANULARITIES,
    Decision,
    Granularity,
    LayerPlan,
    PruningPlan,
    Step,
    Widths,
    best_first,
    head_counts,
    kept_heads,
    widths,
)
from transact_core.pruning.rope import require_narrowable
from transact_core.pruning.surgery import Cut


def decide(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    progress: Progress = silent,
) -> Decision:
    """The plan for these ratios, with `auto` resolved and all steps taken.

    Raises:
        TransActError: a choice is not known, or the granularity cannot be had for this model.
    """
    require_recovery(choices.recovery)
    bench.require_recovery_of_class(choices.recovery)
    if choices.sequential:
        require_sequential(choices)
    require_allocatable(bench.loaded.architecture, mha_ratio, mlp_ratio, choices)
    losses: dict[Granularity, float] = {}
    if choices.granularity == "auto":
        if mha_ratio:
            losses = granularity_losses(bench, mha_ratio, choices, progress)
        granularity = min(losses, key=losses.get, default=Choices.granularity)
        choices = replace(choices, granularity=granularity)
    if choices.steps == 1:
        made = None
        if choices.widths == "by-hand":
            plan = plan_by_hand(bench, choices, progress)
        elif choices.widths == "uniform":
            plan = bench.plan(mha_ratio, mlp_ratio, choices, progress)
        else:
            made = allocated_plan(bench, mha_ratio, mlp_ratio, choices, progress)
            plan = made.plan
        if choices.sequential:
            plan = _sequentially(bench, plan, choices, progress)
        return Decision(
            plan,
            losses,
            sequential=choices.sequential,
            widths=choices.widths,
            keep_layers=choices.keep_layers,
            trial_divergences=made.divergences if made else (),
            allocation_seconds=made.seconds if made else None,
        )
    plan, earlier = _stepwise(bench, mha_ratio, mlp_ratio, choices, progress)
    return Decision(plan, losses, choices.steps, earlier)


# --- auto ------------------------------------------------------------------------------------


def granularities_of(bench: Bench) -> tuple[Granularity, ...]:
    """The granularities that this model allows and that differ from each other."""
    names = list(GRANULARITIES)
    if bench.loaded.architecture.queries_per_group == 1:
        names.remove("query-heads")
    try:
        require_narrowable(bench.loaded.model.config, bench.calibration.sequence_length)
    except TransActError:
        names.remove("head-dims")
    return tuple(names)


def granularity_losses(
    bench: Bench, mha_ratio: float, choices: Choices, progress: Progress = silent
) -> dict[Granularity, float]:
    """Held-out loss of each granularity that cuts, with the attention alone cut at this ratio.

    Repairs are cross-fitted (see `pruning.closed_form`): no window is scored by a repair that was
    fitted on it, so no text is set aside. Every other window is used, which halves the time and
    still shows the differences.
    """
    windows = bench.calibration
    if len(windows) >= 4:
        windows = replace(windows, ids=windows.ids[::2])
    losses = {}
    for granularity in granularities_of(bench):
        # Heads that are narrower have the same dims in all layers.
        if granularity == "head-dims" and choices.widths != "uniform":
            continue

        def report(stage: str, done: int, total: int, granularity: str = granularity) -> None:
            progress(f"Trying {granularity}: {stage.lower()}", done, total)

        tried = replace(choices, granularity=granularity)
        plan = bench.plan(mha_ratio, 0.0, tried, report)
        # A granularity that cannot come near the ratio would remove nothing and lose nothing.
        if not plan.cuts_mha(bench.loaded.architecture):
            continue
        losses[granularity] = held_out_loss(
            bench.loaded.model, plan, windows, choices.recovery, report
        )
    return losses


@torch.no_grad()
def held_out_loss(
    dense: PreTrainedModel,
    plan: PruningPlan,
    windows: Windows,
    recovery: str,
    progress: Progress = silent,
) -> float:
    """Mean NLL in nats on the windows, with cross-fitted repairs."""
    cut = Cut(dense, plan, with_biases=recovery == "bias")
    hidden = recover_by_layers(cut, windows, recovery, progress, judge_only=True).hidden
    return Evaluation(losses_behind_layers(dense, hidden, windows)).mean_nll


# --- module by module ------------------------------------------------------------------------


def require_sequential(choices: Choices) -> None:
    """Refuses choices with which units cannot be chosen sequentially.

    Raises:
        TransActError: another choice prevents it; the sentence names that choice.
    """
    if choices.importance != "reconstruction":
        raise TransActError(
            "Units are chosen sequentially by the importance reconstruction only, not by "
            f"{choices.importance}."
        )
    if choices.recovery == "none":
        raise TransActError(
            "Choosing units sequentially repairs each module before it looks at the next; choose "
            "the recovery least-squares or bias."
        )
    if choices.steps > 1:
        raise TransActError(
            "Units are chosen sequentially in one step; leave out either of the two."
        )


def _sequentially(
    bench: Bench, plan: PruningPlan, choices: Choices, progress: Progress
) -> PruningPlan:
    """Eliminates the units of each module on the stream of the model as pruned and repaired so far.

    It begins with the plan by the dense model's scores, whose widths stay; what narrower heads keep
    stays as there too.
    """
    architecture = bench.loaded.architecture
    if not plan.cuts_anything(architecture):
        return plan
    left = plan.layer_widths(architecture)
    dense = bench.loaded.model
    cut = Cut(dense, plan, with_biases=choices.recovery == "bias")

    def choose(
        layer_index: int, module: str, transitional: torch.Tensor, weights: torch.Tensor
    ) -> LayerPlan:
        # Elimination weights squared errors by the square of the repair's weights.
        rows = (
            window * weight[:, None] for window, weight in zip(transitional, weights, strict=True)
        )
        with layers_of(dense).borrow(layer_index) as layer:
            found = eliminate_module(layer, layer_index, module, rows)
        # Only this layer's units are chosen anew, and only this module's: what the other one keeps
        # is decided already.
        if module == "mha":
            heads = kept_heads(found["heads"][None], left[layer_index], architecture)[0]
            update = {"kept_heads": tuple(heads.nonzero().flatten().tolist())}
        else:
            width = left[layer_index].intermediate_size
            channels = best_first(found["channels"])[:width]
            update = {"kept_channels": tuple(channels.sort().values.tolist())}
        chosen = cut.plan.layers[layer_index].model_copy(update=update)
        layers = (*cut.plan.layers[:layer_index], chosen, *cut.plan.layers[layer_index + 1 :])
        cut.remake_module(cut.plan.model_copy(update={"layers": layers}), layer_index, module)
        return chosen

    def report(stage: str, done: int, total: int) -> None:
        progress(f"Choosing units: {stage.lower()}", done, total)

    recover_by_layers(cut, bench.calibration, choices.recovery, report, choose=choose)
    return cut.plan


# --- several steps ---------------------------------------------------------------------------


def _stepwise(
    bench: Bench, mha_ratio: float, mlp_ratio: float, choices: Choices, progress: Progress
) -> tuple[PruningPlan, tuple[Step, ...]]:
    """Scores, cuts and repairs in turn, each time scoring the model as pruned so far.

    The model of every step is cut from the dense one, so repairs do not accumulate. Dims of
    narrower heads keep the dense model's scores, since a repaired head has another basis.
    """
    scores = bench.scores(choices.importance, progress)
    dense = bench.loaded.model
    earlier = []
    targets = list(schedule(bench.loaded.architecture, mha_ratio, mlp_ratio, choices))
    for step, target in enumerate(targets[:-1], start=1):

        def report(stage: str, done: int, total: int, step: int = step) -> None:
            progress(f"Step {step} of {choices.steps}: {stage.lower()}", done, total)

        any_width = replace(choices, multiple_of=1, head_dim_multiple_of=1)
        plan = bench.plan(*target, any_width, report, scores)
        if not plan.cuts_anything(bench.loaded.architecture):
            continue
        model, _ = repaired_cut(
            dense, plan, bench.calibration, choices.recovery, dense.dtype, report
        )
        cut = Architecture.from_config(model.config)
        earlier.append(Step.of(cut, evaluate(model, bench.evaluation, report).perplexity))
        evidence = Evidence(model, bench.calibration, cut, bench.seed, report)
        scores = _in_dense_places(score(choices.importance, evidence), plan, scores)
    return bench.plan(mha_ratio, mlp_ratio, choices, progress, scores), tuple(earlier)


def schedule(
    architecture: Architecture, mha_ratio: float, mlp_ratio: float, choices: Choices
) -> Iterator[tuple[float, float]]:
    """The ratios of each step: from the current width `c` to `c − (c − t) // steps left`.

    Heads take the nearest number that can be had between the two. Source: TransAct, iterative
    pruning.
    """
    target = widths(
        architecture,
        mha_ratio,
        mlp_ratio,
        choices.granularity,
        choices.multiple_of,
        choices.head_dim_multiple_of,
    )
    at = Widths(
        architecture.num_attention_heads,
        architecture.num_key_value_heads,
        architecture.intermediate_size,
        architecture.head_dim,
    )
    end = target.head_dim or architecture.head_dim
    allowed = (
        head_counts(architecture, choices.granularity)
        if choices.granularity != "head-dims"
        else [architecture.num_attention_heads]
    )
    for left in range(choices.steps, 1, -1):
        wanted = _towards(at.num_attention_heads, target.num_attention_heads, left)
        possible = [
            count
            for count in allowed
            if target.num_attention_heads <= count <= at.num_attention_heads
        ]
        at = Widths(
            min(possible, key=lambda count: (abs(count - wanted), -count)),
            at.num_key_value_heads,
            _towards(at.intermediate_size, target.intermediate_size, left),
            max(end, _towards(at.head_dim, end, left) // 2 * 2),
        )
        heads = Fraction(at.num_attention_heads, architecture.num_attention_heads)
        dims = Fraction(at.head_dim, architecture.head_dim)
        channels = Fraction(at.intermediate_size, architecture.intermediate_size)
        yield float(1 - heads * dims), float(1 - channels)
    yield mha_ratio, mlp_ratio


def _towards(current: int, target: int, steps_left: int) -> int:
    return current - (current - target) // steps_left


def _in_dense_places(scores: Scores, plan: PruningPlan, dense: Scores) -> Scores:
    """Scores of a pruned model at the dense model's indices; removed units score minus infinity."""

    def placed(name: str, indices: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.full_like(getattr(dense, name), -torch.inf)
        for row, kept, values in zip(rows, indices, getattr(scores, name), strict=True):
            row[kept] = values
        return rows

    channels = placed("channels", [torch.tensor(layer.kept_channels) for layer in plan.layers])
    if plan.head_dim:
        return replace(dense, channels=channels)
    heads = [torch.tensor(layer.kept_heads) for layer in plan.layers]
    head_dim = dense.head_channels.shape[1] // dense.heads.shape[1]
    dims = [head_rows(layer.kept_heads, head_dim) for layer in plan.layers]
    return Scores(placed("heads", heads), placed("head_channels", dims), channels)
