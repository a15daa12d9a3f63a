from itertools import pairwise

import pytest
import torch

from tests.conftest import bench_of
from tests.models.families.made import make_member
from transact_core.base.linalg import inverse_rms
from transact_core.experiments.bench import Choices, compress
from transact_core.forward.stream import Stream
from transact_core.forward.waists import head_rows, output_projections
from transact_core.importance.scores import Scores
from transact_core.planning import damage as damages
from transact_core.planning.damage import HEAD_CUTS, RIDGES, Curve, errors_at_all_widths, kept_first
from transact_core.pruning import ridge as ridge_module
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import head_counts, make_plan, widths

CHOICES = Choices(importance="activation")


def folds_of(tokens=240, width=14, hidden=9, folds=3, seed=0):
    """Rows of correlated channels of unlike size and mean, W, a bias and tokens' weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(tokens, 5) @ draw(5, width) + 0.4 * draw(tokens, width) + draw(width)
    x *= torch.exp(draw(width))
    weights = draw(tokens).exp()
    return x.chunk(folds), weights.chunk(folds), draw(hidden, width), draw(hidden)


def rows(x, weights):
    return (torch.column_stack([x, torch.ones(len(x))]) * weights.sqrt()[:, None]).float()


def slow_error(folds, weights, weight, bias, kept, recovery, ridge=None):
    """Cuts to the channels `kept`, repairs on all folds but one, and looks at that one."""
    gone = [j for j in range(weight.shape[1]) if j not in kept]
    lost, written = 0.0, 0.0
    for number, (x, w) in enumerate(zip(folds, weights, strict=True)):
        seen = torch.cat([fold for other, fold in enumerate(folds) if other != number])
        w_seen = torch.cat([each for other, each in enumerate(weights) if other != number])
        missing, missing_seen = x[:, gone] @ weight[:, gone].T, seen[:, gone] @ weight[:, gone].T
        if recovery == "bias":
            missing = missing - (w_seen[:, None] * missing_seen).sum(0) / w_seen.sum()
        if recovery == "least-squares":
            # The ridge as rows of an ordinary least-squares problem.
            energy = (w_seen[:, None] * seen[:, kept].square()).sum(0)
            everything = (w_seen[:, None] * seen.square()).sum(0)
            ridges = torch.diag((ridge * (energy + 1e-3 * everything.mean())).sqrt())
            rows = torch.cat([seen[:, kept] * w_seen.sqrt()[:, None], ridges])
            target = torch.cat(
                [missing_seen * w_seen.sqrt()[:, None], torch.zeros(len(kept), len(weight))]
            )
            missing = missing - x[:, kept] @ torch.linalg.lstsq(rows, target).solution
        lost += (w[:, None] * missing.square()).sum().item()
        written += (w[:, None] * (x @ weight.T + bias).square()).sum().item()
    return lost / written


@pytest.mark.parametrize("rows_at_once", [4, 256])
@pytest.mark.parametrize("biased", [False, True])
def test_one_factorisation_gives_what_cutting_and_fitting_anew_gives_at_each_width(
    biased, rows_at_once, monkeypatch
):
    monkeypatch.setattr(damages, "ROWS_AT_ONCE", rows_at_once)
    folds, weights, weight, bias = folds_of()
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    bias = bias if biased else torch.zeros_like(bias)
    found = errors_at_all_widths(
        [rows(x, w) for x, w in zip(folds, weights, strict=True)],
        weight,
        bias if biased else None,
        order,
    )
    highest = dict.fromkeys(RECOVERIES, 0.0)
    for width in reversed(range(1, len(order) + 1)):
        kept = order[:width].tolist()
        bare = slow_error(folds, weights, weight, bias, kept, "none")
        fits = [slow_error(folds, weights, weight, bias, kept, "least-squares", r) for r in RIDGES]
        expected = {
            "none": bare,
            "bias": min(bare, slow_error(folds, weights, weight, bias, kept, "bias")),
            "least-squares": min(bare, *fits),
        }
        for recovery, error in expected.items():
            highest[recovery] = max(highest[recovery], error)
            assert found[recovery][width].item() == pytest.approx(
                highest[recovery], rel=2e-3, abs=1e-6
            )


@pytest.mark.parametrize(
    ("size", "module", "limit", "few"),
    [
        ({"hidden": 400}, ridge_module, "JUDGED_OUTPUTS", 150),
        ({"tokens": 6000}, damages, "JUDGED_ROWS", 700),
    ],
    ids=["outputs", "rows"],
)
def test_many_outputs_and_many_rows_are_judged_by_combinations(
    size, module, limit, few, monkeypatch
):
    folds, weights, weight, _ = folds_of(**size)
    order = torch.arange(weight.shape[1])
    given = [rows(x, w) for x, w in zip(folds, weights, strict=True)]
    exact = errors_at_all_widths(given, weight, None, order)
    monkeypatch.setattr(module, limit, few)
    found = errors_at_all_widths(given, weight, None, order)
    for recovery in ("none", "bias"):
        assert torch.equal(found[recovery], exact[recovery])
    assert not torch.equal(found["least-squares"], exact["least-squares"])
    torch.testing.assert_close(found["least-squares"], exact["least-squares"], rtol=0.15, atol=1e-6)


def test_rows_with_the_same_second_moments_lose_the_same():
    folds, weights, weight, bias = folds_of()
    order = torch.arange(weight.shape[1])
    given = [rows(x, w) for x, w in zip(folds, weights, strict=True)]
    fewer = [damages._compressed(fold) for fold in given]
    assert {len(fold) for fold in fewer} == {weight.shape[1] + 1}
    exact, found = (errors_at_all_widths(each, weight, bias, order) for each in (given, fewer))
    for recovery in RECOVERIES:
        torch.testing.assert_close(found[recovery], exact[recovery], rtol=1e-4, atol=1e-6)


def test_one_fold_allows_no_repair():
    (x,), (w,), weight, _ = folds_of(folds=1)
    found = errors_at_all_widths([rows(x, w)], weight, None, torch.arange(weight.shape[1]))
    for recovery in RECOVERIES:
        assert torch.equal(found[recovery], found["none"])


def test_a_module_that_writes_nothing_loses_nothing():
    zeros = [torch.zeros(7, 7), torch.zeros(7, 7)]
    for fold in zeros:
        fold[:, -1] = 1
    found = errors_at_all_widths(zeros, torch.ones(4, 6), None, torch.arange(6))
    assert all(not errors.any() for errors in found.values())


@pytest.mark.parametrize("granularity", HEAD_CUTS)
def test_every_plan_keeps_a_beginning_of_the_order(bench, granularity):
    shape, scores = bench.loaded.architecture, bench.scores("activation")
    orders = kept_first(scores, shape)
    for heads in head_counts(shape, granularity)[:-1]:
        for mlp_ratio in (0.2, 0.65):
            mha_ratio = 1 - heads / shape.num_attention_heads
            plan = make_plan(shape, scores, "activation", mha_ratio, mlp_ratio, granularity)
            assert plan.num_attention_heads == heads
            for number, layer in enumerate(plan.layers):
                rows = orders["mha"][granularity][number, : heads * shape.head_dim]
                assert sorted(rows.tolist()) == head_rows(layer.kept_heads, shape.head_dim).tolist()
                channels = orders["mlp"]["mlp"][number, : plan.intermediate_size]
                assert sorted(channels.tolist()) == list(layer.kept_channels)


def test_of_equal_scores_the_order_keeps_what_a_plan_keeps(gqa_bench):
    shape = gqa_bench.loaded.architecture
    scores = Scores(
        torch.ones(shape.num_hidden_layers, shape.num_attention_heads),
        torch.ones(shape.num_hidden_layers, shape.mha_width),
        torch.ones(shape.num_hidden_layers, shape.intermediate_size),
    )
    plan = make_plan(shape, scores, "activation", 0.5, 0.5, "query-heads")
    orders = kept_first(scores, shape)
    rows = orders["mha"]["query-heads"][0, : plan.num_attention_heads * shape.head_dim]
    assert sorted(rows.tolist()) == head_rows(plan.layers[0].kept_heads, shape.head_dim).tolist()


@pytest.mark.parametrize("granularity", HEAD_CUTS)
@pytest.mark.parametrize("recovery", ["bias", "least-squares"])
def test_it_is_the_error_that_a_repair_of_the_dense_stream_reports(
    bench, granularity, recovery, monkeypatch
):
    # The first attention sees the dense stream, as nothing is cut before it.
    monkeypatch.setattr("transact_core.pruning.closed_form.RIDGES", RIDGES)
    choices = Choices(granularity=granularity, recovery=recovery)
    plan = bench.plan(0.5, 0.0, choices)
    fit = compress(bench, plan, recovery)[1].fits[0]
    width = plan.num_attention_heads * bench.loaded.architecture.head_dim
    curve = bench.damage(choices).mha
    known = curve.errors[0, curve.widths.tolist().index(width)].item()
    assert known == pytest.approx(fit.recovered_error, rel=0.02)
    bare = bench.damage(Choices(granularity=granularity, recovery="none")).mha
    known = bare.errors[0, bare.widths.tolist().index(width)].item()
    assert known == pytest.approx(fit.bare_error, rel=0.01)


@pytest.mark.parametrize("member", ["llama", "gemma3"])
def test_the_mlps_curve_is_that_of_its_own_dense_stream(member, tokenizer, windows):
    """And of the norm behind it, where one is, what it passes on of a small error."""
    bench = bench_of(make_member(member), tokenizer, windows)
    choices = Choices(recovery="none")
    curve = bench.damage(choices).mlp
    model, windows = bench.loaded.model, bench.calibration
    order = kept_first(bench.scores("activation"), bench.loaded.architecture)["mlp"]["mlp"]
    stream = Stream(model, windows)
    for number in range(2):
        for _ in stream.advance(number, "mha"):
            pass
        lost = written = 0.0
        projection = output_projections(model.model.layers[number])["mlp"]
        gone = order[number, 25:]
        for transitional, residual, _ in stream.advance(number, "mlp"):
            weight = inverse_rms(residual, model.config.rms_norm_eps).sqrt()
            missing = transitional[..., gone] @ projection.weight[:, gone].T
            whole = projection(transitional)
            if norm := getattr(model.model.layers[number], "post_feedforward_layernorm", None):
                rms = whole.square().mean(-1, keepdim=True).sqrt()
                weight = weight * (1 + norm.weight) / rms
            lost += (missing * weight).square().sum().item()
            written += (whole * weight).square().sum().item()
        assert curve.errors[number, 24].item() == pytest.approx(lost / written, rel=1e-3)


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("granularity", [*HEAD_CUTS, "head-dims"])
def test_less_width_never_loses_less_and_full_width_loses_nothing(gqa_bench, granularity, recovery):
    choices = Choices(granularity=granularity, recovery=recovery)
    shape = gqa_bench.loaded.architecture
    assert not gqa_bench.damage_known(choices)
    known = gqa_bench.damage(choices)
    assert gqa_bench.damage_known(choices)
    for curve, dense in ((known.mha, shape.mha_width), (known.mlp, shape.intermediate_size)):
        assert curve.widths[-1] == dense
        assert curve.widths.diff().gt(0).all()
        assert curve.errors.diff(dim=1).le(0).all()
        assert not curve.errors[:, -1].any()
        assert curve.errors[:, 0].gt(0).all()
        assert curve.at(dense) == 0
    assert widths(shape, 0.5, 0.5, granularity).intermediate_size in known.mlp.widths


def test_narrower_heads_are_tried_and_interpolated(gqa_bench):
    choices = Choices(granularity="head-dims", recovery="least-squares")
    curve = gqa_bench.damage(choices).mha
    plan = gqa_bench.plan(0.25, 0.0, choices)
    fits = compress(gqa_bench, plan, "least-squares")[1].fits
    width = plan.num_attention_heads * plan.head_dim
    mean = sum(fit.recovered_error for fit in fits) / len(fits)
    assert curve.at(width) == pytest.approx(mean, rel=1e-6)
    below = curve.widths[curve.widths.tolist().index(width) + 1].item()
    assert curve.at((width + below) / 2) == pytest.approx((curve.at(width) + curve.at(below)) / 2)


def test_a_second_bench_measures_nothing_again(gqa_bench, monkeypatch):
    before = gqa_bench.damage(CHOICES)
    gqa_bench._measured.clear()
    monkeypatch.setattr(damages, "Stream", None)
    after = gqa_bench.damage(CHOICES)
    assert torch.equal(before.mlp.errors, after.mlp.errors)


def test_no_width_is_made_up():
    curve = Curve(torch.tensor([8, 16]), torch.tensor([[0.5, 0.0]]))
    assert curve.at([8, 12, 16]).tolist() == [0.5, 0.25, 0]
    for width in (4, 17):
        with pytest.raises(ValueError, match=str(width)):
            curve.at([8, width])


def test_progress_is_reported_within_a_layer(gqa_bench):
    """A layer of a large model takes minutes, in which a cut that was asked for waits."""
    model, layers = gqa_bench.loaded.model, gqa_bench.loaded.architecture.num_hidden_layers
    orders = kept_first(gqa_bench.scores("activation"), gqa_bench.loaded.architecture)
    reports = []
    damages.measure_curves(
        model, gqa_bench.calibration, orders, lambda stage, *counts: reports.append(counts)
    )
    done, totals = zip(*reports, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, totals[0])
    # One at the start of each layer, and one after each of its fits.
    assert len(done) >= layers * (1 + 3 * len(RIDGES))
    assert max(later - earlier for earlier, later in pairwise(done)) < (totals[0] / layers / 3)
