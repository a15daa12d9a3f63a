"""Finished shots of cutting and training by turns, kept on disk, so that a run can go on.

A shot is a folder that appears whole or not at all: what was found, and the model as a checkpoint
in float32, from which the next shot begins with the same bits. Only the last shot's weights are
kept. Beside it is the training under way (`training.state`).
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import TransActError
from transact_core.base.files import read_text, require_disk_space, staged_folder
from transact_core.models.architecture import Architecture
from transact_core.models.checkpoint_folder import read_checkpoint
from transact_core.models.checkpoint_writer import CheckpointWriter
from transact_core.pruning.plan import LayerPlan, PruningPlan, Step
from transact_core.training.loop import Curve, Trained
from transact_core.training.state import Work

RECORD = "shot.json"


@dataclass(frozen=True)
class KeptShot:
    """What was found in a shot."""

    step: Step
    trained: Trained
    plan: PruningPlan
    """Of this shot's cut, in the places of the model before it."""
    left: tuple[LayerPlan, ...]
    """What is left behind it, in the places of the dense model."""

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "KeptShot":
        """From what `keep` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is not that.
        """
        return cls(
            Step.model_validate(stored["step"]),
            Trained(Curve.from_json(stored["curve"]), stored["why"]),
            PruningPlan.model_validate(stored["plan"]),
            tuple(map(LayerPlan.model_validate, stored["left"])),
        )


class KeptShots:
    """The folder of a run, and the shots that are kept there.

    `same` says what must be the same for a run to go on; JSON.
    """

    def __init__(self, folder: Path, same: dict[str, Any]) -> None:
        self.folder = folder
        self.same: dict[str, Any] = json.loads(json.dumps(same))
        """As it is read again, with lists for tuples."""
        self.shots = self._read()

    def training(self, number: int) -> Work:
        """Where the training of a shot is kept while it is under way; shots count from 1."""
        return Work(_training(self.folder, number))

    def model(self, device: torch.device) -> PreTrainedModel:
        """The model behind the last kept shot.

        Raises:
            TransActError: its folder is damaged.
        """
        place = _shot(self.folder, len(self.shots))
        try:
            model = read_checkpoint(place, torch.float32)
        except Exception:
            raise _damaged(place) from None
        return model.to(device).eval().requires_grad_(False)

    def keep(self, shot: KeptShot, model: PreTrainedModel) -> None:
        """Keeps one more shot; its training, and the weights before it, are needed no longer.

        Raises:
            TransActError: the disk is full or failed; what was kept before is still there.
        """
        number = len(self.shots) + 1
        place = _shot(self.folder, number)
        record = {
            "same": self.same,
            "step": shot.step.model_dump(mode="json"),
            "curve": asdict(shot.trained.curve),
            "why": shot.trained.why,
            "plan": shot.plan.model_dump(mode="json"),
            "left": [layer.model_dump(mode="json") for layer in shot.left],
        }
        tensors = model.state_dict()
        require_disk_space(place, sum(4 * tensor.numel() for tensor in tensors.values()))
        with staged_folder(place) as staging:
            writer = CheckpointWriter(staging, torch.float32)
            writer.add_weights(tensors.items(), model)
            writer.finish(model, Architecture.from_model(model))
            (staging / RECORD).write_text(json.dumps(record) + "\n")
        self.shots.append(shot)
        shutil.rmtree(_training(self.folder, number), ignore_errors=True)
        for weights in _shot(self.folder, number - 1).glob("*.safetensors"):
            weights.unlink()

    def _read(self) -> list[KeptShot]:
        """Those that are kept, from the first.

        Raises:
            TransActError: they are of another run, or damaged.
        """
        found = []
        while (path := _shot(self.folder, len(found) + 1) / RECORD).exists():
            try:
                stored = json.loads(read_text(path))
                same, shot = stored["same"], KeptShot.from_json(stored)
            except (OSError, ValueError, TypeError, KeyError):
                raise _damaged(path.parent) from None
            if same != self.same:
                raise TransActError(
                    f"The steps kept in {self.folder} have another model, other texts or other "
                    "settings; go on with the same ones, or remove the folder and start anew."
                )
            found.append(shot)
        return found


def begun(folder: Path) -> bool:
    """Whether anything is kept in the folder of a run, or of a training by `tune`."""
    trainings: Sequence[Path] = [folder, *folder.glob("step-*")]
    return any(folder.glob(f"shot-*/{RECORD}")) or any(Work(each).begun for each in trainings)


def _shot(folder: Path, number: int) -> Path:
    return folder / f"shot-{number}"


def _training(folder: Path, number: int) -> Path:
    return folder / f"step-{number}"


def _damaged(place: Path) -> TransActError:
    return TransActError(f"{place} is damaged; remove the folder {place.parent} and start anew.")
