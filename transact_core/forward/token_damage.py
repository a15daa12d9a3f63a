"""What a cut breaks, token by token: how far two models' predictions of the same text differ.

The damage at a token is the Kullback–Leibler divergence of the pruned model's distribution of the
next token from the dense model's, Σ p log(p / q) with p the dense model's, in nats. It is 0 where
both predict the same, whatever the text says next.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.layers import logits_of
from transact_core.forward.perplexity import tokens_at_once

WORST_SHARE = 0.2
"""The share of tokens whose part of the damage is reported: a fifth."""


@dataclass(frozen=True)
class TokenDamage:
    """The predictions of two models at every token of a text but the first of each window.

    Everything has shape (windows, sequence_length − 1), guesses one more dimension of `top`
    entries, the most probable first. Entry t of a window is about its token t + 1, predicted from
    the tokens before it. All lie on the CPU.
    """

    ids: torch.Tensor = field(repr=False)
    """The tokens predicted."""
    divergence: torch.Tensor = field(repr=False)
    """In nats, float32; never negative."""
    dense_nll: torch.Tensor = field(repr=False)
    """Negative log-likelihood of the token in the dense model, in nats."""
    pruned_nll: torch.Tensor = field(repr=False)
    dense_guesses: torch.Tensor = field(repr=False)
    """Token ids."""
    dense_probabilities: torch.Tensor = field(repr=False)
    """Of these guesses."""
    pruned_guesses: torch.Tensor = field(repr=False)
    pruned_probabilities: torch.Tensor = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean divergence of a token, in nats."""
        return self.divergence.double().mean().item()

    @property
    def error(self) -> float:
        """Standard error of the mean, over windows, whose tokens share a context; NaN with one."""
        means = self.divergence.double().mean(dim=1)
        return means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan

    def worst(self, count: int | None = None) -> list[tuple[int, int]]:
        """Window and entry of the most damaged tokens, the worst first; of all by default."""
        order = self.divergence.flatten().argsort(descending=True, stable=True)[:count]
        width = self.divergence.shape[1]
        return [divmod(place, width) for place in order.tolist()]

    def worst_share(self, share: float = WORST_SHARE) -> float:
        """The part of all damage that the most damaged `share` of the tokens carries, in [0, 1].

        NaN where there is no damage at all.
        """
        damage = self.divergence.flatten().double().sort(descending=True).values
        total = damage.sum().item()
        count = max(1, round(share * len(damage)))
        return damage[:count].sum().item() / total if total > 0 else math.nan


@torch.inference_mode()
def measure_token_damage(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Windows,
    top: int = 3,
    progress: Progress = silent,
    stage: str = "Comparing predictions",
) -> TokenDamage:
    """Both models' predictions over the same windows, each window fed alone.

    `top` is the number of guesses kept of each. `progress` is called before each window and may
    raise to stop. At most `LOGITS_AT_ONCE` logits of each model are held at a time.

    Raises:
        TransActError: the vocabularies differ, or a prediction is not a number.
    """
    if dense.config.vocab_size != pruned.config.vocab_size:
        raise TransActError(
            f"The models have vocabularies of {dense.config.vocab_size:,} and "
            f"{pruned.config.vocab_size:,} tokens; their predictions cannot be compared."
        )
    found = []
    for done, window in enumerate(windows.ids):
        progress(stage, done, len(windows))
        found.append(_compare(dense, pruned, window, top))
    progress(stage, len(windows), len(windows))
    return TokenDamage(windows.ids[:, 1:].cpu(), *map(torch.stack, zip(*found, strict=True)))


def _compare(
    dense: PreTrainedModel, pruned: PreTrainedModel, ids: torch.Tensor, top: int
) -> tuple[torch.Tensor, ...]:
    """What `TokenDamage` holds of one window, in the order of its fields after `ids`."""
    models = (dense, pruned)
    states = [
        model.model(ids[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]
        for model in models
    ]
    targets = ids[1:].to(dense.device)
    at_once = tokens_at_once(dense)
    parts = []
    for start in range(0, len(targets), at_once):
        p, q = (
            logits_of(model, state[start : start + at_once])
            .float()
            .log_softmax(-1)
            .to(dense.device)
            for model, state in zip(models, states, strict=True)
        )
        here = targets[start : start + at_once, None]
        # Rounding can leave a divergence of two equal distributions a little below zero.
        divergence = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)
        best = [log.topk(top) for log in (p, q)]
        parts.append(
            (
                divergence,
                -p.gather(1, here)[:, 0],
                -q.gather(1, here)[:, 0],
                best[0].indices,
                best[0].values.exp(),
                best[1].indices,
                best[1].values.exp(),
            )
        )
    whole = tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))
    if not all(part.isfinite().all() for part in whole[:3]):
        raise TransActError(
            "A prediction is not a number: the weights are damaged, or overflow in their dtype; "
            "compute and save in float32 or bfloat16."
        )
    return whole
