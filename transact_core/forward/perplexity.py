"""Perplexity, and its standard error.

Each window is scored alone, nothing is prepended, its first token is not scored. Perplexity is
`exp(Σ NLL / scored tokens)` with NLL in float32 whatever the model computes in.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.layers import behind_layers, logits_of, on_disk

LOGITS_AT_ONCE = 1 << 25
"""Logits that are held at a time, in number: 128 MB in float32, and a softmax of the same size. The
usual windows (512 tokens of a vocabulary of 49,152) are scored in one piece; a window of 32,768
tokens of a vocabulary of 128,256 would otherwise take 17 GB for each of the two."""


@dataclass(frozen=True)
class Evaluation:
    """Losses of one model on one set of windows.

    `nll` has shape (windows, sequence_length − 1): the negative log-likelihood of each scored
    token in nats, float32 on the CPU.
    """

    nll: torch.Tensor = field(repr=False)

    @property
    def scored_tokens(self) -> int:
        return self.nll.numel()

    @property
    def mean_nll(self) -> float:
        return self.nll.double().sum().item() / self.scored_tokens

    @property
    def perplexity(self) -> float:
        """Infinite where the loss is too large for a float to hold its exponential."""
        try:
            return math.exp(self.mean_nll)
        except OverflowError:
            return math.inf


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    progress: Progress = silent,
    stage: str = "Measuring perplexity",
) -> Evaluation:
    """Scores every window alone.

    Raises:
        TransActError: a loss is NaN or infinite.
    """
    if on_disk(model):
        ids = windows.ids.to(model.device)
        hidden = behind_layers(model, ids, lambda done, total: progress(stage, done, total))
        return Evaluation(nll=require_losses(losses_behind_layers(model, hidden, windows)))
    losses = []
    for done, window in enumerate(windows.ids.to(model.device)):
        progress(stage, done, len(windows))
        losses.append(_losses_of_window(model, window))
    progress(stage, len(windows), len(windows))
    return Evaluation(nll=require_losses(torch.stack(losses).cpu()))


def require_losses(nll: torch.Tensor) -> torch.Tensor:
    """The losses, where all of them are numbers.

    Raises:
        TransActError: one is NaN or infinite.
    """
    if not nll.isfinite().all():
        raise TransActError(
            "The model's loss is not a number: its weights are damaged, or it overflows in its "
            "dtype; compute and save in float32 or bfloat16."
        )
    return nll


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token after the first, given those before it, in nats.

    `ids` has shape (tokens,) and lies on the model's device; the result has shape (tokens − 1,),
    float32 on the CPU. At most `LOGITS_AT_ONCE` logits are held at a time, one token's at least.
    """
    return _losses_of_window(model, ids).cpu()


def _losses_of_window(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """As `token_losses`, on the model's device: to copy them is to wait for it."""
    if on_disk(model):
        states = model.model.norm(behind_layers(model, ids[None]))[0]
    else:
        states = model.model(ids[None], use_cache=False).last_hidden_state[0]
    return _losses_of_states(model, states, ids)


def losses_behind_layers(
    model: PreTrainedModel, hidden: torch.Tensor, windows: Windows
) -> torch.Tensor:
    """What `evaluate` measures, from residual streams that have passed all layers already.

    `hidden` has shape (windows, sequence_length, hidden_size); the result (windows, sequence_length
    − 1), in nats, float32 on the CPU. Logits are held as in `token_losses`.
    """
    ids = windows.ids.to(model.device)
    return torch.stack(
        [
            _losses_of_states(model, model.model.norm(states), window)
            for states, window in zip(hidden, ids, strict=True)
        ]
    ).cpu()


def tokens_at_once(model: PreTrainedModel) -> int:
    """How many tokens have `LOGITS_AT_ONCE` logits together, one at least."""
    return max(1, LOGITS_AT_ONCE // model.config.vocab_size)


def _losses_of_states(
    model: PreTrainedModel, states: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The losses of one window, from what its LM head reads, shape (tokens, hidden_size); on the
    model's device."""
    at_once = tokens_at_once(model)
    losses = []
    for start in range(0, len(ids) - 1, at_once):
        targets = ids[1:][start : start + at_once]
        logits = logits_of(model, states[start : start + len(targets)]).float()
        losses.append(functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses)


def paired_difference(pruned: Evaluation, dense: Evaluation) -> tuple[float, float]:
    """Mean per-token difference of NLL from the dense model, in nats, and its standard error.

    Tokens of one window share their context, so the error is taken over windows: the standard
    deviation of the windows' mean differences, divided by the square root of the number of windows.
    NaN with a single window.
    """
    difference = (pruned.nll - dense.nll).double().mean(dim=1)
    windows = len(difference)
    error = difference.std().item() / math.sqrt(windows) if windows > 1 else math.nan
    return difference.mean().item(), error
