import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transact_core.experiments.allocate import loss_laws, plan_by_hand
from transact_core.experiments.bench import Choices, compress
from transact_core.experiments.prediction import (
    Point,
    keep_score,
    next_points,
    predict_grid,
    with_known_damage,
)
from transact_core.planning.damage import HEAD_CUTS
from transact_core.planning.law import (
    FAR_SD,
    OWN_SD,
    PRIOR_MEAN,
    SHARED_SD,
    UNSHARED_NOISE,
    Fit,
    law,
)

CHOICES = Choices(recovery="none")
errors = st.floats(0, 1.5)
points_strategy = st.lists(
    st.tuples(errors, errors, st.floats(-0.1, 8), st.floats(0, 0.3)), max_size=8
)


def plain_law(parameters, m, p):
    """Δ by the formula of the module's docstring."""
    a, alpha, b, beta, g = np.exp(parameters)
    return ((a * (m / 0.1) ** alpha) ** g + (b * (p / 0.1) ** beta) ** g) ** (1 / g)


def fit_of(rows, group="here"):
    columns = np.array(rows, dtype=float).reshape(-1, 4).T
    return Fit([group] * columns.shape[1], *columns)


@given(st.lists(st.floats(-0.8, 0.8), min_size=5, max_size=5), errors, errors)
def test_the_law_is_its_formula_and_its_slopes_are_its_own(away, m, p):
    parameters = PRIOR_MEAN + np.array(away)
    value, slopes = law(parameters, np.array([m]), np.array([p]))
    expected = plain_law(parameters, m, p)
    assert math.exp(value[0]) == pytest.approx(expected, rel=1e-6, abs=1e-150)
    assert np.isfinite(slopes).all()
    if expected > 1e-100:
        for number in range(5):
            step = np.eye(5)[number] * 1e-5
            rise = np.log(plain_law(parameters + step, m, p) / plain_law(parameters - step, m, p))
            assert slopes[0, number] == pytest.approx(rise / 2e-5, rel=1e-3, abs=1e-4)


@given(points_strategy, errors, errors)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_where_nothing_is_cut_and_an_interval_holds_its_middle(rows, m, p):
    fit = fit_of(rows)
    low, mid, high = fit.predict("here", np.array([0.0, m]), np.array([0.0, p]))
    assert (low[0], mid[0], high[0]) == (0, 0, 0)
    assert np.isfinite([low, mid, high]).all()
    assert low[1] <= mid[1] <= high[1]
    assert mid[1] >= 0


@given(points_strategy, errors, errors, errors, errors)
@settings(max_examples=60, deadline=None)
def test_the_fitted_law_rises_with_both_errors_whatever_was_measured(rows, m, p, more_m, more_p):
    parameters = fit_of(rows).parameters("here")
    less, more = (plain_law(parameters, *at) for at in ((m, p), (m + more_m, p + more_p)))
    assert less <= more * (1 + 1e-9)


def synthetic(seed, count):
    """A law drawn from the prior, and noisy measurements of it within twice the dense perplexity."""
    draw = np.random.default_rng(seed)
    parameters = PRIOR_MEAN + draw.normal(size=5) * np.hypot(SHARED_SD, OWN_SD)
    rows = []
    while len(rows) < count:
        m, p = draw.uniform(0, 0.3), draw.uniform(0, 0.3)
        delta = plain_law(parameters, m, p)
        if 0.01 < delta < math.log(2):
            rows.append(
                (m, p, delta + draw.normal() * 0.005 * math.sqrt(delta), 0.01 * math.sqrt(delta))
            )
    return parameters, rows


@pytest.mark.parametrize("seed", range(8))
def test_it_recovers_the_law_that_made_the_points(seed):
    _, rows = synthetic(seed, 45)
    m, p, delta, _ = np.array(rows[40:]).T
    _, few, _ = fit_of(rows[:1]).predict("here", m, p)
    _, many, _ = fit_of(rows[:40]).predict("here", m, p)
    assert np.abs(many - delta).max() < 0.03
    assert np.abs(many - delta).mean() < np.abs(few - delta).mean() + 0.003


@pytest.mark.parametrize("count", [0, 2, 3, 5, 10])
def test_nine_in_ten_intervals_hold_what_is_then_measured(count):
    inside = []
    for seed in range(120):
        _, rows = synthetic(1000 + seed, count + 3)
        m, p, delta, _ = np.array(rows[count:]).T
        low, _, high = fit_of(rows[:count]).predict("here", m, p)
        inside += list((low <= delta) & (delta <= high))
    assert np.mean(inside) >= 0.85


def test_intervals_narrow_as_points_arrive():
    drawn = [synthetic(seed, 12)[1] for seed in range(20)]
    here = np.array([0.05])

    def width(rows):
        _, mid, high = fit_of(rows).predict("here", here, here)
        return math.log(high.item() / mid.item())

    none, few, many = (np.mean([width(rows[:count]) for rows in drawn]) for count in (0, 3, 12))
    assert none > few > many
    assert many < none / 4


