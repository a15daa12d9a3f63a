import pytest

from transact_core.bench import Bench, Choices, compress
from transact_core.errors import Cancelled, TransActError
from transact_core.sweep import sweep


def test_points_are_those_of_single_cuts(gqa_bench):
    pairs = [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)]
    points = list(sweep(gqa_bench, pairs, Choices()))
    assert [(point.plan.mha_ratio, point.plan.mlp_ratio) for point in points] == pairs
    for pair, point in zip(pairs, points, strict=True):
        alone = compress(gqa_bench, gqa_bench.plan(*pair, Choices()), "least-squares")[1]
        assert point.perplexity == alone.perplexity
    assert points[0].perplexity == gqa_bench.dense().perplexity


def test_one_calibration_pass_serves_every_position(gqa_bench, monkeypatch):
    list(sweep(gqa_bench, [(0.5, 0.5)], Choices(recovery="none")))
    monkeypatch.setattr("transact_core.importance.collect", None)
    list(sweep(gqa_bench, [(0.3, 0.1), (0.2, 0.7)], Choices(recovery="none")))


def test_a_second_process_finds_what_the_first_measured(gqa_bench, monkeypatch):
    first = gqa_bench.statistics(), gqa_bench.dense()
    monkeypatch.setattr("transact_core.importance.collect", None)
    monkeypatch.setattr("transact_core.bench.evaluate", None)
    again = Bench(gqa_bench.loaded, gqa_bench.calibration, gqa_bench.evaluation)
    assert again.statistics().mlp.norm.equal(first[0].mlp.norm)
    assert again.dense().nll.equal(first[1].nll)


def test_a_row_holds_what_the_contract_names(gqa_bench):
    (point,) = sweep(gqa_bench, [(0.5, 0.3)], Choices(recovery="none"))
    assert set(point.row()) == {
        "mha_ratio", "mlp_ratio", "parameters", "perplexity", "mha_width", "mlp_width",
        "kv_bytes_per_token", "flops_per_token", "context_length", "weight_bytes",
        "delta_nll", "delta_nll_se", "seconds",
    }  # fmt: skip


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
