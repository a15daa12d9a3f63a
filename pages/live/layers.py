"""What the Compress page asks and tells of the widths of single layers: the jobs that fill the rest
of a budget and measure prices, and what their results are drawn from."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from pages.live import Decided, Position, Pricing
from pages.live.skyline import Bar, fixed_of, price_tables, text_of, texts_of, why_fixed
from pages.parts.progress import estimate_in_words
from pages.server.estimates import allocating_seconds, pricing_seconds
from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.points import find_cut
from pages.server.request import Cut, first_look
from pages.server.start_jobs import start_filling
from pages.server.visits import visit
from transact_core.experiments.bench import Bench, Choices
from transact_core.planning.preview import layer_costs
from transact_core.pruning.plan import ByHand


def filling_of(position: Position, choices: Choices) -> Hashable:
    """What a job that fills the rest of a budget is about."""
    return "fill", visit().request, position, choices


def fill(position: Position, choices: Choices) -> None:
    """Starts to fill the rest of the budget around the bars that a hand has set."""
    if not why_fixed(choices):
        start_filling(
            (position.mha / 100, position.mlp / 100),
            choices,
            fixed_of(position.heads, position.channels),
            filling_of(position, choices),
        )


def with_filled(position: Position, widths: ByHand) -> Position:
    """The position with the widths that filled its budget; what a hand has set stays marked."""
    fixed = fixed_of(position.heads, position.channels)
    heads, channels = (
        text_of([Bar(units, layer in fixed[module]) for layer, units in enumerate(kept)])
        for module, kept in zip(("mha", "mlp"), zip(*widths, strict=True), strict=True)
    )
    return replace(position, heads=heads, channels=channels)


def prices_of(bench: Bench, choices: Choices) -> dict[str, Any] | None:
    """What each layer's module loses at its widths, for the browser; None until that is known."""
    laws = workbench().prices(visit().request, choices)
    if why_fixed(choices) or laws is None or not bench.damage_known(choices):
        return None
    shape = bench.loaded.architecture
    costs = layer_costs(shape, choices.granularity, choices.multiple_of)
    return price_tables(bench.damage(choices), laws, costs, shape.head_dim)


def pricing_in_words(bench: Bench, choices: Choices, job: Job | None) -> Pricing:
    """What is said beside the button that measures what each layer's cut loses."""
    if job is not None and not job.finished:
        return Pricing("Under way; the progress is at the top of the page.", True)
    seconds = pricing_seconds(bench, visit().request, choices)
    words = (
        f"Takes {estimate_in_words(seconds)}: each layer's attention and MLP is cut and repaired "
        "alone at two widths, and its effect on the predictions measured on held-out text. Then "
        "the predicted damage of every bar is drawn below it, and the price of its parameters. "
        "Filling the rest of the budget measures it too."
    )
    if job is not None and job.error:
        words = f"{job.title} failed. {job.error} {words}"
    return Pricing(words)


def decided_at(bench: Bench, cut: Cut, position: Position) -> Decided | None:
    """The widths that the allocation chose here; None where it was not made or asked for."""
    if not cut.allocates or not bench.prepared(first_look(cut.choices)):
        return None
    decision = find_cut(bench, cut)
    if decision is None:
        return None
    widths = decision.plan.layer_widths(bench.loaded.architecture)
    kept = tuple((layer.num_attention_heads, layer.intermediate_size) for layer in widths)
    return Decided(position.mha, position.mlp, *texts_of(kept))


def what_comes_first(bench: Bench, cut: Cut) -> str:
    """What choosing the widths takes, by its stages, before the cut itself; empty for others."""
    if not cut.allocates:
        return ""
    request, choices = visit().request, cut.choices
    prices = estimate_in_words(pricing_seconds(bench, request, choices))
    trials = estimate_in_words(allocating_seconds(bench, request, [cut.ratios], choices))
    return (
        "The widths are chosen first: the error of each width and the price of each layer "
        f"({prices}), then two trial cuts ({trials}). "
    )
