import pytest
import torch

from transact_core.base.linalg import second_moments
from transact_core.forward.stream import Stream
from transact_core.forward.waists import output_projections
from transact_core.importance.elimination import (
    FLOOR,
    RIDGE,
    damped_inverse,
    eliminate,
    eliminate_channels,
    eliminate_heads,
    head_energies,
    weighted_rows,
)


def problem(tokens, width, hidden, seed=0, rank=None):
    """X with correlated channels of unlike size, and W."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = rank or width // 2
    x = draw(tokens, rank) @ draw(rank, width) + 0.3 * draw(tokens, width)
    x *= torch.exp(draw(width))
    return x, draw(hidden, width)


def damped(x):
    gram = x.T @ x
    energy = gram.diagonal()
    return gram + torch.diag(RIDGE * energy + FLOOR * energy.mean())


def residual(h, weight, kept):
    """What least squares leaves if only `kept` channels may write: min tr((W−W')H(W−W')ᵀ)."""
    # Rows whose second moments are H, so that an ordinary solver does the work.
    rows = torch.linalg.cholesky(h).T
    target = rows @ weight.T
    if not kept:
        return target.square().sum().item()
    solution = torch.linalg.lstsq(rows[:, kept], target).solution
    return (target - rows[:, kept] @ solution).square().sum().item()


def slow(h, weight, units, queries=1):
    """Backward elimination of `units` (lists of channels) by trying every one each time.

    Of groups of `queries` units, those that have most left are next.
    """
    alive, order, costs = list(range(len(units))), [], []
    paid = 0.0
    while alive:
        sizes = [sum(other // queries == unit // queries for other in alive) for unit in alive]
        left = {
            unit: residual(h, weight, [j for other in alive if other != unit for j in units[other]])
            for unit, size in zip(alive, sizes, strict=True)
            if size == max(sizes)
        }
        best = min(left, key=left.get)
        alive.remove(best)
        order.append(best)
        costs.append(left[best] - paid)
        paid = left[best]
    return order, costs


def solved(x, weight):
    scale, inverse = damped_inverse((x.T @ x).float())
    return inverse, weight * scale


def products_of(x, weight):
    inverse, columns = solved(x, weight)
    return inverse, columns.T @ columns


def test_channels_go_as_brute_force_says_at_the_cost_it_says():
    x, weight = problem(60, 12, 5)
    order, costs = eliminate_channels(*solved(x, weight))
    expected_order, expected_costs = slow(damped(x), weight, [[j] for j in range(12)])
    assert order.tolist() == expected_order
    assert costs.tolist() == pytest.approx(expected_costs, rel=1e-3)


@pytest.mark.parametrize("queries", [1, 2, 3, 6])
def test_heads_go_as_brute_force_says_at_the_cost_it_says(queries):
    x, weight = problem(80, 24, 7)
    order, costs = eliminate_heads(*products_of(x, weight), 4, queries)
    heads = [list(range(start, start + 4)) for start in range(0, 24, 4)]
    expected_order, expected_costs = slow(damped(x), weight, heads, queries)
    assert order.tolist() == expected_order
    assert costs.tolist() == pytest.approx(expected_costs, rel=1e-4)


def test_no_exchange_makes_a_round_cheaper_and_greed_is_never_better():
    heads = [list(range(start, start + 2)) for start in range(0, 18, 2)]
    better = 0
    for seed in range(12):
        torch.manual_seed(seed)
        # Heads that stand in for heads of other groups, so that single costs mislead.
        x = torch.randn(60, 6, dtype=torch.float64) @ torch.randn(6, 18, dtype=torch.float64)
        x = x + 0.3 * torch.randn(60, 18, dtype=torch.float64)
        weight = torch.randn(5, 18, dtype=torch.float64)
        h = damped(x)

        def cost(gone, h=h, weight=weight):
            kept = [head for head in range(9) if head not in gone]
            return residual(h, weight, [j for head in kept for j in heads[head]])

        first = eliminate_heads(*products_of(x, weight), 2, 3)[0][:3].tolist()
        assert sorted(head // 3 for head in first) == [0, 1, 2]
        exchanged = [
            cost([*first[:turn], 3 * (first[turn] // 3) + other, *first[turn + 1 :]])
            for turn in range(3)
            for other in range(3)
        ]
        assert cost(first) <= min(exchanged) * (1 + 1e-4)
        greedy = cost(slow(h, weight, heads, 3)[0][:3])
        assert cost(first) <= greedy * (1 + 1e-4)
        better += cost(first) < greedy * (1 - 1e-4)
    assert better


def test_a_group_is_worth_what_its_heads_are_together():
    x, weight = problem(80, 24, 7)
    inverse, columns = solved(x, weight)
    products = columns.T @ columns
    scores = head_energies(inverse, columns, 4, 2).unflatten(0, (3, 2))
    groups = [list(range(start, start + 8)) for start in range(0, 24, 8)]
    order, costs = slow(damped(x), weight, groups)
    assert scores.mean(1)[order].tolist() == pytest.approx(
        torch.tensor(costs).cummax(0).values.tolist(), rel=1e-4
    )
    first_gone = eliminate_heads(inverse, products, 4, 2)[0][:3].tolist()
    assert sorted(int(scores[group].argmin()) + 2 * group for group in range(3)) == sorted(
        first_gone
    )


def one_by_one(h, weight):
    """The same in float64, one channel at a time, every update of everything."""
    p, w, alive, order = torch.linalg.inv(h), weight.clone(), list(range(len(h))), []
    while alive:
        costs = [(w[:, j].square().sum() / p[j, j]).item() for j in alive]
        j = alive.pop(min(range(len(alive)), key=costs.__getitem__))
        order.append(j)
        w = w - torch.outer(w[:, j], p[j] / p[j, j])
        p = p - torch.outer(p[:, j], p[j] / p[j, j])
    return order


def test_blocks_in_single_precision_lose_nothing_over_one_by_one():
    width = 400
    x, weight = problem(900, width, 50)
    h = damped(x)
    order, costs = eliminate_channels(*solved(x, weight))
    reference = one_by_one(h, weight)
    assert sorted(order.tolist()) == list(range(width))
    for gone in (width // 10, width // 3, width // 2, width * 9 // 10):
        left = residual(h, weight, sorted(order[gone:].tolist()))
        assert left == pytest.approx(residual(h, weight, sorted(reference[gone:])), rel=0.01)
        assert costs[:gone].sum().item() == pytest.approx(left, rel=1e-3)


def test_of_twins_one_stays():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 300, generator=generator, dtype=torch.float64).repeat(1, 2)
    weight = torch.randn(20, 300, generator=generator, dtype=torch.float64).repeat(1, 2)
    order, _ = eliminate_channels(*solved(x, weight))
    assert {j % 300 for j in order[300:].tolist()} == set(range(300))


def test_a_dead_module_still_has_an_order():
    order, costs = eliminate_channels(*solved(torch.zeros(10, 6), torch.eye(6)))
    assert sorted(order.tolist()) == list(range(6))
    assert costs.isfinite().all()


def test_every_layer_is_eliminated_on_its_own_moments(model, windows):
    windows = windows[0]
    found = eliminate(model, windows)
    stream, head_dim = Stream(model, windows), model.model.layers[0].self_attn.head_dim
    for number in range(len(model.model.layers)):
        for module, name in (("mha", "head_channels"), ("mlp", "channels")):
            hidden = stream.hidden.clone()
            rows = torch.cat(list(weighted_rows(stream, number, module, 1e-6)))
            seen = {}
            projection = output_projections(model.model.layers[number])[module]
            handle = projection.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.setdefault("x", inputs[0])
            )
            layer = model.model.layers[number]
            if module == "mha":
                written = layer.self_attn(
                    layer.input_layernorm(hidden), **stream.arguments[number]
                )[0]
            else:
                written = layer.mlp(layer.post_attention_layernorm(hidden))
            handle.remove()
            norm = (hidden + written).square().mean(-1, keepdim=True).sqrt()
            expected = (seen["x"] / norm).flatten(0, 1)
            torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-4)
            scale, inverse = damped_inverse(second_moments([rows], rows.shape[1]))
            columns = projection.weight.double() * scale
            order, _ = eliminate_channels(inverse, columns)
            assert found[name][number, order].tolist() == list(range(len(order)))
            if module == "mha":
                queries = layer.self_attn.num_key_value_groups
                expected = head_energies(inverse, columns, head_dim, queries)
                torch.testing.assert_close(found["heads"][number], expected)
                if queries == 1:
                    order, _ = eliminate_heads(inverse, columns.T @ columns, head_dim)
                    assert found["heads"][number, order].diff().gt(0).all()
