"""The pruned model as a student: weights of its own, those that are trained, LoRA and its merge.

The embedding stays as it is, and with it an LM head that is tied to it: it is the largest matrix of
a small model, the cut has not touched it, and the divergence is taken in its basis. Weights are
float32 while they are trained, whatever they are stored in: steps of a small learning rate are lost
in 16 bits.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from transact_core.base.errors import TransActError
from transact_core.pruning.surgery import cast

Method = Literal["full", "lora"]
METHODS: tuple[Method, ...] = get_args(Method)
LORA_RANK = 32
LORA_MISSING = (
    "Training by LoRA needs the package peft, which is not installed: run `make tune` in a clone, "
    "or install the extra `tune`; or train with the method full."
)


@dataclass
class Student:
    """A model in training."""

    model: PreTrainedModel
    """The model itself; with LoRA, its projections carry the adapters."""
    method: Method
    adapted: Any = field(default=None, repr=False)
    """peft's model around it."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {
            name: weight for name, weight in self.model.named_parameters() if weight.requires_grad
        }

    def merged(self) -> PreTrainedModel:
        """The stock model with plain weights; the adapters are added to them and gone."""
        if self.adapted is not None:
            self.model = self.adapted.merge_and_unload()
            self.adapted = None
        return self.model.eval().requires_grad_(False)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapters as peft has them, to be put on the model that was trained."""
        self.adapted.save_pretrained(folder, safe_serialization=True)


def require_method(method: str) -> None:
    """Refuses a method that is not known, or whose library is not installed.

    Raises:
        TransActError: it is one of these.
    """
    if method not in METHODS:
        raise TransActError(f"The method {method!r} is none of {', '.join(METHODS)}.")
    if method == "lora" and importlib.util.find_spec("peft") is None:
        raise TransActError(LORA_MISSING)


def make_student(
    model: PreTrainedModel, method: Method, rank: int = LORA_RANK, seed: int = 0
) -> Student:
    """A student with weights of its own; `model`, and what it shares with others, stays as it is.

    Raises:
        TransActError: as `require_method` does.
    """
    require_method(method)
    own = cast(model, torch.float32)
    fixed = own.get_input_embeddings().weight
    # A merge writes into the weights that it adds to, so they are LoRA's own too.
    for module in own.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight is not fixed:
                trained = nn.Parameter(weight.detach().clone(), requires_grad=method == "full")
                setattr(module, name, trained)
    own.tie_weights()
    if method == "full":
        return Student(own, method)
    # Imported here: it takes seconds, and most runs never need it.
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=_projections(own), lora_dropout=0.0
        )
        adapted = get_peft_model(own, config)
    return Student(adapted.base_model.model, method, adapted)


def _projections(model: PreTrainedModel) -> list[str]:
    """The names of the linear maps of the decoder layers, as peft looks for them."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    return sorted(names)
