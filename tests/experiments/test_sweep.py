import math
from functools import partial
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transact_core.base.errors import Cancelled, TransActError
from transact_core.experiments import results
from transact_core.experiments.bench import Bench, Choices, compress
from transact_core.experiments.sweep import most_informative_first, sweep


def pair_of(point):
    return point.plan.mha_ratio, point.plan.mlp_ratio


def test_points_are_those_of_single_cuts(gqa_bench):
    pairs = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)]
    points = {pair_of(point): point for point in sweep(gqa_bench, pairs, Choices())}
    assert set(points) == set(pairs)
    for pair, point in points.items():
        alone = compress(gqa_bench, gqa_bench.plan(*pair, Choices()), "least-squares")[1]
        assert point.perplexity == alone.perplexity
    assert points[0.0, 0.0].perplexity == gqa_bench.dense().perplexity


@pytest.mark.parametrize("choices", [Choices(recovery="none"), Choices("auto", steps=2)])
def test_a_sweep_that_was_stopped_goes_on_where_it_was(gqa_bench, choices, cache, monkeypatch):
    pairs = [(0.1, 0.1), (0.3, 0.3), (0.5, 0.5), (0.7, 0.7)]
    first = []
    for point in sweep(gqa_bench, pairs, choices):
        first.append(point)
        if len(first) == 2:
            break
    assert [pair_of(point) for point in first] == [(0.7, 0.7), (0.1, 0.1)]

    made = []
    compress_really = results.compress

    def counted(bench, plan, *rest):
        made.append((plan.mha_ratio, plan.mlp_ratio))
        return compress_really(bench, plan, *rest)

    monkeypatch.setattr(
        "transact_core.experiments.sweep.measured", partial(results.measured, compress=counted)
    )
    again = Bench(gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation)
    points = list(sweep(again, pairs, choices))
    assert sorted(made) == [(0.3, 0.3), (0.5, 0.5)]
    assert {pair_of(point) for point in points} == set(pairs)
    by_pair = {pair_of(point): point for point in points}
    for point in first:
        same = by_pair[pair_of(point)]
        assert (same.perplexity, same.seconds) == (point.perplexity, point.seconds)
        assert same.decision == point.decision


@given(st.integers(1, 40))
def test_a_line_is_filled_from_its_ends_by_halving(count):
    line = [(step / 64, 0.0) for step in range(1, count + 1)]
    ordered = most_informative_first(line)
    assert sorted(ordered) == line
    assert ordered[: min(2, count)] == [line[-1], line[0]][: min(2, count)]
    for taken in range(2, count):
        before = sorted(ordered[:taken])
        gaps = [(after[0] - at[0]) / 2 for at, after in pairwise(before)]
        nearest = min(math.dist(ordered[taken], other) for other in before)
        # No other point of the line would have been further from those before it.
        assert max(gaps) - 1 / 64 < nearest <= max(gaps)


def test_a_grid_begins_with_its_corners():
    grid = list(product((0.0, 0.2, 0.4), repeat=2))
    ordered = most_informative_first(grid)
    assert ordered[:2] == [(0.4, 0.4), (0.0, 0.0)]
    assert set(ordered[:4]) == set(product((0.0, 0.4), repeat=2))
    assert ordered[4] == (0.2, 0.2)


def test_one_calibration_pass_serves_every_position(gqa_bench, monkeypatch):
    list(sweep(gqa_bench, [(0.5, 0.5)], Choices(recovery="none")))
    monkeypatch.setattr("transact_core.importance.scores.collect", None)
    list(sweep(gqa_bench, [(0.3, 0.1), (0.2, 0.7)], Choices(recovery="none")))


def test_a_second_process_finds_what_the_first_measured(gqa_bench, monkeypatch):
    first = gqa_bench.statistics(), gqa_bench.dense()
    monkeypatch.setattr("transact_core.importance.scores.collect", None)
    monkeypatch.setattr("transact_core.experiments.bench.evaluate", None)
    again = Bench(gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation)
    assert again.statistics().mlp.norm.equal(first[0].mlp.norm)
    assert again.dense().nll.equal(first[1].nll)


def test_a_row_holds_what_the_contract_names(gqa_bench):
    (point,) = sweep(gqa_bench, [(0.5, 0.3)], Choices(recovery="none"))
    assert set(point.row()) == {
        "mha_ratio",
        "mlp_ratio",
        "parameters",
        "perplexity",
        "mha_width",
        "mlp_width",
        "kv_bytes_per_token",
        "flops_per_token",
        "context_length",
        "weight_bytes",
        "delta_nll",
        "delta_nll_se",
        "seconds",
    }


def test_work_stops_where_progress_says_so(gqa_bench):
    def stop(stage: str, done: int, total: int) -> None:
        if "Repairing" in stage and done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        compress(gqa_bench, gqa_bench.plan(0.5, 0.3, Choices()), "least-squares", stop)


def test_unknown_choices_are_refused(gqa_bench):
    with pytest.raises(TransActError, match="importance"):
        gqa_bench.plan(0.5, 0.5, Choices(importance="luck"))
    with pytest.raises(TransActError, match="recovery"):
        compress(gqa_bench, gqa_bench.plan(0.5, 0.5, Choices()), "luck")
