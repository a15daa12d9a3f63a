"""The dense model as a teacher, at hand or as it was written down before."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from transact_core.training.objective import FullTargets, Targets, scored_states, token_losses


class Teacher(Protocol):
    """Whoever says what the dense model would have made of each token.

    `text` is the name under which the windows are known, `rows` which of them are asked for.
    """

    def targets(self, text: str, rows: list[int], ids: torch.Tensor) -> Targets:
        """What is said of the next tokens of some windows, `ids` of shape (rows, tokens)."""

    def nll(self, text: str, rows: list[int], ids: torch.Tensor) -> torch.Tensor:
        """The dense model's NLL of each scored token, in nats, float32 on the CPU."""


class LiveTeacher:
    """The dense model in memory; its weights are read and never written."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def targets(self, text: str, rows: list[int], ids: torch.Tensor) -> Targets:
        return FullTargets(self.model, scored_states(self.model, ids)[0])

    def nll(self, text: str, rows: list[int], ids: torch.Tensor) -> torch.Tensor:
        return token_losses(self.model, ids, self.targets(text, rows, ids)).nll
