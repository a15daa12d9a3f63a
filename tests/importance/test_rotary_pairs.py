import itertools

import pytest
import torch

from tests.conftest import KINDS, bench_of, make_model
from transact_core.importance.rotary_pairs import (
    _assignment,
    _shares,
    drop_order,
    frequency_similarity,
    measure_pairs,
)

INV_FREQ = 10_000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)


def test_effects_equal_a_query_by_query_reference(tokenizer, windows):
    model = make_model(**KINDS["gqa"])
    bench = bench_of(model, tokenizer, windows)
    measured = measure_pairs(model, bench.calibration).effects
    ids = bench.calibration.ids
    hidden = model.model.embed_tokens(ids)
    attention = model.model.layers[0].self_attn
    normed = model.model.layers[0].input_layernorm(hidden)
    cos, sin = (each[0] for each in model.model.rotary_emb(hidden, torch.arange(32)[None]))
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for window in normed:
        query = attention.q_proj(window).unflatten(-1, (6, 8))
        key = attention.k_proj(window).unflatten(-1, (3, 8))
        for place, head in itertools.product((15, 31), range(6)):
            shares = torch.zeros(place + 1, 4)
            for other, pair in itertools.product(range(place + 1), range(4)):
                (a, b), (c, d) = (
                    query[place, head, [pair, pair + 4]],
                    key[other, head // 2, [pair, pair + 4]],
                )
                angle = model.model.rotary_emb.inv_freq[pair].double() * (place - other)
                cosine, sine = angle.cos(), angle.sin()
                shares[other, pair] = ((a * c + b * d) * cosine + (a * d - b * c) * sine) / 8**0.5
            weights = shares.sum(dim=1).softmax(dim=0)[:, None]
            mean = (weights * shares).sum(dim=0)
            expected[head // 2] += (weights * (shares - mean).square()).sum(dim=0)
    assert cos.shape == sin.shape == (32, 8)
    torch.testing.assert_close(measured[0], expected, rtol=1e-4, atol=1e-6)


def test_a_frequency_stands_in_fully_for_itself_and_the_more_the_nearer():
    similarity = frequency_similarity(INV_FREQ)
    assert torch.equal(similarity.diagonal(), torch.ones(6, dtype=torch.float64))
    assert torch.equal(similarity, similarity.T)
    assert (similarity[5, 2:].diff() >= 0).all()
    # By hand, over three distances of weights 1, 1/2, 1/3.
    first, second = INV_FREQ[:2].tolist()
    turned = [
        abs(torch.exp(torch.tensor(1j * (first - second) * d)).item() - 1) ** 2 for d in range(3)
    ]
    by_hand = 1 - min(1, sum(t / (1 + d) for d, t in enumerate(turned)) / (1 + 1 / 2 + 1 / 3))
    assert frequency_similarity(INV_FREQ, 3)[0, 1].item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_assignment_is_the_best_of_all_that_keep_the_order(count):
    torch.manual_seed(count)
    gains, similarity = torch.rand(5, 6, dtype=torch.float64), torch.rand(6, count).double()
    value, chosen = _assignment(gains, similarity)
    total = 0.0
    for row, pairs in zip(gains, chosen.tolist(), strict=True):
        options = {
            each: sum(row[p].item() * similarity[p, s].item() for s, p in enumerate(each))
            for each in itertools.combinations(range(6), count)
        }
        best = max(options.values())
        assert options[tuple(pairs)] == pytest.approx(best)
        total += best
    assert value == pytest.approx(total)


def test_slots_are_dropped_where_it_costs_least():
    torch.manual_seed(0)
    effects = torch.rand(2, 3, 6, dtype=torch.float64)
    order = drop_order(effects, INV_FREQ).tolist()
    assert sorted(order) == list(range(6))
    shares, similarity = _shares(effects).flatten(0, 1), frequency_similarity(INV_FREQ)
    values = [
        _assignment(shares, similarity[:, [slot for slot in range(6) if slot != each]])[0]
        for each in range(6)
    ]
    assert order[0] == max(range(6), key=values.__getitem__)
