import math

import pytest
import torch

from transact_core.forward import perplexity
from transact_core.forward.perplexity import (
    Evaluation,
    evaluate,
    losses_behind_layers,
    paired_difference,
)
from transact_core.forward.stream import Stream


def test_perplexity_equals_a_plain_loop(model, windows):
    total, count = 0.0, 0
    for window in windows[1].ids:
        for position in range(1, len(window)):
            logits = model(window[None, :position]).logits[0, -1]
            total -= torch.log_softmax(logits.float(), dim=0)[window[position]].item()
            count += 1
    measured = evaluate(model, windows[1])
    assert measured.scored_tokens == count
    assert measured.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_paired_difference_is_over_windows():
    torch.manual_seed(0)
    dense, change = torch.rand(5, 7), torch.rand(5, 7)
    mean, error = paired_difference(Evaluation(dense + change), Evaluation(dense))
    by_window = [sum(row) / len(row) for row in change.tolist()]
    average = sum(by_window) / 5
    variance = sum((each - average) ** 2 for each in by_window) / 4
    assert mean == pytest.approx(average, rel=1e-5)
    assert error == pytest.approx(math.sqrt(variance / 5), rel=1e-5)


def test_one_window_has_no_error():
    mean, error = paired_difference(Evaluation(torch.ones(1, 4)), Evaluation(torch.zeros(1, 4)))
    assert mean == 1
    assert math.isnan(error)


def test_a_loss_past_the_largest_float_is_infinite_perplexity():
    assert Evaluation(torch.full((1, 3), 1000.0)).perplexity == math.inf


@torch.no_grad()
def test_losses_in_pieces_are_the_same_bits_and_never_hold_more_logits(model, windows, monkeypatch):
    windows = windows[1]
    stream = Stream(model, windows)
    for layer_index in range(len(stream.layers)):
        stream.pass_layer(layer_index)

    def measured():
        behind = losses_behind_layers(model, stream.hidden, windows)
        return evaluate(model, windows).nll, behind

    whole = measured()
    held = []
    model.lm_head.register_forward_hook(lambda _, __, logits: held.append(logits.numel()))
    for tokens in (7, 1):
        held.clear()
        monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", tokens * model.config.vocab_size)
        for pieces, one_piece in zip(measured(), whole, strict=True):
            torch.testing.assert_close(pieces, one_piece, rtol=1e-6, atol=1e-6)
        assert max(held) == tokens * model.config.vocab_size
