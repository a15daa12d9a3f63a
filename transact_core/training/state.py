"""A training kept on disk: where it stands, and the best weights so far.

Both are safetensors files that appear whole or not at all, and their metadata is JSON, so nothing
is unpickled. A training depends on nothing but its state, its settings and its texts (there is no
dropout), so it goes on from a state as if it had never stopped.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from transact_core.base.errors import TransActError
from transact_core.base.files import disk_trouble, require_disk_space, staged_file

STATE, BEST = "state.safetensors", "best.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's own names of its moments."""
WEIGHTS = "weights"


class Work:
    """The folder of a training under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def begun(self) -> bool:
        return (self.folder / STATE).exists()

    def require_room(self, weights: dict[str, nn.Parameter]) -> None:
        """Refuses a folder whose disk cannot take what is kept of a training.

        A file is written beside the one that it replaces.

        Raises:
            TransActError: it has too little room, or the folder cannot be made.
        """
        size = sum(weight.numel() * 4 for weight in weights.values())
        require_disk_space(self.folder, 2 * (1 + len(MOMENTS)) * size + 2 * size)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TransActError(
                f"The folder {self.folder} cannot be made: {disk_trouble(error) or error}."
            ) from None

    def save(
        self,
        weights: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        standing: dict[str, Any],
    ) -> None:
        """Keeps weights, moments and `standing`, which is JSON, in place of what was kept before.

        Raises:
            TransActError: the disk is full or failed; what was kept before is still there.
        """
        tensors = {f"{WEIGHTS}/{name}": weight for name, weight in weights.items()}
        for name, weight in weights.items():
            for moment in MOMENTS:
                if moment in optimizer.state.get(weight, {}):
                    tensors[f"{moment}/{name}"] = optimizer.state[weight][moment]
        self._write(STATE, tensors, standing)

    def restore(
        self, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Puts weights and moments back and gives `standing`.

        Raises:
            TransActError: the file is damaged or of another training.
        """
        tensors, standing = self._read(STATE)
        _put(weights, tensors, self.folder / STATE)
        for name, weight in weights.items():
            moments = {moment: tensors.get(f"{moment}/{name}") for moment in MOMENTS}
            if all(tensor is not None for tensor in moments.values()):
                optimizer.state[weight] = {
                    "step": torch.tensor(float(standing["step"])),
                    **{moment: tensor.to(weight.device) for moment, tensor in moments.items()},
                }
        return standing

    def standing(self) -> dict[str, Any]:
        """What was kept beside the weights."""
        return self._read(STATE, only_metadata=True)[1]

    def save_best(self, weights: dict[str, nn.Parameter], facts: dict[str, Any]) -> None:
        """Keeps weights as the best ones so far, with what is known of them."""
        tensors = {f"{WEIGHTS}/{name}": weight for name, weight in weights.items()}
        self._write(BEST, tensors, facts)

    def restore_best(self, weights: dict[str, nn.Parameter]) -> None:
        """Puts the best weights back."""
        tensors, _ = self._read(BEST)
        _put(weights, tensors, self.folder / BEST)

    def _write(self, name: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with staged_file(path) as staging:
                save_file(
                    {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                    staging,
                    metadata={"facts": json.dumps(facts)},
                )
        except (OSError, SafetensorError) as error:
            reason = disk_trouble(error) or str(error)
            raise TransActError(
                f"The training could not be kept in {self.folder}: {reason}; what was kept there "
                "before is whole, and --resume goes on from it."
            ) from None

    def _read(
        self, name: str, only_metadata: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = self.folder / name
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                keys = [] if only_metadata else list(file.keys())
                return {key: file.get_tensor(key) for key in keys}, facts
        except (OSError, SafetensorError, ValueError, KeyError):
            raise TransActError(
                f"{path} is damaged or no kept training; remove the folder and start anew."
            ) from None


@torch.no_grad()
def _put(weights: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, weight in weights.items():
        kept = tensors.get(f"{WEIGHTS}/{name}")
        if kept is None or kept.shape != weight.shape:
            raise TransActError(f"{path} is of another model; remove the folder and start anew.")
        weight.copy_(kept)
