import random

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.conftest import KINDS, VOCAB_SIZE, make_model
from transact_core.base.errors import Cancelled, TransActError
from transact_core.forward import continuations, perplexity
from transact_core.forward.continuations import (
    Request,
    _common_beginning,
    score_continuations,
    shares_contexts,
)

MAX_LENGTH = 50


def some_groups(seed=0, groups=8):
    """Questions with one to five answers of one to nine tokens, some of them cut off on the left."""
    draw = random.Random(seed)

    def tokens(most):
        return tuple(draw.choices(range(VOCAB_SIZE), k=draw.randint(1, most)))

    found = []
    for _ in range(groups):
        context = tokens(60)
        found.append([Request(context, tokens(9)) for _ in range(draw.randint(1, 5))])
    # Contexts that differ in the middle, as where an option stands inside a sentence.
    start, end = tokens(20), tokens(5)
    found.append([Request(start + tokens(3), end) for _ in range(2)])
    # Continuations of one token that share all that is read.
    found.append([Request(start, (token,)) for token in range(4)])
    return found


def separately(model, request):
    """Each request by a forward pass of its own, over all positions."""
    sequence = (request.context + request.continuation)[-(MAX_LENGTH + 1) :]
    logits = model(torch.tensor([sequence[:-1]], device=model.device)).logits[0].float().cpu()
    scored = logits.log_softmax(-1)[-len(request.continuation) :]
    targets = torch.tensor(request.continuation)
    likelihood = scored.gather(1, targets[:, None]).sum().item()
    return likelihood, bool((scored.argmax(-1) == targets).all())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_rows_give_what_separate_rows_give(kind, attention, device):
    model = make_model(**KINDS[kind], attn_implementation=attention).to(device)
    groups = some_groups()
    answers = score_continuations(model, groups, MAX_LENGTH)
    assert [len(found) for found in answers] == [len(group) for group in groups]
    for group, found in zip(groups, answers, strict=True):
        for request, answer in zip(group, found, strict=True):
            likelihood, greedy = separately(model, request)
            assert answer.log_likelihood == pytest.approx(likelihood, abs=2e-4)
            assert answer.is_greedy == greedy


def test_an_answer_that_the_model_would_write_is_greedy():
    model = make_model()
    context = (5, 7, 11)
    logits = model(torch.tensor([context])).logits[0, -1]
    (answers,) = score_continuations(
        model, [[Request(context, (int(logits.argmax()),)), Request(context, (3,))]], MAX_LENGTH
    )
    assert [answer.is_greedy for answer in answers] == [True, False]


def test_a_context_is_fed_once_and_the_head_reads_scored_positions_alone():
    model = make_model()
    fed, read = [], []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, given: fed.append(given[0].numel())
    )
    model.lm_head.register_forward_pre_hook(
        lambda _, given: read.append(given[0].shape[:-1].numel())
    )
    context = tuple(range(30))
    group = [Request(context, (100 + answer, 7, 8)) for answer in range(4)]
    score_continuations(model, [group], MAX_LENGTH)
    # The context and the first two tokens of each answer; the last is predicted alone.
    assert fed == [30 + 4 * 2]
    # One prediction of the first token for all four, and two more for each.
    assert read == [1 + 4 * 2]


@pytest.mark.parametrize("tokens_at_once", [1, 100, 100_000])
def test_batches_change_nothing_but_rounding(monkeypatch, tokens_at_once):
    model, groups = make_model(), some_groups(1)
    monkeypatch.setattr(continuations, "TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", tokens_at_once * VOCAB_SIZE // 10)
    for group, found in zip(groups, score_continuations(model, groups, MAX_LENGTH), strict=True):
        for request, answer in zip(group, found, strict=True):
            assert answer.log_likelihood == pytest.approx(separately(model, request)[0], abs=2e-4)


def test_long_rows_do_not_branch(monkeypatch):
    model, groups = make_model(), some_groups(2)
    monkeypatch.setattr(continuations, "LONGEST_SHARED_ROW", 0)
    for group, found in zip(groups, score_continuations(model, groups, MAX_LENGTH), strict=True):
        for request, answer in zip(group, found, strict=True):
            assert answer.log_likelihood == pytest.approx(separately(model, request)[0], abs=2e-4)


def test_layers_that_see_a_window_share_no_rows():
    """A mask of the row's own would let them see everything."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.2,
    )
    model = MistralForCausalLM(config).eval()
    assert not shares_contexts(model)
    assert shares_contexts(make_model())
    groups = some_groups(3)
    for group, found in zip(groups, score_continuations(model, groups, MAX_LENGTH), strict=True):
        for request, answer in zip(group, found, strict=True):
            assert answer.log_likelihood == pytest.approx(separately(model, request)[0], abs=2e-4)


def test_what_the_callback_raises_ends_the_run_before_the_next_batch():
    model, forwards = make_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: forwards.append(1))
    counts = []

    def cancel(stage, done, total):
        counts.append((done, total))
        if len(counts) == 3:
            raise Cancelled

    groups = [[Request(tuple(range(40)), (1, 2))] for _ in range(100)]
    with pytest.raises(Cancelled):
        score_continuations(model, groups, MAX_LENGTH, cancel)
    assert len(forwards) == 2
    assert counts[0] == (0, 100)
    assert 0 < counts[1][0] < counts[2][0] < 100


@pytest.mark.parametrize("context", [(), (1,)])
def test_requests_that_cannot_be_scored_are_refused(context):
    model = make_model()
    with pytest.raises(TransActError, match="must hold a token each"):
        score_continuations(model, [[Request(context, () if context else (1,))]], MAX_LENGTH)
    with pytest.raises(TransActError, match="longer than the 50"):
        score_continuations(model, [[Request((1,), tuple(range(51)))]], MAX_LENGTH)


def test_a_model_whose_numbers_are_none_is_refused():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TransActError, match="not a number"):
        score_continuations(model, [[Request((1,), (2,))]], MAX_LENGTH)


def test_common_beginnings():
    assert _common_beginning([(1, 2, 3)]) == 3
    assert _common_beginning([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert _common_beginning([(1, 2), (3,)]) == 0
    assert _common_beginning([(), (3,)]) == 0
