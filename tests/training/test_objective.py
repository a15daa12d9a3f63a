"""The loss and its gradient against a slow plain loop over tokens."""

import itertools

import pytest
import torch

from tests.conftest import KINDS, VOCAB_SIZE, make_model
from transact_core.forward import perplexity
from transact_core.training.objective import (
    LOSSES,
    FullTargets,
    TopTargets,
    mean_loss,
    scored_states,
    token_losses,
)
from transact_core.training.teacher import LiveTeacher


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))


def disturbed(kind: str):
    """A student that differs from its teacher."""
    student = make_model(**KINDS[kind])
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=draw)
    return student


def plain_losses(student, teacher, ids) -> tuple[list[float], list[float]]:
    """Divergence and NLL of each scored token, one outcome at a time."""
    divergences, nlls = [], []
    for window in ids:
        for position in range(len(window) - 1):
            p = teacher(window[None, : position + 1]).logits[0, -1].double().softmax(0).tolist()
            q = student(window[None, : position + 1]).logits[0, -1].double().softmax(0)
            q = q.log().tolist()
            logs = torch.tensor(p, dtype=torch.float64).log().tolist()
            divergences.append(sum(a * (b - c) for a, b, c in zip(p, logs, q, strict=True)))
            nlls.append(-q[int(window[position + 1])])
    return divergences, nlls


@pytest.mark.parametrize("at_once", [3, 1000])
@pytest.mark.parametrize("kind", ["gqa", "gqa-biased-tied"])
def test_divergence_and_nll_are_those_of_a_plain_loop(kind, at_once, ids, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", at_once * VOCAB_SIZE)
    teacher, student = make_model(**KINDS[kind]), disturbed(kind)
    losses = token_losses(student, ids, LiveTeacher(teacher).targets("", [0, 1], ids))
    divergences, nlls = plain_losses(student, teacher, ids)
    torch.testing.assert_close(
        losses.kl.double(), torch.tensor(divergences).double(), atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        losses.nll.double(), torch.tensor(nlls).double(), atol=2e-5, rtol=1e-4
    )
    assert min(divergences) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["gqa", "gqa-tied"])
def test_gradients_are_those_of_the_plain_loss(kind, loss, ids, monkeypatch):
    """In chunks, with a head that is trained (not tied) and one that is not."""
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 5 * VOCAB_SIZE)
    teacher, student = make_model(**KINDS[kind]), disturbed(kind)
    student.requires_grad_(True)
    student.get_input_embeddings().weight.requires_grad_(False)
    targets = LiveTeacher(teacher).targets("", [0, 1], ids)
    value = mean_loss(student, ids, targets, loss)
    value.backward()
    gradients = {name: weight.grad for name, weight in student.named_parameters()}
    student.zero_grad(set_to_none=True)

    log_q = student(ids).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce = -log_q.gather(-1, ids[:, 1:, None]).mean()
    plain = {"kl": kl, "ce": ce, "kl+ce": (kl + ce) / 2}[loss]
    plain.backward()
    torch.testing.assert_close(value, plain, atol=1e-6, rtol=1e-5)
    for name, weight in student.named_parameters():
        if weight.grad is None:
            assert gradients[name] is None
        else:
            torch.testing.assert_close(gradients[name], weight.grad, atol=1e-6, rtol=1e-4)


def test_all_tokens_written_down_are_the_whole_distribution(ids):
    teacher, student = make_model(**KINDS["gqa"]), disturbed("gqa")
    full = LiveTeacher(teacher).targets("", [0, 1], ids)
    log_p = teacher(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    values, tokens = log_p.topk(VOCAB_SIZE, dim=-1)
    expected, found = (
        token_losses(student, ids, full),
        token_losses(student, ids, TopTargets(tokens, values)),
    )
    torch.testing.assert_close(found.kl, expected.kl, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top", [1, 7, 64])
def test_gradient_of_the_most_likely_tokens_and_the_tail(top, ids):
    """Against autograd through the divergence of top + 1 outcomes."""
    teacher, student = make_model(**KINDS["gqa"]), disturbed("gqa").requires_grad_(True)
    log_p, tokens = teacher(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1).topk(top, dim=-1)
    value = mean_loss(student, ids, TopTargets(tokens, log_p), "kl")
    value.backward()
    gradients = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    log_q = student(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1).gather(1, tokens)
    tail_p, tail_q = 1 - log_p.exp().sum(-1), 1 - log_q.exp().sum(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1) + tail_p * (tail_p / tail_q).log()
    plain.mean().backward()
    torch.testing.assert_close(value, plain.mean(), atol=1e-5, rtol=1e-4)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, atol=1e-5, rtol=1e-3)


def test_fewer_outcomes_diverge_less(ids):
    teacher, student = make_model(**KINDS["gqa"]), disturbed("gqa")
    log_p = teacher(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    found = []
    for top in (1, 8, 64, VOCAB_SIZE - 1):
        values, tokens = log_p.topk(top, dim=-1)
        found.append(token_losses(student, ids, TopTargets(tokens, values)).kl.mean().item())
    full = FullTargets(teacher, scored_states(teacher, ids)[0])
    found.append(token_losses(student, ids, full).kl.mean().item())
    # With all tokens but one the outcomes are the same, and so is the sum but for rounding.
    assert all(less <= more + 1e-5 for less, more in itertools.pairwise(found))
    assert found[0] < found[-1]