def test_points_that_surprise_widen_the_interval():
    _, rows = synthetic(5, 8)
    wild = [
        (m, p, delta * (2.5 if number % 2 else 0.4), se)
        for number, (m, p, delta, se) in enumerate(rows)
    ]

    def width(rows):
        low, mid, high = fit_of(rows).predict("here", np.array([0.06]), np.array([0.06]))
        return ((high - low) / mid).item()

    assert width(wild) > 1.5 * width(rows)


def test_other_choices_points_help_but_less_than_own():
    parameters, rows = synthetic(11, 10)
    columns = np.array(rows).T
    m, p = np.array([0.05]), np.array([0.05])
    truth = plain_law(parameters, 0.05, 0.05)

    def of(group):
        _, mid, high = Fit([group] * 10, *columns).predict("here", m, p)
        return abs(math.log(mid.item() / truth)), math.log(high.item() / mid.item())

    (_, none), (helped_error, helped), (own_error, own) = of(None), of("there"), of("here")
    _, mid, high = fit_of([]).predict("here", m, p)
    assert own < helped < math.log(high.item() / mid.item())
    assert none == helped
    assert own_error < 0.05
    assert helped_error <= abs(math.log(mid.item() / truth)) + 1e-6


def test_nothing_is_made_of_a_point_without_a_cut():
    rows = [(0.1, 0.0, 0.3, 0.01)]
    with_dense = fit_of([*rows, (0.0, 0.0, 0.0, 0.0)])
    assert np.array_equal(with_dense.parameters("here"), fit_of(rows).parameters("here"))


def point_of(bench, mha_ratio, mlp_ratio, choices=CHOICES):
    plan = bench.plan(mha_ratio, mlp_ratio, choices)
    return Point.of(compress(bench, plan, choices.recovery)[1], choices)


@pytest.fixture
def measured(gqa_bench):
    return [point_of(gqa_bench, *at) for at in ((0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.0, 0.25))]


@pytest.mark.parametrize("granularity", [*HEAD_CUTS, "head-dims"])
def test_the_grid_covers_the_sliders_and_rises_with_both(gqa_bench, measured, granularity):
    choices = replace(CHOICES, granularity=granularity)
    shape = gqa_bench.loaded.architecture
    grid = predict_grid(gqa_bench, choices, measured)
    mha, mlp = (sorted({place[axis] for place in grid}) for axis in (0, 1))
    assert len(grid) == len(mha) * len(mlp)
    assert (mha[-1], mlp[-1]) == (shape.mha_width, shape.intermediate_size)
    assert mlp[0] == 1
    dense = grid[shape.mha_width, shape.intermediate_size]
    assert (dense.low, dense.mid, dense.high) == (1, 1, 1)
    for (mha_width, mlp_width), ratio in grid.items():
        assert ratio.low <= ratio.mid <= ratio.high
        for narrower in [(w, mlp_width) for w in mha if w < mha_width] + [
            (mha_width, w) for w in mlp if w < mlp_width
        ]:
            assert grid[narrower].mid >= ratio.mid
            assert grid[narrower].high >= ratio.high


def test_asked_for_widths_are_the_ones_answered(gqa_bench, measured):
    grid = predict_grid(gqa_bench, CHOICES, measured, mlp_widths=[40, 31, 20], mha_widths=[24])
    assert list(grid) == [(24, 40), (24, 31), (24, 20)]
    whole = predict_grid(gqa_bench, CHOICES, measured)
    assert grid[24, 31].mid == pytest.approx(whole[24, 31].mid)


def test_the_score_compares_with_predictions_from_earlier_points(gqa_bench, measured):
    assert keep_score(gqa_bench, measured) == []
    gqa_bench.damage(CHOICES)
    scored = keep_score(gqa_bench, measured)
    assert [score.point for score in scored] == measured
    for index, score in enumerate(scored):
        place = (score.point.mha_width, score.point.mlp_width)
        before = measured[:index]
        grid = predict_grid(gqa_bench, CHOICES, before, [place[0]], [place[1]])
        assert score.predicted.mid == pytest.approx(grid[place].mid)
        assert score.measured == pytest.approx(math.exp(score.point.delta_nll))
        assert score.relative_error == pytest.approx(score.predicted.mid / score.measured - 1)
        assert score.inside == (score.predicted.low <= score.measured <= score.predicted.high)


