import math
from dataclasses import replace

import pytest
import torch

from tests.conftest import make_model, windows_for
from transact_core.base.errors import Cancelled, TransActError
from transact_core.forward import perplexity
from transact_core.forward.perplexity import evaluate
from transact_core.forward.token_damage import TokenDamage, measure_token_damage
from transact_core.pruning.surgery import round_weights


@pytest.fixture
def windows(tokenizer):
    return windows_for(tokenizer, evaluation_tokens=96)[1]


def disturbed():
    model, generator = make_model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_divergences_and_guesses_are_those_of_the_whole_distributions(
    windows, monkeypatch, at_once
):
    dense, pruned = make_model(), disturbed()
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", at_once * dense.config.vocab_size)
    damage = measure_token_damage(dense, pruned, windows)
    assert damage.ids.tolist() == windows.ids[:, 1:].tolist()
    for index, window in enumerate(windows.ids):
        p, q = (
            model(window[None]).logits[0, :-1].double().softmax(-1) for model in (dense, pruned)
        )
        expected = (p * (p / q).log()).sum(-1)
        assert damage.divergence[index].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        for probabilities, guesses, kept in (
            (p, damage.dense_guesses, damage.dense_probabilities),
            (q, damage.pruned_guesses, damage.pruned_probabilities),
        ):
            best = probabilities.topk(3)
            assert guesses[index].tolist() == best.indices.tolist()
            assert kept[index].flatten().tolist() == pytest.approx(
                best.values.flatten().tolist(), abs=1e-5
            )
    for model, nll in ((dense, damage.dense_nll), (pruned, damage.pruned_nll)):
        torch.testing.assert_close(nll, evaluate(model, windows).nll)


def test_a_model_does_itself_no_damage(windows):
    model = make_model()
    damage = measure_token_damage(model, model, windows)
    assert damage.divergence.abs().max() < 1e-6
    assert damage.mean == pytest.approx(0, abs=1e-6)


def with_divergence(rows):
    divergence = torch.tensor(rows)
    rest = [divergence] * 7
    return TokenDamage(divergence, *rest)


def test_the_worst_come_first_and_carry_their_share():
    damage = with_divergence([[0.0, 4.0, 1.0, 1.0, 0.0], [6.0, 2.0, 1.0, 1.0, 0.0]])
    assert damage.worst(3) == [(1, 0), (0, 1), (1, 1)]
    assert len(damage.worst()) == 10
    assert damage.worst_share() == pytest.approx(10 / 16)
    assert damage.worst_share(1.0) == 1
    assert damage.mean == pytest.approx(1.6)
    assert damage.error == pytest.approx(0.4)
    assert math.isnan(with_divergence([[0.0, 0.0]]).worst_share())
    assert math.isnan(with_divergence([[1.0, 0.0]]).error)


def test_it_can_be_cancelled_at_each_window(windows):
    def cancel(stage, done, total):
        assert total == len(windows)
        if done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        measure_token_damage(make_model(), disturbed(), windows, progress=cancel)


def test_models_that_cannot_be_compared_are_refused(windows):
    with pytest.raises(TransActError, match="cannot be compared"):
        measure_token_damage(make_model(), make_model(vocab_size=330), windows)
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TransActError, match="not a number"):
        measure_token_damage(make_model(), broken, replace(windows, ids=windows.ids[:1]))


def test_rounding_does_little_damage(windows):
    dense, rounded = make_model(), make_model()
    round_weights(rounded, torch.bfloat16)
    damage = measure_token_damage(dense, rounded, windows)
    assert 0 < damage.mean < measure_token_damage(dense, disturbed(), windows).mean
