"""What this visitor has written of each cut: its checkpoint folder and its GGUF files."""

from dataclasses import dataclass, field
from pathlib import Path

from pages.server.visits import holding
from transact_core.export.gguf import WrittenFile
from transact_core.export.model_card import add_gguf_to_card
from transact_core.models.llama_cpp import runtime_name


@dataclass
class Written:
    """By the identity of a cut, as `experiments.bench.identity` gives it."""

    folders: dict[tuple, Path] = field(default_factory=dict)
    files: dict[tuple, list[tuple[WrittenFile, float | None]]] = field(default_factory=dict)
    """Each file with its perplexity in llama.cpp; None where that is not installed."""

    def keep_folder(self, identity: tuple, folder: Path) -> None:
        """Notes a folder; its model card names the files that were written before."""
        self.folders[identity] = folder
        self._renew_card(identity)

    def keep_file(self, identity: tuple, file: WrittenFile, perplexity: float | None) -> None:
        """Notes a file, and names it in the model card of the folder that was written before."""
        self.files.setdefault(identity, []).append((file, perplexity))
        self._renew_card(identity)

    def files_of(self, identity: tuple) -> list[Path]:
        """The files of a cut that are still there."""
        return [file.path for file, _ in self.files.get(identity, ()) if file.path.is_file()]

    def _renew_card(self, identity: tuple) -> None:
        folder = self.folders.get(identity)
        measured = [each for each in self.files.get(identity, ()) if each[1] is not None]
        if measured and folder is not None and folder.is_dir():
            add_gguf_to_card(folder, measured, runtime_name())


def written_of() -> Written:
    """What this visitor has written with the model and texts in view."""
    return holding().found.setdefault("written", Written())
