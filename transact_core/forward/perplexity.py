"""Perplexity, and how sure it is.

Each window is scored alone, nothing is prepended, its first token is not scored. Perplexity is
`exp(Σ NLL / scored tokens)` with NLL in float32 whatever the model computes in.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows


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
    model: LlamaForCausalLM,
    windows: Windows,
    progress: Progress = silent,
    stage: str = "Measuring perplexity",
) -> Evaluation:
    """Scores every window alone."""
    losses = []
    for done, window in enumerate(windows.ids.to(model.device)):
        progress(stage, done, len(windows))
        losses.append(token_losses(model, window))
    progress(stage, len(windows), len(windows))
    return Evaluation(nll=require_losses(torch.stack(losses)))


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
def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each token after the first, given those before it, in nats.

    `ids` has shape (tokens,) and lies on the model's device; the result has shape (tokens − 1,),
    float32 on the CPU.
    """
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), ids[1:], reduction="none").cpu()


def losses_behind_layers(
    model: LlamaForCausalLM, hidden: torch.Tensor, windows: Windows
) -> torch.Tensor:
    """What `evaluate` measures, of residual streams that have passed the layers already.

    `hidden` has shape (windows, sequence_length, hidden_size); the result (windows, sequence_length
    − 1), in nats, float32 on the CPU. A window's logits are held at a time.
    """
    losses = []
    for states, ids in zip(hidden, windows.ids.to(hidden.device), strict=True):
        logits = model.lm_head(model.model.norm(states[:-1]))
        losses.append(functional.cross_entropy(logits.float(), ids[1:], reduction="none").cpu())
    return torch.stack(losses)


def paired_difference(pruned: Evaluation, dense: Evaluation) -> tuple[float, float]:
    """Mean per-token difference of NLL from the dense model, in nats, and its standard error.

    Tokens of one window share their context, so the error is taken over windows: the spread of the
    windows' mean differences over the square root of their number. NaN with a single window.
    """
    difference = (pruned.nll - dense.nll).double().mean(dim=1)
    windows = len(difference)
    error = difference.std().item() / math.sqrt(windows) if windows > 1 else math.nan
    return difference.mean().item(), error
