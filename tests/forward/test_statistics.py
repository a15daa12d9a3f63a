import math

import pytest
import torch

from transact_core.base.errors import Cancelled
from transact_core.data.windows import Windows
from transact_core.forward.statistics import (
    ActivationStatistics,
    channels_holding,
    collect,
    energy_shares,
)
from transact_core.importance.scores import IMPORTANCES


def by_hand(model, windows):
    """Every transitional activation, token by token, from the modules' own formulas."""
    layers = len(model.model.layers)
    seen = {"mha": [[] for _ in range(layers)], "mlp": [[] for _ in range(layers)]}
    for window in windows.ids:
        hidden = model.model(window[None], output_hidden_states=True).hidden_states
        for number, decoder in enumerate(model.model.layers):
            normed = decoder.input_layernorm(hidden[number])
            positions = model.model.rotary_emb(hidden[number], torch.arange(len(window))[None])
            bias = decoder.self_attn.o_proj.bias
            written = decoder.self_attn(normed, position_embeddings=positions)[0]
            # o_proj is undone: what it wrote tells what it read, since it has full column rank.
            weight = decoder.self_attn.o_proj.weight.double()
            target = (written if bias is None else written - bias).double()[0]
            read = torch.linalg.lstsq(weight, target.T).solution.T
            if weight.shape[1] <= weight.shape[0]:
                seen["mha"][number] += list(read)
            middle = decoder.post_attention_layernorm(hidden[number] + written)
            gate, up = decoder.mlp.gate_proj(middle), decoder.mlp.up_proj(middle)
            seen["mlp"][number] += list((gate * torch.sigmoid(gate) * up)[0].double())
    return seen


@pytest.fixture
def few(windows):
    return Windows(windows[0].source, windows[0].sha256, windows[0].ids[:3])


def test_sums_equal_a_token_by_token_reference(model, few):
    measured, seen = collect(model, few), by_hand(model, few)
    assert measured.tokens == few.tokens
    for module in ("mha", "mlp"):
        for number, tokens in enumerate(seen[module]):
            if not tokens:
                continue  # heads wider than the residual stream cannot be read off its writing
            statistics = getattr(measured, module)
            for channel in range(len(tokens[0])):
                values = [token[channel].item() for token in tokens]
                squares = sum(value * value for value in values)
                assert statistics.sum_of_squares[number, channel].item() == pytest.approx(
                    squares, rel=1e-3
                )
                assert statistics.norm[number, channel].item() == pytest.approx(
                    math.sqrt(squares), rel=1e-3
                )
                assert statistics.max_abs[number, channel].item() == pytest.approx(
                    max(map(abs, values)), rel=1e-3
                )
                assert statistics.sum[number, channel].item() == pytest.approx(
                    sum(values), rel=1e-3, abs=1e-2
                )


def test_sums_of_the_residual_stream_equal_a_plain_reference(model, few):
    residual = collect(model, few).residual
    hidden = model.model(few.ids, output_hidden_states=True).hidden_states
    for number in range(len(model.model.layers)):
        tokens = hidden[number].flatten(0, 1).double()
        torch.testing.assert_close(residual.sum[number], tokens.sum(0), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(
            residual.sum_of_squares[number], tokens.square().sum(0), rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(
            residual.max_abs[number], tokens.abs().amax(0), rtol=1e-3, atol=1e-3
        )


def test_activation_score_equals_its_formula(bench):
    statistics, shape = bench.statistics(), bench.loaded.architecture
    scores = bench.scores("activation")
    norms = statistics.mha.sum_of_squares.sqrt()
    for layer in range(shape.num_hidden_layers):
        for head in range(shape.num_attention_heads):
            mine = norms[layer, head * shape.head_dim : (head + 1) * shape.head_dim].tolist()
            expected = sum(mine) / len(mine) + 10 / shape.head_dim * max(mine)
            assert scores.heads[layer, head].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(scores.channels, statistics.mlp.sum_of_squares.sqrt())


def test_scores_as_a_table_name_every_unit_once(gqa_bench):
    shape = gqa_bench.loaded.architecture
    for importance in IMPORTANCES:
        frame = gqa_bench.scores(importance).to_frame(importance)
        assert not frame.duplicated(["layer", "module", "unit", "index"]).any()
        per_layer = shape.num_attention_heads + shape.mha_width + shape.intermediate_size
        assert len(frame) == per_layer * shape.num_hidden_layers
        row = frame.query("layer == 1 and unit == 'head' and index == 4").iloc[0]
        assert row.score == gqa_bench.scores(importance).heads[1, 4].item()


def test_memory_does_not_grow_with_the_tokens(model, windows, few):
    sizes = {
        sum(tensor.nbytes for tensor in collect(model, each).to_tensors().values())
        for each in (few, windows[0])
    }
    assert len(sizes) == 1


def test_no_hook_is_left_behind(model, few):
    collect(model, few)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_statistics_round_trip_as_tensors(model, few):
    measured = collect(model, few)
    again = ActivationStatistics.from_tensors(measured.to_tensors(), measured.tokens)
    assert torch.equal(again.mha.norm, measured.mha.norm)
    assert torch.equal(again.mlp.max_abs, measured.mlp.max_abs)


def test_concentration_is_a_plain_count(bench):
    statistics = bench.statistics().mlp
    shares = channels_holding(statistics, 0.9)
    for layer, row in enumerate(statistics.sum_of_squares.tolist()):
        held, count = 0.0, 0
        for energy in sorted(row, reverse=True):
            held, count = held + energy, count + 1
            if held >= 0.9 * sum(row):
                break
        assert shares[layer].item() == pytest.approx(count / len(row))
    assert torch.allclose(energy_shares(statistics)[:, -1], torch.ones(3, dtype=torch.float64))


def test_collecting_can_be_called_off_within_a_batch(gqa_model, windows):
    reports = []

    def progress(stage, done, total):
        reports.append((done, total))
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        collect(gqa_model, windows[0], progress)
    assert [done for done, _ in reports] == [0, 1, 2]
    collect(gqa_model, windows[0])
    assert not any(module._forward_pre_hooks for module in gqa_model.modules())
