import pytest
import torch

from tests.conftest import KINDS, bench_of, make_model, same_weights, snapshot
from transact_core.experiments.bench import Choices, compress
from transact_core.pruning import narrow_heads as narrowing
from transact_core.pruning.closed_form import recover
from transact_core.pruning.narrow_heads import (
    _fit_key,
    _fit_query,
    _least_squares,
    _roots,
    _Sample,
    _turn,
)
from transact_core.pruning.surgery import prune

NARROW = Choices(granularity="head-dims")


@pytest.fixture(params=KINDS)
def narrow_bench(request, tokenizer, windows):
    return bench_of(make_model(**KINDS[request.param]), tokenizer, windows)


def repaired(bench, plan):
    model = prune(bench.loaded.model, plan)
    return model, recover(bench.loaded.model, model, plan, bench.calibration, "least-squares").fits


def test_conjugate_gradients_solve_what_a_direct_solver_does():
    torch.manual_seed(0)
    matrix, target, start = torch.randn(40, 8), torch.randn(40), torch.randn(8)
    expected = torch.linalg.solve(
        matrix.T @ matrix + 0.5 * torch.eye(8), matrix.T @ target + 0.5 * start
    )
    found = _least_squares(start, matrix.mv, matrix.T.mv, target, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_stay_at_the_solution_however_long_they_go_on(monkeypatch):
    """Rounding errors of float32 once grew without end after the solution, 200 steps and more on."""
    monkeypatch.setattr(narrowing, "ITERATIONS", 1000)
    for seed in range(20):
        torch.manual_seed(seed)
        matrix, target = torch.randn(90, 32), torch.randn(90)
        matrix[:, 16:] *= 0.05
        found = _least_squares(torch.zeros(32), matrix.mv, matrix.T.mv, target, 0.0)
        expected = torch.linalg.lstsq(matrix.double(), target.double()[:, None]).solution[:, 0]
        torch.testing.assert_close(found, expected.float(), rtol=1e-2, atol=1e-2)


def logits(query_map, key_map, sample):
    """Differences of logits, pair by pair, from the formula."""
    values = torch.empty_like(sample.target)
    for row in range(len(values)):
        cos, sin = sample.query_rotary
        query = _turn((query_map @ sample.query[row])[None], cos[row], sin[row])[0]
        for column in range(values.shape[1]):
            cos, sin = (each[row, column] for each in sample.key_rotary)
            values[row, column] = query @ _turn(key_map @ sample.key[row, column], cos, sin)
    return values - values.mean(dim=1, keepdim=True)


def test_each_fit_lowers_the_error_of_the_logits(monkeypatch):
    torch.manual_seed(0)
    angles = torch.rand(30, 4, 2) * 3
    turned = [torch.cat([angles, angles], dim=-1)[:, part] for part in (slice(0, 1), slice(1, 4))]
    sample = _Sample(
        query=torch.randn(30, 8),
        key=torch.randn(30, 3, 8),
        target=torch.randn(30, 3) - 0.0,
        query_rotary=(turned[0].cos(), turned[0].sin()),
        key_rotary=(turned[1].cos(), turned[1].sin()),
    )
    query_map, key_map = torch.randn(4, 8), torch.randn(4, 8)

    def error(a, b):
        return (logits(a, b, sample) - sample.target).square().sum().item()

    better_query = _fit_query(query_map, key_map, sample)
    better_key = _fit_key(key_map, query_map[None], [sample])
    assert error(better_query, key_map) < 0.9 * error(query_map, key_map)
    assert error(query_map, better_key) < 0.9 * error(query_map, key_map)
    # A step in any direction from the fitted map is no better: it is the least-squares solution.
    monkeypatch.setattr(narrowing, "ITERATIONS", 200)
    monkeypatch.setattr(narrowing, "RIDGE", 0.0)
    best = _fit_query(query_map, key_map, sample)
    for _ in range(5):
        assert error(best + 0.05 * torch.randn(4, 8), key_map) > error(best, key_map)


def test_roots_multiply_to_the_matrix_and_its_inverse():
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix @ matrix.T + 0.1 * torch.eye(6)
    root, inverse_root = _roots(matrix)
    torch.testing.assert_close(root @ root, matrix)
    torch.testing.assert_close(root @ inverse_root, torch.eye(6, dtype=torch.float64))


def test_fitted_heads_do_better_than_selected_dims(narrow_bench):
    dense = snapshot(narrow_bench.loaded.model)
    plan = narrow_bench.plan(0.5, 0, NARROW)
    _, fits = repaired(narrow_bench, plan)
    assert same_weights(narrow_bench.loaded.model, dense)
    assert all(fit.module == "mha" for fit in fits)
    assert all(fit.recovered_error <= fit.bare_error for fit in fits)
    assert sum(fit.recovered_error < 0.8 * fit.bare_error for fit in fits) >= 2


def test_heads_that_were_narrow_all_along_lose_nothing(tokenizer, windows):
    """Queries, keys and values of half the rank: the fit must find the half that matters."""
    model = make_model(**KINDS["gqa"])
    torch.manual_seed(1)
    for layer in model.model.layers:
        attention = layer.self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.unflatten(0, (-1, 8))[:, [1, 3, 5, 7]] = 0
        mixing = torch.randn(8, 4) @ torch.randn(4, 8) / 4
        for head in attention.v_proj.weight.unflatten(0, (-1, 8)):
            head.copy_(mixing @ head)
    bench = bench_of(model, tokenizer, windows)
    plan = bench.plan(0.5, 0, NARROW)
    assert plan.slots == (0, 2)
    narrow, fits = repaired(bench, plan)
    assert max(fit.recovered_error for fit in fits) < 1e-3 < 0.1 < fits[0].bare_error
    ids = bench.evaluation.ids[:2]
    torch.testing.assert_close(narrow(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)


def test_two_runs_give_the_same_bits(narrow_bench):
    plan = narrow_bench.plan(0.5, 0.3, NARROW)
    first, second = repaired(narrow_bench, plan)[0], repaired(narrow_bench, plan)[0]
    assert same_weights(first, snapshot(second))


def test_a_narrowed_model_can_be_narrowed_again_or_lose_heads(tokenizer, windows):
    bench = bench_of(make_model(**KINDS["wide-heads"]), tokenizer, windows)
    model, _ = compress(bench, bench.plan(0.5, 0, NARROW), "least-squares")
    again = bench_of(model, tokenizer, windows)
    narrower, measured = compress(again, again.plan(0.5, 0, NARROW), "least-squares")
    assert narrower.config.head_dim == 4
    fewer, _ = compress(again, again.plan(0.5, 0, Choices()), "least-squares")
    assert (fewer.config.head_dim, fewer.config.num_attention_heads) == (8, 3)
    assert measured.perplexity > 1


def test_more_text_does_not_mean_more_queries(tokenizer, windows, monkeypatch):
    bench = bench_of(make_model(**KINDS["gqa"]), tokenizer, windows)
    seen = []
    real = narrowing._sample

    def watched(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(narrowing, "_sample", watched)
    monkeypatch.setattr(narrowing, "MAX_QUERIES", 100)
    repaired(bench, bench.plan(0.5, 0, NARROW))
    assert {len(sample.query) for sample in seen} == {16 * 5, 32 * 2}  # of halves, and of all


def test_bfloat16_is_narrowed_too(tokenizer, windows):
    bench = bench_of(make_model(**KINDS["gqa-biased-tied"]).bfloat16(), tokenizer, windows)
    model, measured = compress(bench, bench.plan(0.5, 0.3, NARROW), "least-squares")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert measured.perplexity == measured.perplexity
