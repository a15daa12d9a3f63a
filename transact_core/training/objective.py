"""What training minimises: the divergence from the teacher's next-token distribution, or the loss.

For every scored token, with the teacher's distribution p and the student's q, in nats:

    kl      Σ p (log p − log q), forward KL (Hinton et al. 2015, arXiv 1503.02531, at temperature 1)
    ce      −log q of the token that follows in the text
    kl+ce   half of each

Logits of a whole window are never held: the LM head and the loss run on a few tokens at a time, and
the gradient of the logits, q minus the target distribution, is taken there and then.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from transformers import PreTrainedModel

from transact_core.forward.layers import logits_of
from transact_core.forward.perplexity import tokens_at_once

LossName = Literal["kl", "kl+ce", "ce"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
KL_WEIGHT: dict[LossName, float] = {"kl": 1.0, "kl+ce": 0.5, "ce": 0.0}
"""Share of the divergence in each loss; the rest is the cross-entropy."""


class Targets(Protocol):
    """What the teacher says of the next token, for the scored tokens of some windows in order."""

    def compare(self, log_q: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence at each token, and the distribution to which the gradient leads.

        `log_q` has shape (tokens, vocabulary) and belongs to the scored tokens from `start` on. The
        gradient of the divergence with respect to the logits is `exp(log_q)` minus the second
        result, of the same shape.
        """


@dataclass(frozen=True)
class FullTargets:
    """The teacher's whole distribution, from what its LM head reads."""

    teacher: PreTrainedModel
    states: torch.Tensor
    """Shape (scored tokens, hidden_size), behind the last norm."""

    def compare(self, log_q: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(self.teacher, self.states[start : start + len(log_q)])
        log_p = logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        return torch.einsum("tv,tv->t", p, log_p.sub_(log_q)), p


@dataclass(frozen=True)
class TopTargets:
    """The teacher's most likely tokens, and what all others have together.

    The divergence is that of these k + 1 outcomes, which is at most that of the whole distribution.
    """

    tokens: torch.Tensor
    """Shape (scored tokens, k), ids."""
    log_p: torch.Tensor
    """Shape (scored tokens, k); rounded to 16 bits where it was written down."""
    tail: torch.Tensor | None = None
    """Shape (scored tokens,): what all others have together; None to take what is left of 1."""

    def compare(self, log_q: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(start, start + len(log_q))
        tokens, log_p = self.tokens[rows].long(), self.log_p[rows].float()
        p, log_q_top = log_p.exp(), log_q.gather(1, tokens)
        if self.tail is None:
            tail_p = (1 - p.sum(dim=1)).clamp_min(0)
        else:
            # Rounding has moved the sum a little from 1.
            tail_p = self.tail[rows]
            scale = (1 - tail_p) / p.sum(dim=1)
            p, log_p = p * scale[:, None], log_p + scale.log()[:, None]
        q = log_q.exp()
        tail_q = (1 - log_q_top.exp().sum(dim=1)).clamp_min(torch.finfo(torch.float32).tiny)
        tail = torch.where(tail_p > 0, tail_p * (tail_p / tail_q).log(), 0)
        divergence = (p * (log_p - log_q_top)).sum(dim=1) + torch.nan_to_num(tail)
        target = q * (tail_p / tail_q)[:, None]
        return divergence, target.scatter_(1, tokens, p)


@torch.no_grad()
def top_of(
    model: PreTrainedModel, states: torch.Tensor, following: torch.Tensor, top: int
) -> tuple[torch.Tensor, ...]:
    """The most likely tokens, their log-probabilities, the tail's mass, and NLL, a row a token.

    `states` and `following` are as `scored_states` gives them.
    """
    found = []
    for start in range(0, len(states), tokens_at_once(model)):
        rows = slice(start, start + tokens_at_once(model))
        log_p = logits_of(model, states[rows]).float().log_softmax(dim=-1)
        values, tokens = log_p.topk(min(top, log_p.shape[1]), dim=-1)
        # Summed over the others, as 1 minus the sum would lose a small tail to rounding.
        others = log_p.exp().scatter_(1, tokens, 0.0)
        nll = -log_p.gather(1, following[rows][:, None])[:, 0]
        found.append((tokens, values, others.sum(dim=1), nll))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@dataclass(frozen=True)
class TokenLosses:
    """By token, each of shape (scored tokens,): divergence from the teacher, and NLL, in nats."""

    kl: torch.Tensor
    nll: torch.Tensor


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor, targets: Targets) -> TokenLosses:
    """Divergence and NLL of windows, `ids` of shape (windows, tokens); the last token of each
    window predicts nothing. Both are float32 on the CPU."""
    states, following = scored_states(model, ids)
    found = []
    for start in range(0, len(states), tokens_at_once(model)):
        logits = logits_of(model, states[start : start + tokens_at_once(model)])
        log_q = logits.float().log_softmax(dim=-1)
        chunk = following[start : start + len(log_q)]
        nll = -log_q.gather(1, chunk[:, None])[:, 0]
        found.append((targets.compare(log_q, start)[0].cpu(), nll.cpu()))
    kl, nll = (torch.cat(parts) for parts in zip(*found, strict=True))
    return TokenLosses(kl, nll)


def scored_states(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the LM head reads at the scored tokens, (windows · (tokens − 1), hidden_size), and the
    ids that follow them."""
    states = model.model(ids, use_cache=False).last_hidden_state
    return states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


def mean_loss(
    model: PreTrainedModel, ids: torch.Tensor, targets: Targets | None, loss: LossName
) -> torch.Tensor:
    """The loss to train on, a mean over the scored tokens, with its gradient.

    Args:
        targets: Not needed for `ce`.
    """
    states, following = scored_states(model, ids)
    head = model.get_output_embeddings().weight
    return _MeanLoss.apply(states, head, model, following, targets, KL_WEIGHT[loss])


class _MeanLoss(torch.autograd.Function):
    """Loss and gradients of LM head and states, a few tokens at a time."""

    @staticmethod
    def forward(ctx, states, head, model, following, targets, kl_weight):
        grad_states = torch.empty_like(states)
        grad_head = torch.zeros_like(head) if head.requires_grad else None
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        count = len(states)
        for start in range(0, count, tokens_at_once(model)):
            rows = slice(start, start + tokens_at_once(model))
            with torch.enable_grad():
                chunk = states[rows].detach().requires_grad_()
                logits = logits_of(model, chunk)
            log_q = logits.detach().float().log_softmax(dim=-1)
            next_tokens = following[rows][:, None]
            if kl_weight:
                divergence, target = targets.compare(log_q, start)
                total += kl_weight * divergence.double().sum().cpu()
                target *= kl_weight
            else:
                target = torch.zeros_like(log_q)
            if kl_weight < 1:
                total -= (1 - kl_weight) * log_q.gather(1, next_tokens).double().sum().cpu()
                target.scatter_add_(1, next_tokens, torch.full_like(log_q[:, :1], 1 - kl_weight))
            of_logits = log_q.exp_().sub_(target).div_(count).to(logits.dtype)
            wanted = [chunk] if grad_head is None else [chunk, head]
            grads = torch.autograd.grad(logits, wanted, of_logits)
            grad_states[rows] = grads[0]
            if grad_head is not None:
                grad_head += grads[1]
        ctx.save_for_backward(grad_states, grad_head)
        return (total / count).float().to(states.device)

    @staticmethod
    def backward(ctx, grad):
        grad_states, grad_head = ctx.saved_tensors
        of_head = None if grad_head is None else grad_head * grad
        return grad_states * grad, of_head, None, None, None, None