def test_own_widths_are_scored_by_what_their_layers_lose(gqa_bench, measured, short_texts):
    gqa_bench.damage(CHOICES)
    laws = loss_laws(gqa_bench, CHOICES)
    shape = gqa_bench.loaded.architecture

    def own(*widths):
        choices = replace(CHOICES, widths="by-hand", by_hand=widths)
        plan = plan_by_hand(gqa_bench, choices)
        made = compress(gqa_bench, plan, CHOICES.recovery)[1]
        return Point.of_own_widths(gqa_bench, made, choices, laws)

    heads, channels = shape.num_attention_heads, shape.intermediate_size
    layers = shape.num_hidden_layers
    uniform = own(*[(heads // 2, channels // 2)] * layers)
    assert uniform.choices == CHOICES
    damage = gqa_bench.damage(CHOICES)
    # Widths that are all alike count as the uniform cut that they are.
    alike = Point.of(
        compress(gqa_bench, gqa_bench.plan(0.5, 0.5, CHOICES), CHOICES.recovery)[1], CHOICES
    )
    assert uniform.errors(damage) == pytest.approx(alike.errors(damage))
    uneven = own((heads, channels), *[(heads // 2, channels // 2)] * (layers - 1))
    assert uneven.mlp_width == pytest.approx((layers + 1) / layers * channels / 2)
    m, p = uneven.errors(damage)
    assert 0 < m < uniform.errors(damage)[0]
    assert 0 < p < uniform.errors(damage)[1]
    (*_, last) = keep_score(gqa_bench, [*measured, uneven])
    assert last.point == uneven
    assert last.predicted.low <= last.predicted.mid <= last.predicted.high


def test_points_whose_damage_is_not_known_are_left_out(gqa_bench, measured):
    gqa_bench.damage(CHOICES)
    strange = Point(replace(CHOICES, importance="magnitude"), 24, 20, 0.1)
    assert not gqa_bench.damage_known(strange.choices)
    assert predict_grid(gqa_bench, CHOICES, [*measured, strange]) == predict_grid(
        gqa_bench, CHOICES, measured
    )
    assert len(keep_score(gqa_bench, [*measured, strange])) == len(measured)
    assert not gqa_bench.damage_known(strange.choices)


def test_heads_narrower_than_those_tried_are_left_out(gqa_bench):
    choices = replace(CHOICES, granularity="head-dims")
    tried = gqa_bench.damage(choices).mha.widths[0].item()
    narrower = tried - 2 * gqa_bench.loaded.architecture.num_attention_heads
    assert narrower > 0
    strange = Point(choices, narrower, 40, 0.5)
    assert not with_known_damage(gqa_bench, [strange])
    assert keep_score(gqa_bench, [strange]) == []
    grid = predict_grid(gqa_bench, choices, [strange], mha_widths=[narrower, tried])
    assert grid == predict_grid(gqa_bench, choices, [], mha_widths=[tried])
    assert {mha for mha, _ in grid} == {tried}


def test_the_next_points_are_new_useful_and_apart(gqa_bench, measured):
    first = next_points(gqa_bench, CHOICES, [], count=6, limit=8)
    assert len(first) == len(set(first)) == 6
    grid = predict_grid(gqa_bench, CHOICES, [], *map(list, zip(*first, strict=True)))
    assert all(grid[place].mid > 1 and grid[place].low < 8 for place in first)
    known = [Point(CHOICES, *place, 0.2, 0.01) for place in first[:2]]
    assert not set(next_points(gqa_bench, CHOICES, known, count=6, limit=8)) & set(first[:2])


def test_the_covariance_tells_what_measuring_a_place_would_take_off():
    draw = np.random.default_rng(0)
    m, p = draw.uniform(0, 0.1, 12), draw.uniform(0, 0.1, 12)
    first = (0.1, 0.05, 0.3, 0.02)
    fit = fit_of([first])
    before = fit.covariance("here", m, p)
    assert np.linalg.eigvalsh(before).min() > -1e-9
    _, mid, _ = fit.predict("here", m, p)
    for place in range(12):
        noise = 0.02 * math.sqrt(mid[place] / 0.3)
        seen = fit_of([first, (m[place], p[place], mid[place], noise)]).covariance("here", m, p)
        variance = (UNSHARED_NOISE * noise / mid[place]) ** 2 + (FAR_SD * mid[place] ** 2) ** 2
        taken_off = before[:, place] ** 2 / (before[place, place] + variance)
        assert seen.diagonal() == pytest.approx(before.diagonal() - taken_off, rel=0.1, abs=3e-3)


def test_a_module_of_which_nothing_is_known_is_looked_at_early(gqa_bench):
    shape = gqa_bench.loaded.architecture
    both = next_points(gqa_bench, CHOICES, [], count=3, limit=8)
    assert any(mha_width < shape.mha_width for mha_width, _ in both)
    assert any(mlp_width < shape.intermediate_size for _, mlp_width in both)


def test_no_room_below_the_limit_gives_no_points(gqa_bench):
    assert next_points(gqa_bench, CHOICES, [], count=3, limit=1.0) == []
